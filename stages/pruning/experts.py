"""Record the inputs of layers that are no modules, such as the experts of a mixture, each a slice of one parameter.

An expert to which the router sent few tokens is calibrated on a sample of all tokens that reached the mixture.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from stages.pruning.inputs import CalibratedOn, Inputs, Recorder
from stages.streaming.architecture import Layer
from stages.streaming.mixture import is_routed
from stages.streaming.products import Products


def products_of(block: nn.Module, layers: list[Layer], receive: Callable[[Layer, torch.Tensor, torch.Tensor], None]) -> Products:
    """Pass the tokens and the output of every product with the weight of some layers, [..., columns] and [..., rows], to a function.

    Args:
        block: loaded.
    """
    return Products({layer: weight_of(block, layer) for layer in layers}, receive)


def weight_of(block: nn.Module, layer: Layer) -> torch.Tensor:
    """The weight of a layer that is no module, as stored."""
    parameter = block.get_parameter(layer.name)
    return parameter if layer.expert is None else parameter[layer.expert]


def routed_modules(block: nn.Module, layers: list[Layer]) -> set[str]:
    """The paths of modules that are called with tokens, the experts that they chose, and weights."""
    paths = {layer.module for layer in layers if layer.expert is not None}
    return {path for path in paths if is_routed(block.get_submodule(path))}


def route_to(module: nn.Module, tokens: torch.Tensor, expert: int) -> None:
    """Call a routed module with all tokens, [tokens, columns], sent to one expert.

    Code that is not behind transformers' own wrapper of experts is handed a second choice of weight 0, of another expert: LongCat's
    squeezes a single choice away.
    """
    alone = hasattr(module, "is_transposed") or len(next(module.parameters())) == 1
    chosen = torch.tensor([expert] if alone else [expert, expert - 1 if expert else 1], device=tokens.device).expand(len(tokens), -1)
    module(tokens, chosen, (chosen == expert).to(tokens.dtype))


class Experts:
    """Passes the inputs of experts, and of other layers that are no modules, to a recorder.

    Args:
        block: loaded.
    """

    def __init__(self, block: nn.Module, layers: list[Layer], recorder: Recorder[Any]) -> None:
        self.block, self.layers, self.recorder = block, layers, recorder
        self.read: Callable[[Layer, torch.Tensor], None] | None = None  # is told of what experts read, too

    def recording(self, expert: int | None = None) -> AbstractContextManager[object]:
        """Record while the block runs, or while one expert of it does."""
        layers = self.layers if expert is None else [layer for layer in self.layers if layer.expert == expert]
        return products_of(self.block, layers, self._record) if layers else nullcontext()

    def _record(self, layer: Layer, tokens: torch.Tensor, _: torch.Tensor) -> None:
        if layer.expert is None:
            self.recorder.add_windows(layer, tokens)
            return
        self.recorder.add_tokens(layer, tokens)
        if self.read is not None:
            self.read(layer, tokens)


class FewTokenExperts:
    """The rule for experts with few routed tokens: they are calibrated on a sample of all tokens that reached their mixture.

    A statistic over a few tokens is unreliable, and the tokens that a router sends to one expert resemble those of the others. A module
    that is called with tokens and their routing is called with the sample, all of it routed to the expert. Where a module has another
    form, the sample is of what all experts read at the same place.
    """

    def __init__(self, experts: Experts) -> None:
        self.experts, self.sample = experts, experts.recorder.sample
        self._reached: dict[str, list[torch.Tensor]] = {}  # module of a mixture's experts -> sampled tokens
        self._read: dict[str, list[torch.Tensor]] = {}  # parameter that holds experts -> a sample of what they read
        self._modules = routed_modules(experts.block, experts.layers)
        self._hooks = [
            experts.block.get_submodule(path).register_forward_pre_hook(self._hook(path), with_kwargs=True) for path in self._modules
        ]
        if any(layer.expert is not None and layer.module not in self._modules for layer in experts.layers):
            experts.read = self._keep_read

    def _hook(self, path: str) -> Any:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
            tokens = (*arguments, *keywords.values())[0]
            self._reached.setdefault(path, []).append(self.sample.of(tokens))

        return keep

    def _keep_read(self, layer: Layer, tokens: torch.Tensor) -> None:
        if layer.module not in self._modules:
            self._read.setdefault(layer.name, []).append(tokens.detach()[:: self.sample.stride].clone())

    def apply(self, counts: dict[Layer, int], minimum: int | None) -> None:
        """Replace the recorded inputs of experts with fewer than `minimum` tokens by the sample.

        Args:
            counts: number of tokens routed to each expert, over all processes; those not in it are left as they are.
            minimum: None: recorded inputs are not replaced, and experts without tokens are left out.
        """
        for hook in self._hooks:
            hook.remove()
        experts = [layer for layer in self.experts.layers if layer.expert is not None and layer in counts]
        few = [layer for layer in experts if counts[layer] < max(1, minimum or 0)]
        for layer in experts:
            if layer in few:
                self.experts.recorder.forget(layer)
            else:  # all its tokens may be with other processes
                self._ensure(layer)
        if minimum is not None:
            self._replace(few)

    def _replace(self, few: list[Layer]) -> None:
        for path, expert in sorted({(layer.module, layer.expert or 0) for layer in few if layer.module in self._reached}):
            self._run(path, expert)
        for layer in few:
            if layer.name in self._read:
                self.experts.recorder.add_tokens(layer, torch.cat(self._read[layer.name]))
            if layer.name in self._read or layer.module in self._reached:  # this process may have no sampled token
                self._ensure(layer).calibrated_on = CalibratedOn.ALL_TOKENS

    def _ensure(self, layer: Layer) -> Inputs[Any]:
        return self.experts.recorder.ensure(layer, self.experts.block.get_parameter(layer.name))

    def _run(self, path: str, expert: int) -> None:
        """Send all sampled tokens of a mixture to one expert."""
        with self.experts.recording(expert):
            route_to(self.experts.block.get_submodule(path), torch.cat(self._reached[path]), expert)
