"""Products of tokens with parameters that belong to no linear layer: experts in one tensor, or a matrix that a module multiplies by itself.

A parameter is recognised by its storage, and a slice of it by its address; a module that multiplies by a cast of its weight, such as
`weight.float()`, multiplies by the weight. Which parameters are multiplied with tokens is found by running a block of zeros: a filter of a
convolution or a decay of a recurrence has two dimensions or more, too, and is no linear map of tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from stages.checkpoint.model import put
from stages.streaming.architecture import is_linear

Receive = Callable[[Any, torch.Tensor, torch.Tensor], None]
FACTORS: dict[Any, tuple[str, ...]] = {  # function -> its parameters up to both factors, which are the last two
    linear: ("input", "weight"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, torch.bmm, torch.Tensor.mm, torch.Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ("input", "batch1", "batch2")),
}
CASTS = {getattr(torch.Tensor, name) for name in ("bfloat16", "double", "float", "half", "to", "type", "type_as")}


class Product(NamedTuple):
    """A product of tokens, [..., tokens, columns], with a weight, [..., rows, columns].

    by_columns: whether a column of the output, not a row, is a token's.
    """

    tokens: torch.Tensor
    weight: torch.Tensor
    by_columns: bool = False


def products(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> list[Product]:
    """What a call of a function may compute: a product, either factor of which may be the weight."""
    if function not in FACTORS:
        return []
    given = dict(zip(FACTORS[function], arguments, strict=False)) | (keywords or {})
    left, right = (given[name] for name in FACTORS[function][-2:])
    if function is linear:
        return [Product(left, right)]
    if left.dim() < 2 or right.dim() < 2:
        return []
    return [Product(left, right.mT), Product(right.mT, left, by_columns=True)]


def storage(tensor: torch.Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


class Weights:
    """Weights by their addresses. A cast of one, which modules make anew at each call, is known by its own address.

    Args:
        weights: key -> the weight, a parameter or a slice of one. address: of a tensor.
    """

    def __init__(self, weights: Mapping[Any, torch.Tensor], address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr) -> None:
        self.address = address
        self._keys = {address(weight): key for key, weight in weights.items()}
        self._casts: dict[Any, tuple[torch.Tensor, list[int]]] = {}  # the latest of each dtype, kept so that its address is not used again

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return self.address(tensor) in self._keys

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        return self._keys[self.address(tensor)]

    def follow(self, function: Any, arguments: tuple[Any, ...], output: Any) -> None:
        """Know what a function returned, if it is a cast of a weight, or of a parameter that begins with one."""
        if function not in CASTS or not isinstance(output, torch.Tensor) or arguments[0] not in self or output in self:
            return
        source, start = arguments[0], self.address(arguments[0])
        end = start + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True)) * source.itemsize
        of_slices = {address - start: key for address, key in self._keys.items() if start <= address <= end}
        _, outdated = self._casts.pop((of_slices[0], output.dtype), (None, []))
        for address in outdated:
            del self._keys[address]
        new = {self.address(output) + offset // source.itemsize * output.itemsize: key for offset, key in of_slices.items()}
        self._casts[of_slices[0], output.dtype] = output.detach(), list(new)
        self._keys |= new


class Products(TorchFunctionMode):
    """Passes the tokens and the output of every product with some weights to a function.

    Args:
        weights: what to pass for a weight -> the weight, [rows, columns] or [columns, rows], a parameter or a slice of one.
        receive: called with that, with the tokens, [..., columns], and with the output, [..., rows].
    """

    def __init__(self, weights: dict[Any, torch.Tensor], receive: Receive) -> None:
        super().__init__()
        self.keys, self.receive = Weights(weights), receive

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        self.keys.follow(function, arguments, output)
        for product in products(function, arguments, keywords):
            if product.weight in self.keys:
                return self._received(product, output)
        return output

    def _received(self, product: Product, output: torch.Tensor) -> torch.Tensor:
        """Pass on a product. Returns the output, of which what was passed on is a part, so that its gradients can be seen."""
        by_rows = output.mT.contiguous() if product.by_columns else output
        if product.weight.dim() == 2:
            self.receive(self.keys[product.weight], product.tokens, by_rows)
        else:
            slices = zip(product.weight, product.tokens, by_rows, strict=True)
            by_rows = torch.stack([self._received_slice(*of_slice) for of_slice in slices])
        return by_rows.mT if product.by_columns else by_rows

    def _received_slice(self, weight: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Pass on one of several products that are computed together; tokens of zeros were routed to another of them."""
        routed = tokens.any(dim=-1)
        routed_output = output[routed]
        self.receive(self.keys[weight], tokens[routed], routed_output)
        return output.index_put((routed,), routed_output)


class Factors(TorchFunctionMode):
    """Passes the tokens of products with some weights to a function before they are multiplied.

    Args:
        weights: see Products.
        receive: called before each product with all weights that it multiplies by, and the tokens of each, [..., columns].
    """

    def __init__(self, weights: dict[Any, torch.Tensor], receive: Callable[[list[tuple[Any, torch.Tensor]]], None]) -> None:
        super().__init__()
        self.keys, self.receive = Weights(weights), receive

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        for product in products(function, arguments, keywords):
            if product.weight in self.keys:
                weights = product.weight if product.weight.dim() == 3 else [product.weight]
                tokens = product.tokens if product.weight.dim() == 3 else [product.tokens]
                self.receive([(self.keys[weight], of_weight) for weight, of_weight in zip(weights, tokens, strict=True)])
                break
        output = function(*arguments, **(keywords or {}))
        self.keys.follow(function, arguments, output)
        return output


class Use(NamedTuple):
    """How tokens are multiplied with a parameter.

    transposed: whether it is stored as [columns, rows]. called: whether it is the weight of a linear layer that is called with the tokens.
    groups: of a parameter with two dimensions, into how many groups of rows it is split, each multiplied with other inputs.
    """

    transposed: bool
    called: bool = False
    groups: int = 1


class _Uses(TorchFunctionMode):
    """Notes of each parameter whether tokens were multiplied with it, and how."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.parameters = dict(block.named_parameters())
        self.names, self.uses = Weights(self.parameters, storage), dict[str, Use]()

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        for product in products(function, arguments, keywords):
            if product.weight in self.names:
                name = self.names[product.weight]
                self.uses[name] = Use(transposed=product.weight.stride(-1) != 1, groups=_groups(self.parameters[name], product.weight))
        output = function(*arguments, **(keywords or {}))
        self.names.follow(function, arguments, output)
        return output


def _groups(parameter: torch.Tensor, weight: torch.Tensor) -> int:
    """Into how many groups of rows a parameter with two dimensions is split, given what a product multiplies by: all of them or one."""
    if parameter.dim() != 2:
        return 1
    if weight.dim() == 3 and weight.stride(0) != 0:
        return len(weight)
    return parameter.numel() // max(1, weight.numel()) if weight.dim() == 2 else 1


@torch.no_grad()
def multiplied_parameters(block: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Use]:
    """Find the parameters of a block that tokens are multiplied with: name -> how.

    Args:
        block: without weights. run: runs it on the CPU.
    """
    called = set()
    hooks = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(f"{name}.weight"))
        for name, module in block.named_modules()
        if is_linear(module)
    ]
    try:
        with zeros_in(block), _Uses(block) as noted:
            run(block)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: use._replace(called=name in called) for name, use in noted.uses.items()}


def zeros_in(block: nn.Module) -> AbstractContextManager[None]:
    """Let zeros on the CPU stand in for the weights that a block has not. They are never written, so that they take no memory."""
    return values_in(block, lambda _, tensor: _zeros(tensor))


@contextmanager
def values_in(block: nn.Module, value: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let tensors on the CPU stand in for the weights that a block has not.

    Args:
        value: makes one from the name of a parameter or buffer in the block, and a tensor on the meta device of its shape and dtype.
    """
    parameters = {name: parameter for name, parameter in block.named_parameters(remove_duplicate=False) if parameter.is_meta}
    buffers = {name: buffer for name, buffer in block.named_buffers(remove_duplicate=False) if buffer.is_meta}
    try:
        for name, tensor in (parameters | buffers).items():
            put(block, name, value(name, tensor))
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
