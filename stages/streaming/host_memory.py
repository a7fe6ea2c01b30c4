"""Host memory for buffers, counted, and files without a name for what is beyond it; freed memory goes back to the system."""

import ctypes
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from stages.files import full_disk, require_free_disk

M_ARENA_MAX = -8  # malloc.h


class HostMemory:
    """Host memory that several streams take their buffers from.

    It counts what it gives and takes nothing back: it lives as long as its buffers.

    Args:
        budget: bytes to give; a buffer for which too few are left lies in a file.
        scratch: directory of the files.
    """

    def __init__(self, budget: float, scratch: Path) -> None:
        self.left, self.scratch = budget, scratch

    @classmethod
    def unbounded(cls) -> "HostMemory":
        """All that the system gives; nothing lies in files."""
        return cls(math.inf, Path())

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        """An empty tensor of any values, and where it lies: "memory", or the size and the directory of a file.

        Raises:
            SparsesweepError: the disk has no space for the file.
        """
        needed = torch.Size(shape).numel() * dtype.itemsize
        if needed > self.left:
            return self._in_file(shape, dtype, needed), f"a file of {needed / 1e9:.2f} GB in {self.scratch}"
        self.left -= needed
        return torch.empty(shape, dtype=dtype), "memory"

    def _in_file(self, shape: tuple[int, ...], dtype: torch.dtype, needed: int) -> torch.Tensor:
        require_free_disk(self.scratch, needed)
        with full_disk(self.scratch, "nothing was computed"), tempfile.TemporaryFile(dir=self.scratch) as file:
            os.posix_fallocate(file.fileno(), 0, needed)  # writing to a map of a file that the disk cannot hold kills the process
            path = f"/proc/self/fd/{file.fileno()}"  # the file has no name, so that a killed process leaves none behind
            return torch.from_file(path, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it: glibc keeps a part of every block."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def allocate_in_one_heap() -> None:
    """Make all threads allocate in the main thread's heap: glibc keeps what is freed in heaps of other threads."""
    if (option := _of_glibc("mallopt")) is not None:
        option(M_ARENA_MAX, 1)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
