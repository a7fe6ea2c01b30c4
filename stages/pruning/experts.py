"""Record the inputs of the experts of a mixture. An expert is a slice of one parameter, recognised by its address in a product.

An expert to which the router sent few tokens is calibrated on a sample of all tokens that reached the mixture.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from stages.pruning.inputs import CalibratedOn, Inputs, Recorder
from stages.streaming.architecture import Layer


class ExpertProducts(TorchFunctionMode):
    """Passes the input and the output of every product with an expert's weight to a function.

    Args:
        block: loaded. experts: those to observe.
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


class Experts:
    """Passes the inputs of experts to a recorder.

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
    """The rule for experts with few routed tokens: they are calibrated on a sample of all tokens that reached their mixture.

    A statistic over a few tokens is unreliable, and the tokens that a router sends to one expert resemble those of the others.
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
        """Replace the recorded inputs of experts with fewer than `minimum` tokens by the sample.

        Args:
            counts: number of tokens routed to each expert, over all processes.
            minimum: None: recorded inputs are not replaced, and experts without tokens are left out.
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
        top_k_index = torch.full((len(tokens), 1), expert, device=tokens.device)
        with self.experts.recording():
            self.experts.block.get_submodule(path)(tokens, top_k_index, torch.ones_like(top_k_index, dtype=tokens.dtype))
