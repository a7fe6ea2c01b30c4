"""A checkpoint, or a checkpoint and a delta, as a model of transformers, filled tensor by tensor."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
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
    set_module_tensor_to_device(module, name, device, value=tensor, dtype=dtype if tensor.is_floating_point() else None)


def load_model(base: Checkpoint, delta: SparseDelta | None, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """base, or base + delta, ready to evaluate; beside the model itself, one tensor at a time is in memory.

    Args:
        dtype: of the parameters; the checkpoint's values are cast to it.

    Raises:
        CheckpointError: the checkpoint and the architecture do not have the same parameters.
    """
    model = empty_model(base.directory, dtype)
    wanted, found = set(model.state_dict()) - tied_names(model), set(base)
    if missing := sorted(wanted - found) or sorted(found - set(model.state_dict())):
        raise CheckpointError(f"{base.directory}: its tensors do not fit {type(model).__name__}: {missing[0]} is on one side only")
    for name in base:
        tensor = base.tensor(name)
        set_tensor(model, name, tensor if delta is None else delta.apply(name, tensor), dtype=dtype, device=device)
    model.tie_weights()
    if (base.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.directory)
    return model.to(device)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are other parameters under a second name, such as a tied output embedding."""
    return set(getattr(model, "all_tied_weights_keys", {}))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)
