"""The artifact of dvc.yaml, by its version, from another directory: the commands of docs/publish.md on a small stand-in release."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dvc.api
import pytest
import yaml

from tests import project as projects
from tests.project import ROOT

BLOCKS = re.findall(r"```(?:sh|python)\n(.*?)```", (ROOT / "docs/publish.md").read_text().split("## Versions of a release")[1], re.S)
VERSION = "v1.0.0"


def run(directory: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=directory, env=projects.ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Path:
    """A repository on an origin, with a remote. Its lock names a release, is not committed, and git leaves it out as after `make repro`."""
    root = tmp_path_factory.mktemp("team")
    project, origin, remote = root / "project", root / "origin.git", root / "remote"
    project.mkdir()
    for directory in (remote, root / "elsewhere"):
        directory.mkdir()
    run(root, "git", "init", "-q", "--bare", "-b", "main", str(origin))
    run(project, "git", "init", "-q", "-b", "main")
    run(project, "dvc", "init", "-q")
    run(project, "dvc", "remote", "add", "-q", "-d", "shared", str(remote))
    write = "from pathlib import Path; d = Path('release'); d.mkdir(); (d / 'config.json').write_text('{}')"
    stages = {"publish": {"cmd": f'{sys.executable} -c "{write}"', "outs": ["release"]}}
    artifacts = yaml.safe_load((ROOT / "dvc.yaml").read_text())["artifacts"]
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages, "artifacts": artifacts}))
    (project / "params.yaml").write_text("{}\n")
    (project / "dvc.lock").write_text(projects.OWN["dvc.lock"])
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-q", "-m", "The project")
    run(project, "git", "remote", "add", "origin", str(origin))
    run(project, "git", "push", "-q", "origin", "main")
    run(project, "git", "update-index", "--skip-worktree", "dvc.lock")
    run(project, "dvc", "repro", "-q")
    return root


@pytest.fixture(scope="module")
def tagged(team) -> Path:
    """The same, with a version as the page makes it."""
    for line in BLOCKS[0].strip().splitlines():
        run(team / "project", "bash", "-c", line.split("#")[0].strip())
    return team


def there(path: Path) -> bool:
    return (path / "config.json").read_text() == "{}"


def test_the_version_is_a_tag_that_names_the_artifact(tagged):
    assert run(tagged / "project", "git", "tag").split() == [f"pruned@{VERSION}"]
    assert f"refs/tags/pruned@{VERSION}" in run(tagged / "project", "git", "ls-remote", "--tags", "origin")
    shown = dvc.api.artifacts_show("pruned", version=VERSION, repo=str(tagged / "origin.git"))
    assert shown["path"] == "release"
    assert "path: release\n" in run(tagged / "project", "git", "show", f"pruned@{VERSION}:dvc.lock")
    assert shown["rev"] in (f"pruned@{VERSION}", run(tagged / "project", "git", "rev-parse", "HEAD").strip())


@pytest.mark.parametrize("line", [line for line in BLOCKS[1].strip().splitlines() if line.startswith("dvc ")])
def test_the_release_comes_by_each_command_to_a_directory_that_knows_nothing_of_the_project(tagged, line, tmp_path):
    command = line.split("#")[0].strip().replace("URL", str(tagged / "origin.git"))
    run(tmp_path, "bash", "-c", command)
    (got,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert there(got)


def test_the_release_is_read_from_python_as_the_page_says(tagged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, **{key: projects.ENVIRONMENT[key] for key in projects.ENVIRONMENT}})
    exec(BLOCKS[2].replace("URL", str(tagged / "origin.git")), {})
    assert there(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
