import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import SparsesweepError
from stages.files import replacing, require_free_disk, write_json

ROOT = Path(__file__).parents[1]


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "out"
    with replacing(target) as scratch:
        write_json(scratch / "a.json", {"a": 1})
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_nothing_half_written(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "out") as scratch:
        write_json(scratch / "a.json", {})
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_a_link_into_a_cache_is_never_written_through(tmp_path):
    cached = tmp_path / "cache"
    cached.write_text("precious")
    (tmp_path / "out").mkdir()
    os.link(cached, tmp_path / "out/a.json")
    with replacing(tmp_path / "out") as scratch:
        write_json(scratch / "a.json", {"a": 1})
    assert cached.read_text() == "precious"


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_too_little_room_is_said_with_both_numbers(tmp_path):
    with pytest.raises(SparsesweepError, match=r"free on its disk, wanted 1000000000.00 GB"):
        require_free_disk(tmp_path / "not/there/yet", 10**18)


FILL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from stages.files import replacing
from stages.errors import SparsesweepError
try:
    with replacing(Path(sys.argv[1])) as scratch:
        if sys.argv[2] == "bytes":
            (scratch / "a").write_bytes(bytes(10**6))
        else:
            save_file({"a": torch.zeros(10**6)}, scratch / "a.safetensors")
except SparsesweepError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["bytes", "safetensors"])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path, writer):
    """A file-size limit stands in for the full disk: the write fails in the same place."""
    limit = 100_000
    run = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "out"), writer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "the disk is full" in run.stdout, run.stderr
    assert not any(tmp_path.iterdir())
