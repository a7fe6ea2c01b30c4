"""A checkpoint, or a checkpoint and a delta, as a model of transformers, filled tensor by tensor."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError


def empty_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that config.json describes, without weights (on the meta device), its computed buffers in place.

    Raises:
        CheckpointError: transformers knows no decoder language model of this type.
    """
    config = AutoConfig.from_pretrained(directory)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{directory}: transformers knows no decoder language model of type {config.model_type!r}")
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def set_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a parameter or buffer its value; floats are cast to `dtype`."""
    owner, leaf = _owner(module, name)
    value = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def unset_tensor(module: torch.nn.Module, name: str) -> None:
    """Take a parameter's or buffer's memory back."""
    owner, leaf = _owner(module, name)
    empty = torch.empty_like(getattr(owner, leaf), device="meta")
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    else:
        owner._buffers[leaf] = empty


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def load_model(base: Checkpoint, delta: SparseDelta | None, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """base, or base + delta, ready to evaluate; beside the model itself, one tensor at a time is in memory.

    Args:
        dtype: of the parameters; the checkpoint's values are cast to it.

    Raises:
        CheckpointError: the checkpoint and the architecture do not have the same parameters.
    """
    model = empty_model(base.directory, dtype)
    require_same_tensors(model, base)
    for name in base:
        tensor = base.tensor(name)
        set_tensor(model, name, tensor if delta is None else delta.apply(name, tensor), dtype=dtype, device=device)
    model.tie_weights()
    if (base.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.directory)
    return model.to(device)


def require_same_tensors(model: PreTrainedModel, base: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not the model's, by name and shape.

    Raises:
        CheckpointError: names a tensor that only one of them has, or that has two shapes.
    """
    shapes, kind = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, type(model).__name__
    for name in sorted(set(shapes) - tied_names(model) - set(base)):
        raise CheckpointError(f"{base.directory} does not fit {kind}: it has no tensor {name}")
    for name in base:
        if name not in shapes:
            raise CheckpointError(f"{base.directory} does not fit {kind}: tensor {name} is not the model's")
        if base.shape(name) != shapes[name]:
            raise CheckpointError(f"{base.directory} does not fit {kind}: {name} is {base.shape(name)}, wanted {shapes[name]}")


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are other parameters under a second name, such as a tied output embedding."""
    return set(getattr(model, "all_tied_weights_keys", {}))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)
