import shutil
from types import SimpleNamespace

import pytest

from stages.config.caching import cache_directory, require_room_in_cache
from stages.errors import SparsesweepError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with a stage that wrote 1300 bytes."""
    (tmp_path / "dvc.yaml").write_text("stages: {prune: {cmd: run, outs: [sparse, a.json], metrics: [metrics.json]}, other: {cmd: run}}\n")
    (tmp_path / "sparse/inner").mkdir(parents=True)
    for name, size in (("sparse/inner/masks", 1000), ("a.json", 200), ("metrics.json", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "prune")
    return tmp_path


def free(monkeypatch, size: int) -> list:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=size))
    return asked


def test_a_cache_without_room_for_the_results_is_refused(root, monkeypatch):
    free(monkeypatch, 1299)
    with pytest.raises(
        SparsesweepError,
        match=r"\.dvc/cache: found 0.00 GB free on its disk, wanted 0.00 GB for the results of prune, .* nothing is recorded",
    ):
        require_room_in_cache()
    free(monkeypatch, 1300)
    require_room_in_cache()


def test_a_stage_run_by_hand_or_without_results_asks_for_no_room(root, monkeypatch):
    free(monkeypatch, 0)
    monkeypatch.setenv("DVC_STAGE", "other")
    require_room_in_cache()
    monkeypatch.delenv("DVC_STAGE")
    require_room_in_cache()


def test_the_cache_is_where_the_configuration_says(root, monkeypatch, tmp_path):
    assert cache_directory(root) == root / ".dvc/cache"
    (root / ".dvc/config").write_text(
        "[core]\n    remote = a%b\n['remote \"a%b\"']\n    url = x\n[cache]\n    dir = ../shared\n    type = copy\n"
    )
    assert cache_directory(root).resolve() == root / "shared"
    (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'own'}\n")
    assert cache_directory(root) == tmp_path / "own"
    (tmp_path / "own").mkdir()
    asked = free(monkeypatch, 10**6)
    require_room_in_cache()
    assert asked == [tmp_path / "own"]
