"""What an interrupted run had finished: one delta file and one record a block, under a fingerprint of all that shaped them.

A block counts as finished when its record, written last and by rename, is there and the delta file has the hash that it
names; so a process may die at any moment. A later run with the same fingerprint takes the finished blocks over.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stages.checkpoint.delta import Change, read_block, write_block
from stages.errors import SparsesweepError
from stages.files import full_disk, read_json, remove, sha256, write_json
from stages.pruning import distributed

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"


class Journal:
    """The blocks finished so far, in a directory that outlives the process; see `opened`."""

    def __init__(self, directory: Path, base: str, finished: int | None = None) -> None:
        self.directory, self.base = directory, base
        self.finished = self._finished() if finished is None else finished
        self.surveyed = 0.0  # seconds that an interrupted run's survey had taken, once it is taken over

    def _finished(self) -> int:
        """How many blocks, from the first on, are whole."""
        count = 0
        while self.record_path(count).is_file() and self._is_whole(count):
            count += 1
        return count

    def _is_whole(self, index: int) -> bool:
        path = self.delta_path(index)
        return path.is_file() and sha256(path) == read_json(self.record_path(index))["sha256"]

    def delta_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.json"

    def survey(self, look: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What an interrupted run had learned before its first block, else what `look` gives now, kept for the next run."""
        path, started = self.directory / "survey.safetensors", time.perf_counter()
        if distributed.broadcast(torch.tensor(int(path.is_file())), 0):
            with safe_open(path, framework="pt") as file:
                self.surveyed = float(file.metadata()["seconds"])
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
        found = {
            name: distributed.broadcast(tensor.contiguous(), 0) for name, tensor in sorted(look().items())
        }  # to the last bit in every process
        if distributed.rank() == 0:
            with full_disk(self.directory, "nothing was pruned"):
                part = path.with_suffix(".part")
                save_file(found, part, metadata={"seconds": str(time.perf_counter() - started)})
                _settle_on_disk(part, path)
        return found

    def changes(self, index: int) -> dict[str, Change] | None:
        """The changes of a block that an interrupted run finished, or None."""
        return self.written(index) if index < self.finished else None

    def written(self, index: int) -> dict[str, Change]:
        """The changes of a block, whichever run wrote it."""
        return read_block(self.delta_path(index))

    def write(self, index: int, changes: dict[str, Change], record: dict[str, Any]) -> None:
        """Add a finished block.

        Args:
            record: finite JSON, given back by `records`.

        Raises:
            SparsesweepError: the disk is full; the blocks before stay.
        """
        with full_disk(self.directory, "the blocks finished so far are kept, and the next run goes on after them"):
            delta, note = (path.with_suffix(path.suffix + ".part") for path in (self.delta_path(index), self.record_path(index)))
            write_block(delta, changes, self.base)
            write_json(note, {**record, "sha256": sha256(delta)})
            for part in (delta, note):
                _settle_on_disk(part, part.with_suffix(""))

    def records(self, count: int) -> list[dict[str, Any]]:
        """The records of the first `count` blocks."""
        return [read_json(self.record_path(index)) for index in range(count)]

    def hand_over(self, count: int, directory: Path) -> None:
        """The first `count` delta files also into another directory; the journal keeps them until all is in place."""
        for index in range(count):
            path = self.delta_path(index)
            try:
                os.link(path, directory / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, directory / path.name)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.directory.iterdir())


@contextmanager
def opened(directory: Path, fingerprint: dict[str, Any], base: str) -> Iterator[Journal]:
    """The journal in `directory`: that of an interrupted run with the same fingerprint, else a new one.

    Removed when the block of code succeeds, kept when it fails. Of several processes the first one opens it, and the others
    read it.

    Raises:
        SparsesweepError: another run is using it.
    """
    if distributed.rank() > 0:
        yield Journal(directory, base, int(distributed.broadcast(torch.tensor(0), 0)))
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        _lock(lock, directory)
        _require_fingerprint(directory, fingerprint)
        journal = Journal(directory, base)
        distributed.broadcast(torch.tensor(journal.finished), 0)
        yield journal
        remove(directory)
    finally:
        os.close(lock)


def _settle_on_disk(part: Path, path: Path) -> None:
    """Give a file its name once its bytes are safe from a loss of power."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SparsesweepError(f"{directory}: another run is pruning here; wait for it or stop it") from None


def _require_fingerprint(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Leave the directory as it is if it has this fingerprint, else empty but for the fingerprint."""
    path = directory / FINGERPRINT
    if path.is_file() and path.read_text(encoding="utf8") == _text(fingerprint):
        return
    if path.is_file():
        log.info("%s: an interrupted run of something else (%s); starting afresh", directory, _difference(path, fingerprint))
    for file in directory.iterdir():
        file.unlink()
    with full_disk(directory, "nothing was pruned"):
        part = path.with_suffix(".part")
        part.write_text(_text(fingerprint), encoding="utf8")
        part.replace(path)


def _text(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, sort_keys=True)


def _difference(left: Path, fingerprint: dict[str, Any]) -> str:
    """Which facts of the fingerprint differ."""
    before = read_json(left)
    names = [name for name in sorted({*before, *fingerprint}) if before.get(name) != fingerprint.get(name)]
    return ", ".join(names) + " differ"


class WriteBehind:
    """Writes in a thread while the caller goes on; the first error is raised at the next call or at the end."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._pending: Future[None] | None = None

    def __call__(self, write: Any, *arguments: Any) -> None:
        self.wait()
        self._pending = self._writer.submit(write, *arguments)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """What is being written is finished first, whatever happened."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown(wait=True)
