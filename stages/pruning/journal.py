"""The journal of a pruning run: a delta file and a record of each finished block, so that a killed run can be resumed.

The directory stores a fingerprint of everything that determines the blocks; a run with the same fingerprint reuses them. A block is
finished when its record exists and its delta file has the hash that the record states. The record is renamed to its final name last, so
the process may be killed at any moment.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stages.checkpoint.delta import Change, read_block, write_block
from stages.checkpoint.reader import Checkpoint
from stages.errors import SparsesweepError
from stages.files import bytes_in, full_disk, read_json, remove, sha256, write_json
from stages.pruning import distributed

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
EVIDENCE = "evidence.safetensors"


class Journal:
    """The finished blocks, in a directory that stays when the process is killed; made by `opened`.

    Args:
        base: the checkpoint that is pruned.
        finished: number of finished blocks; None: count them in the directory.

    Attributes:
        evidence_seconds: seconds that an interrupted run needed to measure the evidence that this run reuses, else 0.
    """

    def __init__(self, directory: Path, base: Checkpoint, finished: int | None = None) -> None:
        self.directory, self.base = directory, base
        self.finished = self._finished() if finished is None else finished
        self.evidence_seconds = 0.0

    @property
    def seconds_before(self) -> float:
        """What an interrupted run needed for all that this run takes over."""
        return self.evidence_seconds + sum(block["seconds"] for block in self.records(self.finished))

    def _finished(self) -> int:
        """Number of finished blocks from the first on, up to the first that is not finished."""
        count = 0
        while self.record_path(count).is_file() and self._is_undamaged(count):
            count += 1
        return count

    def _is_undamaged(self, index: int) -> bool:
        path = self.delta_path(index)
        try:
            record = read_json(self.record_path(index))
        except SparsesweepError:  # damaged as well: the block is pruned again
            return False
        whole = isinstance(record, dict) and isinstance(record.get("seconds"), int | float)
        return whole and path.is_file() and sha256(path) == record.get("sha256")

    def delta_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.json"

    def allocation_evidence(self, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Read the evidence of an allocation if an interrupted run wrote it, else compute and write it.

        Args:
            compute: returns named tensors; called by all processes or by none. All use the tensors of the first process.

        Raises:
            SparsesweepError: the disk is full, or what an interrupted run wrote is damaged.
        """
        path, started = self.directory / EVIDENCE, time.perf_counter()
        if distributed.broadcast(torch.tensor(int(path.is_file())), 0):
            try:
                with safe_open(path, framework="pt") as file:
                    self.evidence_seconds = float((file.metadata() or {})["seconds"])
                    return {name: file.get_tensor(name) for name in sorted(file.keys())}
            except (SafetensorError, LookupError, ValueError) as error:
                raise SparsesweepError(f"{path}: damaged ({error!r}); remove {self.directory} and run again") from error
        evidence = {name: distributed.broadcast(tensor.contiguous(), 0) for name, tensor in sorted(compute().items())}
        if distributed.rank() == 0:
            with full_disk(self.directory, "nothing was pruned"):
                temporary = path.with_suffix(".part")
                save_file(evidence, temporary, metadata={"seconds": str(time.perf_counter() - started)})
                _rename_durably(temporary, path)
        return evidence

    def changes(self, index: int) -> dict[str, Change] | None:
        """The changes of a block that an interrupted run finished, or None."""
        return self.written(index) if index < self.finished else None

    def written(self, index: int) -> dict[str, Change]:
        """The changes of a block that this or an interrupted run finished."""
        return read_block(self.delta_path(index), self.base.tensor)

    def write(self, index: int, changes: dict[str, Change], record: dict[str, Any]) -> None:
        """Add a finished block.

        Args:
            record: plain data that JSON can hold; `records` returns it.

        Raises:
            SparsesweepError: the disk is full; the earlier blocks stay finished.
        """
        with full_disk(self.directory, "the blocks finished so far are kept, and the next run goes on after them"):
            delta = self.delta_path(index).with_suffix(".safetensors.part")
            write_block(delta, changes, self.base.fingerprint)
            record_file = self.record_path(index).with_suffix(".json.part")
            write_json(record_file, {**record, "sha256": sha256(delta)})
            _rename_durably(delta, self.delta_path(index))
            _rename_durably(record_file, self.record_path(index))

    def records(self, count: int) -> list[dict[str, Any]]:
        """The records of the first `count` blocks."""
        return [read_json(self.record_path(index)) for index in range(count)]

    def export(self, count: int, directory: Path) -> None:
        """Link or copy the first `count` delta files into another directory; the journal's own files stay."""
        for index in range(count):
            path = self.delta_path(index)
            try:
                os.link(path, directory / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, directory / path.name)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return bytes_in(self.directory)


@contextmanager
def opened(directory: Path, fingerprint: dict[str, Any], base: Checkpoint) -> Iterator[Journal]:
    """Open the journal of an interrupted run with the same fingerprint, else an empty one.

    The directory is removed when the body of the with statement succeeds, and stays when it fails. With several processes, the first
    process opens and writes the journal and the others read it.

    Args:
        fingerprint: JSON that determines the blocks. base: the checkpoint that is pruned.

    Raises:
        SparsesweepError: another run is using the directory.
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


def _rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file once its bytes are on the disk, so that a loss of power leaves no damaged file under the name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SparsesweepError(f"{directory}: another run is pruning here; wait for it or stop it") from None


def _require_fingerprint(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Keep the directory if it has this fingerprint; else empty it and write the fingerprint."""
    path = directory / FINGERPRINT
    if path.is_file() and path.read_bytes() == _text(fingerprint).encode():
        return
    if path.is_file():
        log.info("%s: an interrupted run of something else (%s); starting afresh", directory, _difference(path, fingerprint))
    for file in directory.iterdir():
        file.unlink()
    with full_disk(directory, "nothing was pruned"):
        temporary = path.with_suffix(".part")
        temporary.write_text(_text(fingerprint), encoding="utf8")
        temporary.replace(path)


def _text(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, sort_keys=True)


def _difference(path: Path, fingerprint: dict[str, Any]) -> str:
    """Name the entries in which a fingerprint on disk differs from this one."""
    try:
        stored = read_json(path)
    except SparsesweepError:
        stored = None
    if not isinstance(stored, dict):
        return "its fingerprint is damaged"
    names = [name for name in sorted({*stored, *fingerprint}) if stored.get(name) != fingerprint.get(name)]
    return ", ".join(names) + " differ"


class WriteBehind:
    """Writes in a thread while the caller continues; the next call, or the end of the with statement, raises an error of the write."""

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
        """Wait for the write in progress, also after an error of the caller."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown(wait=True)
