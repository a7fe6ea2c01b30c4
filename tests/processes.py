"""Processes that run functions of the tests, and waiting for what other processes do."""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import chdir
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ["tests.pruning.test_journal", "tests.pruning.test_kept", "tests.pruning.test_sensitivity"]  # whose functions they run


@cache
def forks() -> ForkServerContext:
    """Processes that begin with these modules imported: forks of a server that has neither threads nor locks, as this process may have."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with chdir(ROOT):  # where the server finds the tests
        forkserver.ensure_running()
    return context


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
