"""Wanda and SparseGPT by llm-compressor, in an environment of its own; imports nothing of this repository.

python benchmarks/peers/llm_compressor.py wanda|sparsegpt BASE WINDOWS OUT

In float32, 50% unstructured. Writes the pruned model in bfloat16, and seconds.json: the wall seconds of load, prune and save.
Fails where what was written is not what was asked for, since llm-compressor itself would not.
"""

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SPARSITY = 0.5
TOLERANCE = 0.001  # its SparseGPT drops `score <= comparison_group`: one weight too many in each block of 128 columns, and ties
METHODS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def prune(method: str, base: Path, windows: torch.Tensor, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    blocks = [type(model.model.layers[0]).__name__]
    oneshot(
        model=model,
        tokenizer=str(base),
        dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}),
        # The blocks, not "Linear": that would take in lm_head, which is the embedding where they are tied.
        recipe=METHODS[method](sparsity=SPARSITY, targets=blocks),
        sequential_targets=blocks,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    model.to(torch.bfloat16).save_pretrained(out, save_compressed=False)


def tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each tensor of a checkpoint, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  a shard is no dict
                yield name, shard.get_tensor(name)


def check(base: Path, out: Path) -> None:
    """Refuse a checkpoint whose block matrices are not all as sparse as asked, or whose other tensors changed.

    Raises:
        SystemExit: naming the tensor.
    """
    pruned, matrices = dict(tensors(out)), 0
    for name, before in tensors(base):
        if name not in pruned:
            raise SystemExit(f"{out}: found no tensor {name}, which {base} has")
        if ".layers." in name and before.dim() == 2:
            matrices += 1
            found = (pruned[name] == 0).float().mean().item()
            if abs(found - SPARSITY) > TOLERANCE:
                raise SystemExit(f"{out}: found sparsity {found:.4f} in {name}, wanted {SPARSITY}")
        elif not torch.equal(pruned[name], before):
            raise SystemExit(f"{out}: found {name} changed, wanted it as it was")
    if not matrices:
        raise SystemExit(f"{base}: found no matrix in a decoder block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("base", type=Path, help="directory of a checkpoint")
    parser.add_argument("windows", type=Path, help="safetensors file with windows, [windows, tokens], int64")
    parser.add_argument("out", type=Path, help="directory of the pruned checkpoint")
    arguments = parser.parse_args()

    started = time.perf_counter()
    prune(arguments.method, arguments.base, load_file(arguments.windows)["windows"], arguments.out)
    seconds = time.perf_counter() - started
    check(arguments.base, arguments.out)
    versions = {name: version(name) for name in ("llmcompressor", "torch", "transformers")}
    (arguments.out / "seconds.json").write_text(json.dumps({"seconds": seconds, "versions": versions}) + "\n")


if __name__ == "__main__":
    main()
