"""Small random checkpoints of the architectures that are written as GGUF, with a tokenizer, as the fetch stage leaves them, and a delta."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.checkpoint.delta import Change, SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase
from tests import deltas, tiny

SIZES = {
    "vocab_size": 416,  # above the tokenizer's 400
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama 3": {"rope_parameters": LLAMA3},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": GEMMA3,
}


def fetched(directory: Path, kind: str, **changes: Any) -> Checkpoint:
    """A checkpoint of this architecture as the fetch stage writes it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **{**SIZES, **CONFIGS[kind], **changes})
    made = AutoModelForCausalLM.from_config(config)
    for name, parameter in made.named_parameters():
        parameter.data += (0.1 if "norm" in name or "bias" in name else 0.05) * torch.randn_like(parameter)
    made.to(torch.bfloat16).save_pretrained(directory / "source")
    tiny.tokenizer().save_pretrained(directory / "source")
    local = LocalBase(source="local", path=str(directory / "source"), name=f"tests/{kind}", fingerprint=None, license="mit")
    (directory / "base").mkdir()
    checkpoints.fetch(local, directory / "base", downloads=directory / "unused")
    return Checkpoint(directory / "base")


def pruned(directory: Path, base: Checkpoint) -> SparseDelta:
    """A delta that prunes weights at random, half of each row."""
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for name in deltas.matrices(base):
        rows, columns = base.shape(name)
        order = torch.rand(rows, columns, generator=generator).argsort(dim=1)
        changes[name] = Change(mask=order < columns // 2)
    recipe = deltas.recipe(base=base.fingerprint)
    return deltas.write(directory / "delta", recipe, changes, [deltas.row(name, change.mask) for name, change in changes.items()])
