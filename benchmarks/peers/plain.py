"""Wanda and SparseGPT as published: the whole model and all hidden states in memory, one window after another.

python -m benchmarks.peers.plain wanda|sparsegpt BASE WINDOWS OUT

Sun et al. 2024, arXiv:2306.11695; Frantar & Alistarh 2023, arXiv:2301.00774. For models shaped like LLaMA, in float32, 50%
unstructured. Writes the pruned model in bfloat16, and seconds.json: the wall seconds of load, prune and save.
"""

import argparse
import json
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SPARSITY = 0.5
DAMPING = 0.01  # share of the Gram matrix's mean diagonal
BLOCK_SIZE = 128  # columns


class Wanda:
    """Drop the lowest of each output row; the statistic is the mean over windows of each input's squared norm."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.windows = layer, 0
        self.squared_norm = torch.zeros(layer.in_features, device=layer.weight.device)

    def add(self, tokens: torch.Tensor) -> None:
        """Take in a window's inputs, [tokens, columns], float32."""
        self.squared_norm *= self.windows / (self.windows + 1)
        self.windows += 1
        self.squared_norm += tokens.norm(dim=0) ** 2 / self.windows

    def prune(self) -> None:
        scores = self.layer.weight.float().abs() * self.squared_norm.sqrt()  # Sun et al. 2024, eq. 1
        lowest = scores.sort(dim=1, stable=True).indices[:, : int(scores.shape[1] * SPARSITY)]
        self.layer.weight.scatter_(1, lowest, 0)


class SparseGpt:
    """Drop the lowest of each block of columns and compensate; the statistic is H = 2 X Xᵀ, mean over windows."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.windows = layer, 0
        self.gram = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)

    def add(self, tokens: torch.Tensor) -> None:
        """Take in a window's inputs, [tokens, columns], float32."""
        self.gram *= self.windows / (self.windows + 1)
        self.windows += 1
        scaled = (2 / self.windows) ** 0.5 * tokens
        self.gram += scaled.T @ scaled

    def prune(self) -> None:
        weight = self.layer.weight.float().clone()
        dead = self.gram.diagonal() == 0
        self.gram[dead, dead] = 1
        weight[:, dead] = 0
        factor = inverse_factor(self.gram)
        for start in range(0, weight.shape[1], BLOCK_SIZE):
            end = start + BLOCK_SIZE
            block, errors = sweep(weight[:, start:end], factor[start:end, start:end])
            weight[:, start:end] = block
            weight[:, end:] -= errors @ factor[start:end, end:]
        self.layer.weight.copy_(weight)


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, [columns, columns]; `gram` is damped in place."""
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def sweep(weight: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a block of columns, one threshold for all of it, and compensate inside it (arXiv:2301.00774, alg. 1).

    Args:
        weight: [rows, columns of the block]. factor: [columns, columns], the same part of the upper factor.

    Returns:
        the new weights; the errors E that the columns to the right have to take over, both [rows, columns].
    """
    weight, errors = weight.clone(), torch.zeros_like(weight)
    scores = weight**2 / factor.diagonal() ** 2
    lowest = scores.flatten().sort(stable=True).indices[: int(scores.numel() * SPARSITY)]
    dropped = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill_(0, lowest, True).view_as(scores)
    for j in range(weight.shape[1]):
        errors[:, j] = torch.where(dropped[:, j], weight[:, j], 0) / factor[j, j]
        weight[:, j:] -= errors[:, j, None] @ factor[None, j, j:]
        weight[dropped[:, j], j] = 0
    return weight, errors


Pruner = Wanda | SparseGpt
METHODS: dict[str, type[Pruner]] = {"wanda": Wanda, "sparsegpt": SparseGpt}


class Caught(Exception):
    """The first block was reached."""


def inputs_of_blocks(model: PreTrainedModel, windows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first block receives: hidden states, [windows, tokens, columns], and the keywords that all blocks get."""
    caught = []

    def catch(_: nn.Module, arguments: tuple[torch.Tensor], keywords: dict[str, Any]) -> None:
        caught.append((arguments[0], keywords))
        raise Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with suppress(Caught):
            model(input_ids=window[None].to(model.device), use_cache=False)
    hook.remove()
    return torch.cat([hidden for hidden, _ in caught]), caught[-1][1]


@torch.no_grad()
def prune(model: PreTrainedModel, windows: torch.Tensor, method: type[Pruner]) -> None:
    """Prune block after block, each on the outputs of its pruned predecessors."""
    inputs, keywords = inputs_of_blocks(model, windows)
    outputs = torch.empty_like(inputs)
    for number, block in enumerate(model.model.layers):
        pruners = [method(module) for module in block.modules() if isinstance(module, nn.Linear)]
        hooks = [pruner.layer.register_forward_hook(lambda _, given, __, add=pruner.add: add(given[0][0].float())) for pruner in pruners]
        for i in range(len(windows)):
            block(inputs[i : i + 1], **keywords)
        for hook in hooks:
            hook.remove()
        for pruner in pruners:
            pruner.prune()
        for i in range(len(windows)):
            outputs[i] = block(inputs[i : i + 1], **keywords)[0]
        inputs, outputs = outputs, inputs
        print(f"block {number} of {len(model.model.layers)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("base", type=Path, help="directory of a checkpoint")
    parser.add_argument("windows", type=Path, help="safetensors file with windows, [windows, tokens], int64")
    parser.add_argument("out", type=Path, help="directory of the pruned checkpoint")
    arguments = parser.parse_args()

    started = time.perf_counter()
    windows = load_file(arguments.windows)["windows"]
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    prune(model, windows, METHODS[arguments.method])
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    seconds = time.perf_counter() - started
    versions = {name: version(name) for name in ("torch", "transformers")}
    (arguments.out / "seconds.json").write_text(json.dumps({"seconds": seconds, "versions": versions}) + "\n")


if __name__ == "__main__":
    main()
