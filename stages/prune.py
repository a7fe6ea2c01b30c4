"""Prune the base with the calibration windows; keep what changed.

python -m stages.prune
"""

import logging
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from stages import config, record
from stages.checkpoint.delta import Change, write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.config import stage
from stages.errors import ConfigError
from stages.files import BASE, CALIBRATION, PRUNE_RESULTS, SPARSE, read_json, replacing, require_room, write_json
from stages.pruning.allocation import ALLOCATIONS
from stages.pruning.architecture import Decoder
from stages.pruning.block_loop import micro_batch, prune_blocks
from stages.pruning.method import PruneMatrix, ScoreAndSelect, SparseGpt
from stages.pruning.patterns import Nm, Pattern, Unstructured

log = logging.getLogger(__name__)


@stage("method", "pattern", "allocation", "prune")
def main(
    method: config.Method | config.SparseGptMethod,
    pattern: config.Pattern,
    allocation: config.Allocation,
    prune: config.Prune,
) -> None:
    stopwatch = record.Stopwatch()
    device = record.choose_device("prune.device", prune.device)
    dtype = record.choose_dtype(prune.dtype, device)
    base = Checkpoint(BASE)
    windows = load_file(CALIBRATION / "windows.safetensors")["windows"]
    decoder = Decoder(base, dtype, device)
    patterns = plan(decoder, method, pattern, allocation)
    require_room(SPARSE, delta_bytes(base, patterns, moved=isinstance(method, config.SparseGptMethod)))
    batch = micro_batch(windows, device, prune.micro_batch)
    log.info("read %s (%s) and %d windows of %d tokens", BASE, decoder.name, *windows.shape)
    log.info("pruning %d matrices by %s on %s in %s, %d windows a pass", len(patterns), method.name, device, dtype, batch)

    rows: list[dict[str, Any]] = []
    with replacing(SPARSE) as sparse, replacing(PRUNE_RESULTS) as results, record.gpu_memory("prune.micro_batch", batch):
        blocks = prune_blocks(decoder, windows, compose(method), patterns, batch=batch, error_tokens=prune.error_tokens)
        for block in tqdm(blocks, total=len(decoder.blocks), desc="pruning", unit="block", disable=None):
            write_block(sparse / f"block-{block.index:05d}.safetensors", block.changes, base.fingerprint)
            rows += [matrix_row(block.index, name, patterns[name], change, block.errors[name]) for name, change in block.changes.items()]
        recipe = {
            "method": asdict(method),
            "pattern": asdict(pattern),
            "pattern_label": pattern.label,
            "allocation": asdict(allocation),
            "calibration": read_json(CALIBRATION / "provenance.json")["windows_sha256"],
        }
        summary = summarise(rows)
        write_manifest(sparse, base=base.fingerprint, recipe={**recipe, **summary}, matrices=rows)
        run = record.of_run(device, dtype, stopwatch)
        write_json(results / "sparsity.json", rows)
        write_json(results / "error_by_block.json", error_by_block(rows))
        write_json(results / "metrics.json", {**summary, "seconds": run["seconds"], "peak_memory_gib": run["peak_memory_gib"]})
        write_json(results / "provenance.json", {**recipe, "base": base.fingerprint, "micro_batch": batch, **run})
    log.info("wrote %s: sparsity %.4f, relative error %.4f, %.0f s", SPARSE, summary["sparsity"], summary["relative_error"], run["seconds"])


def compose(method: config.Method | config.SparseGptMethod) -> PruneMatrix:
    """The method that a configuration names."""
    if isinstance(method, config.SparseGptMethod):
        return SparseGpt(score=method.score, damping=method.damping, block_size=method.block_size)
    return ScoreAndSelect(score=method.score)


def plan(
    decoder: Decoder, method: config.Method | config.SparseGptMethod, pattern: config.Pattern, allocation: config.Allocation
) -> dict[str, Pattern]:
    """The pattern of every matrix in scope, found to fit its shape before any weight is read.

    Raises:
        ConfigError: a matrix whose columns the pattern does not divide; names it.
    """
    names = [name for index in range(len(decoder.blocks)) for name in decoder.matrices(index).values()]
    sparsities = ALLOCATIONS[allocation.name](names, pattern.sparsity)
    patterns: dict[str, Pattern] = {}
    for name in names:
        if isinstance(pattern, config.Nm):
            patterns[name] = Nm(kept=pattern.kept, group=pattern.group)
        else:
            patterns[name] = Unstructured(sparsity=sparsities[name], threshold=method.threshold)
        try:
            patterns[name].check(decoder.checkpoint.shape(name)[1])
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    return patterns


def delta_bytes(base: Checkpoint, patterns: dict[str, Pattern], moved: bool) -> int:
    """At most how many bytes the delta takes: a bit a weight, and the survivors' values where they move."""
    weights = {name: torch.Size(base.shape(name)).numel() for name in patterns}
    return sum(count // 8 + (count * base.dtype(name).itemsize if moved else 0) for name, count in weights.items())


def matrix_row(block: int, name: str, pattern: Pattern, change: Change, error: float) -> dict[str, Any]:
    """One matrix in sparsity.json: sparsity asked and achieved, and the relative output error."""
    weights, kept = change.mask.numel(), int(change.mask.sum())
    return {
        "block": block,
        "matrix": name,
        "weights": weights,
        "zeros": weights - kept,
        "asked": pattern.sparsity,
        "sparsity": (weights - kept) / weights,
        "relative_error": error,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "sparsity": sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows),
        "relative_error": sum(row["relative_error"] for row in rows) / len(rows),
    }


def error_by_block(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For DVC's plot: each matrix under its short name."""
    return [{key: row[key] for key in ("block", "relative_error")} | {"matrix": row["matrix"].split(".")[-2]} for row in rows]


if __name__ == "__main__":
    main()
