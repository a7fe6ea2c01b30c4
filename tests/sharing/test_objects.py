"""Rehashing a cache."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml
from dvc.utils import dict_sha256

from stages.sharing import objects
from stages.sharing.references import Reference


def put(cache: Path, content: bytes, suffix: str = "") -> tuple[str, Path]:
    """Write a file to the cache as DVC does; its hash and its path."""
    oid = hashlib.md5(content).hexdigest() + suffix
    path = cache / "files/md5" / oid[:2] / oid[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)
    return oid, path


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    path.chmod(0o444)


@pytest.fixture()
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of a project in the current directory, whose lock has a file "metrics.json" and a directory "sparse"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(objects, "of_clone", lambda: [Reference(path="refs/exps/ab/c/half", commit="c")])
    cache = tmp_path / ".dvc/cache"
    metrics, _ = put(cache, b"{}")
    block, _ = put(cache, b"weights")
    directory, _ = put(cache, json.dumps([{"md5": block, "relpath": "block"}]).encode(), ".dir")
    outs = [{"path": "metrics.json", "md5": metrics}, {"path": "sparse", "md5": directory}]
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"prune": {"outs": outs}}}))
    monkeypatch.setattr(objects, "read_lock", lambda commit: {"prune": {"outs": outs[1:]}})
    return cache


def at(cache: Path, content: bytes) -> Path:
    return put(cache, content)[1]


def test_a_sound_cache_has_nothing_damaged(cache):
    found, count, size = objects.damaged(cache)
    assert (found, count) == ([], 3)
    assert size == sum(path.stat().st_size for path in cache.glob("files/md5/??/*"))


def test_a_damaged_file_is_named_with_what_it_belongs_to(cache):
    path = at(cache, b"weights")
    damage(path)
    (one,), _, _ = objects.damaged(cache)
    assert (one.path, one.found) == (path, hashlib.md5(b"damaged").hexdigest())
    assert objects.users(cache, [one]) == {one.oid: ["sparse/block of workspace", "sparse/block of half"]}


def test_a_damaged_list_of_a_directory_is_named_and_not_read(cache):
    (path,) = cache.glob("files/md5/??/*.dir")
    damage(path)
    (one,), _, _ = objects.damaged(cache)
    assert objects.users(cache, [one]) == {one.oid: ["sparse of workspace", "sparse of half"]}


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_was_written_through_a_link_is_dropped_on_both_sides(cache, link):
    path, workspace = at(cache, b"{}"), Path("metrics.json")
    link(path, workspace)
    damage(workspace)
    found, _, _ = objects.damaged(cache)
    assert [one.path for one in found] == [path]
    assert objects.drop(cache, found) == ["metrics.json"]
    assert not path.exists()
    assert not workspace.is_symlink()
    assert not workspace.exists()


def test_a_sound_copy_in_the_workspace_stays(cache):
    Path("metrics.json").write_bytes(b"{}")
    damage(at(cache, b"{}"))
    found, _, _ = objects.damaged(cache)
    assert objects.drop(cache, found) == []
    assert Path("metrics.json").read_bytes() == b"{}"
    assert objects.damaged(cache)[:2] == ([], 2)


def record(cache: Path, text: str) -> Path:
    name = dict_sha256(yaml.safe_load(text), exclude=["size", "nfiles"])
    path = cache / "runs/ab" / ("ab" * 32) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["cmd: b\nouts: [{path: a, md5: e}]\n", "[", "a", "\x00"])
def test_a_record_of_a_run_that_names_another_result_is_damaged(cache, text):
    path = record(cache, "cmd: a\nouts: [{path: a, md5: d, size: 3}]\n")
    assert objects.damaged(cache)[:2] == ([], 4)
    path.write_text(text)
    (one,), _, _ = objects.damaged(cache)
    assert (one.path, one.oid) == (path, path.name)
    assert objects.users(cache, [one]) == {}


def test_a_file_that_cannot_be_read_is_damaged(cache, monkeypatch):
    path = at(cache, b"{}")
    path.unlink()
    path.mkdir()
    (one,), _, _ = objects.damaged(cache)
    assert one.found == "nothing that can be read (Is a directory)"
