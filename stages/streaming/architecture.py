"""The one module that knows architectures: where a model's decoder blocks are, how to run one alone, what may be pruned in it.

The model is built without weights. Its own forward pass, with every block replaced by a recorder, tells what runs before
the blocks and what arguments each block receives; so nothing here names a model family.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.checkpoint.layout import ParameterSlice, read_layout, tied_names
from stages.checkpoint.model import dematerialize, empty_model, materialize, parameter_dtype, put
from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, CheckpointError

TOKENS_AT_ONCE = 256  # whose logits are in memory where survivors learn or gradients are taken


class _AllRecorded(Exception):
    """Raised by the last recorder: what comes after the blocks is of no interest."""


class _StandIn(nn.Module):
    """Takes a block's place in the list of blocks; the block's attributes can be read through it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Notes what its block is called with and passes the hidden states on, in a tuple where the model expects one."""

    def __init__(self, block: nn.Module, calls: list["Call"], last: bool, in_tuple: bool) -> None:
        super().__init__(block)
        self.calls, self.last, self.in_tuple = calls, last, in_tuple

    def forward(self, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        self.calls.append(Call(hidden=hidden, arguments=arguments, keywords=keywords))
        if self.last:
            raise _AllRecorded
        return (hidden,) if self.in_tuple else hidden


class _Result(_StandIn):
    """Gives the hidden states that the real blocks made."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, in_tuple: bool) -> None:
        super().__init__(block)
        self.output = (hidden,) if in_tuple else hidden

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.output


@dataclass(kw_only=True, slots=True)
class Call:
    """What a block was called with.

    hidden: [windows, tokens, width]. arguments, keywords: everything else: masks, positions, rotary embeddings.
    """

    hidden: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Layer(NamedTuple):
    """A product with inputs of its own: a linear layer, or an expert.

    name: of its weight inside the block. expert: its index where the weight holds several, or None.
    """

    name: str
    expert: int | None

    @property
    def module(self) -> str:
        """The path inside the block of the module that the weight belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix in scope: all of a tensor of the checkpoint, or one expert of a tensor that holds several.

    tensor: its name in the checkpoint. expert: its index there, or None.
    target: the part of the block's parameter that it is.
    transposed: stored as [columns, rows], as GPT-2's Conv1D does.
    shape: (rows, columns) = (outputs, inputs).
    """

    tensor: str
    expert: int | None
    parameter_slice: ParameterSlice
    transposed: bool
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def size(self) -> int:
        """How many weights."""
        return self.shape[0] * self.shape[1]

    @property
    def layer(self) -> Layer:
        """The product in which it appears."""
        return Layer(self.parameter_slice.name, self.parameter_slice.expert)

    def own(self, outputs: torch.Tensor) -> torch.Tensor:
        """Its [rows] of a tensor that has one entry for each of its layer's outputs."""
        return outputs if self.parameter_slice.rows is None else outputs[slice(*self.parameter_slice.rows)]

    def part_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """[rows, columns], a view of a tensor that is laid out like the block's parameter: it, its mask, its gradient."""
        part = self.parameter_slice.of(parameter)
        return part.T if self.transposed else part

    def of(self, block: nn.Module) -> torch.Tensor:
        """[rows, columns], a view of the loaded block's parameter."""
        return self.part_of(block.get_parameter(self.parameter_slice.name))

    def stored_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """[rows, columns], a view of a tensor that is laid out like the checkpoint's: it, or its mask."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.T if self.transposed else part


class Decoder:
    """A decoder language model of which one block at a time has weights.

    Args:
        checkpoint: its tensors and, beside them, its config.json.
        dtype, device: of the computation.

    Raises:
        ArchitectureError: the blocks cannot be found, or the checkpoint's tensors are not the model's; names the model type.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._read_again: dict[str, torch.Tensor] = {}  # of the block that is loaded, see stored
        self.model = empty_model(checkpoint.directory, dtype)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # one expert after another, each by its own product
        self.name = self.model.config.model_type
        self.prefix, self.blocks = self._find_blocks(self.model.config.get_text_config().num_hidden_layers)
        try:
            self.layout = read_layout(self.model, checkpoint)
        except CheckpointError as error:
            raise self._unsupported(str(error)) from None

    def _unsupported(self, reason: str) -> ArchitectureError:
        return ArchitectureError(f"{self.name}: {reason}; this architecture is not supported")

    def _find_blocks(self, count: int) -> tuple[str, nn.ModuleList]:
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        found = [(name, module) for name, module in found if len(module) == count]
        outermost = [(name, module) for name, module in found if not any(name.startswith(other + ".") for other, _ in found)]
        if len(outermost) != 1:
            raise self._unsupported(f"found {len(outermost)} lists of {count} modules, wanted one list of decoder blocks")
        return outermost[0]

    @cached_property
    def _tensors(self) -> list[dict[str, ParameterSlice]]:
        """For each block its tensors: name in the checkpoint -> target, the parameter named as inside the block.

        In the order of the model's parameters.
        """
        tensors: list[dict[str, ParameterSlice]] = [{} for _ in self.blocks]
        for name, target in self.layout.items():
            if target.name.startswith(f"{self.prefix}."):
                index, inner = target.name.removeprefix(f"{self.prefix}.").split(".", 1)
                tensors[int(index)][name] = replace(target, name=inner)
        orders = [{name: position for position, name in enumerate(block.state_dict())} for block in self.blocks]
        return [
            dict(sorted(found.items(), key=lambda item: (order[item[1].name], item[1].expert or 0, item[1].rows or (0, 0))))
            for found, order in zip(tensors, orders, strict=True)
        ]

    def tensors(self, index: int) -> list[str]:
        """Names in the checkpoint of all tensors of a block."""
        return list(self._tensors[index])

    @cached_property
    def matrices(self) -> list[list[Matrix]]:
        """The matrices in scope of every block: its linear layers and experts, without routers.

        Raises:
            ArchitectureError: a block has none, a weight that is neither a linear layer's nor an expert's nor a router's, or
                a matrix that is tied to another tensor; names the tensor.
        """
        return [self._matrices(index) for index in range(len(self.blocks))]

    @cached_property
    def _uses(self) -> Counter[int]:
        """Under how many names each parameter is found, by its id."""
        return Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))

    def _matrices(self, index: int) -> list[Matrix]:
        block, tied, found = self.blocks[index], tied_names(self.model), []
        parameters, buffers = dict(block.named_parameters(remove_duplicate=False)), dict(block.named_buffers())
        for tensor, target in self._tensors[index].items():
            if target.name in buffers or parameters[target.name].dim() < 2 or self._is_router(block, target.name):
                continue
            found += self._matrices_of(block, tensor, target)
            if f"{self.prefix}.{index}.{target.name}" in tied or self._uses[id(parameters[target.name])] > 1:
                raise ArchitectureError(f"{self.name}: {tensor} is tied to another tensor, wanted matrices of the blocks alone")
        if not found:
            raise self._unsupported(f"block {index} has no linear layers to prune")
        return found

    def _matrices_of(self, block: nn.Module, tensor: str, target: ParameterSlice) -> list[Matrix]:
        """One matrix, or one for each expert of a tensor that holds them all."""
        path, _, leaf = target.name.rpartition(".")
        module, parameter = block.get_submodule(path), block.get_parameter(target.name)
        linear = leaf == "weight" and isinstance(module, (nn.Linear, Conv1D))
        if not linear and not _is_experts(module, parameter):
            raise self._unsupported(f"{tensor} of shape {list(parameter.shape)} is neither a linear layer's weight nor experts'")
        if linear or target.expert is not None:
            columns_first = isinstance(module, Conv1D)
            rows, columns = reversed(target.of(parameter).shape) if columns_first else target.of(parameter).shape
            return [Matrix(tensor=tensor, expert=None, parameter_slice=target, transposed=columns_first, shape=(rows, columns))]
        experts = [replace(target, expert=expert) for expert in range(len(parameter))]
        _, rows, columns = parameter.shape
        return [
            Matrix(tensor=tensor, expert=part.expert, parameter_slice=part, transposed=False, shape=(rows, columns)) for part in experts
        ]

    def layers(self, index: int) -> list[Layer]:
        """The layers of a block that matrices in scope appear in, each once."""
        return list(dict.fromkeys(matrix.layer for matrix in self.matrices[index]))

    def _is_router(self, block: nn.Module, name: str) -> bool:
        """Whether a weight beside experts has one output for each of them, or one for a shared expert."""
        path, parameter = name.rpartition(".")[0], block.get_parameter(name)
        for owner, module in block.named_modules():
            experts = [weight for weight in module.parameters(recurse=False) if _is_experts(module, weight)]
            beside = owner.rpartition(".")[0]
            if experts and owner != path and path.startswith(f"{beside}." if beside else ""):
                return parameter.dim() == 2 and len(parameter) in (1, len(experts[0]))
        return False

    @torch.no_grad()
    def calls(self, windows: torch.Tensor) -> list[Call]:
        """Run what comes before the blocks, and note how each block is called.

        Args:
            windows: [windows, tokens], int64.

        Returns:
            One call a block; the first one's `hidden` is the blocks' input, on the device.

        Raises:
            ArchitectureError: the blocks hand on something else than hidden states.
        """
        calls: list[Call] = []
        last = len(self.blocks) - 1
        recorders = self._standing_in(lambda index, block: _Recorder(block, calls, index == last, self._in_tuples))
        with recorders, suppress(_AllRecorded):
            self.model(input_ids=windows.to(self.device), use_cache=False)
        if len(calls) != len(self.blocks) or any(call.hidden.shape != calls[0].hidden.shape for call in calls):
            raise self._unsupported("its blocks do not hand plain hidden states on, each to the next")
        return calls

    @cached_property
    def _in_tuples(self) -> bool:
        """Whether the model takes the first element of what a block returns.

        If so, and it is handed a tensor, the second block receives the first window alone.
        """
        calls: list[Call] = []
        with self._standing_in(lambda index, block: _Recorder(block, calls, index == min(1, len(self.blocks) - 1), False)):
            try:
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
            except _AllRecorded:
                pass
            except (IndexError, RuntimeError, ValueError):
                return True
        return calls[-1].hidden.dim() != calls[0].hidden.dim()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run what comes after the blocks.

        Args:
            hidden: [windows, tokens, width], the last block's output, on the device.

        Returns:
            [windows, tokens, vocabulary], compute dtype.
        """
        with self._standing_in(lambda _, block: _Result(block, hidden, self._in_tuples)):
            return self.model(inputs_embeds=hidden, use_cache=False).logits

    @contextmanager
    def _standing_in(self, make: Any) -> Iterator[None]:
        originals = list(self.blocks)
        for index, block in enumerate(originals):
            self.blocks[index] = make(index, block)
        try:
            yield
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block

    @contextmanager
    def before_blocks(self) -> Iterator[None]:
        """Give weights to all but the blocks and an output embedding of its own, for as long as `calls` is needed."""
        output = self.model.get_output_embeddings()
        skipped = {id(parameter) for parameter in output.parameters()} if output is not None else set()
        skipped -= {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        with self._outside_blocks(skipped, lookup=True):
            yield

    @contextmanager
    def after_blocks(self) -> Iterator[None]:
        """Give weights to all but the blocks, for as long as `logits` is needed."""
        with self._outside_blocks(set(), lookup=False):
            self.model.tie_weights()
            yield

    @contextmanager
    def _outside_blocks(self, skipped: set[int], lookup: bool) -> Iterator[None]:
        """Where embeddings are only looked up, they stay in their stored dtype and the rows found are cast: the same values."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        inside, tied = f"{self.prefix}.", tied_names(self.model)
        needed = {
            tensor: target for tensor, target in self.layout.items() if not target.name.startswith(inside) and target.name not in tied
        }
        needed = {tensor: target for tensor, target in needed.items() if id(parameters[target.name]) not in skipped}
        tables = {f"{name}.weight": module for name, module in self.model.named_modules() if type(module) is nn.Embedding}
        hooks = [module.register_forward_hook(lambda _, __, found: found.to(self.dtype)) for module in tables.values()]
        for tensor, target in needed.items():
            value = self.checkpoint.tensor(tensor)
            if not (lookup and target.name in tables) and value.is_floating_point():
                value = value.to(parameter_dtype(self.model, target.name, self.dtype))
            put(self.model, target.name, value.to(self.device))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in {*(target.name for target in needed.values()), *(tied & parameters.keys())}:
                dematerialize(self.model, name)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """A block's tensors as stored, on the host: name in the checkpoint -> tensor. Safe to call in another thread."""
        return {tensor: self.checkpoint.tensor(tensor, pinned=self.device.type == "cuda") for tensor in self._tensors[index]}

    @contextmanager
    def loaded(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        """Give weights to one block; the tensors, from `read`, are taken out of their dictionary one by one."""
        block, parameters = self.blocks[index], {}
        for tensor, target in self._tensors[index].items():
            if target.name not in parameters:
                dtype = parameter_dtype(self.model, f"{self.prefix}.{index}.{target.name}", self.dtype)
                parameters[target.name] = materialize(block, target.name, dtype=dtype, device=self.device)
            target.of(parameters[target.name]).copy_(tensors.pop(tensor), non_blocking=True)
        try:
            yield block
        finally:
            for name in parameters:
                dematerialize(block, name)
            self._read_again.clear()

    def stored(self, matrix: Matrix, block: nn.Module) -> torch.Tensor:
        """A matrix of a loaded block with the values of the checkpoint, [rows, columns], float32.

        Read again where the compute dtype does not hold all of them.
        """
        stored = self.checkpoint.dtype(matrix.tensor)
        if self.dtype in (stored, torch.float32):
            return matrix.of(block).float()
        if matrix.expert is None:
            return matrix.stored_in(self.checkpoint.tensor(matrix.tensor)).to(self.device).float()
        if matrix.tensor not in self._read_again:
            self._read_again[matrix.tensor] = self.checkpoint.tensor(matrix.tensor)
        return matrix.stored_in(self._read_again[matrix.tensor]).to(self.device).float()


def _is_experts(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds a mixture's experts, [experts, outputs, inputs], each a linear layer's weight."""
    return parameter.dim() == 3 and getattr(module, "is_transposed", None) is False


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """[windows, tokens, width] through one loaded block, called as its model calls it."""
    output = block(hidden, *call.arguments, **call.keywords)
    return output[0] if isinstance(output, (tuple, list)) else output
