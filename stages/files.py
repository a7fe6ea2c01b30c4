"""Files: where the stages keep theirs, whole-or-nothing writing, hashes and room on the disk."""

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stages.errors import SparsesweepError

BASE = Path("artifacts/base")
TEXT = Path("artifacts/text")
CALIBRATION = Path("artifacts/calibration")
SPARSE = Path("artifacts/sparse")
PRUNE_JOURNAL = Path("artifacts/.prune")
PRUNE_RESULTS = Path("results/prune")
DENSE_RESULTS = Path("results/dense")
SPARSE_RESULTS = Path("results/sparse")
RELEASE = Path("release")


def remove(path: Path) -> None:
    """Remove a file, a link or a tree; a link's target stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block succeeds and is removed when it fails.

    The old content goes first, so that a link into a cache is never written through.

    Raises:
        SparsesweepError: the disk is full; nothing half-written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in (path, *path.parent.glob(f".{path.name}-*")):
        remove(left_by_a_kill)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with full_disk(path, "nothing was kept of it"):
            yield scratch
            for file in scratch.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            scratch.chmod(0o755)
            scratch.replace(path)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)


@contextmanager
def full_disk(path: Path, outcome: str) -> Iterator[None]:
    """Turn a full disk into an error that names the path and says what became of what was written.

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
    """safetensors tells the errno in its message only."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)


def require_free_disk(path: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes at `path` where the disk has less.

    Raises:
        SparsesweepError: naming the path, the bytes free and the bytes needed.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SparsesweepError(f"{path}: found {free / 1e9:.2f} GB free on its disk, wanted {needed / 1e9:.2f} GB")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write finite JSON, stably ordered as given; NaN and infinity are a ValueError."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf8")


def read_json(path: Path) -> Any:
    """Raises SparsesweepError, naming the file, where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise SparsesweepError(f"{path}: not found; has the stage that writes it run?") from None
    except ValueError as error:
        raise SparsesweepError(f"{path}: not JSON ({error})") from None


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    with path.open("w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf8") as file:
        return [json.loads(line) for line in file]
