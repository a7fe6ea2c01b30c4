"""From a configuration to what the block loop takes: method, patterns, and how many zeros each matrix gets."""

from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction

import torch

from stages import config
from stages.errors import ConfigError
from stages.pruning import method as methods
from stages.pruning import ranks
from stages.pruning.allocation import alphapruning, bounds_of_counts, filled_in, least_sum, meet_budget, owl
from stages.pruning.block_loop import Plan
from stages.pruning.distillation import Distillation
from stages.pruning.journal import Journal
from stages.pruning.method import Method
from stages.pruning.patterns import Nm, Pattern, Unstructured, pruned_count
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.reordering import require_candidates
from stages.pruning.survey import Sensitivity, outlier_shares, part_errors, sensitivities, spectral_exponents
from stages.streaming.architecture import Decoder, Matrix, Part
from stages.streaming.stream import Stream

GRID = [step / 50 for step in range(50)] + [0.99, 1.0]  # sparsities at which an allocation foresees errors
MEASURED = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # at which it measures them, if it does
RECONSTRUCTED: dict[str, list[str]] = {
    "none": [],
    "block": ["reconstructed"],
    "sub_block": ["sub_block reconstruction"],
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
        case config.SomeReconstruction(name=name, epochs=epochs, learning_rate=rate):
            return Reconstruction(epochs=epochs, learning_rate=rate, toward_model=name == "block")
        case config.Distilled(block_epochs=epochs, block_learning_rate=rate) if epochs:
            return Reconstruction(epochs=epochs, learning_rate=rate, toward_model=True)
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
    parts += ["by parts"] if prune.by_parts else []
    parts += ["one pass"] if prune.propagate == "dense" else []
    return ", ".join(parts)


def plan_patterns(decoder: Decoder, threshold: str, pattern: config.Pattern) -> dict[str, Pattern]:
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
            patterns[matrix.name] = Unstructured(sparsity=pattern.sparsity, threshold=threshold)
        try:
            patterns[matrix.name].check(matrix.shape[1])
        except ValueError as error:
            raise ConfigError(f"{matrix.name}: {error}") from None
    return patterns


def allocated(
    plan: Plan,
    decoder: Decoder,
    allocation: config.OwlAllocation | config.AlphaPruningAllocation | config.LossAllocation | config.ErrorAllocation,
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
            felt = journal.survey(lambda: look_at_loss(make_stream(few), pattern.threshold, allocation.row_floor))
            counts = counts_by_loss([felt[f"{matrix.name}.curve"].tolist() for matrix in matrices], matrices, pattern.sparsity, allocation)
            if allocation.row_strength and pattern.threshold == "matrix":
                rows = {matrix.name: felt[f"{matrix.name}.rows"] ** allocation.row_strength for matrix in matrices}
        elif isinstance(allocation, config.ErrorAllocation):
            few = first_of(windows, allocation.windows)
            found = journal.survey(lambda: look_at_parts(make_stream(few), pattern.threshold))
            parts = [part for index in range(len(decoder.blocks)) for part in decoder.parts(index)]
            counts = counts_by_part(found["parts"].tolist(), parts, matrices, pattern.sparsity, allocation)
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
    return windows[: max(count, ranks.count())]


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


def counts_by_part(
    curves: list[list[float]], parts: list[Part], matrices: list[Matrix], sparsity: float | Fraction, allocation: config.ErrorAllocation
) -> list[int]:
    """Zeros of every matrix, the same share of all in a part, so that the errors measured of all parts add up to the least."""
    sizes = [sum(matrix.size for matrix in part.matrices) for part in parts]
    budget, bounds = pruned_count(sum(sizes), sparsity), {"lowest": allocation.lowest, "highest": allocation.highest}
    finer = [filled_in([0.0, *curve], grid=[0.0, *MEASURED], finer=GRID) for curve in curves]
    counts = least_sum(finer, grid=GRID, sizes=sizes, budget=budget, **bounds)
    shares = {matrix.name: count / size for part, count, size in zip(parts, counts, sizes, strict=True) for matrix in part.matrices}
    wanted = [shares[matrix.name] for matrix in matrices]
    return meet_budget(wanted, sizes=[matrix.size for matrix in matrices], budget=budget, **bounds)


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


def look_at_loss(stream: Stream, threshold: str, floor: float) -> dict[str, torch.Tensor]:
    """For every matrix its curve of expected losses and its rows' sensitivities, as the journal keeps them.

    An expert that no token chose has an empty curve, and rows that are alike.
    """
    found = sensitivities(stream, GRID, threshold, floor)
    kept: dict[str, torch.Tensor] = {}
    for matrix in (matrix for block in stream.decoder.matrices for matrix in block):
        felt = found.get(matrix.name) or Sensitivity(curve=[], rows=torch.ones(matrix.shape[0]))
        kept[f"{matrix.name}.curve"], kept[f"{matrix.name}.rows"] = torch.tensor(felt.curve, dtype=torch.float64), felt.rows
    return kept


def look_at_parts(stream: Stream, threshold: str) -> dict[str, torch.Tensor]:
    """For every part of every block its curve of errors, as the journal keeps them."""
    return {"parts": torch.tensor(part_errors(stream, MEASURED, threshold), dtype=torch.float64)}


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
