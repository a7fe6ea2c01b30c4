"""Load a checkpoint as a model of transformers, tensor by tensor. Only code of transformers runs, and nothing is downloaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from stages.checkpoint.layout import read_layout
from stages.checkpoint.model_class import auto_class_of
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError

if TYPE_CHECKING:  # the sections import this file, and transformers takes seconds to import
    from transformers import PreTrainedModel

Apply = Callable[[str, torch.Tensor], torch.Tensor]  # a tensor of the checkpoint, by name -> the model's, as SparseDelta.apply does

# Of models from empty_model: parameters and buffers that their code makes in a dtype of its own, which transformers keeps.
_DECLARED: "WeakKeyDictionary[PreTrainedModel, dict[str, torch.dtype]]" = WeakKeyDictionary()


def empty_model(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Make the model that config.json describes, without weights (on the meta device), its computed buffers on the CPU.

    Raises:
        CheckpointError: transformers knows no decoder language model of this type, or wants a package for it that is not installed.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    auto_class = auto_class_of(config)
    if auto_class is None:
        raise CheckpointError(f"{directory}: transformers knows no decoder language model of type {config.model_type!r}")
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: transformers makes no {config.model_type!r} without another package ({reason})") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # there is none to draw: on the meta device that would import compilers for seconds
    model.initialize_weights()  # computes the buffers
    _DECLARED[model] = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.dtype != dtype}
    return model


def parameter_dtype(model: "PreTrainedModel", name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model of `dtype`: float32 for the few that transformers keeps in float32, such as routers' biases.

    Args:
        model: from empty_model.
    """
    dtype_plan = model._get_dtype_plan(dtype)
    declared = _DECLARED[model].get(name, dtype)
    return next((planned for pattern, planned in dtype_plan.items() if re.search(rf"(^|\.){pattern}(\.|$)", name)), declared)


def materialize(module: torch.nn.Module, name: str, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate a parameter or buffer, uninitialised, and return its tensor: floats in `dtype`, others in their own dtype."""
    old = _get(module, name)
    value = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
    put(module, name, value)
    return value


def dematerialize(module: torch.nn.Module, name: str) -> None:
    """Free the memory of a parameter or buffer."""
    put(module, name, torch.empty_like(_get(module, name), device="meta"))


def _get(module: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or buffer to a tensor."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def load_model(base: Checkpoint, apply: Apply | None, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a model for evaluation; one tensor at a time is in memory in addition to the model.

    Args:
        apply: called with the name and the tensor of the checkpoint; returns the model's tensor; None: the checkpoint's.
        dtype: that of the parameters; the checkpoint's values are cast to it.

    Raises:
        CheckpointError: the checkpoint and the architecture do not have the same parameters.
    """
    model = empty_model(base.directory, dtype)
    filled: dict[str, torch.Tensor] = {}
    layout = read_layout(model, base)

    def changed(name: str) -> torch.Tensor:
        return base.tensor(name) if apply is None else apply(name, base.tensor(name))

    for name, parameter_slice in layout.slices.items():
        parameter = parameter_slice.name
        if parameter not in filled:
            filled[parameter] = materialize(model, parameter, dtype=parameter_dtype(model, parameter, dtype), device=device)
        parameter_slice.of(filled[parameter]).copy_(changed(name))
    for conversion in layout.conversions:
        for parameter, value in conversion.of(model, {name: changed(name) for name in conversion.tensors}).items():
            materialize(model, parameter, dtype=parameter_dtype(model, parameter, dtype), device=device).copy_(value)
    model.tie_weights()
    if (base.directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(base.directory, local_files_only=True)
    return model.to(device)
