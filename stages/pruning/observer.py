"""Observe the inputs of the layers of a loaded block while windows run through it, for pruning and for an allocation.

Linear layers are observed by hooks, experts as in experts.py; both pass their inputs to a Recorder, see inputs.py.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from math import gcd
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from stages.pruning.distributed import all_reduce, world_size
from stages.pruning.experts import Experts, FewTokenExperts
from stages.pruning.inputs import EvenSample, Inputs, Recorder, S
from stages.pruning.statistics import NoStatistic
from stages.streaming.architecture import Layer
from stages.streaming.calls import block_outputs
from stages.streaming.stream import Stream

T = TypeVar("T")
NEIGHBOURS = 16  # strides from a sample to those that may lie near it in the window


class LastInputRead(Exception):
    """Raised before the product of a block's last layer if the block's output is not needed."""


class LinearLayers:
    """Passes the inputs of linear layers to a recorder.

    Args:
        block: loaded. layers: its linear layers.
    """

    def __init__(self, block: nn.Module, layers: list[Layer], recorder: Recorder[Any]) -> None:
        self.recorder, self.stop_at_last = recorder, False
        self._calls: Counter[Layer] = Counter()  # in this micro-batch
        self._last: tuple[Layer, int] | None = None  # of the block, and its calls, once a micro-batch has shown which one it is
        self._hooks = {layer: block.get_submodule(layer.module).register_forward_pre_hook(self._hook(layer)) for layer in layers}

    def _hook(self, layer: Layer) -> Any:
        def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self.recorder.add_windows(layer, arguments[0])
            self._calls[layer] += 1
            if self.stop_at_last and (layer, self._calls[layer]) == self._last:
                raise LastInputRead

        return record

    def end(self) -> None:
        """After a micro-batch: keep only the hooks that still record or stop."""
        latest = self.recorder.latest
        if self._last is None and latest in self._hooks:
            self._last = latest, self._calls[latest]
        for layer in list(self._hooks):
            if layer in self.recorder.inputs and not self.recorder.records(layer) and (self._last is None or layer != self._last[0]):
                self._hooks.pop(layer).remove()
        self._calls.clear()

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks.values():
            hook.remove()


class Observer(Generic[S]):
    """Observes the layers of one loaded block.

    Args:
        layers: the layers to observe.
        statistic: makes an empty statistic from a number of columns and a device.
        tokens: number of tokens that all processes together run through the block.
        sampled: approximate number of tokens to keep of each input, evenly spread; of an expert's, an eighth of that number, the first.
        first_token: index of this process's first token among those of all processes.
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
        modules = [layer for layer in layers if layer.is_module_of(block)]
        self.linear = LinearLayers(block, modules, self.recorder)
        self.experts = Experts(block, [layer for layer in layers if layer not in set(modules)], self.recorder)
        self.few_token_experts = FewTokenExperts(self.experts)

    def run(self, hidden: torch.Tensor, forward: Callable[[torch.Tensor], T]) -> T:
        """Run some windows through the block and return what `forward` does.

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

    def run_expert(self, expert: int, run: Callable[[], None]) -> None:
        """Observe one expert alone while `run` runs it, on windows whose other layers have been observed."""
        self.recorder.begin(0, 0)
        with self.experts.recording(expert):
            run()
        self.recorder.end()

    def forget(self, layers: list[Layer]) -> None:
        """Drop the inputs of some layers, and free their statistics."""
        for layer in layers:
            self.recorder.forget(layer)

    def run_to_last_input(self, hidden: torch.Tensor, forward: Callable[[torch.Tensor], Any]) -> None:
        """Run some windows through the block; from the second call on stop before the last layer's product. See run."""
        self.linear.stop_at_last = True
        try:
            self.run(hidden, forward)
        except LastInputRead:
            pass
        finally:
            self.linear.stop_at_last = False

    def finish(self, minimum: int | None, layers: list[Layer] | None = None) -> list[Inputs[S]]:
        """Add up over all processes, and return every distinct input in the same order in each process.

        Args:
            minimum: tokens, see FewTokenExperts.apply.
            layers: of which no others read the same inputs, and after which none are observed but experts; None: all.
        """
        self.linear.remove()
        layers = self.layers if layers is None else layers
        local_counts = [self.recorder.inputs[layer].tokens if self.recorder.records(layer) else 0 for layer in layers]
        counts = dict(zip(layers, all_reduce(torch.tensor(local_counts)).tolist(), strict=True))
        self.few_token_experts.apply(counts, minimum)
        distinct = []
        for layer in layers:
            if self.recorder.records(layer):
                inputs = self.recorder.inputs[layer]
                inputs.statistic.finish(all_reduce)
                inputs.tokens = counts[layer]
                distinct.append(inputs)
        for inputs in distinct:
            inputs.layers.sort(key=self.layers.index)
        return distinct


def collect(
    stream: Stream,
    index: int,
    block: nn.Module,
    statistic: Callable[[int, torch.device], S],
    *,
    error_tokens: int,
    expert_tokens: int,
    propagates: bool,
    layers: list[Layer] | None = None,
) -> tuple[list[Inputs[S]], dict[Layer, torch.Tensor]]:
    """Run all windows through a loaded block, and observe its layers.

    Args:
        layers: of the block, those to observe; None: all that multiply by its own matrices in scope.
        statistic, error_tokens, expert_tokens: see Observer, whose `sampled` is the second, and FewTokenExperts.apply.
        propagates: whether the stream goes on to the block's outputs in the same pass.

    Returns:
        Every distinct input of the layers; and of each layer some inputs in the windows held out, [tokens, columns], compute
        dtype.
    """
    layers = stream.decoder.layers(index) if layers is None else layers
    observer = observe(stream, block, layers, statistic, error_tokens)
    _run_through(stream, index, block, observer, stream.fitted, propagates)
    inputs = observer.finish(expert_tokens)
    held_out = observe_held_out(stream, block, layers, error_tokens)
    _run_through(stream, index, block, held_out, stream.held_out, propagates)
    stream.require_finite(index)
    return inputs, samples_of(held_out.finish(None))


def _run_through(stream: Stream, index: int, block: nn.Module, observer: Observer[Any], windows: range, propagates: bool) -> None:
    for members, hidden, call in stream.parts(index, windows):
        forward = partial(block_outputs, block, call=call)
        if propagates:
            stream.put(index, members, observer.run(hidden, forward), call)
        else:
            observer.run_to_last_input(hidden, forward)


def samples_of(inputs: list[Inputs[Any]]) -> dict[Layer, torch.Tensor]:
    """The sample of each layer, [tokens, columns], compute dtype."""
    return {layer: torch.cat(distinct.sample) for distinct in inputs if distinct.sample for layer in distinct.layers}


def observe_held_out(stream: Stream, block: nn.Module, layers: list[Layer], sampled: int) -> Observer[NoStatistic]:
    """Make an observer that keeps about `sampled` tokens of each layer's inputs in the windows held out, at all places in a window."""
    return Observer(block, layers, NoStatistic, even_sample_of_held_out(stream, sampled).stride * sampled, sampled)


def observe(
    stream: Stream, block: nn.Module, layers: list[Layer], statistic: Callable[[int, torch.device], S], sampled: int = 1
) -> Observer[S]:
    """Make an observer of some layers of a loaded block for a stream's windows; see Observer."""
    sample = even_sample(stream, sampled)
    return Observer(block, layers, statistic, sample.stride * sampled, sampled, sample.first_token)


def even_sample(stream: Stream, sampled: int) -> EvenSample:
    """About `sampled` of the tokens that all processes together run through a block, from this process's first on, at all positions."""
    length = stream.shape[1]
    return EvenSample(stride_of(stream.all_windows, length, sampled), stream.first_window * length)


def even_sample_of_held_out(stream: Stream, sampled: int) -> EvenSample:
    """About `sampled` of the tokens of the windows held out, from the first on, at all places in a window."""
    return EvenSample(stride_of(len(stream.held_out) * world_size(), stream.shape[1], sampled), 0)


@cache
def stride_of(windows: int, length: int, sampled: int) -> int:
    """Tokens from one that is sampled to the next, at least so many as leave `sampled` of them.

    It has no divisor in common with the length, else the first token of every window, which has enormous activations, were one of them;
    and a few strides, by which samples come to positions near each other, move on by as much as covers the window.
    """
    least = max(1, windows * length // sampled)
    first, *others = (stride for stride in range(least, least + max(length, least // 10) + 1) if gcd(stride, length) == 1)
    number = windows * length // least

    def covers(stride: int) -> bool:
        steps = (times * stride % length for times in range(1, min(NEIGHBOURS, number) + 1))
        return all(min(step, length - step) * number >= length for step in steps)

    return next((stride for stride in (first, *others) if stride <= 1.1 * least and covers(stride)), first)
