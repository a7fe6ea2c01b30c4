"""What the layers of a block read while windows run through it: a statistic and a sample of tokens for each distinct input.

    Recorder          keeps them; layers that are handed the same tensor share both
    LinearLayers      hands the recorder what linear layers read, by a hook on each
    Experts           hands it what experts read: each is a slice of one parameter, recognised in the product that it appears in
    FewTokenExperts   calibrates an expert that the router gave few tokens on a sample of all tokens that reached the mixture
    Observer          the four together, for one loaded block

An observer is made for a loaded block, runs the windows through it, and is finished before another block is loaded.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from stages.errors import PruningError
from stages.pruning.distributed import all_reduce
from stages.pruning.statistics import Statistic
from stages.streaming.architecture import Layer
from stages.streaming.stream import Stream

S = TypeVar("S", bound=Statistic)


class CalibratedOn(StrEnum):
    """Which tokens a statistic is of: those that the layer reads, or for an expert that few chose a sample of all."""

    ITS_TOKENS = "its tokens"
    ALL_TOKENS = "all tokens"


@dataclass(kw_only=True, slots=True)
class Inputs(Generic[S]):
    """One distinct input.

    layers: those that read it, the first to do so first; after Observer.finish in the order of the observed layers.
    statistic: over the tokens of all processes. sample: pieces of [tokens, columns], in the compute dtype, of this process's tokens.
    tokens: how many the layers read, in all processes.
    """

    layers: list[Layer]
    statistic: S
    sample: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    calibrated_on: CalibratedOn = CalibratedOn.ITS_TOKENS

    def sampled(self) -> torch.Tensor:
        """[tokens, columns], float32."""
        return torch.cat(self.sample).float()

    def reorder(self, order: torch.Tensor) -> None:
        """Make the column `order[k]`, int64, the k-th."""
        self.statistic.reorder(order)
        self.sample = [piece[:, order] for piece in self.sample]


class EvenSample:
    """Every stride-th token of the calibration set, whatever the micro-batch.

    Args:
        stride: tokens. first_token: of this process among those of all processes.
    """

    def __init__(self, stride: int, first_token: int) -> None:
        self.stride, self.first_token = stride, first_token

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The sampled ones of a micro-batch, [..., tokens, columns], as a copy: [sampled, columns]."""
        return tokens.detach().reshape(-1, tokens.shape[-1])[-self.first_token % self.stride :: self.stride].clone()

    def advance(self, tokens: int) -> None:
        """The next micro-batch begins so many tokens later."""
        self.first_token += tokens


class Recorder(Generic[S]):
    """The statistic and the sample of every distinct input.

    Args:
        statistic: makes an empty one from a number of columns and a device.
        sample: picks tokens of linear layers. expert_tokens: of an expert, the first so many.
    """

    def __init__(self, statistic: Callable[[int, torch.device], S], sample: EvenSample, expert_tokens: int) -> None:
        self.statistic, self.sample, self.expert_tokens = statistic, sample, expert_tokens
        self.inputs: dict[Layer, Inputs[S]] = {}
        self.latest: Layer | None = None  # the layer that read last in the current micro-batch
        self._batch = (0, 0)
        self._read: dict[tuple[int, int, int], tuple[Inputs[S], torch.Tensor]] = {}

    def begin(self, windows: int, tokens: int) -> None:
        """A micro-batch of so many windows of so many tokens enters the block."""
        self._batch, self.latest = (windows, tokens), None

    def end(self) -> None:
        """The micro-batch has left the block."""
        self.sample.advance(self._batch[0] * self._batch[1])
        self._read.clear()

    @torch.no_grad()
    def add_windows(self, layer: Layer, tensor: torch.Tensor) -> None:
        """Record what a linear layer reads, [..., columns], a row for each token of the micro-batch.

        Raises:
            PruningError: it reads another number of tokens; names the layer.
        """
        inputs = self._first_read_by(layer, tensor)
        if inputs is None:
            return
        windows, tokens = self._batch
        rows = tensor.reshape(-1, tensor.shape[-1])
        if len(rows) != windows * tokens:
            raise PruningError(f"layer {layer.name}: found {len(rows)} tokens, wanted the block's {windows} x {tokens}")
        inputs.statistic.add(rows.view(windows, tokens, -1))
        inputs.sample.append(self.sample.of(rows))
        inputs.tokens += len(rows)

    @torch.no_grad()
    def add_tokens(self, layer: Layer, tensor: torch.Tensor) -> None:
        """Record the tokens that an expert reads, [..., columns]."""
        inputs = self._first_read_by(layer, tensor)
        if inputs is None:
            return
        rows = tensor.reshape(-1, tensor.shape[-1])
        inputs.statistic.add(rows[None])
        inputs.sample.append(rows[: max(0, self.expert_tokens - sum(map(len, inputs.sample)))].clone())
        inputs.tokens += len(rows)

    def _first_read_by(self, layer: Layer, tensor: torch.Tensor) -> Inputs[S] | None:
        """The inputs that this layer was the first to read; None if another layer records them."""
        self.latest = layer
        if layer not in self.inputs:
            key = (tensor.data_ptr(), tensor.numel(), tensor._version)
            if key not in self._read:  # the tensor is held, so that no other gets its address
                self._read[key] = Inputs(layers=[], statistic=self.statistic(tensor.shape[-1], tensor.device)), tensor
            self.inputs[layer] = self._read[key][0]
            self.inputs[layer].layers.append(layer)
        return self.inputs[layer] if self.records(layer) else None

    def records(self, layer: Layer) -> bool:
        """Whether a layer was the first to read its inputs."""
        return layer in self.inputs and self.inputs[layer].layers[0] == layer

    def forget(self, layer: Layer) -> None:
        """Drop what a layer read."""
        if layer in self.inputs:
            self.inputs.pop(layer).layers.remove(layer)

    def ensure(self, layer: Layer, weight: torch.Tensor) -> Inputs[S]:
        """What a layer of this weight, [..., columns], read; empty if it read nothing in this process."""
        if layer not in self.inputs:
            columns = weight.shape[-1]
            statistic = self.statistic(columns, weight.device)
            self.inputs[layer] = Inputs(layers=[layer], statistic=statistic, sample=[weight.new_empty(0, columns)])
        return self.inputs[layer]


class LastInputRead(Exception):
    """Raised before the product of a block's last layer, where nothing needs its output."""


class LinearLayers:
    """Hands what linear layers read to a recorder.

    Args:
        block: loaded. layers: its linear layers.
    """

    def __init__(self, block: nn.Module, layers: list[Layer], recorder: Recorder[Any]) -> None:
        self.recorder, self.stop_at_last = recorder, False
        self._last: Layer | None = None  # of the block, once a micro-batch has shown which one it is
        self._hooks = {layer: block.get_submodule(layer.module).register_forward_pre_hook(self._hook(layer)) for layer in layers}

    def _hook(self, layer: Layer) -> Any:
        def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self.recorder.add_windows(layer, arguments[0])
            if self.stop_at_last and layer == self._last:
                raise LastInputRead

        return record

    def end(self) -> None:
        """After a micro-batch: keep only the hooks that still record or stop."""
        if self._last is None and self.recorder.latest in self._hooks:
            self._last = self.recorder.latest
        for layer in list(self._hooks):
            if layer in self.recorder.inputs and not self.recorder.records(layer) and layer != self._last:
                self._hooks.pop(layer).remove()

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks.values():
            hook.remove()


class Experts:
    """Hands what experts read to a recorder.

    Args:
        block: loaded. layers: its experts.
    """

    def __init__(self, block: nn.Module, layers: list[Layer], recorder: Recorder[Any]) -> None:
        self.block, self.layers, self.recorder = block, layers, recorder

    def recording(self) -> AbstractContextManager[object]:
        """Record while the block runs."""
        if not self.layers:
            return nullcontext()
        return ExpertProducts(self.block, self.layers, lambda layer, inputs, _: self.recorder.add_tokens(layer, inputs))


class FewTokenExperts:
    """The rule for experts that few tokens chose: they are calibrated on a sample of all tokens that reached their mixture.

    A few tokens tell little about what an expert reads, and what its router will send it resembles what it sends to the others.
    """

    def __init__(self, experts: Experts) -> None:
        self.experts, self.sample = experts, experts.recorder.sample
        self._reached: dict[str, list[torch.Tensor]] = {}  # module of a mixture's experts -> sampled tokens
        modules = {layer.module for layer in experts.layers}
        self._hooks = [experts.block.get_submodule(path).register_forward_pre_hook(self._hook(path), with_kwargs=True) for path in modules]

    def _hook(self, path: str) -> Any:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            tokens = (*arguments, *keywords.values())[0]
            self._reached.setdefault(path, []).append(self.sample.of(tokens))

        return keep

    def apply(self, counts: dict[Layer, int], minimum: int | None) -> None:
        """Forget what experts with fewer than `minimum` tokens read, and give them the sample instead.

        Args:
            counts: tokens that chose each expert, in all processes.
            minimum: None: experts are taken as they are, and those that no token chose are left out.
        """
        for hook in self._hooks:
            hook.remove()
        few = [layer for layer in self.experts.layers if counts[layer] < max(1, minimum or 0)]
        for layer in self.experts.layers:
            if layer in few:
                self.experts.recorder.forget(layer)
            else:  # all its tokens may be with other processes
                self._ensure(layer)
        if minimum is not None:
            for path, expert in sorted({(layer.module, layer.expert or 0) for layer in few if layer.module in self._reached}):
                self._run(path, expert)
                for layer in few:
                    if (layer.module, layer.expert) == (path, expert):  # this process may have no sampled token
                        self._ensure(layer).calibrated_on = CalibratedOn.ALL_TOKENS

    def _ensure(self, layer: Layer) -> Inputs[Any]:
        return self.experts.recorder.ensure(layer, self.experts.block.get_parameter(layer.name))

    def _run(self, path: str, expert: int) -> None:
        """Send all sampled tokens of a mixture to one expert."""
        tokens = torch.cat(self._reached[path])
        chosen = torch.full((len(tokens), 1), expert, device=tokens.device)
        with self.experts.recording():
            self.experts.block.get_submodule(path)(tokens, chosen, torch.ones_like(chosen, dtype=tokens.dtype))


class Observer(Generic[S]):
    """Observes the layers of one loaded block.

    Args:
        layers: those to observe.
        statistic: makes an empty statistic from a number of columns and a device.
        tokens: how many all processes will run through the block.
        sampled: about how many of them to keep of each input, evenly spread; of an expert's, the first eighth of that number.
        first_token: of this process among all.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: list[Layer],
        statistic: Callable[[int, torch.device], S],
        tokens: int,
        sampled: int,
        first_token: int = 0,
    ) -> None:
        self.layers = layers
        sample = EvenSample(max(1, tokens // sampled), first_token)
        self.recorder = Recorder(statistic, sample, max(1, sampled // 8))
        self.linear = LinearLayers(block, [layer for layer in layers if layer.expert is None], self.recorder)
        self.experts = Experts(block, [layer for layer in layers if layer.expert is not None], self.recorder)
        self.few_token_experts = FewTokenExperts(self.experts)

    def run(self, hidden: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Run some windows through the block and return its output.

        Args:
            hidden: [windows, tokens, width]. forward: calls the block with it.
        """
        self.recorder.begin(*hidden.shape[:2])
        try:
            with self.experts.recording():
                return forward(hidden)
        finally:
            self.recorder.end()
            self.linear.end()

    def run_to_last_input(self, hidden: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run some windows through the block up to what its last layer reads, from the second call on; see run."""
        self.linear.stop_at_last = True
        try:
            self.run(hidden, forward)
        except LastInputRead:
            pass
        finally:
            self.linear.stop_at_last = False

    def finish(self, minimum: int | None) -> list[Inputs[S]]:
        """Add up over all processes; every distinct input, in the same order in each process.

        Args:
            minimum: tokens, see FewTokenExperts.apply.
        """
        self.linear.remove()
        own = [self.recorder.inputs[layer].tokens if self.recorder.records(layer) else 0 for layer in self.layers]
        counts = dict(zip(self.layers, all_reduce(torch.tensor(own)).tolist(), strict=True))
        self.few_token_experts.apply(counts, minimum)
        distinct = []
        for layer in self.layers:
            if self.recorder.records(layer):
                inputs = self.recorder.inputs[layer]
                inputs.statistic.finish(all_reduce)
                inputs.tokens = counts[layer]
                distinct.append(inputs)
        for inputs in distinct:
            inputs.layers.sort(key=self.layers.index)
        return distinct


def observe(stream: Stream, block: nn.Module, layers: list[Layer], statistic: type[S], sampled: int = 1) -> Observer[S]:
    """An observer of what some layers of a loaded block read of a stream's windows; see Observer."""
    length = stream.shape[1]
    return Observer(block, layers, statistic, stream.all_windows * length, sampled, stream.first_window * length)


class ExpertProducts(TorchFunctionMode):
    """Hands on the input and the output of every product with an expert's weight.

    Args:
        block: loaded. experts: those to hand on.
        receive: called with the layer, [tokens, columns] and [tokens, rows].
    """

    def __init__(self, block: nn.Module, experts: list[Layer], receive: Callable[[Layer, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.experts = {block.get_parameter(layer.name)[layer.expert].data_ptr(): layer for layer in experts}
        self.receive = receive

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        if function is linear and (layer := self.experts.get(arguments[1].data_ptr())) is not None:
            self.receive(layer, arguments[0], output)
        return output
