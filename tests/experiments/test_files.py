"""Files of a revision: from the cache by the lock, from git, and from DVC where neither has them."""

import json
import subprocess
import sys
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stages.errors import SparsesweepError
from stages.experiments import files as module
from stages.experiments.files import Files, Unreadable, cache_directory
from stages.experiments.lock import OUTPUTS
from tests.project import ENVIRONMENT

LOCKED, LISTED, ABSENT = Path("results/a.json"), Path("results/details/rows.jsonl"), Path("results/details/absent.json")


@pytest.fixture()
def project(tmp_path, monkeypatch) -> tuple[str, Path]:
    """A commit whose lock names a file and a directory, both in the cache alone; and the cache."""
    monkeypatch.chdir(tmp_path)
    run(["git", "init", "-q"], ["dvc", "init", "-q"])
    cache = cache_directory()
    rows = stored(cache, b'{"row": 0}\n{"row": 1}\n')
    listing = stored(cache, json.dumps([{"md5": rows, "relpath": LISTED.name}]).encode(), ".dir")
    outs = [{"path": str(LOCKED), "md5": stored(cache, b'{"a": 1}')}, {"path": str(LISTED.parent), "md5": listing}]
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"s": {"cmd": "c", "outs": outs}}}))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"s": {"cmd": "c", "outs": [str(LOCKED), str(LISTED.parent)]}}}))
    Path("tracked.json").write_text("[1]")
    run(["git", "add", "-A"], ["git", "commit", "-q", "-m", "A lock"])
    done = subprocess.run(["git", "rev-parse", "HEAD"], env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip(), cache


def run(*commands: list[str]) -> None:
    for command in commands:
        subprocess.run(command, env=ENVIRONMENT, check=True)


def stored(cache: Path, content: bytes, suffix: str = "") -> str:
    """Content in a cache; its hash."""
    digest = md5(content).hexdigest() + suffix
    path = module.object_of(cache, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return digest


def test_what_the_cache_has_is_read_without_dvc(project, monkeypatch):
    monkeypatch.setattr(module, "DVCFileSystem", lambda rev: pytest.fail("asked DVC"))
    files = Files(*project)
    assert files.json(LOCKED) == {"a": 1}
    assert files.lines(LISTED) == [{"row": 0}, {"row": 1}]
    assert [files.has(path) for path in (LOCKED, LISTED, ABSENT, Path("tracked.json"), Path("absent"))] == [True, True, False, True, False]


def test_what_the_cache_lacks_is_read_by_dvc(project):
    assert Files(*project).json(Path("tracked.json")) == [1]
    revision, cache = project
    for path in (cache / OUTPUTS).glob("*/*"):
        path.unlink()
    files = Files(revision, cache)
    for path in (LOCKED, LISTED):
        with pytest.raises(Unreadable, match=f"{path} is not there .*; `make receive` brings it, or evaluating it again writes it"):
            files.text(path)
    assert not files.has(LISTED)


def test_the_workspace_is_read_as_it_is(project):
    LOCKED.parent.mkdir()
    LOCKED.write_text("{")
    files = Files(None, project[1])
    with pytest.raises(Unreadable, match="results/a.json: not JSON"):
        files.json(LOCKED)
    assert files.has(LOCKED)
    assert not files.has(Path("absent"))


def test_a_directory_that_is_no_project_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SparsesweepError, match="not inside of a DVC repository"):
        cache_directory()


def test_why_a_revision_from_before_the_remote_cannot_be_read_is_said_with_the_way_out():
    advice = "config file error: expected 'url'; a remote was set after it ran: `dvc remote modify --local REMOTE url URL` repeats"
    assert module._reason("config file error: expected 'url'").startswith(advice)
    assert module._reason("broken") == "broken"


def test_a_list_that_was_cut_short_leaves_its_experiment_out(project):
    revision, cache = project
    digest = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["s"]["outs"][1]["md5"]
    module.object_of(cache, digest).write_bytes(b'[{"md5": ')
    with pytest.raises(Unreadable, match="not JSON"):
        Files(revision, cache).json(LISTED)


def test_a_remote_that_refuses_is_a_reason(project, monkeypatch):
    class Refused(Exception):
        pass

    class FileSystem:
        def __init__(self, rev: str) -> None:
            pass

        def read_text(self, *_: object, **__: object) -> str:
            raise Refused("no credentials")

    monkeypatch.setattr(module, "DVCFileSystem", FileSystem)
    monkeypatch.setitem(sys.modules, "asyncssh", SimpleNamespace(Error=Refused))
    with pytest.raises(Unreadable, match="no credentials"):
        Files(*project).json(Path("absent.json"))
