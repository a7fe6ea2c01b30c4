"""Products of tokens with parameters that belong to no linear layer: experts in one tensor, or a matrix that a module multiplies by itself.

A parameter is recognised by its storage, and a slice of it by its address. Which parameters are multiplied with tokens is found by running
a block of zeros: a filter of a convolution or a decay of a recurrence has two dimensions or more, too, and is no linear map of tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from stages.checkpoint.model import put

Receive = Callable[[Any, torch.Tensor, torch.Tensor], None]
POSITIONS: dict[Any, tuple[int, int]] = {  # function -> positions of the tokens and of the weight, [columns, rows], among its arguments
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), (0, 1)),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), (0, 1)),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm), (1, 2)),
}


class Product(NamedTuple):
    """A product of tokens, [..., columns], with a weight, [..., rows, columns]."""

    tokens: torch.Tensor
    weight: torch.Tensor


def product(function: Any, arguments: tuple[Any, ...]) -> Product | None:
    """The product that a call of a function computes, or None."""
    if function is linear:
        return Product(arguments[0], arguments[1])
    if function not in POSITIONS:
        return None
    tokens, weight = (arguments[position] for position in POSITIONS[function])
    return Product(tokens, weight.mT) if weight.dim() >= 2 else None


class Products(TorchFunctionMode):
    """Passes the tokens and the output of every product with some weights to a function.

    Args:
        weights: what to pass for a weight -> the weight, [rows, columns] or [columns, rows], a parameter or a slice of one.
        receive: called with that, with the tokens, [..., columns], and with the output, [..., rows].
    """

    def __init__(self, weights: dict[Any, torch.Tensor], receive: Receive) -> None:
        super().__init__()
        self.keys, self.receive = {weight.data_ptr(): key for key, weight in weights.items()}, receive

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        multiplied = product(function, arguments)
        if multiplied is None or multiplied.weight.data_ptr() not in self.keys:
            return output
        tokens, weight = multiplied
        if weight.dim() == 2:
            self.receive(self.keys[weight.data_ptr()], tokens, output)
            return output
        return torch.stack([self._receive_slice(*of_slice) for of_slice in zip(weight, tokens, output, strict=True)])

    def _receive_slice(self, weight: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Pass on one of several products that are computed together; tokens of zeros were routed to another of them.

        Returns:
            The output, of which what was passed on is a part, so that its gradients can be seen.
        """
        routed = tokens.any(dim=-1)
        routed_output = output[routed]
        self.receive(self.keys[weight.data_ptr()], tokens[routed], routed_output)
        return output.index_put((routed,), routed_output)


class _Uses(TorchFunctionMode):
    """Notes of each parameter whether tokens were multiplied with it, and whether it is stored as [columns, rows]."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {parameter.untyped_storage().data_ptr(): name for name, parameter in parameters.items()}
        self.transposed: dict[str, bool] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        multiplied = product(function, arguments)
        if multiplied is not None:
            weight = multiplied.weight
            name = self.names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                self.transposed[name] = weight.stride(-1) != 1
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
def multiplied_parameters(block: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, bool]:
    """Find the parameters of a block that tokens are multiplied with: name -> whether it is stored as [columns, rows].

    Args:
        block: without weights. run: runs it on the CPU.
    """
    with zeros_in(block), _Uses(dict(block.named_parameters())) as uses:
        run(block)
    return uses.transposed


@contextmanager
def zeros_in(block: nn.Module) -> Iterator[None]:
    """Let zeros on the CPU stand in for the weights that a block has not. They are never written, so that they take no memory."""
    parameters = {name: parameter for name, parameter in block.named_parameters(remove_duplicate=False) if parameter.is_meta}
    buffers = {name: buffer for name, buffer in block.named_buffers(remove_duplicate=False) if buffer.is_meta}
    try:
        for name, tensor in (parameters | buffers).items():
            put(block, name, _zeros(tensor))
        yield
    finally:
        for name, parameter in parameters.items():  # the same objects, by which tied parameters are known
            path, _, leaf = name.rpartition(".")
            block.get_submodule(path)._parameters[leaf] = parameter
        for name, buffer in buffers.items():
            put(block, name, buffer)


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros of a parameter's shape and dtype that are not written; of three dimensions the slices of the first are one."""
    shape = parameter.shape[1:] if parameter.dim() == 3 else parameter.shape
    unwritten = torch.from_numpy(numpy.zeros(max(1, shape.numel()) * parameter.itemsize, dtype=numpy.uint8))
    return unwritten.view(parameter.dtype)[: shape.numel()].view(shape).expand(parameter.shape)
