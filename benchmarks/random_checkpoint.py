"""A random checkpoint with the exact configuration of zephyr-7b-beta, written block by block, never whole in memory.

Needs torch, transformers and safetensors alone.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

INDEX = "model.safetensors.index.json"
STANDARD_DEVIATION = 0.02


def zephyr(blocks: int) -> MistralConfig:
    """zephyr-7b-beta's configuration, with so many blocks (its own number is 32)."""
    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
    )


def write(directory: Path, blocks: int, device: str = "cpu") -> dict[str, str]:
    """Write bfloat16 shards, an index and config.json, the same for the same arguments.

    Args:
        device: where the values are drawn.

    Returns:
        File name -> a name for its contents, as a provenance file lists hashes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = zephyr(blocks)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = tensor.shape
    for number, (shard, shapes) in enumerate(shards.items()):
        generator = torch.Generator(device).manual_seed(number)
        tensors = {name: _draw(name, shape, generator, device) for name, shape in shapes.items()}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)
    return {shard: f"random, {blocks} blocks, generator {number} on {device}" for number, shard in enumerate(shards)}


def _draw(name: str, shape: torch.Size, generator: torch.Generator, device: str) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return values.normal_(0, STANDARD_DEVIATION, generator=generator).cpu()
