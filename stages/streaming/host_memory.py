"""Buffers in host memory up to a budget and in unnamed files beyond it; freed memory is returned to the system."""

import ctypes
import math
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from stages.files import full_disk, require_free_disk

M_ARENA_MAX = -8  # malloc.h
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # sys/mman.h


class HostMemory:
    """A budget of host memory from which several streams allocate their buffers.

    Freed buffers are not added back to the budget: it is used for as long as its buffers.

    Args:
        budget: bytes; a buffer that needs more than the rest of the budget is a file.
        scratch: directory of the files.
    """

    def __init__(self, budget: float, scratch: Path) -> None:
        self.left, self.scratch = budget, scratch

    @classmethod
    def unbounded(cls) -> "HostMemory":
        """No bound; no buffer is a file."""
        return cls(math.inf, Path())

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> tuple[torch.Tensor, str]:
        """Allocate a tensor, uninitialised; returns it and its location: "memory", or the size and the directory of a file.

        Args:
            pinned: whether memory is page-locked: a GPU copies from and to it several times faster.

        Raises:
            SparsesweepError: the disk has no space for the file.
        """
        needed_bytes = torch.Size(shape).numel() * dtype.itemsize
        if (page_locked_bytes(needed_bytes) if pinned else needed_bytes) > self.left:
            return self.in_file(shape, dtype), f"a file of {needed_bytes / 1e9:.2f} GB in {self.scratch}"
        self.left -= page_locked_bytes(needed_bytes) if pinned else needed_bytes
        return torch.empty(shape, dtype=dtype, pin_memory=pinned), "memory"

    def in_file(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor in an unnamed file, uninitialised, whatever the budget.

        Raises:
            SparsesweepError: the disk has no space for the file.
        """
        needed_bytes = torch.Size(shape).numel() * dtype.itemsize
        require_free_disk(self.scratch, needed_bytes)
        with full_disk(self.scratch, "nothing was computed"), tempfile.TemporaryFile(dir=self.scratch) as file:
            os.posix_fallocate(file.fileno(), 0, needed_bytes)  # writing to a map of a file that the disk cannot hold kills the process
            path = f"/proc/self/fd/{file.fileno()}"  # the file has no name, so that a killed process leaves none behind
            return torch.from_file(path, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def page_locked_bytes(needed_bytes: int) -> int:
    """What torch takes for a page-locked tensor: the next power of two."""
    return 1 << max(0, needed_bytes - 1).bit_length()


class ReservedTensor:
    """A tensor on the CPU that takes memory only where it is written, until this is freed.

    Args:
        shape, dtype: of the tensor.

    Attributes:
        tensor: zeros until it is written.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, max(1, shape.numel() * dtype.itemsize), flags=flags)
        self.tensor = torch.frombuffer(self._map, dtype=dtype, count=shape.numel()).view(shape)

    def free(self, index: int) -> None:
        """Free the memory of an entry of the first dimension, which is undefined then, up to a page that it shares with others."""
        size = self.tensor[0].numel() * self.tensor.itemsize
        start, end = -(-index * size // mmap.PAGESIZE) * mmap.PAGESIZE, (index + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def release_free_memory() -> None:
    """Return freed memory to the system; without this, glibc keeps a part of every block's memory."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def allocate_in_one_heap() -> None:
    """Make all threads allocate in the main thread's heap: glibc does not return memory that is freed in heaps of other threads."""
    if (option := _of_glibc("mallopt")) is not None:
        option(M_ARENA_MAX, 1)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
