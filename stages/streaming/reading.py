"""In which order the layers of a block read their inputs, which of them read the same, and what its modules note while it runs.

All is found by a run with zeros for weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from stages.streaming.architecture import Layer, kind_of_block, unsupported
from stages.streaming.calls import Call, run_block
from stages.streaming.products import Factors, zeros_in

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel


class Identity:
    """Which tensor of which content: equal for two tensors of the same memory that nothing wrote into in between.

    It does not keep the tensor alive; its address is not used again while this object is there.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        place = (tensor.storage_offset(), tensor.numel(), tensor.shape[-1], tensor.stride(-1))
        self._facts = (StorageWeakRef(tensor.untyped_storage()), place, tensor._version)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)


@dataclass(frozen=True, kw_only=True)
class ReadingOrder:
    """How a block reads.

    inputs: for each distinct input the layers that read it, in the order in which they are first read.
    noted: (path of a module, name of an attribute) of what modules set while the block runs, such as the state of a recurrence.
    """

    inputs: list[list[Layer]]
    noted: list[tuple[str, str]]


def reading_orders(model: "PreTrainedModel", blocks: nn.ModuleList, layers: list[list[Layer]], calls: list[Call]) -> list[ReadingOrder]:
    """Find how each block reads.

    Experts read tokens that depend on the router: which of their matrices read the same tokens is that of one expert for all, they come
    one after another, and those of a module whose experts were not called come last.

    Args:
        blocks: without weights. layers: of each block, those of interest. calls: one for each block, of a few tokens, on the CPU.

    Raises:
        ArchitectureError: a layer reads two inputs in one call of its block, or a module writes into a buffer or a container of its own;
            names it.
    """
    known: dict[Any, ReadingOrder] = {}
    shared: dict[type, Any] = {}  # mappings into which blocks write what later ones read, so that all of them must run
    orders = []
    for index, block in enumerate(blocks):
        key = (kind_of_block(block), tuple(layers[index]))
        if key not in known or shared:
            known[key] = _reading_order(model, index, block, layers[index], calls[index].example(shared))
        orders.append(known[key])
    return orders


def _reading_order(model: "PreTrainedModel", index: int, block: nn.Module, layers: list[Layer], call: Call) -> ReadingOrder:
    experts = {layer.name for layer in layers if layer.expert is not None}
    first: dict[str, Identity] = {}  # name of a layer -> what it read first
    kept = []  # so that nothing is written where these were

    def receive(name: str, tensor: torch.Tensor) -> None:
        identity = Identity(tensor)
        kept.append(tensor)
        if name not in experts and first.setdefault(name, identity) != identity:
            reason = (
                f"layer {name} of block {index} reads two inputs in one call of its block, wanted one with prune.propagate = sequential"
            )
            raise unsupported(model, f"{reason}; prune=exact takes both")
        first.setdefault(name, identity)

    with torch.no_grad(), zeros_in(block), reads(block, layers, receive):
        before = _attributes(block)
        written = _written(block)
        run_block(block, call.hidden, call)
        if changed := written.symmetric_difference(_written(block)):
            name = min(name for name, *_ in changed)
            reason = f"block {index} writes into {name} while it runs, wanted modules that keep what they have"
            raise unsupported(model, f"{reason} with prune.propagate = sequential; prune=exact runs one micro-batch after another")
        after = _attributes(block)
    noted = [key for key in after if key not in before or after[key] is not before[key]]
    for path, attribute in noted:
        restore(block.get_submodule(path), attribute, before.get((path, attribute), MISSING))
    names = [*first, *(name for name in dict.fromkeys(layer.name for layer in layers) if name not in first)]
    inputs: dict[Any, list[str]] = {}
    for name in names:
        inputs.setdefault(first.get(name, name), []).append(name)
    return ReadingOrder(inputs=_in_order(list(inputs.values()), layers), noted=noted)


MISSING = object()  # stands for an attribute that is not there


def restore(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module, or delete it where the value is MISSING."""
    if value is MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def _attributes(block: nn.Module) -> dict[tuple[str, str], Any]:
    """(path of a module, name) -> value of all attributes that are no parameters, buffers, modules or hooks."""
    of_all = nn.Module().__dict__.keys()
    return {(path, name): value for path, module in block.named_modules() for name, value in module.__dict__.items() if name not in of_all}


def _written(block: nn.Module) -> set[tuple[Any, ...]]:
    """What changes where a module writes into a buffer or a container that it has."""
    buffers = {(name, buffer._version) for name, buffer in block.named_buffers()}
    containers = {
        (f"{path}.{name}", id(value), tuple(map(id, value.values() if isinstance(value, dict) else value)))
        for (path, name), value in _attributes(block).items()
        if isinstance(value, (dict, list, set))
    }
    return buffers | containers


def _in_order(inputs: list[list[str]], layers: list[Layer]) -> list[list[Layer]]:
    """Distinct inputs by layer instead of by name; those of the experts of one module expert after expert."""
    modules: dict[str, list[list[str]]] = {}  # those of linear layers have one input each
    experts = {layer.name: layer.module for layer in layers if layer.expert is not None}
    for names in inputs:
        modules.setdefault(experts.get(names[0], names[0]), []).append(names)
    order = []
    for of_module in modules.values():
        numbers = sorted({layer.expert or 0 for layer in layers if layer.name in of_module[0]})
        for expert, names in ((expert, names) for expert in numbers for names in of_module):
            order.append([layer for layer in layers if layer.name in names and (layer.expert or 0) == expert])
    return [group for group in order if group]


@contextmanager
def reads(block: nn.Module, layers: list[Layer], receive: Any) -> Iterator[None]:
    """Pass the name of each layer that reads, and what it reads, to a function; weights may be zeros that experts have in common."""
    others: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            if layer.is_module_of(block):
                hook = partial(lambda name, _, arguments: receive(name, arguments[0]), layer.name)
                stack.callback(block.get_submodule(layer.module).register_forward_pre_hook(hook).remove)
            else:
                others[layer.name] = block.get_parameter(layer.name)
        if others:
            stack.enter_context(Factors(others, lambda tokens: receive(*tokens[0])))
        yield
