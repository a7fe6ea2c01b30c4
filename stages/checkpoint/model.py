"""A checkpoint, or a checkpoint and a delta, as a model of transformers."""

from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError


def load_model(base: Checkpoint, delta: SparseDelta | None, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """base, or base + delta, ready to evaluate.

    Args:
        dtype: of the parameters; the checkpoint's values are cast to it.

    Raises:
        CheckpointError: the checkpoint and the architecture do not have the same parameters.
    """
    config = AutoConfig.from_pretrained(base.directory)
    state = {name: base.tensor(name) if delta is None else delta.apply(name, base.tensor(name)) for name in base}
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if wrong:
        raise CheckpointError(f"{base.directory}: its tensors do not fit {type(model).__name__}: {wrong}")
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)
