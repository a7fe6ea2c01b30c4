"""What the layers of a block read while windows run through it: a statistic and a sample of tokens for each distinct input.

Layers that are handed the same tensor share both. A linear layer is watched by a hook; an expert, whose weight is a slice of
one parameter for all experts, by the product in which that slice appears.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from stages.errors import PruningError
from stages.pruning.distributed import all_reduce
from stages.pruning.statistics import Statistic
from stages.streaming.architecture import Layer
from stages.streaming.stream import Stream


class _LastInputSeen(Exception):
    """Raised before the product of a block's last layer: nobody reads its output while statistics are collected."""


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What was seen of one distinct input.

    statistic: over all tokens of all ranks. sample: parts of [tokens, columns], in the compute dtype.
    tokens: how many were seen, on all ranks. routed: False for an expert that was given tokens which did not choose it.
    """

    statistic: Statistic
    sample: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    routed: bool = True

    def sampled(self) -> torch.Tensor:
        """[tokens, columns], float32."""
        return torch.cat(self.sample).float()

    def reorder(self, order: torch.Tensor) -> None:
        """Make the input `order[k]`, int64, the k-th."""
        self.statistic.reorder(order)
        self.sample = [part[:, order] for part in self.sample]


class Observer:
    """Watches the layers of one loaded block.

    Args:
        layers: those to watch.
        statistic: makes an empty statistic from a number of columns and a device.
        tokens: how many all processes will see; sampled: about how many of them to keep, evenly spread. Of an expert's, the
            first eighth of that number.
        first_token: of this process among all.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: list[Layer],
        statistic: Callable[[int, torch.device], Statistic],
        tokens: int,
        sampled: int,
        first_token: int = 0,
    ) -> None:
        self.block, self.layers, self.statistic, self.sampled = block, layers, statistic, sampled
        self.stride, self.first_token, self.batch = max(1, tokens // sampled), first_token, (0, 0)
        self.leader: dict[Layer, Layer] = {}
        self.inputs: dict[Layer, Inputs] = {}
        self._handed: dict[tuple[Any, ...], tuple[Layer, torch.Tensor]] = {}
        self._order: list[Layer] = []
        self._last: Layer | None = None
        self._stop = False
        self._entered: dict[str, list[torch.Tensor]] = {}
        self._experts = [layer for layer in layers if layer.expert is not None]
        linear_layers = [layer for layer in layers if layer.expert is None]
        self._hooks = {layer: block.get_submodule(layer.module).register_forward_pre_hook(self._watch(layer)) for layer in linear_layers}
        modules = {layer.module for layer in self._experts}
        self._doors = [block.get_submodule(path).register_forward_pre_hook(self._enter(path), with_kwargs=True) for path in modules]

    def run(self, hidden: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor], *, stop: bool) -> torch.Tensor | None:
        """Run some windows through the block.

        Args:
            hidden: [windows, tokens, width]. forward: calls the block with it.
            stop: leave out what comes after the last layer's input, once it is known which layer that is.

        Returns:
            The block's output, or None if it was left out.
        """
        self.batch, self._stop, self._order = (hidden.shape[0], hidden.shape[1]), stop, []
        try:
            with self._products():
                return forward(hidden)
        except _LastInputSeen:
            return None
        finally:
            self.first_token += hidden.shape[0] * hidden.shape[1]
            self._handed.clear()
            self._drop_followers()

    def _products(self) -> AbstractContextManager[object]:
        if not self._experts:
            return nullcontext()
        return ExpertProducts(self.block, self._experts, lambda layer, inputs, _: self.see(layer, inputs))

    def _drop_followers(self) -> None:
        if self._last is None and self._order and self._order[-1].expert is None:
            self._last = self._order[-1]
        for layer, leader in self.leader.items():
            if layer not in (leader, self._last) and layer in self._hooks:
                self._hooks.pop(layer).remove()

    def _watch(self, layer: Layer) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self.see(layer, arguments[0])
            if self._stop and layer == self._last:
                raise _LastInputSeen

        return hook

    def _enter(self, path: str) -> Any:
        """Keep a sample of the tokens that reach a mixture, for the experts that too few of them choose."""

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            tokens = (*arguments, *keywords.values())[0]
            self._entered.setdefault(path, []).append(self._spread(tokens))

        return hook

    @torch.no_grad()
    def see(self, layer: Layer, inputs: torch.Tensor) -> None:
        """Take in what a layer is handed, unless another layer was handed the same."""
        self._order.append(layer)
        key = (inputs.data_ptr(), inputs.numel(), inputs._version)
        if layer not in self.leader:
            self.leader[layer], _ = self._handed.setdefault(key, (layer, inputs))  # held: no other tensor gets this address
        if self.leader[layer] == layer:
            self._take(layer, inputs)

    def _take(self, layer: Layer, inputs: torch.Tensor) -> None:
        columns = inputs.shape[-1]
        if layer not in self.inputs:
            self.inputs[layer] = Inputs(statistic=self.statistic(columns, inputs.device))
        seen = self.inputs[layer]
        rows = inputs.reshape(-1, columns)
        if layer.expert is None:
            if len(rows) != self.batch[0] * self.batch[1]:
                raise PruningError(f"layer {layer.name}: found {len(rows)} tokens, wanted the block's {self.batch[0]} x {self.batch[1]}")
            seen.statistic.add(rows.view(*self.batch, columns))
            seen.sample.append(self._spread(rows))
        else:
            seen.statistic.add(rows[None])
            seen.sample.append(rows[: max(0, max(1, self.sampled // 8) - sum(map(len, seen.sample)))].clone())
        seen.tokens += len(rows)

    def _spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every stride-th token of the calibration set, whatever the micro-batch: [tokens, columns]."""
        return tokens.detach().reshape(-1, tokens.shape[-1])[-self.first_token % self.stride :: self.stride].clone()

    def finish(self, minimum: int | None) -> None:
        """Add up over ranks, and give experts that fewer than `minimum` tokens chose the sample of all that reached the mixture.

        An expert's few tokens tell little of what it reads; what its router would send it is like what it sends the others.
        With None experts are taken as they come, and one that no token chose is left out.
        """
        counts = torch.tensor([self.inputs[layer].tokens if layer in self.inputs else 0 for layer in self.layers])
        for layer, count in zip(self.layers, all_reduce(counts).tolist(), strict=True):
            if layer.expert is not None:
                self._settle(layer, enough=count >= max(1, minimum or 0))
        for door in self._doors:
            door.remove()  # what is sent in now is no new token
        for path, expert in self._starved() if minimum is not None else []:
            self._send(path, expert)
        for layer, count in zip(self.layers, counts.tolist(), strict=True):
            if self.leader.get(layer) == layer:
                self.inputs[layer].statistic.finish(all_reduce)
                self.inputs[layer].tokens = count
        for hook in self._hooks.values():
            hook.remove()

    def _settle(self, layer: Layer, enough: bool) -> None:
        """Forget an expert that too few tokens chose; make an empty entry where all it was given went to other ranks."""
        if not enough:
            self.inputs.pop(layer, None)
            self.leader.pop(layer, None)
        elif layer not in self.leader:
            weight = self.block.get_parameter(layer.name)
            empty = weight.new_empty(0, weight.shape[-1])
            self.leader[layer] = layer
            self.inputs[layer] = Inputs(statistic=self.statistic(weight.shape[-1], weight.device), sample=[empty])

    def _starved(self) -> list[tuple[str, int]]:
        missing = [layer for layer in self.layers if layer not in self.leader]
        starved = {(layer.module, layer.expert) for layer in missing if layer.expert is not None}
        return sorted((path, expert) for path, expert in starved if path in self._entered)

    def _send(self, path: str, expert: int) -> None:
        """All sampled tokens to one expert."""
        tokens = torch.cat(self._entered[path])
        chosen = torch.full((len(tokens), 1), expert, device=tokens.device)
        with self._products():
            self.block.get_submodule(path)(tokens, chosen, torch.ones_like(chosen, dtype=tokens.dtype))
        for layer in self.layers:
            if (layer.module, layer.expert) == (path, expert):
                self._settle(layer, enough=True)  # this process may have no sampled token
                self.inputs[self.leader[layer]].routed = False

    def groups(self) -> Iterator[tuple[Inputs, list[Layer]]]:
        """Each distinct input with the layers that read it; its statistic is let go of with it."""
        for leader in [layer for layer in self.layers if layer in self.inputs]:  # the same order in every process
            yield self.inputs.pop(leader), [layer for layer in self.layers if self.leader.get(layer) == leader]


def watch(stream: Stream, block: nn.Module, layers: list[Layer], statistic: type[Statistic], sampled: int = 1) -> Observer:
    """An observer of what a stream's windows make some layers of a loaded block read; see Observer."""
    length = stream.shape[1]
    return Observer(block, layers, statistic, stream.all_windows * length, sampled, stream.first_window * length)


class ExpertProducts(TorchFunctionMode):
    """Hands on the input and the output of every product with an expert's weight.

    Args:
        block: loaded. experts: those to watch.
        take: called with the layer, [tokens, columns] and [tokens, rows].
    """

    def __init__(self, block: nn.Module, experts: list[Layer], take: Callable[[Layer, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.experts = {block.get_parameter(layer.name)[layer.expert].data_ptr(): layer for layer in experts}
        self.take = take

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        if function is linear and (layer := self.experts.get(arguments[1].data_ptr())) is not None:
            self.take(layer, arguments[0], output)
        return output
