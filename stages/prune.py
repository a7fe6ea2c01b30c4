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
from stages.errors import ConfigError
from stages.files import (
    BASE,
    CALIBRATION,
    PRUNE_JOURNAL,
    PRUNE_RESULTS,
    SPARSE,
    read_json,
    replacing,
    require_room,
    sha256,
    write_json,
)
from stages.pruning import ranks
from stages.pruning.block_loop import Companions, Finished, Plan, PrunedBlock, micro_batch, prune_blocks
from stages.pruning.distillation import DistilledBlocks, distill
from stages.pruning.journal import Journal, WriteBehind, opened
from stages.pruning.patterns import Pattern, Unstructured
from stages.pruning.statistics import Gram, Moments
from stages.streaming.architecture import TOKENS_AT_ONCE, Decoder
from stages.streaming.stream import GPU_SHARE, Stream

log = logging.getLogger(__name__)

CODE = Path(__file__).parent
LIBRARIES = 2**29  # bytes of host memory that torch and transformers take
COPIES_TRAINED = 7  # of a block's weights in float32: values as found and as trained, gradients, Adam's moments, masks, activations
COPIES_DISTILLED = 5  # likewise: weights, gradients, the survivors' gradients and places
COPIES_OF_LOGITS = 4  # in float32: the dense model's, the pruned one's, their logarithms, and what is between
COPIES_RANKED = 4  # of a block's weights in float32: scores, matrix by matrix and all together, these in float64 for their mean
COPIES_FACTORED = 7  # of a Gram matrix in float32: in float64 itself, its factor, the inverse; and that in float32
COPIES_CUT, COPIES_SWEPT = 8, 12  # of a layer's weights in float32, while it is scored, and while it is swept with its neighbours


@stage("method", "pattern", "allocation", "reconstruction", "prune")
def main(
    method: config.Method,
    pattern: config.Pattern,
    allocation: config.Allocation,
    reconstruction: config.Reconstruct,
    prune: config.Prune,
) -> None:
    stopwatch = record.Stopwatch()
    device = ranks.own(record.choose_device("prune.device", prune.device))
    dtype = record.choose_dtype(prune.dtype, device)
    base = Checkpoint(BASE)
    windows = load_file(CALIBRATION / "windows.safetensors")["windows"]
    decoder = Decoder(base, dtype, device)
    plan = Plan(
        method=compose(method),
        patterns=plan_patterns(decoder, method.threshold, pattern),
        propagate=prune.propagate,
        error_tokens=prune.error_tokens,
        expert_tokens=prune.expert_tokens,
        by_parts=prune.by_parts,
        reconstruction=reconstruction_of(reconstruction),
        distillation=distillation_of(reconstruction, len(decoder.blocks)),
        permutation_rounds=pattern.permutation_rounds if isinstance(pattern, config.Nm) else None,
    )
    batch = micro_batch(windows.shape[1], device, prune.micro_batch)
    recipe = {
        "method": asdict(method),
        "pattern": asdict(pattern),
        "pattern_label": pattern.label,
        "allocation": asdict(allocation),
        "reconstruction": asdict(reconstruction),
        "label": label(method, allocation, reconstruction, prune),
        "by_parts": prune.by_parts,
        "propagate": prune.propagate,
        "calibration": read_json(CALIBRATION / "provenance.json")["windows_sha256"],
    }
    with (
        ranks.joined(device),
        record.gpu_memory("prune.micro_batch", batch),
        opened(PRUNE_JOURNAL, fingerprint(base, recipe, prune, batch, device, dtype), base.fingerprint) as journal,
    ):
        if ranks.rank() == 0:
            twice = delta_bytes(decoder, plan, plan.distillation.first) if plan.distillation else 0  # as pruned and as distilled
            require_room(SPARSE, delta_bytes(decoder, plan) + twice - journal.size)
        log.info("read %s (%s) and %d windows of %d tokens", BASE, decoder.name, *windows.shape)
        log.info("pruning %d matrices by %s on %s in %s", len(plan.patterns), method.name, device, dtype)
        if journal.finished:
            log.info("an interrupted run finished %d blocks (%s); going on after them", journal.finished, journal.directory)
        budget = max(0, memory_budget(prune.memory_budget) // ranks.local_count() - block_bytes(decoder, plan, allocation))
        streams = 1 + plan.toward_model + (plan.distillation is not None)  # the pruned model's and its companions
        make_stream = partial(stream_of, decoder, batch, budget, GPU_SHARE / streams, one_by_one=plan.learns)
        if not isinstance(allocation, config.UniformAllocation):
            spread = Unstructured(sparsity=pattern.sparsity, threshold=method.threshold)
            plan = allocated(plan, decoder, allocation, spread, windows, make_stream, journal)
        stream = make_stream(windows)
        beside = Companions.of(stream, plan)
        places = " and ".join(sorted({one.place for one in (stream, beside.dense, beside.entering) if one}))
        log.info("%d windows a pass; hidden states are in %s", batch, places)
        found = {"batch": batch, "processes": ranks.count(), "hidden_states": places, "resumed_after": journal.finished}
        run_through(stream, plan, journal, beside)
        del stream  # nobody needs its hidden states any more
        distilled = learn_together(plan, journal, beside)
        ranks.meet()  # nobody reads the journal any more
        if ranks.rank() == 0:
            earlier = sum(block["seconds"] for block in journal.records(journal.finished))
            found |= {"divergences": distilled.divergences} if distilled else {}
            write_results(journal, decoder, recipe, found | record.of_run(device, dtype, stopwatch, earlier), distilled)


def fingerprint(
    base: Checkpoint, recipe: dict[str, Any], prune: config.Prune, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All that shapes a block's outcome: what an interrupted run finished is taken over where these are the same."""
    how = {key: value for key, value in asdict(prune).items() if key not in ("memory_budget", "device")}  # these change no byte
    facts = {"base": base.fingerprint, "config": sha256(BASE / "config.json"), **recipe, "prune": how, "batch": batch}
    facts |= {"processes": ranks.count(), "device": record.device_name(device), "dtype": str(dtype)}
    return facts | {"code": code_sha256(), "versions": record.versions()}


def stream_of(decoder: Decoder, batch: int, budget: int, gpu_share: float, windows: torch.Tensor, one_by_one: bool) -> Stream:
    """This process's share of some windows, before the first block."""
    share, first = share_of(windows)
    make = partial(Stream, decoder, share, batch=batch, budget=budget, scratch=PRUNE_JOURNAL.parent, gpu_share=gpu_share)
    with decoder.before_blocks():
        return make(first_window=first, all_windows=len(windows), one_by_one=one_by_one)


def run_through(stream: Stream, plan: Plan, journal: Journal, beside: Companions) -> None:
    """Prune the blocks that the journal does not have; the first process writes them into it."""
    count, stopwatch = len(stream.decoder.blocks), record.Stopwatch()
    with WriteBehind() as behind, tqdm(total=count, initial=journal.finished, desc="pruning", unit="block", disable=quiet()) as bar:
        for block in prune_blocks(stream, plan, journal.changes, beside):
            if ranks.rank() == 0:
                rows = [matrix_row(block, finished, plan.patterns) for finished in block.matrices]
                behind(journal.write, block.index, block.changes, {"seconds": stopwatch.lap(), "rows": rows})
            bar.update()


def learn_together(plan: Plan, journal: Journal, beside: Companions) -> DistilledBlocks | None:
    """Train the last blocks, all of which the journal has, where the plan says so."""
    if plan.distillation is None:
        return None
    assert beside.entering is not None and beside.dense is not None
    ranks.meet()  # the first process has written the last block
    show = partial(tqdm, desc="distilling", unit="step", disable=quiet())
    return distill(beside.entering, beside.dense.hidden, plan.distillation, journal.written, show)


def quiet() -> bool | None:
    """No bar where nobody looks, nor from any process but the first."""
    return True if ranks.rank() > 0 else None


def write_results(
    journal: Journal, decoder: Decoder, recipe: dict[str, Any], run: dict[str, Any], distilled: DistilledBlocks | None
) -> None:
    """The delta and what is known of it, from the whole journal and what a distillation made of its last blocks."""
    base, count = decoder.checkpoint.fingerprint, len(decoder.blocks)
    rows = [row for block in journal.records(count) for row in block["rows"]]
    summary = summarise(rows)
    with replacing(SPARSE) as sparse, replacing(PRUNE_RESULTS) as results:
        journal.hand_over(distilled.first if distilled else count, sparse)
        for index, changes in distilled.changes() if distilled else []:
            write_block(sparse / journal.delta_path(index).name, changes, base)
        write_manifest(sparse, base=base, recipe={**recipe, **summary}, matrices=rows)
        write_json(results / "sparsity.json", rows)
        write_json(results / "error_by_block.json", error_by_block(rows))
        write_json(results / "metrics.json", {**summary, "seconds": run["seconds"], "peak_memory_gib": run["peak_memory_gib"]})
        write_json(results / "provenance.json", {**recipe, "base": base, **run})
    log.info("removing the journal %s, %.1f MB", journal.directory, journal.size / 1e6)
    log.info("wrote %s: sparsity %.4f, relative error %.4f, %.0f s", SPARSE, summary["sparsity"], summary["relative_error"], run["seconds"])


def share_of(windows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's windows, [its windows, tokens], and the number of its first.

    Raises:
        ConfigError: there are fewer windows than processes.
    """
    if len(windows) < ranks.count():
        raise ConfigError(f"calibration.windows: found {len(windows)}, wanted at least one for each of {ranks.count()} processes")
    shares = windows.tensor_split(ranks.count())
    return shares[ranks.rank()], sum(map(len, shares[: ranks.rank()]))


def code_sha256() -> str:
    """Of the code that decides what is pruned."""
    files = sorted(file for room in ("pruning", "streaming", "checkpoint") for file in CODE.glob(f"{room}/**/*.py"))
    files += [CODE / "prune.py", CODE / "composition.py"]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def memory_budget(asked: float | None) -> int:
    """Bytes of host memory to work in: GiB as asked, or what is free."""
    return int(asked * 2**30) if asked else psutil.virtual_memory().available


def block_bytes(decoder: Decoder, plan: Plan, allocation: config.Allocation) -> int:
    """About how many bytes of host memory the loop needs beside the hidden states, rather too many than too few.

    The largest block as stored, twice (this one's last tensors, the next one's first); on a CPU also in the compute dtype, a
    Gram matrix for every layer, what it takes to factor the widest, and of the largest layer the float32 copies that a method
    works on. On a CPU an allocation by outliers needs a block's scores; an allocation by the loss and a distillation need a block's
    gradients, what comes after the blocks and some tokens' logits. A distillation needs copies of a block on the host whatever the
    device.
    """
    on_cpu, width = decoder.device.type == "cpu", decoder.dtype.itemsize
    solved = plan.method.statistic is Gram
    copies = COPIES_SWEPT if solved or plan.method.statistic is Moments else COPIES_CUT
    counts, stored, work = [], 0, 0
    for index, matrices in enumerate(decoder.matrices):
        sizes = {name: weights(decoder, name) for name in decoder.tensors(index)}
        counts.append(sum(sizes.values()))
        stored = max(stored, sum(size * decoder.checkpoint.dtype(name).itemsize for name, size in sizes.items()))
        largest, widest = max(matrix.size for matrix in matrices), max(matrix.shape[1] for matrix in matrices)
        grams = sum({matrix.layer: 4 * matrix.shape[1] ** 2 for matrix in matrices}.values()) + COPIES_FACTORED * 4 * widest**2
        trained = COPIES_TRAINED * 4 * counts[-1] if plan.reconstruction else 0
        work = max(work, counts[-1] * width + trained + copies * 4 * largest + (grams if solved else 0))
    if isinstance(allocation, config.OwlAllocation):
        work = max(work, max(counts) * (width + COPIES_RANKED * 4))
    if plan.distillation or isinstance(allocation, config.LossAllocation):
        outside = sum(weights(decoder, name) for name in decoder.layout) - sum(counts)
        logits = COPIES_OF_LOGITS * 4 * decoder.model.config.get_text_config().vocab_size * TOKENS_AT_ONCE
        work = max(work, (2 * max(counts) + outside) * width + logits)
    host = LIBRARIES + 2 * stored + (COPIES_DISTILLED * 4 * max(counts) if plan.distillation else 0)
    return host + (work if on_cpu else 0)


def weights(decoder: Decoder, name: str) -> int:
    """How many a tensor of the checkpoint has."""
    return torch.Size(decoder.checkpoint.shape(name)).numel()


def delta_bytes(decoder: Decoder, plan: Plan, first: int = 0) -> int:
    """About how many bytes the delta takes from a block on: a bit a weight, and the survivors' values where they move."""
    total = 0.0
    for matrix in (matrix for block in decoder.matrices[first:] for matrix in block):
        count, kept = matrix.size, 1 - plan.patterns[matrix.name].sparsity
        total += count / 8 + (count * kept * decoder.checkpoint.dtype(matrix.tensor).itemsize if plan.moves else 0)
    return int(total)


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
