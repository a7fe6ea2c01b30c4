"""Prune the base with the calibration windows; keep what changed.

python -m stages.prune                        prune.processes says how many processes share the work
torchrun --nnodes 2 ... -m stages.prune       several machines, see docs/engine.md
"""

import logging
import math
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from stages import devices, record
from stages.checkpoint.delta import write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.config.entry import stage
from stages.energy import metered
from stages.errors import CalibrationError
from stages.files import (
    BASE,
    CALIBRATION,
    PRUNE_JOURNAL,
    PRUNE_RESULTS,
    SPARSE,
    STATISTICS,
    replacing,
    require_free_disk,
    sha256,
    write_json,
)
from stages.pruning import distributed, kept
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.block_loop import MatrixResult, PrunedBlock, TeacherStreams, prune_blocks
from stages.pruning.distillation import DistilledBlocks, distill
from stages.pruning.journal import Journal, WriteBehind, opened
from stages.pruning.judged import judged_choices
from stages.pruning.kept import KeptInputs
from stages.pruning.learning import Outcome
from stages.pruning.memory import delta_bytes, host_bytes, memory_budget
from stages.pruning.method import Method
from stages.pruning.patterns import Pattern, PatternSection
from stages.pruning.permutable import permutable_blocks
from stages.pruning.plan import Plan
from stages.pruning.planning import Judgement, allocate, plan_patterns
from stages.pruning.reconstructions import RECONSTRUCTIONS
from stages.pruning.section import ANY_MACHINE, Kept, Propagation, Prune
from stages.pruning.windows import calibration_windows, micro_batch, stream_of, windows_of_sources
from stages.recipe import Recipe
from stages.streaming.decoder import Decoder
from stages.streaming.stream import GPU_SHARE, Stream

log = logging.getLogger(__name__)

CODE = Path(__file__).parent
TOKENS_PER_COLUMN = 20  # below which new weights fit the calibration tokens


@stage(
    "method", "pattern", "allocation", "reconstruction", "prune", "environment.torch", "environment.transformers", "environment.safetensors"
)
def main(method: Method, pattern: PatternSection, allocation: Any, reconstruction: Any, prune: Prune) -> None:
    stopwatch = record.Stopwatch()
    device = devices.choose_device("prune.device", prune.device)
    if prune.processes > 1 and not distributed.is_started():
        distributed.require_gpus(device, prune.processes)
        distributed.become("stages.prune", sys.argv[1:], prune.processes)
    if distributed.is_started():
        prune = replace(prune, processes=distributed.started_processes())  # which the recipe states, whoever started them
        prune.check("prune")
    device = distributed.local_device(device)
    dtype = devices.choose_dtype(prune.dtype, device)
    base = Checkpoint(BASE)
    windows, held_out, windows_sha256 = calibration_windows(base)
    decoder = Decoder(base, dtype, device)
    batch = micro_batch(windows.shape[1], device, prune.micro_batch)
    plan = plan_of(decoder, method, pattern, allocation, reconstruction, prune)
    recipe = recipe_of(method, pattern, allocation, reconstruction, prune, base=base.fingerprint, calibration=windows_sha256)
    log.info("read %s (%s), %d windows of %d tokens, and %d held out", BASE, decoder.name, *windows.shape, len(held_out))
    require_held_out(judged_choices(method, allocation, reconstruction), held_out)
    warn_of_few_tokens(plan, decoder, windows)
    facts = kept.fingerprint(prune, base, windows_sha256, batch=batch, device=device, dtype=dtype)
    with (
        distributed.process_group(device),
        devices.gpu_memory("prune.micro_batch", batch),
        metered(device) as meter,
        opened(PRUNE_JOURNAL, fingerprint(recipe, batch, device, dtype), base) as journal,
    ):
        require_free_disk_for(decoder, plan, journal)
        log.info("pruning %d matrices by %s on %s in %s", len(plan.patterns), recipe.label, device, dtype)
        budget = host_budget(decoder, plan, allocation, prune.memory_budget, tokens=batch * windows.shape[1])
        kept_inputs = inputs_kept(decoder, plan, prune, facts)
        make_stream = partial(stream_of, decoder, batch=batch, budget=budget, gpu_share=GPU_SHARE / (plan.streams + any(decoder.reused)))
        plan, judgement = allocate(plan, decoder, allocation, pattern, windows, held_out, make_stream, journal, windows_of_sources())
        if judgement is not None:
            log_judgement(allocation.name, judgement)
            recipe = replace(recipe, label=label(method, pattern, allocation, reconstruction, prune, taken=judgement.taken))
        source = kept_inputs or make_stream(windows, held_out)
        teachers = TeacherStreams.of(source, plan) if isinstance(source, Stream) else None
        locations = hidden_states(source, teachers, batch)
        run: dict[str, Any] = {"batch": batch, "processes": distributed.world_size(), "resumed_after": journal.finished}
        run |= {"blocks_by_expert": len(decoder.apart), "kept_statistics": prune.statistics if kept_inputs else None}
        run |= {"hidden_states": locations, "allocation_judged": judgement and judgement.as_dict()}
        prune_all(source, plan, journal, teachers)
        del source  # its hidden states are of no more use
        distilled = train_last_blocks(plan, journal, teachers)
        distributed.barrier()  # every process has read the journal
        if distributed.rank() == 0:
            run |= record.of_run(device, dtype, stopwatch, journal.seconds_before)
            whole = not journal.seconds_before and distributed.world_size() == 1  # else this process measured a part of it
            run["joules"] = meter.joules() if whole else None
            write_results(journal, decoder, recipe, run, distilled)


def plan_of(decoder: Decoder, method: Method, pattern: PatternSection, allocation: Any, reconstruction: Any, prune: Prune) -> Plan:
    """What to do to every block, from the sections.

    Raises:
        ConfigError, ArchitectureError: see planning.plan_patterns. PruningError: see permutable_blocks.
        ArchitectureError: the blocks hand on more than hidden states, and the last ones are to be trained together; or several blocks
            multiply by a matrix, see Decoder.require_matrices_of_one_block.
    """
    training = RECONSTRUCTIONS.of(reconstruction)
    for_one_block = {
        f"allocation={allocation.name}": ALLOCATIONS.of(allocation).budgeted is not None,
        f"reconstruction={reconstruction.name}": bool(training.each_block or training.last_blocks),
        f"prune.propagate = {Propagation.SEQUENTIAL}": prune.propagate == Propagation.SEQUENTIAL,
        "pattern.permutation_rounds": pattern.permutation_rounds is not None,
    }
    for option, chosen in for_one_block.items():
        if chosen:
            decoder.require_matrices_of_one_block(option)
    if training.last_blocks:
        decoder.require_gradients_by_hidden_states(f"reconstruction={reconstruction.name}")
    if prune.propagate == Propagation.SEQUENTIAL:
        decoder.require_reading_orders()
    return Plan(
        method=method,
        patterns=plan_patterns(decoder, method.compared_within, pattern),
        propagate=Propagation(prune.propagate),
        error_tokens=prune.error_tokens,
        expert_tokens=prune.expert_tokens,
        reconstruction=training.each_block(reconstruction) if training.each_block else None,
        distillation=training.last_blocks(reconstruction, len(decoder.blocks)) if training.last_blocks else None,
        permutation_rounds=pattern.permutation_rounds,
        permutable=None if pattern.permutation_rounds is None else permutable_blocks(decoder),
    )


def recipe_of(
    method: Method, pattern: PatternSection, allocation: Any, reconstruction: Any, prune: Prune, *, base: str, calibration: str
) -> Recipe:
    """The recipe of what the sections ask for, see Recipe."""
    return Recipe(
        method=asdict(method),
        pattern=asdict(cast(Any, pattern)),
        allocation=asdict(allocation),
        reconstruction=asdict(reconstruction),
        prune={key: value for key, value in asdict(prune).items() if key not in ANY_MACHINE},
        base=base,
        calibration=calibration,
        label=label(method, pattern, allocation, reconstruction, prune),
        pattern_label=pattern.label,
    )


def label(method: Method, pattern: PatternSection, allocation: Any, reconstruction: Any, prune: Prune, *, taken: bool = True) -> str:
    """What tells one pruned model from another in a plot, apart from its pattern and from numbers.

    Args:
        taken: whether the allocation was better than equal sparsities, and not given up for these.
    """
    words = [method.label(grouped=pattern.grouped)]
    words += [f"{allocation.name} allocation{'' if taken else ' not taken'}"] if ALLOCATIONS.of(allocation).budgeted else []
    words += [RECONSTRUCTIONS.of(reconstruction).label] if RECONSTRUCTIONS.of(reconstruction).label else []
    words += {Propagation.DENSE: ["one pass"], Propagation.SEQUENTIAL: ["sequential"]}.get(Propagation(prune.propagate), [])
    return ", ".join(words)


def fingerprint(recipe: Recipe, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that shapes a block's outcome: what an interrupted run finished is taken over where these are the same."""
    facts = {"config": sha256(BASE / "config.json"), **recipe.as_dict(), "batch": batch}
    facts |= {"processes": distributed.world_size(), "device": devices.device_name(device), "dtype": str(dtype)}
    return facts | {"code": code_sha256(), "versions": record.versions()}


def require_free_disk_for(decoder: Decoder, plan: Plan, journal: Journal) -> None:
    """Refuse to begin where the disk does not hold the delta and what the journal keeps of it meanwhile.

    Raises:
        SparsesweepError: naming the bytes free and the bytes needed.
    """
    if distributed.rank() == 0:
        needed = delta_bytes(decoder, plan)
        needed += delta_bytes(decoder, plan, plan.distillation.first) if plan.distillation else 0  # as pruned and as distilled
        require_free_disk(SPARSE, needed - journal.size)
    if journal.finished:
        log.info("an interrupted run finished %d blocks (%s); going on after them", journal.finished, journal.directory)


def host_budget(decoder: Decoder, plan: Plan, allocation: Any, asked: float | None, tokens: int) -> int:
    """Bytes of host memory for the hidden states of this process: its part of the budget less all that pruning needs otherwise.

    Where that is more than the budget, and something that is asked for does not need whole blocks, experts are loaded one at a time. The
    log warns where it is more even so.

    Args:
        asked: `prune.memory_budget`, GiB; None: what is free. tokens: of a pass.
    """
    bytes_needed = partial(needed_bytes, decoder, plan, allocation, tokens)
    available = memory_budget(asked) // distributed.local_world_size()
    needed, how = bytes_needed(), ""
    if needed > available and decoder.has_experts:
        if option := needs_whole_blocks(decoder, plan, allocation):
            how = f": with {option} experts are not loaded one at a time"
        elif decoder.take_experts_apart():
            before, needed, how = needed, bytes_needed(), ", though experts are loaded one at a time"
            message = "loading experts one at a time: %.1f GB of host memory are there, %.1f are needed, and %.1f for whole blocks"
            log.info(message, available / 1e9, needed / 1e9, before / 1e9)
        else:
            how = ": only experts with transformers' own interface are loaded one at a time"
    if needed > available:
        message = "pruning needs up to %.1f GB of host memory, of which %.1f GB are there%s"
        log.warning(message, needed / 1e9, available / 1e9, how)
    return max(0, available - needed)


def needed_bytes(decoder: Decoder, plan: Plan, allocation: Any, tokens: int) -> int:
    """See memory.host_bytes."""
    budgeted = ALLOCATIONS.of(allocation).budgeted
    return host_bytes(
        decoder,
        plan,
        tokens,
        scores_blocks=budgeted is not None and budgeted.holds_scores,
        takes_gradients=budgeted is not None and budgeted.takes_gradients,
        judges=budgeted is not None,
    )


def needs_whole_blocks(decoder: Decoder, plan: Plan, allocation: Any) -> str | None:
    """The option for which blocks are loaded with all of their experts, or None."""
    reasons = {
        f"prune.device={decoder.device.type}": decoder.device.type != "cpu",
        f"prune.processes={distributed.world_size()}": distributed.world_size() > 1,
        f"allocation={allocation.name}": ALLOCATIONS.of(allocation).budgeted is not None,
        "matrices of several blocks": any(decoder.reused),
        "a reconstruction": plan.trains,
        "a permuted pattern": plan.permutation_rounds is not None,
        f"prune.propagate={Propagation.SEQUENTIAL}": plan.propagate == Propagation.SEQUENTIAL,
    }
    return next((option for option, needs in reasons.items() if needs), None)


def require_held_out(judged: list[str], held_out: torch.Tensor) -> None:
    """Refuse to begin where something is to be judged and no windows are held out.

    Raises:
        CalibrationError: the windows were drawn without any held out.
    """
    if judged and not len(held_out):
        wanted = f"wanted at least one: they judge {', '.join(judged)}"
        raise CalibrationError(f"{CALIBRATION}: found no windows held out, {wanted}; run the sample stage with calibration.held_out=4")


def warn_of_few_tokens(plan: Plan, decoder: Decoder, windows: torch.Tensor) -> None:
    """Warn where new weights are fitted to few tokens for the inputs of a layer: they then fit these tokens rather than the model."""
    columns = max(matrix.shape[1] for block in decoder.matrices for matrix in block)
    wanted = -(-TOKENS_PER_COLUMN * columns // windows.shape[1])
    if plan.changes_weights and len(windows) < wanted:
        log.warning(
            "calibration.windows: found %d windows of %d tokens for layers of up to %d inputs, wanted %d tokens an input: "
            "kept weights may fit these tokens rather than the model; calibration.windows=%d gives as many, and "
            "method.damping.shrinkage=true fits fewer of them less closely",
            *(len(windows), windows.shape[1], columns, TOKENS_PER_COLUMN, wanted),
        )


def inputs_kept(decoder: Decoder, plan: Plan, prune: Prune, facts: dict[str, str | int]) -> KeptInputs | None:
    """What the observe stage kept, if the blocks can be pruned for it alone; else None, and the log says why.

    Args:
        facts: the fingerprint that it must have.

    Raises:
        SparsesweepError: what is kept has another; names what differs.
    """
    if prune.statistics == Kept.NONE:
        return None
    statistic = plan.method.statistic
    reasons = {
        f"{plan.method.name} needs {statistic.__name__}": not kept.serves(Kept(prune.statistics), statistic),
        "columns are permuted": plan.permutation_rounds is not None,
        "experts are loaded one at a time": bool(decoder.apart),
        "several blocks multiply by the same matrices": any(decoder.reused),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        log.warning("the windows run through all blocks: what prune.statistics=%s keeps is of no use, since %s", prune.statistics, reason)
        return None
    return KeptInputs(STATISTICS, decoder, statistic, facts)


def hidden_states(source: Stream | KeptInputs, teachers: TeacherStreams | None, batch: int) -> str | None:
    """Where they are, in words; None where there are none, since the blocks are pruned for kept statistics."""
    if isinstance(source, KeptInputs):
        log.info("no window runs through the blocks: %s has the statistics of their inputs", source.directory)
        return None
    locations = " and ".join(sorted({source.location, *(teachers.locations if teachers else ())}))
    log.info("%d windows a pass; hidden states are in %s", batch, locations)
    return locations


def log_judgement(name: str, judgement: Judgement) -> None:
    """Say how an allocation was judged."""
    for version, loss in zip(judgement.versions, judgement.allocated, strict=True):
        words = "".join(f", {key} {value}" for key, value in version.items())
        log.info("allocation %s%s: loss %.4f on the windows held out, %.4f with equal sparsities", name, words, loss, judgement.uniform)
    if not judgement.taken:
        log.warning("allocation %s is not taken: it is no better than equal sparsities on the windows held out", name)


def prune_all(source: Stream | KeptInputs, plan: Plan, journal: Journal, teachers: TeacherStreams | None) -> None:
    """Prune the blocks that the journal does not have; the first process writes them into it."""
    count, stopwatch = len(source.decoder.blocks), record.Stopwatch()
    with WriteBehind() as behind, tqdm(total=count, initial=journal.finished, desc="pruning", unit="block") as bar:
        earlier = [Outcome.of_dict(block["training"]) for block in journal.records(journal.finished) if block["training"]]
        for block in prune_blocks(source, plan, journal.changes, teachers, earlier):
            if distributed.rank() == 0:
                rows = [matrix_row(block, result, plan.patterns) for result in block.matrices]
                training = None if block.training is None else block.training.as_dict()
                behind(journal.write, block.index, block.changes, {"seconds": stopwatch.lap(), "rows": rows, "training": training})
            if block.training is not None and block.training.rate is None:
                log.warning("block %d: no learning rate lowered its error on the windows held out; it is not reconstructed", block.index)
            bar.update()


def train_last_blocks(plan: Plan, journal: Journal, teachers: TeacherStreams | None) -> DistilledBlocks | None:
    """Train the last blocks together, all of which the journal has, where the plan says so."""
    if plan.distillation is None or teachers is None or teachers.student_inputs is None:
        return None
    distributed.barrier()  # the first process has written the last block
    show = partial(tqdm, desc="distilling", unit="step")
    distilled = distill(teachers.student_inputs, teachers.teacher.hidden, plan.distillation, journal.written, show)
    outcome = distilled.outcome
    if outcome.rate is None:
        log.warning("no learning rate lowered the divergence on the windows held out; the last blocks are not distilled")
    log.info("divergence on the windows held out: %.4f nats a token before, %.4f after", outcome.before, outcome.after)
    return distilled


def write_results(journal: Journal, decoder: Decoder, recipe: Recipe, run: dict[str, Any], distilled: DistilledBlocks | None) -> None:
    """The delta and what is known of it, from the whole journal and what a distillation made of its last blocks."""
    count = len(decoder.blocks)
    records = journal.records(count)
    rows = [row | {"distilled": distilled_in(distilled, index)} for index, block in enumerate(records) for row in block["rows"]]
    summary = summarise(rows)
    trainings = [{"block": index, **block["training"]} for index, block in enumerate(records) if block["training"]]
    run = {**run, "reconstructions": trainings}
    with replacing(SPARSE) as sparse, replacing(PRUNE_RESULTS) as results:
        journal.export(distilled.first if distilled else count, sparse)
        for index, changes in distilled.changes() if distilled else []:
            write_block(sparse / journal.delta_path(index).name, changes, recipe.base)
        write_manifest(sparse, recipe=recipe, summary=summary, matrices=rows)
        write_json(results / "sparsity.json", rows)
        write_json(results / "error_by_block.json", error_by_block(rows))
        costs = {"seconds": run["seconds"], "peak_memory_gib": run["peak_memory_gib"]}
        costs |= {"joules": round(sum(run["joules"].values()), 1)} if run["joules"] else {}
        write_json(results / "metrics.json", {**summary, **costs})
        learned = {"distillation": distilled.outcome.as_dict(), "divergences": distilled.divergences} if distilled else {}
        left = {"out_of_scope": out_of_scope(decoder)}
        write_json(results / "provenance.json", {**recipe.as_dict(), **run, **left, **learned})
    log.info("removing the journal %s, %.1f MB", journal.directory, journal.size / 1e6)
    held_out = f", {error:.4f} on windows held out" if (error := summary.get("relative_error_held_out")) is not None else ""
    facts = (SPARSE, summary["sparsity"], summary["relative_error"], held_out, run["seconds"])
    log.info("wrote %s: sparsity %.4f, relative error %.4f%s, %.0f s", *facts)


def distilled_in(distilled: DistilledBlocks | None, block: int) -> bool | None:
    """Whether a block was trained with the others of a distillation; False where that lowered no divergence, None where it had no part."""
    return None if distilled is None or block < distilled.first else distilled.outcome.rate is not None


def code_sha256() -> str:
    """Of the code that decides what is pruned."""
    return record.code_sha256("pruning", "streaming", "checkpoint", "groups.py", "prune.py")


def matrix_row(block: PrunedBlock, finished: MatrixResult, patterns: dict[str, Pattern]) -> dict[str, Any]:
    """One matrix in sparsity.json: sparsity asked and achieved, the relative output error, and what it was calibrated on."""
    matrix = finished.matrix
    weights, kept = matrix.size, finished.kept
    return {
        "block": block.index,
        "matrix": matrix.name,
        "tensor": matrix.tensor,
        "expert": matrix.expert,
        "shape": list(matrix.shape),
        "transposed": matrix.transposed,
        "weights": weights,
        "zeros": weights - kept,
        "asked": float(patterns[matrix.name].sparsity),
        "sparsity": (weights - kept) / weights,
        "relative_error": finished.relative_error,
        "relative_error_held_out": finished.held_out_error,
        "refined": finished.refined,
        "trained": None if block.training is None else block.training.rate is not None,
        "tokens": finished.tokens,
        "calibrated_on": finished.calibrated_on,
        "damping": finished.damping,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The sparsity of all matrices together, and the means of their relative errors, on calibration tokens and on those held out."""
    held_out = [row["relative_error_held_out"] for row in rows if row["relative_error_held_out"] is not None]
    return {
        "sparsity": sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows),
        "relative_error": sum(row["relative_error"] for row in rows) / len(rows),
        **({"relative_error_held_out": sum(held_out) / len(held_out)} if held_out else {}),
    }


def out_of_scope(decoder: Decoder) -> dict[str, float]:
    """What the blocks hold that is no matrix in scope: the kind of tensor -> its fraction of all weights of the blocks, the most first."""
    sizes: dict[str, int] = {}
    total, in_scope = 0, {matrix.tensor for matrices in decoder.matrices for matrix in matrices}
    for tensor in dict.fromkeys(tensor for index in range(len(decoder.blocks)) for tensor in decoder.tensors(index)):
        size = math.prod(decoder.checkpoint.shape(tensor))
        total += size
        if tensor not in in_scope:
            kind = ".".join(kind_of(tensor))
            sizes[kind] = sizes.get(kind, 0) + size
    return {kind: size / total for kind, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))}


def error_by_block(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For DVC's plot: the relative error of each kind of matrix in each block, a mixture's experts as their mean."""
    kinds = {row["matrix"]: kind_of(row["matrix"]) for row in rows}
    names = short_names(set(kinds.values()))
    errors: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        errors.setdefault((row["block"], names[kinds[row["matrix"]]]), []).append(row["relative_error"])
    return [{"block": block, "relative_error": sum(of_kind) / len(of_kind), "matrix": name} for (block, name), of_kind in errors.items()]


def kind_of(matrix: str) -> tuple[str, ...]:
    """The path of a matrix inside its block, without numbers: the same for every block and for every expert of a mixture."""
    words = re.sub(r"\[\d+\]$", "", matrix).removesuffix(".weight").split(".")
    block = next((position for position, word in enumerate(words) if word.isdigit()), -1)
    return tuple(word for word in words[block + 1 :] if not word.isdigit())


def short_names(kinds: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For each path its shortest end that is the end of no other."""
    names = {}
    for kind in kinds:
        lengths = range(1, len(kind) + 1)
        alone = (length for length in lengths if sum(other[-length:] == kind[-length:] for other in kinds) == 1)
        names[kind] = ".".join(kind[-next(alone, len(kind)) :])
    return names


if __name__ == "__main__":
    main()
