"""Hidden states of windows that run through a decoder block by block, while the next block is read ahead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy

import torch
from torch import nn

from stages.errors import PruningError
from stages.streaming.calls import Call, require_same, require_unchanged, run_block
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory, allocate_in_one_heap, release_free_memory

GPU_SHARE = 0.25


class Stream:
    """The hidden states of some windows before one block of a decoder; `advance` moves them past the block.

    Make it within `decoder.before_blocks()`, which loads the embeddings.

    Args:
        windows: [windows, tokens], int64.
        held_out: the last so many of them are held out: nothing is fitted to them, and they are never in a micro-batch with others.
        batch: windows per forward pass.
        memory: allocates hidden states and other buffers; without a bound by default.
        first_window: index of the first of these windows among those of all processes. all_windows: number of windows of all processes,
            both without those held out.
        gpu_share: fraction of the GPU's memory; hidden states up to this size stay there.

    Attributes:
        fitted, held_out: indices of the windows that are fitted to, and of those that are held out.

    Raises:
        ArchitectureError: an argument of a block differs from window to window; names the block and the argument.
        SparsesweepError: the disk has no space for a file of hidden states.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: torch.Tensor,
        *,
        batch: int,
        held_out: int = 0,
        memory: HostMemory | None = None,
        first_window: int = 0,
        all_windows: int | None = None,
        gpu_share: float = GPU_SHARE,
    ) -> None:
        self.fitted, self.held_out = range(len(windows) - held_out), range(len(windows) - held_out, len(windows))
        self.first_window, self.all_windows, self.gpu_share = first_window, all_windows or len(self.fitted), gpu_share
        self.memory = memory or HostMemory.unbounded()
        self.decoder, self.batch, self.windows, self.shape = decoder, batch, windows, windows.shape
        self._check = torch.zeros((), device=decoder.device)
        single = decoder.calls(_other_tokens(decoder, windows[:1]))
        self.hidden, self.location = self._hidden_buffer(single[0].hidden)
        self.calls = {1: [_without_hidden(call) for call in single]}  # by the number of windows, one a block
        for members in self._micro_batches(self.fitted, self.held_out):
            micro_batch = windows[members]
            calls = decoder.calls(micro_batch)
            self.hidden[members] = calls[0].hidden
            require_same(decoder.model, decoder.blocks, calls, self.calls[1], len(micro_batch))
            self.calls.setdefault(len(micro_batch), [_without_hidden(call) for call in calls])

    def clone(self) -> "Stream":
        """Copy the stream: the same windows before the same block, with their own copy of the hidden states.

        Raises:
            SparsesweepError: the disk has no space for their file.
        """
        clone = copy(self)
        clone.hidden, clone.location = clone._hidden_buffer(self.hidden)
        clone.hidden.copy_(self.hidden)
        clone._check = self._check.clone()
        return clone

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor in host memory or in a file; see HostMemory.buffer."""
        return self.memory.buffer(shape, dtype)[0]

    def _hidden_buffer(self, like: torch.Tensor) -> tuple[torch.Tensor, str]:
        """Allocate a tensor for all hidden states, in GPU memory up to gpu_share of it, else on the host; returns its location, too.

        Args:
            like: [windows, tokens, width], hidden states of some windows.
        """
        shape = (self.shape[0], *like.shape[1:])
        needed = torch.Size(shape).numel() * like.itemsize
        if like.is_cuda and needed <= self.gpu_share * torch.cuda.get_device_properties(like.device).total_memory:
            return torch.empty(shape, dtype=like.dtype, device=like.device), "GPU memory"
        return self.memory.buffer(shape, like.dtype)

    def _micro_batches(self, *ranges: range) -> Iterator[slice]:
        """Yield the windows of each micro-batch; the windows of a micro-batch are all of one range."""
        for windows in ranges:
            for start in windows[:: self.batch]:
                yield slice(start, min(start + self.batch, windows.stop))

    def parts(self, index: int, *ranges: range) -> Iterator[tuple[slice, torch.Tensor, Call]]:
        """Yield each micro-batch: its windows, its hidden states on the device, [windows, tokens, width], and the call of block `index`.

        Args:
            ranges: `fitted`, `held_out`, or both, which is the default.

        Raises:
            ArchitectureError: after the last micro-batch, if the block wrote into an argument; names the block and the argument.
        """
        for windows in self._micro_batches(*(ranges or (self.fitted, self.held_out))):
            hidden = self.hidden[windows].to(self.decoder.device, non_blocking=True)
            yield windows, hidden, self.calls[len(hidden)][index]
        require_unchanged(self.decoder.model, index, self.decoder.blocks[index], [calls[index] for calls in self.calls.values()])

    def window(self, index: int, window: int) -> tuple[torch.Tensor, Call]:
        """One window's hidden states, [1, tokens, width], on the device, with the call of block `index`."""
        return self.hidden[window : window + 1].to(self.decoder.device), self.calls[1][index]

    def advance(self, index: int, block: nn.Module) -> None:
        """Run all windows through a loaded block."""
        for windows, hidden, call in self.parts(index):
            self.put(windows, run_block(block, hidden, call))
        self.require_finite(index)

    def put(self, windows: slice, output: torch.Tensor) -> None:
        """Store a block's output, [windows, tokens, width], as the hidden states of some windows."""
        self.hidden[windows] = output
        self._check += output.sum(dtype=torch.float32) * 0  # 0, or NaN; read once a block, since a GPU waits for each read

    def require_finite(self, index: int) -> None:
        """Raise PruningError if the outputs of block `index` had NaN or infinity."""
        if self._check != 0:
            raise PruningError(f"block {index}: found NaN or infinity in its outputs, wanted finite activations")


def _other_tokens(decoder: Decoder, windows: torch.Tensor) -> torch.Tensor:
    """Windows of other tokens in every position, [windows, tokens], int64."""
    return (windows + 1) % decoder.model.get_input_embeddings().weight.shape[0]


def _without_hidden(call: Call) -> Call:
    return Call(hidden=call.hidden.new_empty(0), arguments=call.arguments, keywords=call.keywords)


@contextmanager
def read_ahead(decoder: Decoder, order: range) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """Yield an iterator over the blocks' tensors as stored; a thread reads the next block while the caller uses the current one."""
    allocate_in_one_heap()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:

        def blocks() -> Iterator[dict[str, torch.Tensor]]:
            future = reader.submit(decoder.read, order[0])
            for next_index in [*order[1:], None]:
                tensors = future.result()
                if next_index is not None:
                    future = reader.submit(decoder.read, next_index)
                yield tensors
                release_free_memory()

        try:
            yield blocks()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)
