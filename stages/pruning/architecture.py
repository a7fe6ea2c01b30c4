"""The one module that knows architectures: where a model's decoder blocks are, and how to run one alone.

The model is built without weights. Its own forward pass, with every block replaced by a recorder, tells what runs before
the blocks and what arguments each block receives; so nothing here names a model family.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.checkpoint.model import empty_model, require_same_tensors, set_tensor, tied_names, unset_tensor
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, PruningError


class _AllRecorded(Exception):
    """Raised by the last recorder: what comes after the blocks is of no interest."""


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module, calls: list["Call"], last: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.calls = calls
        self.last = last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.calls.append(Call(hidden=hidden, arguments=arguments, keywords=keywords))
        if self.last:
            raise _AllRecorded
        return hidden


@dataclass(kw_only=True, slots=True)
class Call:
    """What a block was called with.

    hidden: [windows, tokens, width]. arguments, keywords: everything else: masks, positions, rotary embeddings.
    """

    hidden: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Decoder:
    """A decoder language model of which one block at a time has weights.

    Args:
        checkpoint: its tensors and, beside them, its config.json.
        dtype, device: of the computation.

    Raises:
        PruningError: the blocks cannot be found, the checkpoint's tensors have other names, a block has no linear layers or
            other weights beside them (fused experts, Conv1D), or a matrix in scope is tied; names the architecture.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.model = empty_model(checkpoint.directory, dtype)
        self.name = self.model.config.model_type
        self.prefix, self.blocks = self._find_blocks(self.model.config.num_hidden_layers)
        self._require_same_names()

    def _find_blocks(self, count: int) -> tuple[str, nn.ModuleList]:
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        found = [(name, module) for name, module in found if len(module) == count]
        outermost = [(name, module) for name, module in found if not any(name.startswith(other + ".") for other, _ in found)]
        if len(outermost) != 1:
            raise PruningError(f"{self.name}: found {len(outermost)} lists of {count} modules, wanted one list of decoder blocks")
        return outermost[0]

    def _require_same_names(self) -> None:
        tied = tied_names(self.model)
        try:
            require_same_tensors(self.model, self.checkpoint)
        except CheckpointError as error:
            raise PruningError(f"{self.name}: {error}; this architecture is not supported") from None
        for index, block in enumerate(self.blocks):
            matrices = self.matrices(index)
            linear = {f"{module}.weight" for module in matrices}
            for name, parameter in block.named_parameters():
                if parameter.dim() > 1 and name not in linear:
                    shape = list(parameter.shape)
                    raise PruningError(
                        f"{self.name}: {name} of shape {shape} is no linear layer's weight; this architecture is not supported"
                    )
            if not matrices:
                raise PruningError(f"{self.name}: block {index} has no linear layers to prune; this architecture is not supported")
            for name in matrices.values():
                if name in tied:
                    raise PruningError(f"{self.name}: {name} is tied to another tensor, wanted matrices of the blocks alone")

    def tensor_names(self, index: int) -> dict[str, str]:
        """All tensors of a block: parameter's or persistent buffer's name inside the block -> in the checkpoint."""
        return {name: f"{self.prefix}.{index}.{name}" for name in self.blocks[index].state_dict()}

    def matrices(self, index: int) -> dict[str, str]:
        """The block's linear layers: module name inside the block -> name of its weight in the checkpoint."""
        modules = self.blocks[index].named_modules()
        return {name: f"{self.prefix}.{index}.{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}

    @torch.no_grad()
    def calls(self, windows: torch.Tensor) -> list[Call]:
        """Run what comes before the blocks, and note how each block is called.

        Args:
            windows: [windows, tokens], int64.

        Returns:
            One call a block; the first one's `hidden` is the blocks' input.
        """
        calls: list[Call] = []
        originals = list(self.blocks)
        for index, block in enumerate(originals):
            self.blocks[index] = _Recorder(block, calls, last=index == len(originals) - 1)
        try:
            self.model(input_ids=windows.to(self.device), use_cache=False)
        except _AllRecorded:
            pass
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block
        if any(call.hidden.shape != calls[0].hidden.shape for call in calls):
            raise PruningError(f"{self.name}: its blocks do not hand plain hidden states on; this architecture is not supported")
        return calls

    @contextmanager
    def before_blocks(self) -> Iterator[None]:
        """Give weights to what runs before the blocks, for as long as `calls` is needed."""
        inside = f"{self.prefix}."
        needed = [n for n, _ in self.model.named_parameters() if not n.startswith(inside) and n in self.checkpoint]
        output = self.model.get_output_embeddings()
        skipped = {id(parameter) for parameter in output.parameters()} if output is not None else set()
        inputs = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        parameters = dict(self.model.named_parameters())
        needed = [name for name in needed if id(parameters[name]) in inputs or id(parameters[name]) not in skipped]
        for name in needed:
            self._set(self.model, name, self.checkpoint.tensor(name))
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        try:
            yield
        finally:
            for name in needed:
                unset_tensor(self.model, name)

    @contextmanager
    def loaded(self, index: int) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
        """Give weights to one block.

        Yields:
            The block, and its matrices as stored: module name -> [rows, columns] in the checkpoint's dtype.
        """
        block, stored = self.blocks[index], {}
        matrices = self.matrices(index)
        for inner, name in self.tensor_names(index).items():
            tensor = self.checkpoint.tensor(name)
            self._set(block, inner, tensor)
            if (module := inner.removesuffix(".weight")) in matrices:
                stored[module] = tensor
        try:
            yield block, stored
        finally:
            for inner in self.tensor_names(index):
                unset_tensor(block, inner)

    def set_weight(self, block: nn.Module, module: str, weight: torch.Tensor) -> None:
        """Replace the weight of a linear layer of a loaded block."""
        self._set(block, f"{module}.weight", weight)

    def _set(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        set_tensor(module, name, tensor, dtype=self.dtype, device=self.device)


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """[windows, tokens, width] through one loaded block, called as its model calls it."""
    output = block(hidden, *call.arguments, **call.keywords)
    return output[0] if isinstance(output, tuple) else output
