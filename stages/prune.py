"""Prune the base with the calibration windows; keep what changed.

python -m stages.prune
torchrun --nproc-per-node N -m stages.prune     on N GPUs, each with its share of the windows
"""

import hashlib
import logging
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from stages import config, record
from stages.checkpoint.delta import write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.composition import allocated, compose, distillation_of, label, plan_patterns, reconstruction_of
from stages.config import stage
from stages.errors import CalibrationError, ConfigError
from stages.files import (
    BASE,
    CALIBRATION,
    PRUNE_JOURNAL,
    PRUNE_RESULTS,
    SPARSE,
    read_json,
    replacing,
    require_free_disk,
    sha256,
    write_json,
)
from stages.pruning import distributed
from stages.pruning.block_loop import Companions, Finished, Plan, PrunedBlock, micro_batch, prune_blocks
from stages.pruning.distillation import DistilledBlocks, distill
from stages.pruning.journal import Journal, WriteBehind, opened
from stages.pruning.memory import delta_bytes, host_bytes
from stages.pruning.patterns import Pattern, Unstructured
from stages.recipe import Recipe
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import GPU_SHARE, Stream

log = logging.getLogger(__name__)

CODE = Path(__file__).parent


@stage("method", "pattern", "allocation", "reconstruction", "prune")
def main(
    method: config.Method,
    pattern: config.Pattern,
    allocation: config.Allocation,
    reconstruction: config.Reconstruct,
    prune: config.Prune,
) -> None:
    stopwatch = record.Stopwatch()
    device = distributed.local_device(record.choose_device("prune.device", prune.device))
    dtype = record.choose_dtype(prune.dtype, device)
    base = Checkpoint(BASE)
    windows, windows_sha256 = calibration_windows(base)
    decoder = Decoder(base, dtype, device)
    plan = Plan(
        method=compose(method),
        patterns=plan_patterns(decoder, method.comparison_group, pattern),
        propagate=prune.propagate,
        error_tokens=prune.error_tokens,
        expert_tokens=prune.expert_tokens,
        reconstruction=reconstruction_of(reconstruction),
        distillation=distillation_of(reconstruction, len(decoder.blocks)),
        permutation_rounds=pattern.permutation_rounds if isinstance(pattern, config.Nm) else None,
    )
    batch = micro_batch(windows.shape[1], device, prune.micro_batch)
    recipe = Recipe(
        method=asdict(method),
        pattern=asdict(pattern),
        allocation=asdict(allocation),
        reconstruction=asdict(reconstruction),
        prune=asdict(prune),
        base=base.fingerprint,
        calibration=windows_sha256,
        label=label(method, allocation, reconstruction, prune),
        pattern_label=pattern.label,
    )
    with (
        distributed.process_group(device),
        record.gpu_memory("prune.micro_batch", batch),
        opened(PRUNE_JOURNAL, fingerprint(recipe, batch, device, dtype), base.fingerprint) as journal,
    ):
        if distributed.rank() == 0:
            twice = delta_bytes(decoder, plan, plan.distillation.first) if plan.distillation else 0  # as pruned and as distilled
            require_free_disk(SPARSE, delta_bytes(decoder, plan) + twice - journal.size)
        log.info("read %s (%s) and %d windows of %d tokens", BASE, decoder.name, *windows.shape)
        log.info("pruning %d matrices by %s on %s in %s", len(plan.patterns), method.name, device, dtype)
        if journal.finished:
            log.info("an interrupted run finished %d blocks (%s); going on after them", journal.finished, journal.directory)
        taken = host_bytes(
            decoder,
            plan,
            batch * windows.shape[1],
            scores_blocks=isinstance(allocation, config.OwlAllocation),
            feels_loss=isinstance(allocation, config.LossAllocation),
        )
        budget = max(0, memory_budget(prune.memory_budget) // distributed.local_world_size() - taken)
        streams = 1 + plan.learns + (plan.distillation is not None)  # the pruned model's and its companions
        make_stream = partial(stream_of, decoder, batch, budget, GPU_SHARE / streams)
        if not isinstance(allocation, config.UniformAllocation):
            spread = Unstructured(sparsity=pattern.sparsity, comparison_group=method.comparison_group)
            plan = allocated(plan, decoder, allocation, spread, windows, make_stream, journal)
        stream = make_stream(windows)
        beside = Companions.of(stream, plan)
        locations = " and ".join(sorted({one.location for one in (stream, beside.dense, beside.entering) if one}))
        log.info("%d windows a pass; hidden states are in %s", batch, locations)
        found = {"batch": batch, "processes": distributed.world_size(), "hidden_states": locations, "resumed_after": journal.finished}
        run_through(stream, plan, journal, beside)
        del stream  # nobody needs its hidden states any more
        distilled = learn_together(plan, journal, beside)
        distributed.barrier()  # nobody reads the journal any more
        if distributed.rank() == 0:
            earlier = journal.surveyed + sum(block["seconds"] for block in journal.records(journal.finished))
            found |= {"divergences": distilled.divergences} if distilled else {}
            write_results(journal, decoder, recipe, found | record.of_run(device, dtype, stopwatch, earlier), distilled)


def calibration_windows(base: Checkpoint) -> tuple[torch.Tensor, str]:
    """What the sample stage drew, [windows, tokens], int64, and its SHA-256.

    Raises:
        CalibrationError: the windows are not there, not those that were drawn, or drawn with another tokenizer.json than this base's.
    """
    path, facts = CALIBRATION / "windows.safetensors", read_json(CALIBRATION / "provenance.json")
    found = sha256(path) if path.is_file() else "no file"
    if found != facts["windows_sha256"]:
        raise CalibrationError(f"{path}: found {found}, wanted SHA-256 {facts['windows_sha256']}; run the sample stage again")
    tokenizer = facts.get("tokenizer_sha256", base.tokenizer_sha256)
    if tokenizer != base.tokenizer_sha256:
        raise CalibrationError(
            f"{CALIBRATION}: found windows of the tokenizer with SHA-256 {tokenizer}, wanted that of {BASE}, {base.tokenizer_sha256}; "
            "run the sample stage again"
        )
    return load_file(path)["windows"], found


def fingerprint(recipe: Recipe, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that shapes a block's outcome: what an interrupted run finished is taken over where these are the same."""
    how = {key: value for key, value in recipe.prune.items() if key not in ("memory_budget", "device")}  # these change no byte
    facts = {"config": sha256(BASE / "config.json"), **recipe.as_dict(), "prune": how, "batch": batch}
    facts |= {"processes": distributed.world_size(), "device": record.device_name(device), "dtype": str(dtype)}
    return facts | {"code": code_sha256(), "versions": record.versions()}


def stream_of(decoder: Decoder, batch: int, budget: int, gpu_share: float, windows: torch.Tensor) -> Stream:
    """This process's share of some windows, before the first block."""
    share, first = share_of(windows)
    memory = HostMemory(budget, PRUNE_JOURNAL.parent)
    with decoder.before_blocks():
        return Stream(decoder, share, batch=batch, memory=memory, gpu_share=gpu_share, first_window=first, all_windows=len(windows))


def run_through(stream: Stream, plan: Plan, journal: Journal, beside: Companions) -> None:
    """Prune the blocks that the journal does not have; the first process writes them into it."""
    count, stopwatch = len(stream.decoder.blocks), record.Stopwatch()
    with WriteBehind() as behind, tqdm(total=count, initial=journal.finished, desc="pruning", unit="block", disable=quiet()) as bar:
        for block in prune_blocks(stream, plan, journal.changes, beside):
            if distributed.rank() == 0:
                rows = [matrix_row(block, finished, plan.patterns) for finished in block.matrices]
                behind(journal.write, block.index, block.changes, {"seconds": stopwatch.lap(), "rows": rows})
            bar.update()


def learn_together(plan: Plan, journal: Journal, beside: Companions) -> DistilledBlocks | None:
    """Train the last blocks, all of which the journal has, where the plan says so."""
    if plan.distillation is None:
        return None
    assert beside.entering is not None and beside.dense is not None
    distributed.barrier()  # the first process has written the last block
    show = partial(tqdm, desc="distilling", unit="step", disable=quiet())
    return distill(beside.entering, beside.dense.hidden, plan.distillation, journal.written, show)


def quiet() -> bool | None:
    """No bar where nobody looks, nor from any process but the first."""
    return True if distributed.rank() > 0 else None


def write_results(journal: Journal, decoder: Decoder, recipe: Recipe, run: dict[str, Any], distilled: DistilledBlocks | None) -> None:
    """The delta and what is known of it, from the whole journal and what a distillation made of its last blocks."""
    count = len(decoder.blocks)
    rows = [row for block in journal.records(count) for row in block["rows"]]
    summary = summarise(rows)
    with replacing(SPARSE) as sparse, replacing(PRUNE_RESULTS) as results:
        journal.hand_over(distilled.first if distilled else count, sparse)
        for index, changes in distilled.changes() if distilled else []:
            write_block(sparse / journal.delta_path(index).name, changes, recipe.base)
        write_manifest(sparse, recipe=recipe, summary=summary, matrices=rows)
        write_json(results / "sparsity.json", rows)
        write_json(results / "error_by_block.json", error_by_block(rows))
        write_json(results / "metrics.json", {**summary, "seconds": run["seconds"], "peak_memory_gib": run["peak_memory_gib"]})
        write_json(results / "provenance.json", {**recipe.as_dict(), **run})
    log.info("removing the journal %s, %.1f MB", journal.directory, journal.size / 1e6)
    log.info("wrote %s: sparsity %.4f, relative error %.4f, %.0f s", SPARSE, summary["sparsity"], summary["relative_error"], run["seconds"])


def share_of(windows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's windows, [its windows, tokens], and the number of its first.

    Raises:
        ConfigError: there are fewer windows than processes.
    """
    if len(windows) < distributed.world_size():
        raise ConfigError(
            f"calibration.windows: found {len(windows)}, wanted at least one for each of {distributed.world_size()} processes"
        )
    shares = windows.tensor_split(distributed.world_size())
    return shares[distributed.rank()], sum(map(len, shares[: distributed.rank()]))


def code_sha256() -> str:
    """Of the code that decides what is pruned."""
    files = sorted(file for package in ("pruning", "streaming", "checkpoint") for file in CODE.glob(f"{package}/**/*.py"))
    files += [CODE / "prune.py", CODE / "composition.py"]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def memory_budget(asked: float | None) -> int:
    """Bytes of host memory to work in: GiB as asked, or what is free."""
    return int(asked * 2**30) if asked else psutil.virtual_memory().available


def matrix_row(block: PrunedBlock, finished: Finished, patterns: dict[str, Pattern]) -> dict[str, Any]:
    """One matrix in sparsity.json: sparsity asked and achieved, the relative output error, and what it was calibrated on."""
    matrix = finished.matrix
    mask = block.changes[matrix.tensor].mask
    mask = mask if matrix.expert is None else mask[matrix.expert]
    weights, kept = mask.numel(), int(mask.sum())
    return {
        "block": block.index,
        "matrix": matrix.name,
        "tensor": matrix.tensor,
        "weights": weights,
        "zeros": weights - kept,
        "asked": float(patterns[matrix.name].sparsity),
        "sparsity": (weights - kept) / weights,
        "relative_error": finished.relative_error,
        "tokens": finished.tokens,
        "calibrated_on": finished.calibrated_on,
        "damping": finished.damping,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "sparsity": sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows),
        "relative_error": sum(row["relative_error"] for row in rows) / len(rows),
    }


def error_by_block(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For DVC's plot: each kind of matrix under its short name, a mixture's experts as their mean."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        parts = [part for part in re.sub(r"\[\d+\]$", "", row["matrix"]).split(".") if part != "weight"]
        found.setdefault((row["block"], parts[-1]), []).append(row["relative_error"])
    return [{"block": block, "relative_error": sum(errors) / len(errors), "matrix": name} for (block, name), errors in found.items()]


if __name__ == "__main__":
    main()
