"""The matrices of a block that make a router: what is computed from them decides which experts run and with what weights, and no more.

It is seen in a run of the block with zeros for weights, in which NaN stand in for outputs of a matrix, and zeros for what experts return.
Those of a router, however many layers it has, reach what the experts are called with besides tokens, and neither these tokens nor the
hidden states that the block returns. Those of attention or of a shared expert reach the hidden states, however many rows they have.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stages.streaming.mixture import is_routed
from stages.streaming.products import Weights, products, storage, zeros_in

Run = Callable[[nn.Module], torch.Tensor]


@torch.no_grad()
def find_routers(block: nn.Module, matrices: Iterable[str], experts: set[str], run: Run) -> set[str]:
    """Find the matrices of a block that make a router.

    Args:
        block: without weights. matrices: names of parameters that tokens are multiplied with, without those that hold experts.
        experts: paths of the modules that hold experts. A router is found of those that are called with tokens, the experts that these
            chose, and weights.
        run: runs the block on the CPU, and returns its hidden states.

    Raises:
        ValueError: with zeros for weights the block's own values are NaN, by which none can be told.
    """
    modules = [block.get_submodule(path) for path in sorted(experts)]
    if not any(map(is_routed, modules)):
        return set()
    routers = set()
    with zeros_in(block):
        routing, others = _observed(block, modules, run)
        if _has_nan([routing, others]):
            raise ValueError("with zeros for weights a block with experts gives NaN, wanted numbers, by which its router is told")
        for name in matrices:
            with _Spoiled(block.get_parameter(name)):
                spoiled_routing, spoiled_others = _observed(block, modules, run)
            if not _are_same(spoiled_routing, routing) and _are_same(spoiled_others, others):
                routers.add(name)
    return routers


def _observed(block: nn.Module, modules: list[nn.Module], run: Run) -> tuple[list[Any], list[Any]]:
    """What mixtures are called with besides tokens; and these tokens, and the hidden states of a run in which experts return zeros."""
    routing, others = list[Any](), list[Any]()

    def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = signature(module.forward).bind(*arguments, **keywords).arguments.values()
        tokens, *rest = (value.clone() if isinstance(value, torch.Tensor) else value for value in given)
        others.append(tokens)
        routing.extend(rest if is_routed(module) else ())

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(lambda _, __, output: _zeros_like(output)) for module in modules]
    try:
        return routing, [run(block), others]
    finally:
        for hook in hooks:
            hook.remove()


def _zeros_like(output: Any) -> Any:
    """Zeros for all tensors that a module returned."""
    if isinstance(output, tuple):
        return tuple(map(_zeros_like, output))
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else output


def _has_nan(values: Any) -> bool:
    return any(map(_has_nan, values)) if isinstance(values, list) else isinstance(values, torch.Tensor) and bool(values.isnan().any())


def _are_same(values: Any, expected: Any) -> bool:
    """Whether all tensors in a list, and what else there is, have the same values; NaN is the same as NaN."""
    if isinstance(values, list):
        return len(values) == len(expected) and all(map(_are_same, values, expected))
    if isinstance(values, torch.Tensor):
        return values.shape == expected.shape and bool(((values == expected) | (values.isnan() & expected.isnan())).all())
    return bool(values == expected)


class _Spoiled(TorchFunctionMode):
    """Lets NaN stand in for outputs of products with a parameter: all of the first token, which weigh its experts; and of others all but
    the first, so that they choose others."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self.weights = Weights({None: parameter}, storage)

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        self.weights.follow(function, arguments, output)
        for product in products(function, arguments, keywords):
            if product.weight in self.weights:
                output = output.clone()
                by_rows = output.mT if product.by_columns else output
                by_rows[..., 1:] = by_rows[(0,) * (by_rows.dim() - 1)] = torch.nan
        return output
