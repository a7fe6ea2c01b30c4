"""What no input may do, whatever reads it: hang, take memory beyond a bound, end without a message, write outside, run code, tell a secret.

A case runs in a directory of its own. An audit hook of Python sees the files that are opened for writing, moved or removed, the processes
that are started, the addresses that are connected to and the code that is executed; the kernel counts the memory.
"""

import contextlib
import io
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzz.mutations import Files
from stages.errors import LONGEST_MESSAGE, SparsesweepError

DEADLINE = 20.0  # seconds of a case; most take milliseconds, and machines are busy
ADDRESSES = 4 * 2**30  # bytes by which the address space of a case may grow: allocations that are never touched
SECRETS = {"HF_TOKEN": "hf_fuzzTokenThatNobodyMayPrint0000000", "AWS_SECRET_ACCESS_KEY": "fuzzSecretKeyThatNobodyMayPrint"}
LOGGERS = (None, "transformers", "huggingface_hub", "datasets", "lm_eval")  # None: the root; the others keep what they log from it
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.chmod": 1, "os.truncate": 1}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pickle.find_class")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Fault(Exception):
    """An input for which a property does not hold."""


class _Stopped(BaseException):
    """What ends a case that hangs or does what it must not; no `except Exception` holds it."""


@dataclass(kw_only=True)
class Outcome:
    """How a case ended. seconds: wall time. peak: bytes by which resident memory grew at most. message: why it was refused, or None."""

    seconds: float
    peak: int
    message: str | None


@dataclass(kw_only=True)
class Guard:
    """Runs cases below a directory of its own.

    forbidden: what the case that runs now did and must not. warm: whether a case ran already: the first runs once before, unwatched, since
        libraries are imported, make their caches and take their memory when they are first used.
    """

    root: Path
    forbidden: list[str] = field(default_factory=list)
    warm: bool = False

    @property
    def directory(self) -> Path:
        """That of a case, which is the current one while it runs."""
        return self.root / "case"

    def run(self, files: Files, read: Callable[[], object], *, names: tuple[str, ...], memory: int) -> Outcome:
        """Write the files of a case, read them, and check every property.

        Args:
            names: one of them stands in the message of a refusal. memory: bound on its growth in bytes.

        Raises:
            Fault: a property does not hold; says which.
        """
        self._write(files)
        if not self.warm:
            with chdir(self.directory), _captured(io.StringIO()), contextlib.suppress(Exception):
                read()
            self._write(files)
            self.warm = True
        self.forbidden.clear()
        error, printed, outcome = self._run(read)
        self._check(error, printed, names)
        if outcome.peak > memory:
            raise Fault(f"memory grew by {outcome.peak / 2**20:.0f} MiB, wanted at most {memory / 2**20:.0f} MiB")
        return outcome

    def _write(self, files: Files) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _run(self, read: Callable[[], object]) -> tuple[BaseException | None, str, Outcome]:
        error: BaseException | None = None
        output = io.StringIO()
        with chdir(self.directory), _captured(output), _deadline():
            before, started = _memory_from_now(), time.perf_counter()
            with _addresses(), _watched(self):
                try:
                    read()
                except (Exception, _Stopped) as raised:  # noqa: BLE001 -- which it is, is what is checked
                    error = raised
            seconds, peak = time.perf_counter() - started, _memory("VmHWM") - before
        message = None if error is None else str(error)
        return error, output.getvalue(), Outcome(seconds=seconds, peak=peak, message=message)

    def _check(self, error: BaseException | None, printed: str, names: tuple[str, ...]) -> None:
        if self.forbidden:
            raise Fault("; ".join(self.forbidden))
        if sorted(path.name for path in self.root.iterdir()) != ["case"]:
            raise Fault(f"found {sorted(path.name for path in self.root.iterdir())} beside the directory of the case")
        if error is not None and not isinstance(error, SparsesweepError):
            raise Fault(f"{where(error)}: {type(error).__name__}: {str(error)[:200]}") from error
        if error is not None and not any(name in str(error) for name in names):
            raise Fault(f"{where(error)}: the message names none of {', '.join(names)}: {str(error)[:200]}") from error
        if len(str(error or "")) > LONGEST_MESSAGE + 1:
            raise Fault(f"{where(error)}: a message of {len(str(error))} characters: {str(error)[:100]}") from error
        told = "".join(traceback.format_exception(error)) + printed if error is not None else printed
        written = b"".join(path.read_bytes() for path in self.directory.rglob("*") if path.is_file() and not path.is_symlink())
        if secret := next((name for name, value in SECRETS.items() if value in told or value.encode() in written), None):
            raise Fault(f"{secret} was printed or written")


def where(error: BaseException | None) -> str:
    """The last line of this project that an error passed."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__ if error else None) if f"{os.sep}stages{os.sep}" in frame.filename
    ]
    return f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "nowhere in stages"


@contextmanager
def prepared(root: Path) -> Iterator[Guard]:
    """A guard below an empty directory, with secrets in the environment."""
    guard, before = Guard(root=root / "cases"), {name: os.environ.get(name) for name in SECRETS}
    guard.root.mkdir()
    os.environ |= SECRETS
    _install_hook()
    try:
        yield guard
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# What Python tells of.

_WATCHING: list[Guard] = []  # the guard of the case that runs now
_INSTALLED: list[bool] = []


def _install_hook() -> None:
    """An audit hook stays for ever; so there is one, which looks only while a case runs."""
    if not _INSTALLED:
        _INSTALLED.append(True)
        sys.addaudithook(_audit)


@contextmanager
def _watched(guard: Guard) -> Iterator[None]:
    _WATCHING.append(guard)
    try:
        yield
    finally:
        _WATCHING.clear()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHING:
        return
    guard, found = _WATCHING[0], None
    if event == "open" and _writes(arguments[1], arguments[2]) and not _is_inside(arguments[0], guard):
        found = f"opened {arguments[0]!r} for writing"
    elif event in CHANGES:
        outside = [path for path in arguments[: CHANGES[event]] if not _is_inside(path, guard)]
        found = f"{event} of {outside}" if outside else None
    elif event in STARTS:
        found = f"{event} {arguments[0]!r}"
    elif event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in LOOPBACK:
        found = f"connected to {arguments[1][0]}"
    elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(str(guard.root)):
        found = f"executed {arguments[0].co_filename}"
    if found is not None:
        guard.forbidden.append(found)
        raise _Stopped(found)


def _writes(mode: object, flags: object) -> bool:
    return bool(set(str(mode)) & set("wax+")) if isinstance(mode, str) else isinstance(flags, int) and bool(flags & WRITING)


def _is_inside(path: object, guard: Guard) -> bool:
    if isinstance(path, int):  # a file that is open already
        return True
    absolute = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]  # noqa: PTH100 -- follows no links, asks no disk
    return absolute == os.devnull or absolute == str(guard.directory) or absolute.startswith(f"{guard.directory}{os.sep}")


# What is captured and measured.


@contextmanager
def _captured(output: io.StringIO) -> Iterator[None]:
    """Take what is printed and logged; warnings are left out."""
    handler, loggers = logging.StreamHandler(output), [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextmanager
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Stopped(f"it was not done after {DEADLINE:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _addresses() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory_from_now() -> int:
    """Bytes that are resident; the kernel's peak begins anew here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123 -- a Path's methods cost more than the case
        return next(int(line.split()[1]) for line in file if line.startswith(key.encode())) * 1024
