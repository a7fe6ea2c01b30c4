"""Prune a block layer after layer in one pass: each matrix for what its pruned predecessors hand it, in the same block, too.

    for each distinct input X of the block, in the order of the forward pass:    # "true sequential", Frantar et al. 2023,
        run       all micro-batches up to the layers that read it                # arXiv:2210.17323, section 4; its code
        prune     these layers for X
    run on to the end of the block, whose outputs are the next block's inputs

The forward pass of each micro-batch has a thread of its own and waits inside the first product whose weight is not pruned yet, until
all have come as far. So every product is computed once, with pruned weights, and only one input's statistic is in memory. What waits is
in the device's memory up to a budget, of a GPU's then in the host's, and in files beyond these, see activations.

Which experts a micro-batch calls, and in which order, is the router's affair. An expert is pruned as soon as all micro-batches that chose
it wait for it; one that few tokens chose for a sample of all, as in experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from stages.devices import current, free_gpu_memory
from stages.errors import PruningError
from stages.pruning.activations import Activations
from stages.pruning.distributed import all_reduce
from stages.pruning.experts import route_to, routed_modules, weight_of
from stages.pruning.inputs import CalibratedOn, EvenSample, Inputs, by_window
from stages.pruning.observer import even_sample, even_sample_of_held_out
from stages.pruning.statistics import Gram, Statistic
from stages.pruning.turns import Turns
from stages.streaming.architecture import Layer, Matrix
from stages.streaming.calls import block_outputs
from stages.streaming.host_memory import page_locked_bytes
from stages.streaming.products import Factors
from stages.streaming.reading import MISSING, Identity, restore
from stages.streaming.stream import Stream

Prune = Callable[[list[Inputs], dict[Layer, torch.Tensor]], None]

# What is left free of a GPU for more than waiting: how many tensors of a size there are at the same time, in the worst method.
COPIES_FOR_MASKS, COPIES_WITH_GRAM, COPIES_OF_GRAM = 4, 10, 7
COPIES_OF_ACTIVATIONS = 4


class _Collected(Exception):
    """Raised before a product once the sample of all tokens has reached an expert."""


class _DistinctInput:
    """An input of some layers, and what is recorded of it until these are pruned.

    Args:
        layers: that read it. routed: the path of the module that is called with tokens and the experts which they chose, or None.
    """

    def __init__(self, number: int, layers: list[Layer], routed: str | None) -> None:
        self.number, self.layers, self.routed = number, layers, routed
        self.is_pruned = False
        self.inputs: Inputs[Any] | None = None
        self.held_out: list[torch.Tensor] = []

    @property
    def is_expert(self) -> bool:
        return self.layers[0].expert is not None


@dataclass(eq=False)
class _Pass:
    """The forward pass of one micro-batch.

    activations: that it holds, or None where nothing bounds them; held: their bytes in memory while it waits. sample: of its tokens.
    read: number of a distinct input -> the tensor. waits_for: the distinct inputs whose layers it waits for.
    noted: what modules noted in this pass, see ReadingOrder.
    chosen: path of a module of experts -> those that its tokens chose, once it has been called.
    """

    windows: slice
    is_held_out: bool
    sample: EvenSample
    activations: Activations | None
    turns: Turns = field(init=False)
    held: int = 0
    read: dict[int, Identity] = field(default_factory=dict)
    waits_for: list[_DistinctInput] = field(default_factory=list)
    chosen: dict[str, set[int]] = field(default_factory=dict)
    noted: list[Any] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return not self.turns.ended and all(distinct.is_pruned for distinct in self.waits_for)

    @contextmanager
    def not_noting(self) -> Iterator[None]:
        """While what is made is to outlive the pass."""
        if self.activations is None:
            yield
            return
        self.activations.is_noting = False
        try:
            yield
        finally:
            self.activations.is_noting = True

    def will_read(self, distinct: _DistinctInput) -> bool:
        """Whether it may still read an input: all do, but that of an expert which its tokens are known not to have chosen."""
        if self.turns.ended or distinct.number in self.read:
            return False
        chosen = None if distinct.routed is None else self.chosen.get(distinct.routed)
        return chosen is None or distinct.layers[0].expert in chosen


class SequentialPass:
    """One pass of all windows of a stream through a block that is pruned meanwhile.

    Args:
        block: loaded, dense. prune: prunes the layers that read some inputs, in the block, given these and samples of the windows held
            out; called in the same order in every process.
        statistic: makes an empty statistic from a number of columns and a device.
        error_tokens, expert_tokens: see Plan.
        propagates: whether the stream goes on to the outputs of the pruned block; if not, no product is made that no layer reads.
    """

    def __init__(
        self,
        stream: Stream,
        index: int,
        block: nn.Module,
        prune: Prune,
        *,
        statistic: Callable[[int, torch.device], Statistic],
        error_tokens: int,
        expert_tokens: int,
        propagates: bool,
    ) -> None:
        self.stream, self.index, self.block, self.prune = stream, index, block, prune
        self.statistic, self.minimum, self.propagates = statistic, expert_tokens, propagates
        self.tokens_of_expert = max(1, error_tokens // 8)
        routed = routed_modules(block, stream.decoder.layers(index))
        order = stream.decoder.reading_orders[index]
        self.distinct = [
            _DistinctInput(number, layers, layers[0].module if layers[0].module in routed else None)
            for number, layers in enumerate(order.inputs)
        ]
        self.noted = [(block.get_submodule(path), name) for path, name in order.noted]
        self.distinct_of = {layer: distinct for distinct in self.distinct for layer in distinct.layers}
        self.routed = routed
        self.reached: dict[str, list[torch.Tensor]] = {path: [] for path in routed}  # sampled tokens that reached a mixture
        self.read_by_experts: dict[str, list[torch.Tensor]] = {}  # parameter of experts -> a sample of what they read
        self.running: _Pass | None = None
        self._collected: dict[int, torch.Tensor] | None = None  # of an expert for which the sample is run, see _routed_to
        self._moved: dict[StorageWeakRef, Activations] = {}
        spare = self._solve_bytes(stream.decoder.matrices[index]) + _pass_bytes(stream, index)
        self._budget = waiting_budget(stream, spare)
        fitted, held_out = even_sample(stream, error_tokens), even_sample_of_held_out(stream, error_tokens)
        self.passes = [self._pass(windows, fitted, stream.fitted) for windows in stream.micro_batches(stream.fitted)]
        self.passes += [self._pass(windows, held_out, stream.held_out) for windows in stream.micro_batches(stream.held_out)]

    def run(self) -> None:
        """Prune the block; then the stream is behind it, if it propagates.

        Raises:
            PruningError: see block_loop; or a layer was called in a way that one pass does not allow for; names it.
        """
        try:
            with self._hooks():
                self._run_passes()
                for distinct in self.distinct:  # experts that no token chose
                    if not distinct.is_pruned:
                        self._prune([distinct])
        finally:
            for of_micro_batch in self.passes:
                of_micro_batch.turns.cancel()
            self._moved.clear()
        self.stream.require_unchanged(self.index)
        if self.propagates:
            self.stream.require_finite(self.index)

    def _solve_bytes(self, matrices: list[Matrix]) -> int:
        """About the memory in which what reads one input is solved: copies of the matrices and of their Gram matrix, in float32."""
        copies, grams = (COPIES_WITH_GRAM, COPIES_OF_GRAM) if self.statistic is Gram else (COPIES_FOR_MASKS, 0)
        sizes = []
        for distinct in self.distinct:
            shapes = [matrix.shape for matrix in matrices if matrix.layer in distinct.layers]
            columns = shapes[0][1]
            sizes.append(copies * sum(rows for rows, _ in shapes) * columns + grams * columns**2)
        return torch.float32.itemsize * max(sizes)

    def _pass(self, windows: slice, sample: EvenSample, members: range) -> _Pass:
        length = self.stream.shape[1]
        own = EvenSample(sample.stride, sample.first_token + (windows.start - members.start) * length)
        activations = Activations(self._moved) if self._budget < inf else None
        made = _Pass(windows, members is self.stream.held_out, own, activations)
        made.turns = Turns(lambda: self._forward(made))
        return made

    @torch.no_grad()
    def _forward(self, of_micro_batch: _Pass) -> None:
        """Run a micro-batch through the block, in its own thread, to which torch's modes and the current GPU are local."""
        windows = of_micro_batch.windows
        with current(self.stream.decoder.device), of_micro_batch.activations or nullcontext():
            hidden, call = self.stream.part(self.index, windows)
            with self._experts():
                outputs = block_outputs(self.block, hidden, call)
            if self.propagates:
                self.stream.put(self.index, windows, outputs, call)

    def _run_passes(self) -> None:
        while True:
            for of_micro_batch in self.passes:
                if of_micro_batch.is_ready:
                    self._resume(of_micro_batch)
            choice = self._next()
            if choice is None:
                return
            self._prune(choice)
            if not self.propagates and not self._still_read():
                return

    def _resume(self, of_micro_batch: _Pass) -> None:
        """Let a micro-batch run to the next layer that is not pruned; then move it elsewhere if it does not fit into memory."""
        activations = of_micro_batch.activations
        if activations is not None:
            activations.bring_back()
        self.running, of_micro_batch.waits_for, of_micro_batch.held = of_micro_batch, [], 0
        before = [module.__dict__.get(name, MISSING) for module, name in self.noted]
        for (module, name), value in zip(self.noted, of_micro_batch.noted or before, strict=True):
            restore(module, name, value)
        try:
            of_micro_batch.turns.resume()
        finally:
            self.running = None
            of_micro_batch.noted = [module.__dict__.get(name, MISSING) for module, name in self.noted]
            for (module, name), value in zip(self.noted, before, strict=True):
                restore(module, name, value)
        if activations is not None and not of_micro_batch.turns.ended:
            of_micro_batch.held = activations.bytes()
            if sum(other.held for other in self.passes) > self._budget:
                activations.move_to_buffer(self._buffer)
                of_micro_batch.held = 0

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate where waiting activations go that the device does not hold: on the host for those of a GPU, else in a file."""
        buffers = [one.activations.buffer for one in self.passes if one.activations is not None and one.activations.buffer is not None]
        on_host = sum(page_locked_bytes(buffer.nbytes) for buffer in buffers if buffer.is_pinned())
        needed = page_locked_bytes(torch.Size(shape).numel() * dtype.itemsize)
        if self.stream.decoder.device.type != "cuda" or on_host + needed > self.stream.memory.left:
            return self.stream.memory.in_file(shape, dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def _next(self) -> list[_DistinctInput] | None:
        """The inputs that all micro-batches of all processes wait to read that ever will; None once all have ended.

        Where each waits for another, as where some do not call a layer, the first in order.
        """
        waited_for = self._waited_for()
        complete = [distinct for distinct, expected in zip(waited_for, self._readers(waited_for), strict=True) if not expected]
        return complete or waited_for[:1] or None

    def _still_read(self) -> bool:
        """Whether a micro-batch of any process waits to read, or may read, an input whose layers are not pruned yet."""
        return bool(self._waited_for()) or any(self._readers([distinct for distinct in self.distinct if not distinct.is_pruned]))

    def _waited_for(self) -> list[_DistinctInput]:
        """The inputs that micro-batches of any process wait to read."""
        waiting = torch.zeros(len(self.distinct), dtype=torch.int64)
        for of_micro_batch in self.passes:
            for distinct in of_micro_batch.waits_for:
                waiting[distinct.number] += not distinct.is_pruned and not of_micro_batch.turns.ended
        return [self.distinct[number] for number in all_reduce(waiting).nonzero().flatten().tolist()]

    def _readers(self, inputs: list[_DistinctInput]) -> list[int]:
        """How many micro-batches of all processes may still come to read each of some inputs."""
        counts = [sum(of_micro_batch.will_read(distinct) for of_micro_batch in self.passes) for distinct in inputs]
        return all_reduce(torch.tensor(counts, dtype=torch.int64)).tolist()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Stop before the products of linear layers, and look at what reaches mixtures of experts."""
        with ExitStack() as stack:
            for layer in self.distinct_of:
                if layer.is_module_of(self.block):
                    module = self.block.get_submodule(layer.module)
                    hook = module.register_forward_pre_hook(lambda _, arguments, layer=layer: self._read([(layer, arguments[0])]))
                    stack.callback(hook.remove)
            for path in self.routed:
                hook = self.block.get_submodule(path).register_forward_pre_hook(self._reach(path), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _experts(self) -> Any:
        """Stop before the products of layers that are no modules, while the block runs in this thread."""
        layers = [layer for layer in self.distinct_of if not layer.is_module_of(self.block)]
        weights = {layer: weight_of(self.block, layer) for layer in layers}
        return Factors(weights, self._read) if layers else nullcontext()

    def _reach(self, path: str) -> Any:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            if self.running is None:
                return
            tokens, chosen = (*arguments, *keywords.values())[:2]
            with self.running.not_noting():
                if not self.running.is_held_out:
                    self.reached[path].append(self.running.sample.of(tokens))
                if not chosen.is_floating_point():
                    self.running.chosen[path] = set(chosen.unique().tolist())

        return keep

    @torch.no_grad()
    def _read(self, inputs: list[tuple[Layer, torch.Tensor]]) -> None:
        """Called before a product, in the thread of the micro-batch: record what its layers read and wait until they are pruned."""
        if self.running is None:
            self._collect(inputs)
            return
        running, several = self.running, len(inputs) > 1
        with running.not_noting():
            for layer, tensor in inputs:
                distinct, identity = self.distinct_of[layer], Identity(tensor)
                tokens = tensor.reshape(-1, tensor.shape[-1])
                tokens = tokens[tokens.any(dim=-1)] if several else tokens
                if distinct.is_expert and not several and not len(tokens):
                    continue  # nothing is multiplied by it; in one product with others it is pruned as they are
                if distinct.number in running.read:
                    if running.read[distinct.number] != identity:
                        raise _otherwise(layer, f"reads another input than {distinct.layers[0].name} before it, or reads a second one")
                elif distinct.is_pruned:
                    raise _otherwise(layer, "is called by one micro-batch after others have gone on without it")
                else:
                    running.read[distinct.number] = identity
                    self._record(running, distinct, layer, tokens)
                    running.waits_for.append(distinct)
        if running.waits_for:
            running.turns.pause()

    def _record(self, running: _Pass, distinct: _DistinctInput, layer: Layer, tokens: torch.Tensor) -> None:
        """Add to the statistic and the sample of an input.

        Args:
            tokens: of the running micro-batch, [tokens, columns].

        Raises:
            PruningError: see by_window.
        """
        windows = running.windows.stop - running.windows.start
        parts = tokens[None] if distinct.is_expert else by_window(layer, tokens, windows)
        kept = distinct.held_out if running.is_held_out else self._inputs(distinct, tokens).sample
        if distinct.is_expert:
            kept.append(tokens[: max(0, self.tokens_of_expert - sum(map(len, kept)))].clone())
        else:
            kept.append(running.sample.of(tokens))
        if running.is_held_out:
            return
        inputs = self._inputs(distinct, tokens)
        inputs.statistic.add(parts)
        inputs.tokens += len(tokens)
        if distinct.is_expert and distinct.routed is None:
            self.read_by_experts.setdefault(layer.name, []).append(tokens[:: running.sample.stride].clone())

    def _inputs(self, distinct: _DistinctInput, like: torch.Tensor) -> Inputs[Any]:
        """Those of this process, which are empty at first. like: [..., columns], of their dtype, on their device."""
        if distinct.inputs is None:
            columns = like.shape[-1]
            distinct.inputs = Inputs(
                layers=list(distinct.layers), statistic=self.statistic(columns, like.device), sample=[like.new_empty(0, columns)]
            )
        return distinct.inputs

    def _prune(self, choice: list[_DistinctInput]) -> None:
        """Add up over all processes, and prune the layers that read some inputs."""
        counts = all_reduce(torch.tensor([0 if distinct.inputs is None else distinct.inputs.tokens for distinct in choice])).tolist()
        of_choice, held_out = [], dict[Layer, torch.Tensor]()
        for distinct, tokens in zip(choice, counts, strict=True):
            if distinct.is_expert and tokens < max(1, self.minimum):
                self._replace(distinct)
            elif not tokens:
                raise PruningError(f"layer {distinct.layers[0].name}: no calibration token reached it")
            inputs = self._inputs(distinct, _columns_of(self.block, distinct.layers[0]))
            inputs.statistic.finish(all_reduce)
            inputs.tokens = tokens
            inputs.layers.sort(key=self.stream.decoder.layers(self.index).index)
            of_choice.append(inputs)
            if distinct.held_out:
                held_out.update(dict.fromkeys(distinct.layers, torch.cat(distinct.held_out)))
        self.prune(of_choice, held_out)
        for distinct in choice:
            distinct.is_pruned, distinct.inputs, distinct.held_out = True, None, []

    def _replace(self, distinct: _DistinctInput) -> None:
        """Let a sample of all tokens stand for those of an expert that few chose.

        Raises:
            PruningError: there is none; names the layer.
        """
        layer = distinct.layers[0]
        if distinct.routed is not None:
            tokens = self._routed_to(distinct)
        else:
            tokens = torch.cat([_columns_of(self.block, layer), *self.read_by_experts.get(layer.name, [])])
        if not all_reduce(torch.tensor(len(tokens))):
            raise PruningError(f"layer {layer.name}: no calibration token reached it")
        distinct.inputs = None
        inputs = self._inputs(distinct, tokens)
        if len(tokens):
            inputs.statistic.add(tokens[None])
            inputs.sample = [tokens[: self.tokens_of_expert].clone()]
        inputs.calibrated_on = CalibratedOn.ALL_TOKENS

    def _routed_to(self, distinct: _DistinctInput) -> torch.Tensor:
        """What the layers read where all sampled tokens of their mixture are sent to their expert, [tokens, columns]."""
        layer, path = distinct.layers[0], distinct.routed
        reached = self.reached[path] if path is not None else []
        if not reached:
            return _columns_of(self.block, layer)
        self._collected = {}
        try:
            with self._experts():
                route_to(self.block.get_submodule(layer.module), torch.cat(reached), layer.expert or 0)
        except _Collected:
            pass
        finally:
            collected, self._collected = self._collected, None
        return collected.get(distinct.number, _columns_of(self.block, layer))

    def _collect(self, inputs: list[tuple[Layer, torch.Tensor]]) -> None:
        """Keep what the layers of an expert read that is not pruned yet, and go no further."""
        for layer, tensor in inputs:
            distinct = self.distinct_of[layer]
            if self._collected is not None and not distinct.is_pruned:
                self._collected[distinct.number] = tensor.reshape(-1, tensor.shape[-1])
                raise _Collected


def waiting_budget(stream: Stream, spare: int) -> float:
    """Bytes of activations that may wait in memory: what is left of the host's budget, or what is free of a GPU.

    Args:
        spare: bytes of a GPU that are needed otherwise.
    """
    device = stream.decoder.device
    if device.type == "cuda":
        return max(0, free_gpu_memory(device) - spare)
    return stream.memory.left


def _pass_bytes(stream: Stream, index: int) -> int:
    """About the memory in which one micro-batch runs, apart from what it holds when it waits."""
    widest = max(max(matrix.shape) for matrix in stream.decoder.matrices[index])
    return COPIES_OF_ACTIVATIONS * stream.batch * stream.shape[1] * widest * stream.hidden.itemsize


def _columns_of(block: nn.Module, layer: Layer) -> torch.Tensor:
    """No tokens of a layer's inputs, [0, columns], compute dtype."""
    weight = block.get_parameter(layer.name)
    return weight.new_empty(0, weight.shape[-2 if layer.transposed else -1])


def _otherwise(layer: Layer, found: str) -> PruningError:
    name = layer.name if layer.expert is None else f"{layer.name}[{layer.expert}]"
    return PruningError(
        f"layer {name}: it {found}, wanted one input in a fixed order with prune.propagate = sequential; prune=exact takes it"
    )
