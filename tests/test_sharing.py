"""The promise to a team: what one member has computed, another has by one command, bit for bit, and computes only what is new."""

import contextlib
import filecmp
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import pytest
import yaml

from stages.recipe import fingerprint
from tests import project as projects
from tests import servers
from tests.project import Project

POINT = ["exp", "run", "-S", "experiment=tiny"]
NEW_POINT = [*POINT, "-S", "pattern.sparsity=0.25", "--pull", "--allow-missing", "evaluate_sparse"]
READ_BY_A_NEW_POINT = (
    "artifacts/base",
    "artifacts/calibration",
    "artifacts/statistics",
    "artifacts/text",
    "artifacts/text/evaluation",
    "artifacts/tasks",
    "artifacts/dense",
)
REMOTES = ["directory", "ssh", "s3", "shared cache"]


@dataclass(frozen=True)
class Team:
    """Two clones: one that has run the sweep, and a fresh one. output: what was printed by either. wire: to the remote's server."""

    first: Project
    second: Project
    output: list[str]
    wire: servers.Wire | None = None

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
        for name, value in ({"url": server.url} | server.secrets if server.secrets else {}).items():
            member.run("dvc", "remote", "modify", "--local", "shared", name, value)
    return Team(first, second, [], server.wire)


@pytest.fixture()
def team(sweep, tmp_path) -> Iterator[Team]:
    """One that shares by a directory."""
    yield from team_by("directory", sweep, tmp_path)


def objects(project: Project) -> set[str]:
    """The hashes of the files in a clone's own cache."""
    return {"".join(path.parts[-2:]) for path in (project.root / ".dvc/cache/files/md5").glob("??/*")}


def hashes(project: Project, lock: str, outs: tuple[str, ...] = ()) -> set[str]:
    """The hashes of outputs in a lock, all of them if none is named, and of the files in them; of those that are in the cache."""
    found = set()
    for stage in yaml.safe_load(lock)["stages"].values():
        for entry in stage["outs"] + (stage.get("deps", []) if outs else []):
            if not outs or entry["path"] in outs:
                found.add(entry["md5"])
                listed = project.root / ".dvc/cache/files/md5" / entry["md5"][:2] / entry["md5"][2:]
                if entry["md5"].endswith(".dir") and listed.exists():
                    found |= {file["md5"] for file in json.loads(listed.read_text())}
    return found


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


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
        page = (second / "comparison/index.html").read_text()
        assert "half" in page
        assert "sparser" in page
        names = [path.name for path in (first / "release").iterdir()]
        assert filecmp.cmpfiles(first / "release", second / "release", names, shallow=False) == (names, [], [])
        assert sorted(path.name for path in (second / "release").iterdir()) == sorted(names)
        if remote != "shared cache":  # where what is in the cache is linked
            assert files_in(second / "artifacts") == set()  # no stage was executed, and no weights were brought but the release's
        before = objects(team.second)
        assert team.second.stages_run(*NEW_POINT) == ["prune", "evaluate_sparse"]
        if remote != "shared cache":
            pulled = (objects(team.second) - before) & objects(team.first)
            allowed = hashes(team.second, (team.second.root / "dvc.lock").read_text(), (*READ_BY_A_NEW_POINT, "results/dense/metrics.json"))
            assert pulled <= allowed
            assert len(pulled) > 5


def test_the_numbers_are_the_same_and_nothing_is_sent_twice(team):
    team.share()
    team.receive()
    assert table(team.print(team.first, "show")) == table(team.print(team.second, "show")) != []
    assert re.search(r"^sent to .*: 0 experiments, 0 files, .*\nthere already: 2 experiments \(half, sparser\)", team.share(), re.M)
    assert re.search(
        r"^received from .*: 0 experiments, 0 files, .*\nhere already: 2 experiments", team.receive("--apply", "sparser"), re.M
    )
    assert numbers(team.second) == numbers(team.first)
    assert not (team.second.root / "release").exists()
    with (team.second.root / "params.yaml").open("a") as file:
        file.write("# mine\n")
    output = team.receive("--apply", "half", fails=True)
    assert "error: params.yaml, dvc.lock: found changes that no experiment has, wanted none that would be lost" in output


def test_a_member_without_a_shared_experiment_is_told(team):
    assert "error: found no experiment on origin, wanted one that was shared: `make share`" in team.receive(fails=True)
    assert "error: found no evaluated experiment, wanted one to share" in team.print(team.second, "share", fails=True)
    assert "error: experiment 'absent': not found, wanted one of half, sparser" in team.share("absent", fails=True)


def test_a_release_that_another_run_left_is_not_taken_for_the_experiments_own(team):
    team.share("sparser")
    output = team.receive("--release", "sparser", fails=True)
    assert "error: sparser: found no release of it, wanted one (publish read another artifacts/sparse than prune wrote)" in output
    assert not (team.second.root / "release").exists()
    assert "error: found no experiment half on origin, wanted one of sparser" in team.receive("half", fails=True)


# Nothing wrong is picked up.


def numbers(project: Project) -> dict:
    """What was scored in the workspace; without seconds and memory, which differ from run to run."""
    return json.loads((project.root / "results/sparse/metrics.json").read_text())


def require_of_one_run(project: Project) -> None:
    """The scores in the workspace are of the delta there."""
    manifest = json.loads((project.root / "artifacts/sparse/delta.json").read_text())
    protocol = json.loads((project.root / "results/sparse/details/protocol.json").read_text())
    assert protocol["delta"] == fingerprint(manifest["recipe"], manifest["shards"])


def test_a_point_that_was_run_twice_is_shared_twice_and_computed_by_nobody_else(team):
    point = [*POINT, "-S", "pattern.sparsity=0.75"]
    team.first.run("dvc", *point, "-n", "again", "--force", "--single-item", "prune")
    team.first.run("dvc", *point, "-n", "again_scored", "--force", "--single-item", "evaluate_sparse")
    before = numbers(team.first)
    team.share()
    assert "again_scored" in team.receive()
    assert team.second.stages_run(*point, "--pull", "--allow-missing", "evaluate_sparse") == []
    assert numbers(team.second) == before
    require_of_one_run(team.second)


def test_another_experiment_of_the_same_name_replaces_none(team):
    """Two members call different points "mine": each is told, each keeps its own, and the others' arrive."""
    assert team.first.stages_run(*POINT, "-S", "pattern.sparsity=0.75", "-n", "mine", "evaluate_sparse") == []
    team.share()
    team.second.run("dvc", *NEW_POINT, "-n", "mine")
    before = commit_of(team.second, "mine")
    output = team.print(team.second, "share", fails=True)
    assert "error: mine: found another experiment of this name on origin, wanted none or the same: `dvc exp rename mine NEW_NAME`" in output
    output = team.receive(fails=True)
    assert "2 experiments (half, sparser)" in output
    assert "error: mine: found another experiment of this name here than on origin" in output
    assert commit_of(team.second, "mine") == before
    team.second.run("dvc", "exp", "rename", "mine", "quarter")
    assert "1 experiment (quarter)" in team.print(team.second, "share", "quarter")
    assert "1 experiment (mine)" in team.receive()
    assert commit_of(team.second, "mine") == commit_of(team.first, "mine") != before


def test_results_of_another_version_of_torch_are_not_taken(team):
    team.share()
    team.receive()
    other = [*POINT, "-S", "environment.torch=9.9.9", "--pull", "--allow-missing", "evaluate_sparse"]
    output = team.second.run("dvc", *other, fails=True)
    assert "Stage 'sample' is cached" in output
    assert re.search(r"environment.torch: found '\d.*', wanted 9.9.9", output)
    assert "Stage 'prune' is cached" not in output
    assert files_in(team.second.root / "results/sparse") | files_in(team.second.root / "results/prune") == set()


# What is damaged or cleaned away comes again.


def test_a_file_that_was_written_through_a_link_is_found_and_comes_again(team):
    team.share()
    metrics = team.first.root / "results/prune/metrics.json"
    before = metrics.read_bytes()
    team.first.run("dvc", "checkout", "--relink", "results/prune/metrics.json")
    metrics.chmod(0o644)
    with metrics.open("r+b") as file:
        file.write(before.replace(b"0.7", b"0.8"))
    metrics.chmod(0o444)
    output = team.print(team.first, "verify_cache", fails=True)
    assert "results/prune/metrics.json of workspace, results/prune/metrics.json of sparser" in output
    assert re.search(r"error: .*/\.dvc/cache: found 1 file damaged, wanted none; `python -m stages.verify_cache --drop`", output)
    output = team.print(team.first, "verify_cache", "--drop")
    assert "removed 1 file of the cache, and of the workspace: results/prune/metrics.json" in output
    team.first.run("dvc", "pull", "results/prune/metrics.json")
    assert metrics.read_bytes() == before
    assert ": 0 damaged" in team.print(team.first, "verify_cache")


def commit_of(project: Project, name: str) -> str:
    return project.run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").strip()


def test_a_file_that_is_damaged_on_the_remote_is_not_taken(team):
    team.share()
    lock = yaml.safe_load(team.first.run("git", "show", f"{commit_of(team.first, 'half')}:dvc.lock"))
    (oid,) = [entry["md5"] for entry in lock["stages"]["evaluate_sparse"]["outs"] if entry["path"] == "results/sparse/metrics.json"]
    stored = team.first.root.with_name("remote") / "files/md5" / oid[:2] / oid[2:]
    sound = stored.read_bytes()
    damage(stored)
    output = team.receive(fails=True)
    assert re.search(rf"error: half: found that 1 of \d+ files did not come \({oid}\), wanted all; on the remote they are damaged", output)
    assert oid not in objects(team.second)
    assert "there already: 2 experiments" in team.share()  # of the same size
    assert ": 0 experiments, 1 files, " in team.share("--repair")
    assert stored.read_bytes() == sound
    assert stored.stat().st_mode & 0o777 == 0o444
    assert "error" not in team.receive()
    assert (team.second.root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]).read_bytes() == sound


@pytest.mark.parametrize("remote", REMOTES[:3])
def test_what_is_cut_short_or_deleted_on_the_remote_is_sent_again(remote, sweep, tmp_path):
    """A file whose directory's list is there, too: DVC's own push takes it to be there."""
    for team in team_by(remote, sweep, tmp_path):
        team.share()
        cut, deleted = (object_of(team.first, f"artifacts/base/{name}") for name in ("config.json", "tokenizer.json"))
        lines = [
            "from dvc.repo import Repo",
            "remote = Repo().cloud.get_remote_odb()",
            f"remote.delete('{deleted}')",
            f"remote.delete('{cut}')",
            f"remote.fs.pipe_file(remote.oid_to_path('{cut}'), b'cut')",
        ]
        team.first.run(sys.executable, "-c", "; ".join(lines))
        assert ": 0 experiments, 2 files, " in team.share()
        assert ": 0 experiments, 0 files, " in team.share("--repair")


@pytest.mark.parametrize("remote", ["ssh", "s3"])
def test_a_server_that_dies_in_the_middle_of_a_push_has_no_experiment_and_the_same_command_sends_the_rest(
    remote, sweep, tmp_path, monkeypatch
):
    monkeypatch.setitem(projects.ENVIRONMENT, "AWS_MAX_ATTEMPTS", "1")  # else its client tries again for minutes
    size = sum(path.stat().st_size for path in (sweep.root / ".dvc/cache/files/md5").rglob("*") if path.is_file())
    for team in team_by(remote, sweep, tmp_path):
        team.wire.limit = team.wire.passed + size // 2
        assert "error: " in team.share(fails=True)
        assert team.wire.broken
        team.wire.mend()
        assert "error: found no experiment on origin" in team.receive(fails=True)
        assert ": 2 experiments (half, sparser)" in team.share()
        assert ": 0 experiments, 0 files, " in team.share("--repair")  # none that came is half there
        assert ": 2 experiments (half, sparser)" in team.receive()


def object_of(project: Project, path: str) -> str:
    """The hash of a file that the workspace has."""
    return hashlib.md5((project.root / path).read_bytes(), usedforsecurity=False).hexdigest()


def test_a_file_that_is_damaged_in_the_cache_is_not_sent(team):
    oid = object_of(team.first, "artifacts/sparse/delta.json")
    stored = team.first.root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]
    sound = stored.read_bytes()
    damage(stored)
    output = team.share(fails=True)
    assert f"error: found 1 files damaged in the cache ({oid}), wanted to send sound ones; `make verify-cache`" in output
    remote = team.first.root.with_name("remote") / "files/md5" / oid[:2] / oid[2:]
    assert not remote.exists()
    assert team.first.run("git", "ls-remote", "origin", "refs/exps/*") == ""
    stored.chmod(0o644)
    stored.write_bytes(sound)
    stored.chmod(0o444)
    team.share()
    assert remote.read_bytes() == sound
    damage(remote)
    stored.unlink()
    output = team.share("--repair", "sparser", fails=True)
    assert f"error: found 1 files damaged on the remote, and not here ({oid}), wanted all sound; a member who has them" in output


def damage(stored: Path) -> None:
    """Change a file of a cache or remote as a disk does: neither its size nor its mode."""
    before = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(before.replace(b"1", b"2"))
    stored.chmod(0o444)
    assert stored.read_bytes() != before


def test_run_records_that_were_not_sent_are_an_error_and_sent_the_next_time(team):
    runs = team.first.root.with_name("remote") / "runs"
    runs.write_text("DVC logs that it cannot write below a file, and goes on")
    assert re.search(r"error: found that \d+ run records were not sent \(.*\), wanted all; share again", team.share(fails=True))
    assert team.first.run("git", "ls-remote", "origin", "refs/exps/*") == ""
    runs.unlink()
    team.share()
    assert files_in(runs) == files_in(team.first.root / ".dvc/cache/runs") != set()


def test_what_no_experiment_names_is_cleaned_away_and_no_more(team):
    """`dvc gc` by all experiments keeps them; by the workspace it loses them, and they come from the remote again."""
    team.share()
    every = objects(team.first)
    team.first.run("dvc", "gc", "--force", "--all-commits", "--all-experiments")
    assert objects(team.first) == every
    team.first.run("dvc", "gc", "--force", "--workspace")
    assert objects(team.first) < every
    team.print(team.first, "receive", "--release", "half")
    assert (team.first.root / "release/README.md").is_file()


def test_a_remote_is_cleaned_by_a_clone_that_has_received_everything(team):
    """One that has not received an experiment removes its files; the member who has them sends them again."""
    remote = team.first.root.with_name("remote") / "files/md5"
    clean = ["dvc", "gc", "--force", "--cloud", "--all-commits", "--all-experiments"]
    team.share()
    every = files_in(remote)
    team.receive()
    team.second.run(*clean)
    assert files_in(remote) == every
    team.second.run("dvc", "exp", "remove", "sparser")
    team.second.run(*clean)
    assert files_in(remote) < every
    team.share()
    assert files_in(remote) == every


def test_in_a_shared_cache_the_clones_whose_files_stay_are_named(sweep, tmp_path):
    for team in team_by("shared cache", sweep, tmp_path):
        cache, clean = tmp_path / "cache/files/md5", ["dvc", "gc", "--force", "--all-commits", "--all-experiments"]
        every = files_in(cache)
        team.second.run(*clean, "--projects", str(team.first.root))
        assert files_in(cache) == every
        team.second.run(*clean)
        assert files_in(cache) == set()


# No secret leaves config.local or the environment.


def test_no_secret_reaches_git_or_what_is_written(sweep, tmp_path, monkeypatch):
    secrets = {name: token_hex() for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for team in team_by("s3", sweep, tmp_path):
        local = team.second.root / ".dvc/config.local"
        local.unlink()  # the second member's are in the environment
        for name, value in secrets.items():
            monkeypatch.setitem(projects.ENVIRONMENT, name, value)
        team.output.append(team.first.run("dvc", *POINT, "-n", "third", "-S", "pattern.sparsity=0.3"))
        team.share()
        team.receive("--release", "third")
        team.print(team.first, "show", "--commands")
        kept = (team.first.root / ".dvc/config.local").read_text()
        hidden = [*secrets.values(), *re.findall(r"(?:access_key_id|secret_access_key) = (\S+)", kept)]
        assert len(hidden) == 5
        assert (team.second.root / "release/README.md").is_file()
        for where, content in everything(team):
            assert [secret for secret in hidden if secret.encode() in content] == [], where


def everything(team: Team) -> Iterator[tuple[str, bytes]]:
    """All files of both clones but config.local, all objects of git's, and all that was printed."""
    yield "output", "".join(team.output).encode()
    for member in (team.first, team.second, Project(team.first.root.with_name("origin.git"))):
        yield f"git's objects in {member.root}", git_objects(member)
        for path in member.root.rglob("*"):
            if path.is_file() and path.name != "config.local":
                yield str(path), path.read_bytes()


def git_objects(project: Project) -> bytes:
    command = ["git", "cat-file", "--batch-all-objects", "--batch"]
    return subprocess.run(command, cwd=project.root, env=projects.ENVIRONMENT, capture_output=True, check=True).stdout


# Disk.


def test_a_point_of_a_mask_only_method_adds_its_mask_and_small_records(sweep):
    """One bit for each weight: ten sparsities of a model in bfloat16 add at most 10/16 of its matrices, and no copy of them."""
    half, sparser = (hashes(sweep, sweep.run("git", "show", f"{commit_of(sweep, name)}:dvc.lock")) for name in ("half", "sparser"))
    cache = sweep.root / ".dvc/cache/files/md5"
    added = sum((cache / oid[:2] / oid[2:]).stat().st_size for oid in sparser - half)
    size = numbers(sweep)["size"]["matrices"]
    assert size["mask_bytes"] <= size["dense_bytes"] / 16
    assert size["mask_bytes"] < size["delta_bytes"] < added < size["mask_bytes"] + 150_000


def test_a_worker_of_the_queue_links_the_base_and_copies_it_not(team):
    command = ["dvc", *POINT, "--temp", "-S", "pattern.sparsity=0.2", "prune"]
    worker = subprocess.Popen(command, cwd=team.first.root, env=projects.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    linked: dict[str, bool] = {}
    while worker.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # the worker's directory goes when it has done
            for path in (team.first.root / ".dvc/tmp/exps").glob("**/artifacts/base/*.safetensors"):
                linked[path.name] = path.is_symlink() or path.stat().st_nlink > 1
    assert worker.returncode == 0
    assert linked.keys() == {path.name for path in (team.first.root / "artifacts/base").glob("*.safetensors")}
    assert all(linked.values())
