"""Files: the paths of the stages, atomic replacement of directories, hashes, free disk, and checks of file names."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from stages.errors import SparsesweepError

log = logging.getLogger(__name__)

BASE = Path("artifacts/base")
TEXT = Path("artifacts/text")
BENCHMARKS = Path("artifacts/tasks")  # rows of tasks that lm-eval knows by their own names
OWN_TASKS = Path("tasks")
CALIBRATION = Path("artifacts/calibration")
STATISTICS = Path("artifacts/statistics")
KEPT_MANIFEST = "manifest.json"  # below STATISTICS
SPARSE = Path("artifacts/sparse")
PRUNE_JOURNAL = Path("artifacts/.prune")
DENSE_JOURNAL = Path("artifacts/.evaluate-dense")
SPARSE_JOURNAL = Path("artifacts/.evaluate-sparse")
FLOAT8_JOURNAL = Path("artifacts/.evaluate-float8")
RULER_JOURNALS = Path("artifacts")  # .evaluate-TYPE, one for each type of quantisation
PRUNE_RESULTS = Path("results/prune")
DENSE_RESULTS = Path("results/dense")
DENSE_STATES = Path("artifacts/dense")
SPARSE_RESULTS = Path("results/sparse")
FLOAT8_RESULTS = Path("results/float8")  # of the pruned model as publish.dtype=float8 rounds it
PROMPT_SENSITIVITY = "details/prompt_sensitivity.json"  # below SPARSE_RESULTS, where tasks were asked in several styles
RULER_RESULTS = Path("results/ruler")
RELEASE = Path("release")
SUMS = "SHA256SUMS"  # below RELEASE: of all its other files
UPLOAD = Path("results/upload.json")
CREATED_REPOSITORIES = Path("artifacts/.repositories.json")  # those on a hub that uploads created
COMPARISON = Path("comparison")
FRONTIERS = Path("frontiers")  # of each protocol, by hash: kept with the page, read by publish


def is_plain_name(name: object) -> bool:
    """Whether a value is the name of a file in a directory: a string without separators or control characters, not "." or ".."."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & {"/", "\\"}


def is_inner_path(path: object) -> bool:
    """Whether a value is a relative path that stays within its directory, such as "data/train.parquet"."""
    return isinstance(path, str) and all(is_plain_name(component) for component in path.split("/"))


def bytes_in(directory: Path) -> int:
    """Bytes of the files that lie in a directory."""
    return sum(path.stat().st_size for path in directory.iterdir())


def remove(path: Path) -> None:
    """Remove a file, a link or a directory tree; a link's target is not removed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `path` when the block succeeds and is removed when it fails.

    What is at `path` stays until then; links in it into a cache are never written through.

    Raises:
        SparsesweepError: the disk is full, and nothing half-written is left; or see `scratch_directory`.
    """
    with full_disk(path, "nothing was kept of it"), scratch_directory(path) as scratch:
        yield scratch
        for file in scratch.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        scratch.chmod(0o755)
        if path.exists() or path.is_symlink():
            path.rename(scratch.with_name("replaced"))
        scratch.rename(path)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory in the parent directory of `path`, for one run at a time; it is always removed at the end.

    A second run waits for the first and logs this. The files of a killed run are removed: its lock ended with its process.

    Raises:
        SparsesweepError: the file system has no locks.
    """
    lock_directory = path.with_name(f".{path.name}-scratch")
    scratch = lock_directory / "files"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_directory / "lock", path):
        try:
            _empty(lock_directory)
            scratch.mkdir()
            yield scratch
        finally:
            _empty(lock_directory)
            (lock_directory / "lock").unlink(missing_ok=True)
            with suppress(OSError):  # not empty: the next run has opened its lock there already
                lock_directory.rmdir()


def _empty(lock_directory: Path) -> None:
    """Remove all but the lock."""
    for entry in list(lock_directory.iterdir()):
        if entry.name != "lock":
            remove(entry)


def locked(file: Path, path: Path) -> TextIO:
    """Open a lock file and lock it exclusively; closing it releases the lock. Who has the lock may remove the file.

    A second run waits for the first and logs this.

    Args:
        path: what the lock is for, named in messages.

    Raises:
        SparsesweepError: the file system has no locks.
    """
    while True:
        with suppress(FileExistsError):
            file.parent.mkdir()
        with ExitStack() as closing:
            try:
                lock = closing.enter_context(file.open("a+"))
            except FileNotFoundError:  # the run before removed the directory at this moment
                continue
            _wait_for(lock, path)
            if _is_at(lock, file):  # and not removed by the run before
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {platform.node()}")
                lock.flush()
                closing.pop_all()
                return lock


def _is_at(lock: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _wait_for(lock: TextIO, path: Path) -> None:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            log.warning("%s: waiting for another run that writes it (%s)", path, lock.read())
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        wanted = "wanted a file system with locks, which keep two runs from writing the same files"
        raise SparsesweepError(f"{path}: found no locks on its file system ({error}), {wanted}") from error


@contextmanager
def full_disk(path: Path, outcome: str) -> Iterator[None]:
    """Turn a full disk into an error that names the path.

    Args:
        outcome: the state of the files that were written, for the error.

    Raises:
        SparsesweepError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_full_disk(error):
            raise SparsesweepError(f"{path}: the disk is full ({error}); {outcome}") from error
        raise


def _is_full_disk(error: OSError | SafetensorError) -> bool:
    """Whether an error means a full disk; safetensors states the errno only in its message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)


def free_disk(path: Path) -> int:
    """Bytes that are free on the disk of a path, which need not be there yet."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def require_free_disk(path: Path, needed: int) -> None:
    """Refuse to write `needed` bytes at `path` if the disk has less space.

    Raises:
        SparsesweepError: names the path, the bytes free and the bytes needed.
    """
    free = free_disk(path)
    if free < needed:
        raise SparsesweepError(f"{path}: found {free / 1e9:.2f} GB free on its disk, wanted {needed / 1e9:.2f} GB")


def sha256(path: Path) -> str:
    """SHA-256 [hex] of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON, with the keys in the order of `data`.

    Raises:
        ValueError: the data has NaN or infinity.
    """
    path.write_text(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf8")


def parsed_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, or is nested more deeply than Python's stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        SparsesweepError: the file is missing, cannot be read or is not JSON; names it.
    """
    try:
        return parsed_json(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise SparsesweepError(f"{path}: not found; has the stage that writes it run?") from None
    except OSError as error:
        raise SparsesweepError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SparsesweepError(f"{path}: not JSON ({error})") from None


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    with path.open("w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
