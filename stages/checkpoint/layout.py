"""Find the slice of a parameter that each tensor of the checkpoint fills.

The names in a checkpoint and in its model may differ: a prefix is missing, or a module is renamed. The experts of a mixture
are one tensor per matrix on disk and one 3-D parameter in memory. transformers has a table of these conversions, which is read
here; some join other matrices by rows, such as the filters of three convolutions. A conversion that reorders the values within a
tensor, or splits it, is left to transformers: it may fill what is not pruned, such as a vision encoder.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from stages.checkpoint.model_class import text_decoder
from stages.checkpoint.reader import Checkpoint
from stages.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """The slice of a parameter or buffer that a tensor of the checkpoint fills.

    name: that of the parameter in the model.
    expert: index of the expert along the first dimension, or None if the tensor is the whole parameter.
    rows: (start, stop) of the rows within the expert, or None for all rows.
    transposed: whether the tensor has rows and columns in the other order than the parameter.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """View the slice of the parameter, laid out as the tensor."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        matrix = matrix if self.rows is None else matrix[slice(*self.rows)]
        return matrix.mT if self.transposed else matrix


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion of some tensors into some parameters that is none of renaming, stacking experts and joining rows.

    tensors: name in the checkpoint -> pattern of the converter that it matches, in the order in which transformers reads them.
    target: name of the first parameter that they fill. converter: of transformers.
    """

    tensors: dict[str, str]
    target: str
    converter: "WeightConverter"

    def of(self, model: "PreTrainedModel", tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the tensors, by name in the checkpoint; returns the values of parameters, by name in the model."""
        converter = deepcopy(self.converter)
        for name, pattern in self.tensors.items():
            tensor = tensors[name]
            converter.add_tensor(self.target, name, pattern, lambda tensor=tensor: tensor)
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    @property
    def steps(self) -> str:
        """What transformers calls them."""
        return ", ".join(type(operation).__name__ for operation in self.converter.operations)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every tensor of a checkpoint fills, without those that transformers ignores.

    slices: name in the checkpoint -> slice of a parameter. conversions: of all other tensors. converted: the parameters that these fill.
    """

    slices: dict[str, ParameterSlice]
    conversions: list[Conversion]
    converted: list[str]


def read_layout(model: "PreTrainedModel", checkpoint: Checkpoint) -> Layout:
    """Find what every tensor of the checkpoint fills.

    Args:
        model: may be without weights.

    Raises:
        CheckpointError: a tensor is only in the checkpoint or only in the model, or its shapes in the two differ, or two tensors that the
            model ties have other values; names the tensor.
        ArchitectureError: a tensor of the text decoder is converted otherwise than by renaming, stacking experts and joining rows.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets, conversions = _targets(model, checkpoint, shapes)
    for name, target in list(targets.items()):
        if target.name not in shapes:
            if not _ignored(model, name):
                raise CheckpointError(f"{checkpoint.directory} does not fit {type(model).__name__}: tensor {name} is not the model's")
            del targets[name]
    row_counts = {target: checkpoint.shape(name)[0] for name, target in targets.items() if target.matrix is not None}
    slices = {name: _slice(target, row_counts) for name, target in targets.items()}
    _require_outside_decoder(model, conversions)
    converted = _converted_shapes(model, checkpoint, conversions)
    _require_all_filled(model, checkpoint, shapes, slices, converted)
    _require_equal_ties(model, checkpoint, slices)
    return Layout(slices=slices, conversions=conversions, converted=list(converted))


def path_of(model: "PreTrainedModel", module: torch.nn.Module) -> str:
    """The path of a module in a model, with a dot at its end; empty for the model itself."""
    return next((f"{name}." for name, other in model.named_modules() if other is module and name), "")


def _require_outside_decoder(model: "PreTrainedModel", conversions: list[Conversion]) -> None:
    decoder = path_of(model, text_decoder(model))
    for conversion in conversions:
        if conversion.target.startswith(decoder):
            name, wanted = next(iter(conversion.tensors)), "wanted matrices that are joined by rows, or experts that are stacked"
            reason = f"{name} is converted by {conversion.steps}, {wanted}; this architecture is not supported"
            raise ArchitectureError(f"{model.config.model_type}: {reason}")


def tied_names(model: "PreTrainedModel") -> set[str]:
    """Names of parameters that share their tensor with another parameter, such as a tied output embedding."""
    return set(getattr(model, "all_tied_weights_keys", {}))


class _Target(NamedTuple):
    """A parameter, its expert, and which of the matrices that are joined by rows: 0 for the gate, 1 for the up-projection; or None.

    transposed: see ParameterSlice.
    """

    name: str
    expert: int | None = None
    matrix: int | None = None
    transposed: bool = False


def _targets(
    model: "PreTrainedModel", checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, _Target], list[Conversion]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    targets: dict[str, _Target] = {}
    others: dict[str, Conversion] = {}  # by the first parameter that they fill
    for name in sorted(checkpoint, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if parameter not in shapes:  # the table does not hold for this tensor, whose prefix may still be missing
            parameter, pattern = rename_source_key(name, [], [], model.base_model_prefix, shapes)
        if pattern is None:
            targets[name] = _Target(parameter)
            continue
        converter = next(converter for converter in converters if pattern in converter.source_patterns)
        if (transposes := _transposes(converter, checkpoint.shape(name), shapes.get(parameter))) is not None:
            targets[name] = _Target(parameter, transposed=transposes)
            continue
        stacks = _stacks(converter)
        if stacks is None:
            others.setdefault(parameter, Conversion(tensors={}, target=parameter, converter=converter)).tensors[name] = pattern
            continue
        expert = _expert_number(name, pattern, rename_source_key(name, renamings, [])[0]) if stacks else None
        targets[name] = _Target(parameter, expert, converter.source_patterns.index(pattern))
    return {name: targets[name] for name in checkpoint if name in targets}, list(others.values())


def _expert_number(name: str, pattern: str, renamed: str) -> int:
    """The number at the star of a pattern, a regular expression otherwise."""
    expert = re.search(pattern.replace("*", r"(\d+)"), renamed)
    if expert is None:
        raise CheckpointError(f"{name}: found no expert's number in it, wanted a name like {pattern}")
    return int(expert[1])


def _slice(target: _Target, row_counts: dict[_Target, int]) -> ParameterSlice:
    if target.matrix is None:
        return ParameterSlice(name=target.name, transposed=target.transposed)
    first = sum(row_counts.get(target._replace(matrix=preceding), 0) for preceding in range(target.matrix))
    return ParameterSlice(name=target.name, expert=target.expert, rows=(first, first + row_counts[target]))


def _transposes(converter: "WeightConverter", stored: tuple[int, ...], parameter: tuple[int, ...] | None) -> bool | None:
    """Whether a conversion exchanges the last two dimensions of a tensor, and does nothing else. None: it does something else.

    Args:
        stored, parameter: the shapes of the tensor and of its parameter. Some conversions only exchange what differs.
    """
    from transformers.core_model_loading import Transpose

    operation, *others = converter.operations
    if others or not isinstance(operation, Transpose) or len(stored) < 2:
        return None
    if {operation.dim0 % len(stored), operation.dim1 % len(stored)} != {len(stored) - 2, len(stored) - 1}:
        return None
    return not (operation.check_dims and stored == parameter)


def _stacks(converter: "WeightConverter") -> bool | None:
    """Whether a conversion stacks experts; it may join rows, too. None: it does something else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacks = isinstance(converter.operations[0], MergeModulelist) and converter.operations[0].dim == 0
    join = converter.operations[1:] if stacks else converter.operations
    rows = 1 if stacks else 0  # the dimension that is joined
    if len(join) > 1 or not all(isinstance(operation, Concatenate) and operation.dim == rows for operation in join):
        return None
    return stacks


def _ignored(model: "PreTrainedModel", name: str) -> bool:
    """Whether transformers ignores this tensor of an old checkpoint, such as masks and frequencies, which it computes itself."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}
    return any(re.search(pattern, name) for pattern in patterns)


def _require_all_filled(
    model: "PreTrainedModel",
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    slices: dict[str, ParameterSlice],
    converted: dict[str, tuple[int, ...]],
) -> None:
    """Refuse a checkpoint whose tensors do not fill every parameter, or differ in shape from their slices."""
    mismatch, filled = f"{checkpoint.directory} does not fit {type(model).__name__}", dict.fromkeys(shapes, 0)
    for name, parameter_slice in slices.items():
        parameter = torch.empty(shapes[parameter_slice.name], device="meta")
        in_bounds = parameter_slice.expert is None or parameter_slice.expert < len(parameter)
        if in_bounds and parameter_slice.rows is not None:
            in_bounds = parameter_slice.rows[1] <= parameter.shape[0 if parameter_slice.expert is None else 1]
        expected_shape = tuple(parameter_slice.of(parameter).shape) if in_bounds else shapes[parameter_slice.name]
        if checkpoint.shape(name) != expected_shape:
            raise CheckpointError(f"{mismatch}: {name} is {checkpoint.shape(name)}, wanted {expected_shape}")
        filled[parameter_slice.name] += torch.Size(expected_shape).numel()
    for name, shape in converted.items():
        if shapes.get(name) != shape:
            raise CheckpointError(f"{mismatch}: its tensors are converted to {name} of {shape}, wanted {shapes.get(name, 'none')}")
        filled[name] += torch.Size(shape).numel()
    buffers = {name for name, _ in model.named_buffers()}
    for name in sorted(set(shapes) - tied_names(model) - buffers):
        if filled[name] < torch.Size(shapes[name]).numel():
            raise CheckpointError(
                f"{mismatch}: it has no tensor {name}" + (f", or only a part of it ({filled[name]} values)" if filled[name] else "")
            )


def _require_equal_ties(model: "PreTrainedModel", checkpoint: Checkpoint, slices: dict[str, ParameterSlice]) -> None:
    """Refuse an output embedding that is tied to the input's and stored with other values: stock transformers then ties them not."""
    stored = {found.name: name for name, found in slices.items() if found == ParameterSlice(name=found.name)}
    embedding = f"{path_of(model, model.get_input_embeddings())}weight"
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        if embedding in pair and stored.keys() >= set(pair) and not torch.equal(*(checkpoint.tensor(stored[name]) for name in pair)):
            found = f"found other values in {stored[pair[0]]} than in {stored[pair[1]]}, which config.json ties"
            raise CheckpointError(f"{checkpoint.directory}: {found}, wanted the same, or tie_word_embeddings false in config.json")


def _converted_shapes(model: "PreTrainedModel", checkpoint: Checkpoint, conversions: list[Conversion]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that conversions give, by name."""
    shapes = {}
    for conversion in conversions:
        tensors = {name: torch.empty(checkpoint.shape(name), device="meta") for name in conversion.tensors}
        try:
            shapes.update({name: tuple(value.shape) for name, value in conversion.of(model, tensors).items()})
        except (RuntimeError, ValueError) as error:
            found = ", ".join(f"{name} of {list(tensor.shape)}" for name, tensor in tensors.items())
            raise CheckpointError(f"{checkpoint.directory}: found {found}, which {conversion.steps} does not convert ({error})") from error
    return shapes
