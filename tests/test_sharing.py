"""The promise to a team: what one member has computed, another has by one command, bit for bit, and computes only what is new."""

import filecmp
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import project as projects
from tests import servers
from tests.project import Project

POINT = ["exp", "run", "-S", "experiment=tiny"]
NEW_POINT = [*POINT, "-S", "pattern.sparsity=0.25", "--pull", "--allow-missing", "evaluate_sparse"]
READ_BY_A_NEW_POINT = ("artifacts/base", "artifacts/calibration", "artifacts/text", "artifacts/text/evaluation", "artifacts/tasks")
REMOTES = ["directory", "ssh", "s3", "shared cache"]


@dataclass(frozen=True)
class Team:
    """Two clones: one that has run the sweep, and a fresh one. output: what was printed by either."""

    first: Project
    second: Project
    output: list[str]

    def share(self, *arguments: str, fails: bool = False) -> str:
        return self.print(self.first, "share", *arguments, fails=fails)

    def receive(self, *arguments: str, fails: bool = False) -> str:
        return self.print(self.second, "receive", *arguments, fails=fails)

    def print(self, member: Project, module: str, *arguments: str, fails: bool = False) -> str:
        self.output.append(member.run(sys.executable, "-m", f"stages.{module}", *arguments, fails=fails))
        return self.output[-1]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Project:
    """A clone that has run two points, of which the second is not published."""
    made = projects.make(tmp_path_factory.mktemp("sweep"))
    made.run("dvc", *POINT, "-n", "half")
    made.run("dvc", *POINT, "-n", "sparser", "-S", "pattern.sparsity=0.75", "evaluate_sparse")
    return made


def copy_of(project: Project, directory: Path) -> Project:
    """The same clone with an empty origin, and no remote of DVC."""
    shutil.copytree(project.root, directory / "a", symlinks=True)
    copied = Project(directory / "a")
    copied.run("dvc", "remote", "remove", "shared")
    copied.run("git", "init", "-q", "--bare", "-b", "main", str(directory / "origin.git"))
    copied.run("git", "remote", "set-url", "origin", str(directory / "origin.git"))
    return copied


def publish_configuration(project: Project) -> None:
    project.run("git", "commit", "-q", "-m", "Where the team shares", "--allow-empty", ".dvc/config")
    project.run("git", "push", "-q", "origin", "main")


def team_by(remote: str, sweep: Project, directory: Path) -> Iterator[Team]:
    """A team that shares by a remote of a kind."""
    if remote == "shared cache":
        cache = directory / "cache"
        first = copy_of(sweep, directory)
        shutil.copytree(sweep.root / ".dvc/cache", cache)
        shutil.rmtree(first.root / ".dvc/cache")
        publish_configuration(first)
        second = projects.clone(first, directory / "b")
        for member in (first, second):
            member.run("dvc", "config", "--local", "cache.dir", str(cache))
            member.run("dvc", "config", "--local", "cache.shared", "group")
        yield Team(first, second, [])
        return
    if remote == "ssh" and servers.SSHD is None:
        pytest.skip("OpenSSH's server is not installed")
    if remote != "directory" and importlib.util.find_spec(f"dvc_{remote}") is None:
        pytest.skip(f"the extra {remote} is not installed")
    if remote == "s3" and importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    first = copy_of(sweep, directory)
    if remote == "directory":
        (directory / "remote").mkdir()
        yield with_remote(first, directory, servers.Server(url=str(directory / "remote"), settings={}, secrets={}))
    else:
        with servers.ssh(directory) if remote == "ssh" else servers.s3() as server:
            yield with_remote(first, directory, server)


def with_remote(first: Project, directory: Path, server: servers.Server) -> Team:
    first.run("dvc", "remote", "add", "-d", "shared", server.url)
    for name, value in {"verify": "true", **server.settings}.items():
        first.run("dvc", "remote", "modify", "shared", name, value)
    publish_configuration(first)
    second = projects.clone(first, directory / "b")
    for member in (first, second):
        for name, value in server.secrets.items():
            member.run("dvc", "remote", "modify", "--local", "shared", name, value)
    return Team(first, second, [])


@pytest.fixture()
def team(sweep, tmp_path) -> Iterator[Team]:
    """One that shares by a directory."""
    yield from team_by("directory", sweep, tmp_path)


def objects(project: Project) -> set[str]:
    """The hashes of the files in a clone's own cache."""
    return {"".join(path.parts[-2:]) for path in (project.root / ".dvc/cache/files/md5").glob("??/*")}


def hashes(project: Project, outs: tuple[str, ...]) -> set[str]:
    """The hashes of outputs in the lock of a clone, and of the files in them."""
    found = set()
    for stage in yaml.safe_load((project.root / "dvc.lock").read_text())["stages"].values():
        for entry in stage["outs"] + stage.get("deps", []):
            if entry["path"] in outs:
                found.add(entry["md5"])
                listed = project.root / ".dvc/cache/files/md5" / entry["md5"][:2] / entry["md5"][2:]
                if entry["md5"].endswith(".dir") and listed.exists():
                    found |= {file["md5"] for file in json.loads(listed.read_text())}
    return found


def table(output: str) -> list[str]:
    """The rows of experiments in what stages.show prints."""
    return sorted(line for line in output.splitlines() if line.startswith(("half ", "sparser ")))


@pytest.mark.parametrize("remote", REMOTES)
def test_what_one_member_has_computed_another_has(remote, sweep, tmp_path):
    for team in team_by(remote, sweep, tmp_path):
        shared = team.share()
        assert re.search(r"^sent to origin and the .*: 2 experiments \(half, sparser\)", shared, re.M)
        received = team.receive("--release", "half")
        assert re.search(r"^received from origin and the .*: 2 experiments \(half, sparser\)", received, re.M)
        first, second = team.first.root, team.second.root
        assert table(team.print(team.first, "show")) == table(team.print(team.second, "show")) != []
        page = (second / "comparison/index.html").read_text()
        assert "half" in page
        assert "sparser" in page
        names = [path.name for path in (first / "release").iterdir()]
        assert filecmp.cmpfiles(first / "release", second / "release", names, shallow=False) == (names, [], [])
        assert sorted(path.name for path in (second / "release").iterdir()) == sorted(names)
        assert not (second / "artifacts").exists()  # no stage was executed, and no weights were brought but the release's
        before = objects(team.second)
        assert team.second.stages_run(*NEW_POINT) == ["prune", "evaluate_sparse"]
        if remote != "shared cache":
            pulled = (objects(team.second) - before) & objects(team.first)
            allowed = hashes(team.second, (*READ_BY_A_NEW_POINT, "results/dense/metrics.json"))
            assert pulled <= allowed
            assert len(pulled) > 5
        assert "there already: 2 experiments (half, sparser)" in team.share()
