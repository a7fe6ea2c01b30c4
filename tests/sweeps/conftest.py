"""A project whose stages wait, and sweeps in it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from benchmarks import stand_in
from benchmarks.unconfigured import ENVIRONMENT

PATIENCE = 300  # seconds
EXPERIMENTS = re.compile(r"refs/exps/../[0-9a-f]{38}/(\S+)")


@dataclass
class Running:
    """A command in a process group of its own."""

    process: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def finished(self) -> tuple[int, str]:
        """Its exit code and output."""
        return self.process.wait(timeout=PATIENCE), self.output

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something to become true while this command runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, f"waited too long: {self.output}"
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 of this process alone."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@dataclass
class Project:
    """A clone of the project that waits, its git remote and its DVC remote."""

    root: Path
    started: list[Running] = field(default_factory=list)

    @property
    def held(self) -> Path:
        """While it is there, the stage that STAND_IN_HOLDS names does not go on."""
        return self.root.parent / "held"

    def start(self, *command: str, **environment: str) -> Running:
        log = self.root.parent / f"{len(self.started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env={**ENVIRONMENT, "STAND_IN_HELD": str(self.held), **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Running(process, log))
        return self.started[-1]

    def sweep(self, *arguments: str, **environment: str) -> Running:
        return self.start(sys.executable, "-m", "stages.sweep", *arguments, **environment)

    def write(self, name: str, text: str) -> str:
        """A sweep file beside the project."""
        path = self.root.parent / name
        path.write_text(text)
        return str(path)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        return done.stdout

    def experiments(self, *where: str) -> set[str]:
        """The names of those in this clone, or, after "ls-remote", "origin", there."""
        return set(EXPERIMENTS.findall(self.git(*(where or ("for-each-ref", "--format=%(refname)")))))

    def executing(self, stage: str) -> list[psutil.Process]:
        """Processes of a stage of this project's points."""
        return [process for process in psutil.process_iter() if f"stage.py {stage}" in _line(process) and self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.cwd().startswith(str(self.root.parent))
        return False

    def end(self) -> None:
        """End what a test started and left, each by its id."""
        self.held.unlink(missing_ok=True)
        for running in self.started:
            if running.process.poll() is None:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()


def _line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(stand_in.make(tmp_path_factory.mktemp("waits")))
    yield made
    made.end()
