"""What goes wrong on real machines, tried: no wrong number enters a result, and the same command completes it afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.files import sha256
from tests import project as projects
from tests.processes import alive, wait_for
from tests.project import ENVIRONMENT, Project

POINT = ["exp", "run", "-S", "experiment=tiny", "-S", "pattern.sparsity=0.5"]
SLOW = [*POINT, "-S", "method=admm", "-S", "calibration.windows=24"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    made = projects.make(tmp_path_factory.mktemp("faults"))
    made.stages_run(*POINT, "-n", "sound")
    return made


def hashes(project: Project) -> dict[str, str]:
    """Of what a run leaves, without what differs from run to run."""
    files = sorted(path for path in (project.root / "artifacts/sparse").rglob("*") if path.is_file())
    return {str(path.relative_to(project.root)): sha256(path) for path in files}


def start(project: Project, *command: str) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=project.root, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of a few megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system is mounted by root alone")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def grow(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=500m", str(directory)], check=True)


def test_a_cache_on_a_full_disk_stops_the_stage_and_records_nothing(project, small_disk, tmp_path):
    clone = projects.clone(project, tmp_path / "b")
    clone.run("dvc", "config", "--local", "cache.dir", str(small_disk))
    said = clone.run("dvc", *POINT, fails=True)
    assert "nothing is recorded: make room, then run the same command again" in said
    stopped = said[said.index("SparsesweepError") :].split("for the results of ")[1].split(",")[0]
    assert stopped not in (clone.root / "dvc.lock").read_text()
    grow(small_disk)
    assert stopped in clone.stages_run(*POINT)
    clone.run("dvc", "status", "-q")
    assert hashes(clone) == hashes(project)


def test_a_remote_on_a_full_disk_is_an_error_and_a_second_push_completes_it(project, small_disk, tmp_path):
    project.run("dvc", "remote", "add", "-f", "--local", "full", str(small_disk / "remote"))
    project.run("dvc", "push", "-r", "full", fails=True)
    grow(small_disk)
    project.run("dvc", "push", "-r", "full")
    shutil.rmtree(project.root / ".dvc/cache/files")
    shutil.rmtree(project.root / "artifacts/sparse")
    project.run("dvc", "pull", "-r", "full")
    assert project.stages_run("repro") == []


def test_a_damaged_object_of_a_remote_is_not_taken(project, tmp_path):
    project.run("dvc", "push")
    remote, lock = project.root.parent / "remote", (project.root / "dvc.lock").read_text()
    entry = next(out for out in outs_of(lock) if out["path"] == "results/sparse/metrics.json")
    (found,) = remote.rglob(f"{entry['md5'][:2]}/{entry['md5'][2:]}")
    sound = found.read_bytes()
    found.chmod(0o644)
    found.write_bytes(sound.replace(b"1", b"2"))
    found.chmod(0o444)
    clone = projects.clone(project, tmp_path / "b")
    (clone.root / "dvc.lock").write_text(lock)
    assert "results/sparse/metrics.json" in clone.run("dvc", "pull", fails=True)
    assert not (clone.root / "results/sparse/metrics.json").exists()
    assert "1 files" in project.run(sys.executable, "-m", "stages.share", "--repair", "sound")
    clone.run("dvc", "pull")
    assert (clone.root / "results/sparse/metrics.json").read_bytes() == sound


def outs_of(lock: str) -> list[dict]:
    return [out for stage in yaml.safe_load(lock)["stages"].values() for out in stage["outs"]]


def test_after_a_kill_of_dvc_its_stage_goes_on_alone_and_a_second_run_is_refused_until_its_end(project):
    """DVC forgets the lock of a process that is gone; the journal's own lock does not."""
    process = start(project, "dvc", *SLOW, "prune")
    journal = project.root / "artifacts/.prune"
    wait_for(lambda: journal.is_dir() and any(journal.glob("block-*")))
    orphans = descendants(process.pid)
    for pid in orphans:
        os.kill(pid, signal.SIGSTOP)  # else it might end before the second run begins
    process.kill()
    process.wait()
    process.stdout.close()  # the stage holds its other end
    try:
        assert "another run" in project.run("dvc", "repro", "prune", fails=True)
    finally:
        for pid in orphans:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not any(map(alive, orphans)))
    project.stages_run(*SLOW, "prune")
    completed = hashes(project)
    project.stages_run("repro", "-f", "-s", "prune")
    assert hashes(project) == completed
    project.stages_run(*POINT)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [found for child in map(int, listed) for found in (child, *descendants(child))]


def test_of_two_runs_at_once_the_second_is_refused(project):
    process = start(project, "dvc", *SLOW, "-S", "calibration.seed=3", "prune")
    wait_for(lambda: (project.root / "artifacts/.prune").is_dir())
    said = project.run("dvc", "repro", "prune", fails=True)
    assert re.search(r"'.*' is busy, it is being blocked by:\s+\(PID \d+\): .*dvc", said)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    project.stages_run(*POINT)


@pytest.mark.parametrize("year", [1985, 2060])
def test_a_clock_that_jumps_makes_no_result_stale_or_fresh(project, year):
    project.stages_run(*POINT)
    moment = (year - 1970) * 31_556_952
    for path in [
        path for top in ("artifacts", "results", "release", "stages") for path in (project.root / top).rglob("*") if path.is_file()
    ]:
        os.utime(path, (moment, moment))
    assert project.stages_run("repro") == []
    metrics = project.root / "results/sparse/metrics.json"
    sound = metrics.read_text()
    other = metrics.with_suffix(".new")  # another inode: what is unlinked and written again can have the same
    other.write_text(sound.replace("1", "2"))
    os.utime(other, (moment, moment))
    other.replace(metrics)
    assert project.changed_stages() >= {"publish"}
    project.stages_run("repro")
    assert json.loads(metrics.read_text()) == json.loads(sound)
