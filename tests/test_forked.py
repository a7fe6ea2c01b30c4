"""Commands that are forks end as commands of their own do."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests import forked, project
from tests.processes import alive, wait_for
from tests.project import ROOT

PROBE = "tests.probe"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(project.commands() / "python"), "-m", PROBE, *arguments]
    given = {**project.ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)


def is_fork(done: subprocess.CompletedProcess) -> bool:
    return "forked.py" in done.stdout.splitlines()[0]


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("words", 1), ("error", 1), ("kill", -signal.SIGKILL)])
def test_a_fork_ends_as_a_process_does(end, code):
    done = run(end, SOME="thing")
    real = subprocess.run(
        [sys.executable, "-m", PROBE, end],
        env={**project.ENVIRONMENT, "PYTHONPATH": str(ROOT), "SOME": "thing"},
        capture_output=True,
        text=True,
    )
    assert is_fork(done) and not is_fork(real)
    assert done.returncode == real.returncode == code
    assert done.stdout.splitlines()[1:] == real.stdout.splitlines()[1:]
    assert done.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_where_imports_read_other_variables_the_command_is_a_process_of_its_own():
    assert not is_fork(run("0", OMP_NUM_THREADS="2"))
    assert not is_fork(run("0", PYTHONHASHSEED="7"))
    assert is_fork(run("0", HF_HUB_DISABLE_PROGRESS_BARS="1"))


def test_what_no_one_waits_for_ends_with_what_it_has_started(tmp_path):
    command = [str(project.commands() / "python"), "-m", PROBE, "wait", str(tmp_path)]
    process = subprocess.Popen(command, env={**project.ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    pids = tmp_path / "pids"
    wait_for(pids.is_file)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, map(int, pids.read_text().split()))))


def test_a_fork_that_is_lost_is_an_error_and_the_command_does_not_run_again(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        source = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from forked import command; "
        source += f"command({str(tmp_path / 'socket')!r}, '/bin/false', {PROBE!r})"
        process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True, env=os.environ)
        listener.accept()[0].close()
        assert "lost" in process.communicate(timeout=60)[1]
        assert process.returncode == forked.LOST
