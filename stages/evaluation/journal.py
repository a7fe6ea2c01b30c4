"""The journal of an evaluation: its finished parts, so that a run that fails later need not score them again.

The directory stores a fingerprint of everything that determines the scores; a run with the same fingerprint reuses them. A part is a file
that is renamed to its name last, so that the process may be killed at any moment.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.errors import SparsesweepError
from stages.evaluation.metric import Observed
from stages.files import full_disk, read_json, remove, write_json

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
WINDOWS = "windows.safetensors"
TOGETHER = "together"  # the part that says with how many models side by side, how long this one took of it, and in how much memory
KEPT = "what was scored so far is kept, and the next run goes on after it"
BETWEEN = "\n"  # a corpus and a name in the name of a tensor


class Journal:
    """The finished parts, in a directory that stays when the process fails; made by `opened`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken_over = {path.name for path in directory.iterdir()}  # of an interrupted run

    def _path(self, *name: str) -> Path:
        """The file of a part; names of tasks may hold any character."""
        return self.directory / f"{name[0]}-{hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]}.json"

    def has(self, *name: str) -> bool:
        """Whether a part is finished."""
        return self._path(*name).is_file()

    def read(self, *name: str) -> Any:
        """The plain data of a finished part."""
        if self._path(*name).name in self.taken_over:
            log.info("%s: taken over from an interrupted run: %s", self.directory, " ".join(name))
        return read_json(self._path(*name))

    def write(self, data: Any, *name: str) -> None:
        """Add a finished part."""
        with full_disk(self.directory, KEPT):
            path = self._path(*name)
            write_json(path.with_suffix(".part"), data)
            _rename_durably(path.with_suffix(".part"), path)

    @property
    def has_observed(self) -> bool:
        """Whether the windows of the corpora are finished."""
        return (self.directory / WINDOWS).is_file()

    def observed(self, compute: Callable[[], Mapping[str, Observed]]) -> dict[str, Observed]:
        """What was observed on the windows of each corpus: an interrupted run's, or computed now and added.

        Raises:
            SparsesweepError: what the interrupted run wrote is damaged; names the file.
        """
        path = self.directory / WINDOWS
        if path.is_file():
            log.info("%s: taken over from an interrupted run: windows", self.directory)
            found: dict[str, dict[str, torch.Tensor]] = {}
            try:
                for key, tensor in load_file(path).items():
                    corpus, name = key.split(BETWEEN)
                    found.setdefault(corpus, {})[name] = tensor
            except (SafetensorError, ValueError) as error:
                raise SparsesweepError(f"{path}: damaged ({error}); remove {self.directory} and run again") from error
            return dict(found)
        computed = compute()
        tensors = {f"{corpus}{BETWEEN}{name}": tensor for corpus, of in computed.items() for name, tensor in of.items()}
        self.write_tensors(tensors, path.name)
        return dict(computed)

    def write_tensors(self, tensors: Mapping[str, torch.Tensor], name: str) -> None:
        """Add a finished part of tensors, as a file of this name."""
        path = self.directory / name
        with full_disk(self.directory, KEPT):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path.with_suffix(".part"))
            _rename_durably(path.with_suffix(".part"), path)

    def copy(self, name: str, directory: Path) -> bool:
        """Link, or copy, a file of the journal into a directory: the next run has it, if this one fails. Returns: whether there is one."""
        path = self.directory / name
        if not path.is_file():
            return False
        try:
            os.link(path, directory / name)
        except OSError:  # links are not allowed there
            with full_disk(directory, KEPT):
                shutil.copyfile(path, directory / name)
        return True


@contextmanager
def opened(directory: Path, fingerprint: dict[str, Any], *, stays: bool = False) -> Iterator[Journal]:
    """Open the journal of an interrupted run with the same fingerprint, else an empty one.

    The directory is removed when the body of the with statement succeeds, and stays when it fails.

    Args:
        fingerprint: JSON that determines the scores. stays: for another run, even if the body succeeds.

    Raises:
        SparsesweepError: another run is using the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        _lock(lock, directory)
        _require_fingerprint(directory, json.dumps(fingerprint, indent=1, sort_keys=True))
        yield Journal(directory)
        if not stays:
            remove(directory)
    finally:
        os.close(lock)


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SparsesweepError(f"{directory}: another run is evaluating here; wait for it or stop it") from None


def _require_fingerprint(directory: Path, text: str) -> None:
    """Keep the directory if it has this fingerprint; else empty it and write the fingerprint."""
    path = directory / FINGERPRINT
    if path.is_file() and path.read_bytes() == text.encode():
        return
    if path.is_file():
        log.info("%s: an interrupted run of something else; starting afresh", directory)
    for file in directory.iterdir():
        remove(file)
    with full_disk(directory, "nothing was scored"):
        path.with_suffix(".part").write_text(text, encoding="utf8")
        _rename_durably(path.with_suffix(".part"), path)


def _rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file once its bytes are on the disk, so that a loss of power leaves no damaged file under the name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
