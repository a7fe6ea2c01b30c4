"""Hidden states of windows, and what else blocks hand on, on their way through a decoder block by block; the next block is read ahead."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stages.devices import free_gpu_memory
from stages.errors import PruningError
from stages.streaming.architecture import unsupported
from stages.streaming.calls import Call, Carried, Shared, block_outputs, differing_arguments, require_own, require_unchanged
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
        ArchitectureError: an argument of a block differs from window to window and is no tensor of windows; names both.
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
        self._differing: list[dict[str, torch.Tensor]] = [{} for _ in single]  # of a block: name of an argument -> [all windows, ...]
        self._handed_on: dict[tuple[Any, ...], torch.Tensor] = {}  # see put
        for members in self.micro_batches():
            micro_batch = windows[members]
            calls = decoder.calls(micro_batch)
            self.hidden[members] = calls[0].hidden
            self._keep_differing(members, calls)
            if members.start == 0 and any(self._differing):
                self._require_own(members.stop - 1)
            self.calls.setdefault(len(micro_batch), [_without_hidden(call) for call in calls])
        self._carried = {value.position for call in self.calls[1] for value in call.handed_on() if isinstance(value, Carried)}

    def clone(self) -> "Stream":
        """Copy the stream: the same windows before the same block, with their own copy of the hidden states.

        Raises:
            SparsesweepError: the disk has no space for their file.
        """
        clone = copy(self)
        clone.hidden, clone.location = clone._hidden_buffer(self.hidden)
        clone._check, clone._handed_on = self._check.clone(), {}
        clone.copy_from(self)
        return clone

    def copy_from(self, other: "Stream") -> None:
        """Take the hidden states, and what else blocks handed on, of a stream of the same windows."""
        self.hidden.copy_(other.hidden)
        for key, buffer in other._handed_on.items():
            if key not in self._handed_on:
                self._handed_on[key] = self.host_buffer(tuple(buffer.shape), buffer.dtype)
            self._handed_on[key].copy_(buffer)

    def _keep_differing(self, members: slice, calls: list[Call]) -> None:
        """Keep the arguments of each block that have an entry for each window."""
        decoder, buffers = self.decoder, dict[int, torch.Tensor]()
        count = members.stop - members.start
        for index, of_block in enumerate(differing_arguments(decoder.model, decoder.blocks, calls, self.calls[1], count)):
            for name, tensor in of_block.items():
                if name not in self._differing[index]:
                    if id(tensor) not in buffers:  # that of an earlier block
                        buffers[id(tensor)] = self.host_buffer((self.shape[0], *tensor.shape[1:]), tensor.dtype)
                        buffers[id(tensor)].copy_(self.calls[1][index].named(decoder.blocks[index])[name])  # of windows before these
                    self._differing[index][name] = buffers[id(tensor)]
                self._differing[index][name][members] = tensor

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor in host memory or in a file; see HostMemory.buffer."""
        return self.memory.buffer(shape, dtype)[0]

    def learner_buffer(self, shape: tuple[int, ...], dtype: torch.dtype, spare: int) -> torch.Tensor:
        """Allocate a tensor that learning reads and changes on the device: in a GPU's memory, or as host_buffer does.

        Args:
            spare: bytes of a GPU's memory that have to remain free.
        """
        device, needed = self.decoder.device, math.prod(shape) * dtype.itemsize
        if device.type != "cuda":
            return self.host_buffer(shape, dtype)
        if needed + spare <= free_gpu_memory(device):
            return torch.empty(shape, dtype=dtype, device=device)
        return self.memory.buffer(shape, dtype, pinned=True)[0]

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

    def micro_batches(self, *ranges: range) -> Iterator[slice]:
        """Yield the windows of each micro-batch; the windows of a micro-batch are all of one range.

        Args:
            ranges: `fitted`, `held_out`, or both, which is the default.
        """
        for windows in ranges or (self.fitted, self.held_out):
            for start in windows[:: self.batch]:
                yield slice(start, min(start + self.batch, windows.stop))

    def _require_own(self, window: int) -> None:
        alone = self.decoder.calls(self.windows[window : window + 1])
        for index, (of_block, call) in enumerate(zip(self._differing, alone, strict=True)):
            received = call.named(self.decoder.blocks[index])
            for name, buffer in of_block.items():
                require_own(self.decoder.model, index, name, self._on_device(buffer, slice(window, window + 1))[0], received[name])

    def parts(self, index: int, *ranges: range) -> Iterator[tuple[slice, torch.Tensor, Call]]:
        """Yield each micro-batch: its windows, its hidden states on the device, [windows, tokens, width], and the call of block `index`.

        Args:
            ranges: see micro_batches.

        Raises:
            ArchitectureError: after the last micro-batch, see require_unchanged.
        """
        for windows in self.micro_batches(*ranges):
            yield windows, *self.part(index, windows)
        self.require_unchanged(index)

    def part(self, index: int, windows: slice) -> tuple[torch.Tensor, Call]:
        """The hidden states of some windows on the device, [windows, tokens, width], and the call of block `index`."""
        return self.hidden[windows].to(self.decoder.device, non_blocking=True), self.call(index, windows)

    def require_unchanged(self, index: int) -> None:
        """Refuse a model whose block `index` wrote into an argument.

        Raises:
            ArchitectureError: names the block and the argument.
        """
        require_unchanged(self.decoder.model, index, self.decoder.blocks[index], [calls[index] for calls in self.calls.values()])

    def window(self, index: int, window: int) -> tuple[torch.Tensor, Call]:
        """One window's hidden states, [1, tokens, width], on the device, with the call of block `index`."""
        windows = slice(window, window + 1)
        return self.hidden[windows].to(self.decoder.device), self.call(index, windows)

    def call(self, index: int, windows: slice) -> Call:
        """The call of block `index` for some windows."""
        block, call = self.decoder.blocks[index], self.calls[windows.stop - windows.start][index]
        values: dict[str, Any] = {name: self._on_device(buffer, windows) for name, buffer in self._differing[index].items()}
        if self.decoder.hands_on:
            for name, value in call.named(block).items():
                if isinstance(value, Carried):
                    values[name] = self._on_device(self._handed_on[("carried", value.position)], windows)
                elif isinstance(value, Shared):
                    values[name] = self._shared(name, value, windows)
        return call.replacing(block, values)

    def _on_device(self, buffer: torch.Tensor, windows: slice) -> torch.Tensor:
        entries = buffer[windows].to(self.decoder.device, non_blocking=True)
        return entries if entries.is_cuda else entries.clone()  # into which a block may write

    def _shared(self, name: str, value: Shared, windows: slice) -> Any:
        """The mapping that blocks share, with what earlier blocks wrote for these windows."""
        written: dict[Any, list[torch.Tensor]] = {}
        for (argument, key, *_), buffer in self._handed_on.items():
            if argument == name:
                written.setdefault(key, []).append(self._on_device(buffer, windows))
        mapping = value.kind()
        for key, tensors in written.items():
            mapping[key] = tuple(tensors)
        return mapping

    def advance(self, index: int, block: nn.Module) -> None:
        """Run all windows through a loaded block."""
        for windows, hidden, call in self.parts(index):
            self.put(index, windows, block_outputs(block, hidden, call), call)
        self.require_finite(index)

    def put(self, index: int, windows: slice, outputs: tuple[Any, ...], call: Call) -> None:
        """Store what block `index` returned for some windows: hidden states, and what else it hands on.

        Args:
            outputs: of block_outputs. call: that gave them; the block may have written into a mapping in it.

        Raises:
            ArchitectureError: the block wrote something other than a tuple of tensors with an entry for each window; names the argument.
        """
        output = outputs[0]
        for position in self._carried:
            if position < len(outputs) and outputs[position] is not None:
                self._hand_on(("carried", position), windows, outputs[position])
        recorded = self.calls[windows.stop - windows.start][index].named(self.decoder.blocks[index]) if self.decoder.hands_on else {}
        for name, value in call.named(self.decoder.blocks[index]).items() if recorded else ():
            if isinstance(recorded[name], Shared):
                for key, tensors in value.items():
                    for number, tensor in enumerate(tensors):
                        self._hand_on((name, key, number), windows, tensor)
        self.hidden[windows] = output
        self._check += output.sum(dtype=torch.float32) * 0  # 0, or NaN; read once a block, since a GPU waits for each read

    def _hand_on(self, key: tuple[Any, ...], windows: slice, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or len(tensor) != windows.stop - windows.start:
            found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__qualname__
            raise unsupported(
                self.decoder.model, f"a block hands on {key[:2]}: found {found}, wanted tensors with an entry for each window"
            )
        shape = (self.shape[0], *tensor.shape[1:])
        if key not in self._handed_on or self._handed_on[key].shape != shape:
            self._handed_on[key] = self.host_buffer(shape, tensor.dtype)
        self._handed_on[key][windows] = tensor

    def require_finite(self, index: int) -> None:
        """Raise PruningError if the outputs of block `index` had NaN or infinity."""
        if self._check != 0:
            raise PruningError(f"block {index}: found NaN or infinity in its outputs, wanted finite activations")


def _other_tokens(decoder: Decoder, windows: torch.Tensor) -> torch.Tensor:
    """Windows of other tokens in every position, [windows, tokens], int64."""
    return (windows + 1) % decoder.model.get_input_embeddings().weight.shape[0]


def _without_hidden(call: Call) -> Call:
    return replace(call, hidden=call.hidden.new_empty(0))


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
