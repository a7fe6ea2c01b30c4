"""Run a block whose experts are loaded one at a time, where the block with all of its experts does not fit the memory.

    1. run the block up to its mixture of experts, and keep the tokens that reach it and the experts that they chose
    2. for each expert: load it, run the tokens that chose it, and add its outputs to those of the experts before it
    3. run the block once more, and hand it the sum as the mixture's output

An expert is run by its module's own forward method, on the same tokens in the same order as among all others, and outputs are added up
in the order of the experts: the bits are those of the module's own loop over its experts.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stages.streaming.architecture import Layer
from stages.streaming.calls import Call, block_outputs, run_block
from stages.streaming.host_memory import release_free_memory
from stages.streaming.products import products, zeros_in

if TYPE_CHECKING:
    from stages.checkpoint.delta import Change
    from stages.streaming.decoder import Decoder
    from stages.streaming.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The experts of a block.

    path: of their module in the block. parameters: names in the block of all of its parameters, [experts, ...] each.
    count: number of experts.
    """

    path: str
    parameters: tuple[str, ...]
    count: int


def is_routed(module: nn.Module) -> bool:
    """Whether a module is called with tokens, the experts that they chose, and weights."""
    return len(inspect.signature(module.forward).parameters) == 3


def find_mixture(block: nn.Module, layers: list[Layer], call: Call) -> Mixture | None:
    """Find the mixture of a block whose experts can be loaded one at a time; None where there is none.

    It is one module with transformers' interface of experts: called once, with tokens, the experts that each chose, and their weights,
    it returns the weighted sum of what these experts give. No layer of the block may read anything that follows from its output.

    Args:
        block: without weights. layers: those in scope. call: of a few tokens, on the CPU.
    """
    paths = {layer.module for layer in layers if layer.expert is not None}
    if len(paths) != 1:
        return None
    path = paths.pop()
    module = block.get_submodule(path)
    sizes = {len(parameter) if parameter.dim() > 1 else 0 for parameter in module.parameters()}
    standard = hasattr(module, "is_transposed") and is_routed(module)
    if not standard or len(sizes) != 1 or not _ends_in(block, module, call):
        return None
    names = tuple(f"{path}.{name}" for name, _ in module.named_parameters())
    return Mixture(path=path, parameters=names, count=sizes.pop())


@torch.no_grad()
def _ends_in(block: nn.Module, module: nn.Module, call: Call) -> bool:
    """Whether a block calls a mixture once, by the standard interface, and multiplies nothing that follows from its output."""
    called = []

    def forward(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tokens, chosen, weights = (*arguments, *keywords.values())
        called.append(tokens.dim() == 2 and chosen.shape == weights.shape and len(chosen) == len(tokens) == call.hidden.shape[:2].numel())
        return torch.full_like(tokens, torch.nan)

    with zeros_in(block), _calling(module, forward), _Multiplied() as multiplied:
        run_block(block, call.hidden, call.example())
    return called == [True] and not multiplied.nan


class _Multiplied(TorchFunctionMode):
    """Notes whether NaN were multiplied with a matrix."""

    nan = False

    def __torch_function__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        for product in products(function, arguments, keywords):
            self.nan = self.nan or bool(product.tokens.isnan().any())
        return function(*arguments, **(keywords or {}))


@contextmanager
def _calling(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let a function stand in for a module's forward method."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class Routing:
    """The tokens that reach a block's mixture in each window, the experts that they chose, and what these give.

    Its buffers are used for one block after another.

    Args:
        stream: of the windows; allocates the buffers, in host memory or in files.
    """

    def __init__(self, stream: "Stream") -> None:
        self.stream = stream
        self._buffers: dict[str, torch.Tensor] = {}
        self._windows = slice(0)  # that run through the block

    @contextmanager
    def recording(self, block: nn.Module, mixture: Mixture) -> Iterator[None]:
        """Keep what the mixture is called with for the windows of `running`, and let zeros be its output."""

        def forward(*arguments: Any, **keywords: Any) -> torch.Tensor:
            tokens, chosen, weights = (*arguments, *keywords.values())
            for name, tensor in (("tokens", tokens), ("chosen", chosen), ("weights", weights), ("outputs", torch.zeros_like(tokens))):
                self._of(name, tensor)[:] = tensor
            return torch.zeros_like(tokens)

        with _calling(block.get_submodule(mixture.path), forward):
            yield

    @contextmanager
    def replaying(self, block: nn.Module, mixture: Mixture) -> Iterator[None]:
        """Let the mixture's output be the sum that `run_expert` has made for the windows of `running`."""

        def forward(*arguments: Any, **keywords: Any) -> torch.Tensor:
            tokens = (*arguments, *keywords.values())[0]
            return self._of("outputs", tokens).clone()

        with _calling(block.get_submodule(mixture.path), forward):
            yield

    def running(self, windows: slice) -> None:
        """Say which windows run through the block next."""
        self._windows = windows

    def _of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The entries of a buffer for the windows that run, one for each of their tokens."""
        length = self.stream.shape[1]
        shape = (self.stream.shape[0] * length, *like.shape[1:])
        if name not in self._buffers or self._buffers[name].shape != shape or self._buffers[name].dtype != like.dtype:
            self._buffers[name] = self.stream.host_buffer(shape, like.dtype)
        return self._buffers[name][self._windows.start * length : self._windows.stop * length]

    def chosen_experts(self) -> list[int]:
        """The experts that tokens of any window chose, in order; those beyond the mixture's have no weights."""
        return self._buffers["chosen"].unique().tolist()

    def run_expert(self, module: nn.Module, expert: int, windows: slice, *, add: bool) -> None:
        """Run the tokens of some windows that chose an expert through it.

        Args:
            module: the experts', of which this one is loaded. add: whether its outputs are added to the sum.
        """
        length = self.stream.shape[1]
        rows = slice(windows.start * length, windows.stop * length)
        tokens, chosen, weights = (self._buffers[name][rows] for name in ("tokens", "chosen", "weights"))
        slot, token = (chosen == expert).T.nonzero(as_tuple=True)
        if len(token):
            output = module(tokens[token], chosen.new_full((len(token), 1), expert), weights[token, slot][:, None])
            if add:
                self._buffers["outputs"][rows].index_add_(0, token, output)


def loaded_in_turn(decoder: "Decoder", index: int, experts: Iterable[int], apply: "Apply | None" = None) -> Iterator[int]:
    """Yield each expert while it is loaded; a thread reads the next one meanwhile.

    Args:
        index: of a loaded block. apply: gives the tensors of an expert to load for those as stored; None: these.
    """
    order = list(experts)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        future = reader.submit(decoder.read_expert, index, order[0]) if order else None
        for position, expert in enumerate(order):
            tensors = future.result() if future else {}
            future = reader.submit(decoder.read_expert, index, order[position + 1]) if position + 1 < len(order) else None
            with decoder.loaded_expert(index, expert, tensors if apply is None else apply(expert, tensors)):
                yield expert
            release_free_memory()


Apply = Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def applying(changes: "dict[str, Change]") -> Apply:
    """Apply the changes of a block's tensors to experts as stored; experts must come in order, none twice."""
    by_expert = {name: enumerate(change.by_expert()) for name, change in changes.items() if len(change.shape) == 3}

    def apply(expert: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {}
        for name, tensor in tensors.items():
            if name in by_expert:
                changed[name] = next(change for number, change in by_expert[name] if number == expert).apply(tensor)
            else:
                changed[name] = changes[name].apply(tensor) if name in changes else tensor
        return changed

    return apply


def advance(stream: "Stream", index: int, block: nn.Module, routing: Routing, changes: "dict[str, Change]") -> None:
    """Run all windows through a block that is loaded without its experts; see Stream.advance.

    Args:
        changes: of the block's tensors, with which its experts are loaded.
    """
    mixture, decoder = stream.decoder.apart[index], stream.decoder
    with routing.recording(block, mixture):
        for windows, hidden, call in stream.parts(index):
            routing.running(windows)
            run_block(block, hidden, call)
    chosen = routing.chosen_experts()
    module = block.get_submodule(mixture.path)
    for expert in loaded_in_turn(decoder, index, [expert for expert in chosen if expert < mixture.count], applying(changes)):
        for windows in stream.micro_batches():
            routing.run_expert(module, expert, windows, add=True)
    replay(stream, index, block, routing)


def replay(stream: "Stream", index: int, block: nn.Module, routing: Routing) -> None:
    """Run all windows through a block whose mixture's outputs have been summed up, after which the stream is past it."""
    mixture = stream.decoder.apart[index]
    module = block.get_submodule(mixture.path)
    for expert in (expert for expert in routing.chosen_experts() if expert >= mixture.count):  # without weights
        for windows in stream.micro_batches():
            routing.run_expert(module, expert, windows, add=True)
    with routing.replaying(block, mixture):
        for windows, hidden, call in stream.parts(index):
            routing.running(windows)
            stream.put(index, windows, block_outputs(block, hidden, call), call)
    stream.require_finite(index)
