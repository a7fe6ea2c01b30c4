"""From a configuration to what the block loop takes: method, patterns, and how many zeros each matrix gets."""

from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction

import torch

from stages import config
from stages.errors import ConfigError
from stages.pruning import distributed
from stages.pruning import method as methods
from stages.pruning.allocation import alphapruning, bounds_of_counts, least_sum, meet_budget, owl
from stages.pruning.block_loop import Plan
from stages.pruning.distillation import Distillation
from stages.pruning.journal import Journal
from stages.pruning.method import Method
from stages.pruning.patterns import Nm, Pattern, Unstructured, pruned_count
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.reordering import require_candidates
from stages.pruning.sensitivity import Sensitivity, outlier_shares, sensitivities, spectral_exponents
from stages.streaming.architecture import Matrix
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

GRID = [step / 50 for step in range(50)] + [0.99, 1.0]  # sparsities at which an allocation foresees errors
RECONSTRUCTED: dict[str, list[str]] = {
    "none": [],
    "block": ["reconstructed"],
    "distilled": ["distilled"],
}


def compose(method: config.Method) -> Method:
    """The method that a configuration names."""
    return Method(score=score_of(method), update=update_of(method))


def score_of(method: config.Method) -> methods.Score:
    if isinstance(method.score, config.RiaScore):
        return methods.ria_score(method.score.power)
    if method.score.name == "obs":
        return methods.obs_score(method.damping.share, method.damping.limit)
    return {"magnitude": methods.MAGNITUDE, "wanda": methods.WANDA, "wanda_variant": methods.WANDA_VARIANT}[method.score.name]


def update_of(method: config.Method) -> methods.Update:
    parameters = {key: value for key, value in asdict(method.update).items() if key != "name"}
    share, limit = method.damping.share, method.damping.limit
    match method.update:
        case config.SparseGptUpdate():
            sweeping = method.score.name == "obs"
            return methods.SparseGpt(damping=share, damping_limit=limit, choose_while_sweeping=sweeping, **parameters)
        case config.LeastSquaresUpdate():
            return methods.SwapAndRefit(damping=share, cycles=0, candidates=0, refit_steps=method.update.steps)
        case config.AdmmUpdate():
            return methods.Admm(damping=share, damping_limit=limit, **parameters)
        case config.SwapsUpdate():
            return methods.SwapAndRefit(damping=share, **parameters)
        case config.DsNoTUpdate():
            return methods.DsNoT(**parameters)
        case _:
            return methods.Keep()


def reconstruction_of(reconstruction: config.Reconstruct) -> Reconstruction | None:
    """What blocks learn one by one."""
    match reconstruction:
        case config.BlockReconstruction(epochs=epochs, learning_rate=rate):
            return Reconstruction(epochs=epochs, learning_rate=rate)
        case config.Distilled(block_epochs=epochs, block_learning_rate=rate) if epochs:
            return Reconstruction(epochs=epochs, learning_rate=rate)
        case _:
            return None


def distillation_of(reconstruction: config.Reconstruct, blocks: int) -> Distillation | None:
    """What the last of so many blocks learn together."""
    if not isinstance(reconstruction, config.Distilled):
        return None
    first = blocks - max(1, round(reconstruction.share * blocks))
    return Distillation(first=first, epochs=reconstruction.epochs, learning_rate=reconstruction.learning_rate)


def label(method: config.Method, allocation: config.Allocation, reconstruction: config.Reconstruct, prune: config.Prune) -> str:
    """What tells one pruned model from another in a plot, pattern and numbers apart: the method, and the parts that its name hides."""
    score, update = method.score.name, method.update.name
    scores, updates = ([option for option in choice.options if option in method.name] for choice in (config.SCORES, config.UPDATES))
    parts = [method.name if scores and score == max(scores, key=len) else f"{method.name} ({score})"]
    if update == "none":
        parts += ["no update"] if updates or not scores else []
    elif update not in updates:
        parts += [update]
    parts += [f"{allocation.name} allocation"] if allocation.name != "uniform" else []
    parts += RECONSTRUCTED[reconstruction.name]
    parts += ["one pass"] if prune.propagate == "dense" else []
    return ", ".join(parts)


def plan_patterns(decoder: Decoder, comparison_group: str, pattern: config.Pattern) -> dict[str, Pattern]:
    """The pattern of every matrix in scope, found to fit its shape before any weight is read.

    Raises:
        ConfigError: a matrix whose columns the pattern does not divide, or whose rows would lose no weight; names it.
        PruningError: channels are to change places in a block that has none for it; names it.
        ArchitectureError: see Decoder.matrices.
    """
    if isinstance(pattern, config.Nm) and pattern.permutation_rounds is not None:
        require_candidates(decoder)
    patterns: dict[str, Pattern] = {}
    for matrix in (matrix for block in decoder.matrices for matrix in block):
        if isinstance(pattern, config.Nm):
            patterns[matrix.name] = Nm(kept=pattern.kept, group=pattern.group)
        else:
            patterns[matrix.name] = Unstructured(sparsity=pattern.sparsity, comparison_group=comparison_group)
        try:
            patterns[matrix.name].check(matrix.shape[1])
        except ValueError as error:
            raise ConfigError(f"{matrix.name}: {error}") from None
    return patterns


def allocated(
    plan: Plan,
    decoder: Decoder,
    allocation: config.OwlAllocation | config.AlphaPruningAllocation | config.LossAllocation,
    pattern: Unstructured,
    windows: torch.Tensor,
    make_stream: Callable[[torch.Tensor], Stream],
    journal: Journal,
) -> Plan:
    """The plan with a sparsity for every matrix, so that all together have the pattern's, to the weight.

    Raises:
        ConfigError: the bounds of the allocation do not allow the sparsity; before a weight is read.
        PruningError: what it goes by is not finite, or a spectrum has no tail; names the matrix or the block.
    """
    matrices = [matrix for block in decoder.matrices for matrix in block]
    sizes, rows = [matrix.size for matrix in matrices], dict[str, torch.Tensor]()
    try:
        bounds_of_counts(sizes, pruned_count(sum(sizes), pattern.sparsity), allocation.lowest, allocation.highest)
        if isinstance(allocation, config.LossAllocation):
            few = first_of(windows, allocation.windows)
            felt = journal.survey(lambda: look_at_loss(make_stream(few), pattern.comparison_group, allocation.row_floor))
            counts = counts_by_loss([felt[f"{matrix.name}.curve"].tolist() for matrix in matrices], matrices, pattern.sparsity, allocation)
            if allocation.row_strength and pattern.comparison_group == "matrix":
                rows = {matrix.name: felt[f"{matrix.name}.rows"] ** allocation.row_strength for matrix in matrices}
        else:
            found = journal.survey(lambda: look_at_blocks(allocation, decoder, windows, make_stream))
            counts = counts_by_block(found["blocks"].tolist(), decoder.matrices, pattern.sparsity, allocation)
    except ValueError as error:
        raise ConfigError(f"allocation: {error}") from error
    patterns: dict[str, Pattern] = {
        matrix.name: replace(pattern, sparsity=Fraction(count, matrix.size)) for matrix, count in zip(matrices, counts, strict=True)
    }
    return replace(plan, patterns=patterns, rows=rows)


def first_of(windows: torch.Tensor, count: int) -> torch.Tensor:
    """So many, and at least one for each process."""
    return windows[: max(count, distributed.world_size())]


def counts_by_block(
    found: list[float],
    matrices: list[list[Matrix]],
    sparsity: float | Fraction,
    allocation: config.OwlAllocation | config.AlphaPruningAllocation,
) -> list[int]:
    """Zeros of every matrix by what was found of its block."""
    wanted_of = owl if isinstance(allocation, config.OwlAllocation) else alphapruning
    by_block = wanted_of(found, sparsity=float(sparsity), strength=allocation.strength)
    wanted = [by_block[index] for index, block in enumerate(matrices) for _ in block]
    sizes = [matrix.size for block in matrices for matrix in block]
    budget = pruned_count(sum(sizes), sparsity)
    return meet_budget(wanted, sizes=sizes, budget=budget, lowest=allocation.lowest, highest=allocation.highest)


def counts_by_loss(
    curves: list[list[float]], matrices: list[Matrix], sparsity: float | Fraction, allocation: config.LossAllocation
) -> list[int]:
    """Zeros of every matrix where they cost least; a matrix without a curve, of which nothing is known, gets its even share."""
    sizes = [matrix.size for matrix in matrices]
    known = [number for number, curve in enumerate(curves) if curve]
    counts = [pruned_count(size, sparsity) for size in sizes]
    left = pruned_count(sum(sizes), sparsity) - sum(count for count, curve in zip(counts, curves, strict=True) if not curve)
    found = least_sum(
        [curves[number] for number in known],
        grid=GRID,
        sizes=[sizes[number] for number in known],
        budget=left,
        lowest=allocation.lowest,
        highest=allocation.highest,
    )
    for number, count in zip(known, found, strict=True):
        counts[number] = count
    return counts


def look_at_loss(stream: Stream, comparison_group: str, floor: float) -> dict[str, torch.Tensor]:
    """For every matrix its curve of expected losses and its rows' sensitivities, as the journal keeps them.

    An expert that no token chose has an empty curve, and rows that are alike.
    """
    found = sensitivities(stream, GRID, comparison_group, floor)
    kept: dict[str, torch.Tensor] = {}
    for matrix in (matrix for block in stream.decoder.matrices for matrix in block):
        felt = found.get(matrix.name) or Sensitivity(curve=[], rows=torch.ones(matrix.shape[0]))
        kept[f"{matrix.name}.curve"], kept[f"{matrix.name}.rows"] = torch.tensor(felt.curve, dtype=torch.float64), felt.rows
    return kept


def look_at_blocks(
    allocation: config.OwlAllocation | config.AlphaPruningAllocation,
    decoder: Decoder,
    windows: torch.Tensor,
    make_stream: Callable[[torch.Tensor], Stream],
) -> dict[str, torch.Tensor]:
    """What the allocation goes by, for each block, as the journal keeps it."""
    if isinstance(allocation, config.OwlAllocation):
        found = outlier_shares(make_stream(windows), allocation.multiple)
    else:
        found = spectral_exponents(decoder)
    return {"blocks": torch.tensor(found, dtype=torch.float64)}
