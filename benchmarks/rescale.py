"""The same function written with other weights: what a method makes of it must not depend on how it is written.

python -m benchmarks.rescale

Writes artifacts/base again with weights at other scales, in the same file format: rows of the value matrix divided, and columns of the
output matrix multiplied, by the same powers of two; likewise rows of the up-projection and columns of the down-projection; likewise the
gains of norms and the columns of the matrices that read them, where a norm multiplies by its gain alone. Powers of two are exact in every
float dtype, so that the function is the same to the last bit but for the order of sums. `python -m stages.prune` and
`python -m benchmarks.development` then show what pruning makes of it; `dvc repro fetch_base` brings the base back.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.reader import fingerprint
from stages.files import BASE, read_json, sha256, write_json

LARGEST = 3  # exponent of the scales
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def scales(count: int, seed: int) -> torch.Tensor:
    """Powers of two, [count], float32."""
    generator = random.Random(seed)
    return torch.tensor([2.0 ** generator.randint(-LARGEST, LARGEST) for _ in range(count)])


def rescaled(tensors: dict[str, torch.Tensor], *, query_heads: int, value_heads: int, norms: bool) -> dict[str, torch.Tensor]:
    """The tensors of a Llama-like decoder at other scales.

    Args:
        query_heads, value_heads: of the attention. norms: whether norms multiply by their gains, as Llama's do and Gemma's do not.
    """
    result = {name: tensor.clone() for name, tensor in tensors.items()}

    def multiply(name: str, factors: torch.Tensor) -> None:
        result[name] = (result[name].float() * factors).to(tensors[name].dtype)

    prefixes = sorted({name.partition("self_attn.")[0] for name in tensors if "self_attn.v_proj" in name})
    for seed, block in enumerate(prefixes):
        value, width = tensors[f"{block}self_attn.v_proj.weight"], tensors[f"{block}self_attn.v_proj.weight"].shape[1]
        factors = scales(len(value), 3 * seed)
        by_query_head = factors.view(value_heads, -1).repeat_interleave(query_heads // value_heads, dim=0).flatten()
        multiply(f"{block}self_attn.v_proj.weight", 1 / factors[:, None])
        multiply(f"{block}self_attn.o_proj.weight", by_query_head)
        factors = scales(len(tensors[f"{block}mlp.up_proj.weight"]), 3 * seed + 1)
        multiply(f"{block}mlp.up_proj.weight", 1 / factors[:, None])
        multiply(f"{block}mlp.down_proj.weight", factors)
        for number, (norm, readers) in enumerate(READERS.items()):
            if norms:
                factors = scales(width, 1000 * (number + 1) + seed)
                multiply(f"{block}{norm}.weight", 1 / factors)
                for reader in readers:
                    multiply(f"{block}{reader}.weight", factors)
    return result


def rescale(directory: Path) -> None:
    """Write a fetched checkpoint again at other scales, with its new hashes."""
    config = json.loads((directory / "config.json").read_text())
    heads = {"query_heads": config["num_attention_heads"], "value_heads": config["num_key_value_heads"]}
    provenance = read_json(directory / "provenance.json")
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    result = rescaled(tensors, **heads, norms=not config["model_type"].startswith("gemma"))
    for shard in shards:
        save_file({name: result[name] for name in load_file(shard)}, shard, metadata={"format": "pt"})
        provenance["files"][shard.name] = sha256(shard)
    write_json(directory / "provenance.json", provenance | {"fingerprint": fingerprint(provenance["files"])})


if __name__ == "__main__":
    rescale(BASE)
