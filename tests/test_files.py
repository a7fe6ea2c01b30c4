import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.errors import SparsesweepError
from stages.files import is_inner_path, is_plain_name, read_json, replacing, require_free_disk, scratch_directory, write_json

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


def test_what_was_there_stays_until_what_replaces_it_is_whole(tmp_path):
    target = tmp_path / "out"
    with replacing(target) as scratch:
        write_json(scratch / "a.json", {"a": 1})
    with pytest.raises(KeyError), replacing(target) as scratch:
        write_json(scratch / "b.json", {})
        raise KeyError
    assert [path.name for path in target.iterdir()] == ["a.json"]
    with replacing(target) as scratch:
        write_json(scratch / "b.json", {})
    assert [path.name for path in target.iterdir()] == ["b.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_too_little_free_disk_is_stated_with_both_numbers(tmp_path):
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


# Several runs that write the same output.

WRITE = """
import sys, time
from pathlib import Path
from stages.files import replacing
path, name = Path(sys.argv[1]), sys.argv[2]
with replacing(path) as scratch:
    (scratch / name).write_text(name)
    Path(f"{path}-begun-{name}").touch()
    while len(sys.argv) > 3 and not Path(sys.argv[3]).exists():
        time.sleep(0.01)
"""


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITE, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_run_waits_for_the_first_and_says_so(tmp_path):
    out, go = tmp_path / "out", tmp_path / "go"
    first = start(out, "first", go)
    wait_for((tmp_path / "out-begun-first").exists)
    second = start(out, "second")
    warning = second.stderr.readline()
    assert f"{out}: waiting for another run that writes it (process {first.pid} on " in warning
    assert not (tmp_path / "out-begun-second").exists()
    go.touch()
    for run in (first, second):
        output = run.communicate(timeout=60)
        assert run.returncode == 0, output
    assert [path.name for path in out.iterdir()] == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "out", "out-begun-first", "out-begun-second"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    killed = start(out, "killed", tmp_path / "never")
    wait_for((tmp_path / "out-begun-killed").exists)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert (tmp_path / ".out-scratch").is_dir()
    with replacing(out) as scratch:
        assert not any(scratch.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-begun-killed"]


def test_outputs_whose_names_begin_alike_do_not_wait_for_one_another(tmp_path):
    with replacing(tmp_path / "out") as scratch, replacing(tmp_path / "out-scratch") as other:
        (scratch / "a").touch()
        (other / "b").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "out-scratch").iterdir()] == ["b"]


REPEAT = """
import sys
from pathlib import Path
from stages.files import replacing
for i in range(100):
    with replacing(Path(sys.argv[1])) as scratch:
        (scratch / "a").write_text(sys.argv[2])
        assert (scratch / "a").read_text() == sys.argv[2]
"""


def test_many_runs_one_after_another_leave_one_output_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", REPEAT, str(tmp_path / "out")]
    runs = [subprocess.Popen([*command, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(3)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(SparsesweepError, match=r"out: found no locks on its file system \(.*No locks available\), wanted"),
        replacing(tmp_path / "out"),
    ):
        pass


def test_scratch_is_removed_when_the_work_fails(tmp_path):
    with pytest.raises(KeyError), scratch_directory(tmp_path / "downloads") as scratch:
        assert scratch.parent.parent == tmp_path
        (scratch / "a").touch()
        raise KeyError
    assert not any(tmp_path.iterdir())


# Names and contents.


@pytest.mark.parametrize("name", ["model.safetensors", "LICENSE", "a b", "é.txt", "..a"])
def test_a_plain_name_is_a_file_in_a_directory(name):
    assert is_plain_name(name)
    assert is_inner_path(f"data/{name}")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/a", "../a", "a/", "a//b", "a/../b", "a\\b", "a\nb", "a\0", None, 7])
def test_what_leaves_its_directory_is_no_path_inside_it(name):
    assert not is_plain_name(name)
    assert not is_inner_path(name)


def test_a_file_that_is_missing_unreadable_or_no_json_is_named(tmp_path):
    with pytest.raises(SparsesweepError, match="a.json: not found; has the stage that writes it run"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(SparsesweepError, match="a.json: cannot be read .Is a directory"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(SparsesweepError, match="b.json: not JSON"):
        read_json(tmp_path / "b.json")


def test_json_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(SparsesweepError, match=r"a.json: not JSON \(lists or objects are nested too deeply\)"):
        read_json(tmp_path / "a.json")
