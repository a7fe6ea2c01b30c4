"""Run one point in a clone of its own, which any machine can do that has git, this environment and a place for the data.

The clone of a point stays until its experiment has been handed over. So a point that was interrupted, by whatever, goes on where its
stages' journals left off when it is run again on the same machine. This module reads nothing but what it is told, and imports of the
project nothing that imports torch: a cluster is sent the package.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import psutil
from dvc.config import Config

from stages.files import SPARSE_JOURNAL, locked

TAIL = 12  # lines of a log that tell why a point failed
PAUSE = 1.0  # seconds between two looks at what still runs in a clone
AUTHOR = {"user.name": "sweep", "user.email": "sweep@localhost"}  # of experiments, where git knows nobody
PRUNED = "-pruned"  # after the name of a point, of the experiment in its clone that goes no further, and of its log
EVALUATED = "-evaluated"  # after the name of a point, of the log of it and others that are evaluated side by side
BEFORE_EVALUATION = ("prune", "evaluate_dense")
CREDENTIALS = re.compile(r"://[^/@\s]+@")  # in a URL


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker is told.

    name: of the experiment. overrides: for -S of `dvc exp run`. target: the stage up to which it runs. origin: the path or URL of the
    repository that has the revision and gets the experiment. directory: for clones and logs; cache: of DVC; both of this machine, "~" is
    its user's home. configuration: of the clone's config.local, as DVC reads it. share: whether data and run records go to the
    DVC remote, too. threads: of each process. cards: for CUDA_VISIBLE_DEVICES; None: as the machine has it. replaces: the commit that a
    team's origin has of the experiment, "" if none, which this one is to take the place of; None: the origin is the clone of who asked.
    """

    name: str
    overrides: tuple[str, ...]
    target: str
    origin: str
    revision: str
    directory: str
    cache: str
    share: bool
    threads: int
    cards: str | None
    replaces: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a point.

    error: why it failed; None if it did not. stages: those that were executed and not restored. seconds: of wall time.
    """

    name: str
    error: str | None
    stages: tuple[str, ...] = ()
    seconds: float = 0.0


class CommandError(Exception):
    """A command failed; says which, and the end of its output."""


def run(task: Task) -> Outcome:
    """Run a point, hand its experiment to the origin, and remove its clone; what is there already is restored and not computed."""

    def whole(shell: _Shell) -> None:
        _prepare(task, shell)
        _experiment(task, shell)
        _hand_over(task, shell)
        shutil.rmtree(shell.clone)

    return _outcome([task], whole)


def prune(task: Task) -> Outcome:
    """Run a point as far as its pruned model and the dense one's results; its clone stays as DVC left it, and `run` goes on there."""

    def part(shell: _Shell) -> None:
        _prepare(task, shell)
        if not _is_recorded(task, shell):
            name = f"{task.name}{PRUNED}"
            shell.succeeds("git", "update-ref", "-d", reference_of(task, name))  # of an earlier run, after which the workspace was another
            shell(*_dvc(task, name), *BEFORE_EVALUATION)

    return _outcome([task], part, PRUNED)


def evaluate_together(tasks: Sequence[Task]) -> tuple[list[str], Outcome]:
    """Evaluate what `prune` left of several points side by side; the journals of all then have what is found.

    Returns:
        The names of those that were to be evaluated, and what came of it; nothing is done with fewer than two.
    """
    waiting: list[str] = []

    def part(shell: _Shell) -> None:
        clones = [_clone(task) for task in tasks if _clone(task).is_dir() and not _is_recorded(task, replace(shell, clone=_clone(task)))]
        waiting.extend(clone.name for clone in clones)
        if len(clones) > 1:
            replace(shell, clone=clones[0])("python", "-m", "stages.evaluate_together", *map(str, clones))

    outcome = _outcome(tasks, part, EVALUATED)
    return waiting, outcome


def _clone(task: Task) -> Path:
    return Path(task.directory).expanduser().resolve() / task.name


def _outcome(tasks: Sequence[Task], work: Callable[["_Shell"], None], what: str = "") -> Outcome:
    """What comes of work in the first of several points' clones, where nothing else runs in any of them; its log stays if it fails.

    Args:
        what: after the point's name, of the log.
    """
    started, first = time.monotonic(), tasks[0]
    clone = _clone(first)
    log = clone.with_name(f"{first.name}{what}.log")
    clone.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for other in sorted(map(_clone, tasks)):
            stack.enter_context(_alone(other))
        output = stack.enter_context(log.open("w", encoding="utf8"))
        try:
            work(_Shell(clone, output, _environment(first)))
        except CommandError as error:
            return Outcome(name=first.name, error=str(error), stages=_executed(log), seconds=time.monotonic() - started)
        stages = _executed(log)
        log.unlink()
    return Outcome(name=first.name, error=None, stages=stages, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Shell:
    """Runs commands in a clone, their output in a log."""

    clone: Path
    log: TextIO
    environment: dict[str, str]

    def __call__(self, *command: str, cwd: Path | None = None) -> None:
        print(CREDENTIALS.sub("://", f"$ {' '.join(command)}"), file=self.log, flush=True)
        code = subprocess.run(
            command, cwd=cwd or self.clone, env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT
        ).returncode
        if code:
            lines = Path(self.log.name).read_text(encoding="utf8", errors="replace").split("\n$ ")[-1].strip().splitlines()[1:]
            said = "\n".join(line for line in lines[-TAIL:] if line.strip())
            raise CommandError(f"{' '.join(command[:3])} exited with {code}: {said}\nits log: {self.log.name}")

    def says(self, *command: str) -> str:
        """What a command prints; "" if it fails."""
        return subprocess.run(command, cwd=self.clone, env=self.environment, capture_output=True, text=True).stdout

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(command, cwd=self.clone, env=self.environment, capture_output=True).returncode == 0


@contextmanager
def _alone(clone: Path) -> Iterator[None]:
    """Wait until no other worker, and nothing that a killed one left behind, runs in a clone.

    Raises:
        SparsesweepError: the file system has no locks.
    """
    file = clone.with_suffix(clone.suffix + ".lock")
    with locked(file, clone):
        try:
            said = None
            while (processes := _processes_in(clone)) or _is_locked(clone / SPARSE_JOURNAL):
                if processes and processes != said:
                    print(f"waiting for the processes {', '.join(map(str, processes))}, which run in {clone}", file=sys.stderr, flush=True)
                    said = processes
                time.sleep(PAUSE)
            yield
        finally:
            file.unlink(missing_ok=True)  # before the lock is released: who waits for it opens another


def _is_locked(journal: Path) -> bool:
    """Whether an evaluation, in whatever clone, writes in a journal."""
    try:
        descriptor = os.open(journal, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _processes_in(directory: Path) -> list[int]:
    """The processes of this machine whose working directory is a directory, or is in it."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(directory):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def _environment(task: Task) -> dict[str, str]:
    """Of the commands: this interpreter's own programs first, and no more threads and cards than the task has."""
    made = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": str(task.threads),
        "DVC_NO_ANALYTICS": "1",
    }
    if task.cards is not None:
        made["CUDA_VISIBLE_DEVICES"] = task.cards
    return made


def _prepare(task: Task, shell: _Shell) -> None:
    """The revision, checked out in the point's clone; one that an earlier run left goes on being used."""
    clone = shell.clone
    if clone.is_dir():
        shell("git", "remote", "set-url", "origin", task.origin)  # it was another, if the run before was shared and this one is not
        shell("git", "fetch", "-q", "origin")
        if not shell.succeeds("git", "cat-file", "-e", f"{task.revision}^{{commit}}"):  # on no branch, as in a worktree
            shell("git", "fetch", "-q", "origin", task.revision)
    else:
        part = clone.with_suffix(clone.suffix + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shell("git", "clone", "-q", "--no-checkout", task.origin, str(part), cwd=clone.parent)
        part.rename(clone)
    shell("git", "checkout", "-q", "--force", "--detach", task.revision)
    for key, value in AUTHOR.items():
        if not shell.succeeds("git", "config", key):
            shell("git", "config", key, value)
    (clone / ".dvc/config.local").unlink(missing_ok=True)
    with Config(str(clone / ".dvc")).edit("local") as settings:
        settings.update(task.configuration)
        settings["cache"] = {**settings.get("cache", {}), "dir": str(Path(task.cache).expanduser().absolute())}
        settings["exp"] = {**settings.get("exp", {}), "auto_push": False, "git_remote": "origin"}


def _experiment(task: Task, shell: _Shell) -> None:
    """Run the experiment, unless a run that was interrupted afterwards has recorded it."""
    if _is_recorded(task, shell):
        return
    shell(*_dvc(task, task.name), task.target)


def _is_recorded(task: Task, shell: _Shell) -> bool:
    """Whether the clone has the point's experiment."""
    return shell.succeeds("git", "rev-parse", "--quiet", "--verify", reference_of(task))


def _dvc(task: Task, name: str) -> list[str]:
    """The command that runs a point's experiment, by a name, up to the targets that follow."""
    overrides = [argument for override in task.overrides for argument in ("-S", override)]
    return ["dvc", "exp", "run", "--pull", "--allow-missing", "--name", name, *overrides]


def _hand_over(task: Task, shell: _Shell) -> None:
    """Give the experiment to the origin. Where another gave a team's the same point meanwhile, that one stays: both are whole.

    Its files go to the DVC remote first: `dvc exp push` would name them before they are there, and leave it so if sending them failed.
    """
    reference = reference_of(task)
    if task.share:
        shell("git", "checkout", "-q", "--force", "--detach", reference)  # an earlier run may have recorded it
        shell("dvc", "push", "--run-cache")
    force = "--force" if task.replaces is None else f"--force-with-lease={reference}:{task.replaces}"
    try:
        shell("git", "push", "-q", force, "origin", f"{reference}:{reference}")
    except CommandError:
        there = shell.says("git", "ls-remote", "origin", reference).partition("\t")[0]
        if task.replaces is None or there in ("", task.replaces):  # it was not refused for another's sake
            raise


def reference_of(task: Task, name: str | None = None) -> str:
    """Of the point's experiment, or of one of another name in its clone."""
    return f"refs/exps/{task.revision[:2]}/{task.revision[2:]}/{name or task.name}"


def _executed(log: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^Running stage '([^']+)'", log.read_text(encoding="utf8", errors="replace"), re.M))
