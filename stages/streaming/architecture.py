"""The structure of a decoder language model: its blocks, their tensors, and what a matrix in them is; scope.py finds the matrices.

It is derived from names, shapes and types of modules of a model without weights (on the meta device). No model family is named
anywhere.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from stages.checkpoint.layout import ParameterSlice, path_of
from stages.checkpoint.model_class import text_decoder
from stages.errors import ArchitectureError

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel


class Layer(NamedTuple):
    """One matrix product: a linear layer, or a projection of an expert.

    name: that of its weight inside the block. expert: index of the expert if the weight holds several, else None.
    transposed: whether the weight is [..., columns, rows]. called: False if its module is not called, and tokens are multiplied with the
    weight elsewhere.
    """

    name: str
    expert: int | None
    transposed: bool = False
    called: bool = True

    def is_module_of(self, block: nn.Module) -> bool:
        """Whether it is a linear layer of a block that is called with its inputs."""
        return self.called and is_linear(block.get_submodule(self.module))

    @property
    def module(self) -> str:
        """The path inside the block of the module that the weight belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix in scope: all of a tensor of the checkpoint, or one of several in it, as experts are, or groups of rows with own inputs.

    tensor: name in the checkpoint. expert: its index in this tensor, which may have two dimensions if it holds groups of rows; or None.
    parameter_slice: its slice of the block's parameter.
    transposed: whether it is stored as [columns, rows], as GPT-2's Conv1D does.
    shape: (rows, columns) = (outputs, inputs).
    called: see Layer.
    """

    tensor: str
    expert: int | None
    parameter_slice: ParameterSlice
    transposed: bool
    shape: tuple[int, int]
    called: bool = True

    @property
    def name(self) -> str:
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def layer(self) -> Layer:
        """The layer that multiplies by this matrix."""
        transposed = self.transposed != self.parameter_slice.transposed  # the parameter, not the tensor
        return Layer(self.parameter_slice.name, self.parameter_slice.expert, transposed, self.called)

    def rows_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Select this matrix's rows, [rows, ...], of a tensor with one entry for each output of the layer, [outputs, ...]."""
        return outputs if self.parameter_slice.rows is None else outputs[slice(*self.parameter_slice.rows)]

    def part_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """View this matrix, [rows, columns], in a tensor that is laid out like the block's parameter, such as its mask or gradient."""
        matrix = self.parameter_slice.of(parameter)
        return matrix.T if self.transposed else matrix

    def of(self, block: nn.Module) -> torch.Tensor:
        """View this matrix, [rows, columns], in the loaded block's parameter."""
        return self.part_of(block.get_parameter(self.parameter_slice.name))

    def stored_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """View this matrix, [rows, columns], in a tensor that is laid out like the checkpoint's, such as its mask."""
        rows, columns = self.shape[::-1] if self.transposed else self.shape
        matrix = tensor if self.expert is None else tensor.view(-1, rows, columns)[self.expert]
        return matrix.T if self.transposed else matrix


def kind_of_block(block: nn.Module) -> tuple[Any, ...]:
    """What tells a block from others: the types of its modules and the shapes of its parameters, by name."""
    modules = ((name, type(module)) for name, module in block.named_modules())
    shapes = ((name, parameter.shape) for name, parameter in block.named_parameters())
    return (*modules, *shapes)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, which multiplies the one tensor that it is called with by its weight."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def unsupported(model: "PreTrainedModel", reason: str) -> ArchitectureError:
    """Make the error that refuses a model; names its type."""
    return ArchitectureError(f"{model.config.model_type}: {reason}; this architecture is not supported")


def find_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks: the one outermost list of as many modules as the model, or the text decoder of a multimodal one, has layers.

    Returns:
        Its path in the model, and the list.

    Raises:
        ArchitectureError: there is no such list, or there are several; or the blocks share weights with other modules.
    """
    config, prefix = model.config.get_text_config(), path_of(model, text_decoder(model))
    counts = [getattr(config, key, None) for key in ("num_hidden_layers", "num_layers")]  # a block may count as two layers
    if counts[0] is None:
        raise unsupported(model, "found no num_hidden_layers in its config, wanted the number of decoder blocks")
    inner = {name: module for name, module in model.named_modules() if name.startswith(prefix) and isinstance(module, nn.ModuleList)}
    found: list[tuple[str, nn.ModuleList]] = []
    for count in dict.fromkeys(filter(None, counts)):
        lists = {name: module for name, module in inner.items() if len(module) == count}
        found = [(name, module) for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        if len(found) == 1:
            break
    else:
        raise unsupported(model, f"found {len(found)} lists of {counts[0]} modules, wanted one list of decoder blocks")
    path, blocks = found[0]
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        if name.startswith(f"{path}.") != other.startswith(f"{path}."):
            raise unsupported(model, f"{name} is tied to {other}, wanted blocks that share no weights with other modules")
    return path, blocks


def tensors_by_block(model: "PreTrainedModel", layout: dict[str, ParameterSlice], prefix: str) -> list[dict[str, ParameterSlice]]:
    """Split the tensors of the checkpoint by block; one that several blocks have in common, as in Zamba, belongs to each of them.

    Args:
        layout: name in the checkpoint -> slice of a parameter of the model. prefix: path of the blocks in the model.

    Returns:
        For each block: name in the checkpoint -> slice of a parameter, by its name inside the block; in the order of the parameters.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(prefix))
    tensors: list[dict[str, ParameterSlice]] = [{} for _ in blocks]
    others: dict[str, list[str]] = {}  # parameter -> the others that are the same
    for name, parameter in getattr(model, "all_tied_weights_keys", {}).items():
        others.setdefault(parameter, []).append(name)
    filled = {parameter_slice.name for parameter_slice in layout.values()}
    for tensor, parameter_slice in layout.items():
        names = [parameter_slice.name, *(name for name in others.get(parameter_slice.name, []) if name not in filled)]
        for name in names:
            if name.startswith(f"{prefix}."):
                index, inner = name.removeprefix(f"{prefix}.").split(".", 1)
                tensors[int(index)][tensor] = replace(parameter_slice, name=inner)
    return [_in_order(of_block, block) for of_block, block in zip(tensors, blocks, strict=True)]


def _in_order(tensors: dict[str, ParameterSlice], block: nn.Module) -> dict[str, ParameterSlice]:
    position = {name: number for number, name in enumerate(block.state_dict())}
    ordered = sorted(tensors.items(), key=lambda item: (position[item[1].name], item[1].expert or 0, item[1].rows or (0, 0)))
    return dict(ordered)
