"""Windows through a decoder of any size, one block in memory: hidden states, what each block is called with, reading ahead."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.errors import ArchitectureError, PruningError
from stages.files import full_disk, require_free_disk
from stages.streaming.architecture import Call, Decoder, run_block

M_ARENA_MAX = -8  # malloc.h
GPU_SHARE = 0.25


def release_free_memory() -> None:
    """Give what was freed back to the system, where the C library would keep it: glibc holds on to some of every block."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def share_one_heap() -> None:
    """Let threads allocate where the main thread does: in a heap of their own, glibc would keep what they free."""
    if (option := _of_glibc("mallopt")) is not None:
        option(M_ARENA_MAX, 1)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, tensors bit by bit."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or not isinstance(one, (int, float, str, bool)))


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, budget: int | None, scratch: Path | None) -> tuple[torch.Tensor, str]:
    """An empty tensor in host memory, or if that takes more than `budget` bytes in a file without a name; and where it is.

    Args:
        scratch: directory for the file.

    Raises:
        SparsesweepError: no disk space for the file.
    """
    count = torch.Size(shape).numel()
    needed = count * dtype.itemsize
    if budget is None or needed <= budget:
        return torch.empty(shape, dtype=dtype), "memory"
    directory = scratch or Path(tempfile.gettempdir())
    require_free_disk(directory, needed)
    with full_disk(directory, "nothing was computed"), tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, needed)  # a map of a file that the disk has no disk space for kills the process
        path = f"/proc/self/fd/{file.fileno()}"  # the file has no name, so that a killed process leaves none behind
        mapped = torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
    return mapped, f"a file of {needed / 1e9:.2f} GB in {directory}"


class Stream:
    """The hidden states of some windows on their way through a decoder, block after block.

    Made within `decoder.before_blocks()`, which gives embeddings their weights.

    Args:
        windows: [windows, tokens], int64.
        batch: windows per forward pass.
        budget: bytes of host memory that the hidden states may take; if they need more they lie in a file. None: no bound.
        scratch: directory for that file.
        first_window, all_windows: where these windows lie among those of all processes.
        gpu_share: of the GPU's memory: hidden states up to this stay there.
        one_by_one: whether single windows will be asked for, too.

    Raises:
        ArchitectureError: what the blocks receive differs from window to window.
        SparsesweepError: no disk space for the file.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: torch.Tensor,
        *,
        batch: int,
        budget: int | None = None,
        scratch: Path | None = None,
        first_window: int = 0,
        all_windows: int | None = None,
        gpu_share: float = GPU_SHARE,
        one_by_one: bool = False,
    ) -> None:
        self.first_window, self.all_windows, self.gpu_share = first_window, all_windows or len(windows), gpu_share
        self.budget, self.scratch = budget, scratch  # the budget: what is left of it
        self.decoder, self.batch, self.windows, self.shape = decoder, batch, windows, windows.shape
        self.starts = range(0, len(windows), batch)
        self.calls: dict[int, list[Call]] = {}
        self.location = "memory"
        self._check = torch.zeros((), device=decoder.device)
        for start in self.starts:
            calls = decoder.calls(windows[start : start + batch])
            if start == 0:
                self.hidden = self._hidden_buffer(calls[0].hidden)
            self.hidden[start : start + batch] = calls[0].hidden
            for call in calls:
                call.hidden = call.hidden.new_empty(0)
            self._require_same(calls, len(windows[start : start + batch]))
        if one_by_one and 1 not in self.calls:
            self.calls[1] = decoder.calls(windows[:1])
            for call in self.calls[1]:
                call.hidden = call.hidden.new_empty(0)

    def clone(self) -> "Stream":
        """The same windows, as far as these have come, with hidden states of their own.

        Raises:
            SparsesweepError: no disk space for their file.
        """
        clone = copy(self)
        clone.hidden = clone._hidden_buffer(self.hidden)
        clone.hidden.copy_(self.hidden)
        self.budget, clone._check = clone.budget, self._check.clone()  # both have taken theirs
        return clone

    def _hidden_buffer(self, first: torch.Tensor) -> torch.Tensor:
        """Hidden states in GPU memory where they are a small part of it, else on the host, else in a file without a name."""
        shape = (self.shape[0], *first.shape[1:])
        count = torch.Size(shape).numel()
        needed = count * first.itemsize
        if first.is_cuda and needed <= self.gpu_share * torch.cuda.get_device_properties(first.device).total_memory:
            self.location = "GPU memory"
            return torch.empty(shape, dtype=first.dtype, device=first.device)
        hidden, self.location = self._taken(shape, first.dtype)
        return hidden

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor for as long as the stream lives: in what its budget leaves, or in a file; see host_buffer."""
        return self._taken(shape, dtype)[0]

    def _taken(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        tensor, location = host_buffer(shape, dtype, self.budget, self.scratch)
        if self.budget is not None and location == "memory":
            self.budget -= tensor.nbytes
        return tensor, location

    def _require_same(self, calls: list[Call], windows: int) -> None:
        known = self.calls.setdefault(windows, calls)
        for call, before in zip(calls, known, strict=True):
            if not same(call.arguments, before.arguments) or not same(call.keywords, before.keywords):
                reason = "what its blocks receive differs from window to window; this architecture is not supported"
                raise ArchitectureError(f"{self.decoder.name}: {reason}")

    def parts(self, index: int) -> Iterator[tuple[slice, torch.Tensor, Call]]:
        """The hidden states, a micro-batch at a time on the device, with the call for block `index`."""
        for start in self.starts:
            part = self.hidden[start : start + self.batch].to(self.decoder.device, non_blocking=True)
            yield slice(start, start + len(part)), part, self.calls[len(part)][index]

    def window(self, index: int, window: int) -> tuple[torch.Tensor, Call]:
        """One window's hidden states, [1, tokens, width], on the device, with the call for block `index`."""
        return self.hidden[window : window + 1].to(self.decoder.device), self.calls[1][index]

    def advance(self, index: int, block: nn.Module) -> None:
        """All windows through a loaded block."""
        for where, part, call in self.parts(index):
            self.put(where, run_block(block, part, call))
        self.require_finite(index)

    def put(self, where: slice, output: torch.Tensor) -> None:
        self.hidden[where] = output
        self._check += output.sum(dtype=torch.float32) * 0  # 0, or NaN; looked at once a block: each look makes a GPU wait

    def require_finite(self, index: int) -> None:
        """Raises PruningError if block `index` put out NaN or infinity."""
        if self._check != 0:
            raise PruningError(f"block {index}: found NaN or infinity in its outputs, wanted finite activations")


@contextmanager
def read_ahead(decoder: Decoder, order: range) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """Each block's tensors as stored, the next block's being read by a thread while the caller works on one."""
    share_one_heap()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:

        def blocks() -> Iterator[dict[str, torch.Tensor]]:
            future = reader.submit(decoder.read, order[0])
            for following in [*order[1:], None]:
                tensors = future.result()
                if following is not None:
                    future = reader.submit(decoder.read, following)
                yield tensors
                release_free_memory()

        try:
            yield blocks()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)
