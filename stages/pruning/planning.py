"""From sections of the configuration to a plan for the block loop, whole before any weight is read."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from stages.errors import ConfigError, PruningError
from stages.pruning import distributed
from stages.pruning.allocation import bounds_of_counts, meet_budget
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.entries import DenseModel, Evidence
from stages.pruning.journal import Journal
from stages.pruning.patterns import ComparisonGroup, Pattern, PatternSection, Unstructured, pruned_count
from stages.pruning.plan import Plan
from stages.pruning.sensitivity import Candidate, pruned_losses
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

JUDGED_BY = 8  # calibration windows whose inputs Wanda sees where an allocation is judged
UNIFORM_LOSS, ALLOCATED_LOSSES = "held_out.uniform", "held_out.allocated"  # keys of the evidence


def plan_patterns(decoder: Decoder, comparison_group: ComparisonGroup, section: PatternSection) -> dict[str, Pattern]:
    """The pattern of every matrix in scope, found to fit its shape.

    Args:
        section: `pattern`.

    Raises:
        ConfigError: a matrix whose columns the pattern does not divide, or in which no weight would be pruned; names it.
        ArchitectureError: see Decoder.matrices.
    """
    pattern, patterns = section.pattern(comparison_group), dict[str, Pattern]()
    for matrix in (matrix for block in decoder.matrices for matrix in block):
        try:
            pattern.check(matrix.shape[1], matrix.shape[0])
        except ValueError as error:
            raise ConfigError(f"{matrix.name}: {error}") from None
        patterns[matrix.name] = pattern
    return patterns


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Losses on the windows held out after pruning by Wanda, nats per token: with equal sparsities, and with the allocation's.

    versions: what tells each of the allocation's versions from the section, see entries.Budgeted. allocated: of each, at least one.
    """

    uniform: float
    versions: list[dict[str, Any]]
    allocated: list[float]

    @property
    def best(self) -> int:
        """Index of the allocation's best version."""
        return self.allocated.index(min(self.allocated))

    @property
    def taken(self) -> bool:
        """Whether the best version is better than equal sparsities."""
        return self.allocated[self.best] < self.uniform

    def as_dict(self) -> dict[str, Any]:
        tried = [{**version, "loss": loss} for version, loss in zip(self.versions, self.allocated, strict=True)]
        return {"uniform": self.uniform, "allocated": self.allocated[self.best], "taken": self.taken, "tried": tried}


def allocate(
    plan: Plan,
    decoder: Decoder,
    section: Any,
    pattern: PatternSection,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    stream: Callable[..., Stream],
    journal: Journal,
    sources: tuple[int, ...] = (),
) -> tuple[Plan, Judgement | None]:
    """Give every matrix a sparsity of its own, so that all together have the pattern's, to the weight.

    Where the windows held out show no less loss than with equal sparsities, the matrices get equal ones, to the weight likewise.

    Args:
        section: `allocation`.
        pattern: the section; its sparsity is what all matrices together must have. windows, stream, sources: see entries.DenseModel.
        held_out: [windows, tokens], int64, at least one.
        journal: keeps what is measured.

    Returns:
        The plan, and how the allocation was judged; None where there is none.

    Raises:
        ConfigError: the bounds of the allocation do not allow the sparsity; before a weight is read.
        PruningError: what is measured is not finite, or a spectrum has no tail; names the matrix or the block.
    """
    budgeted = ALLOCATIONS.of(section).budgeted
    if budgeted is None:
        return plan, None
    target = Unstructured(sparsity=pattern.sparsity, comparison_group=plan.method.compared_within)
    matrices = [matrix for block in decoder.matrices for matrix in block]
    sizes = [matrix.size for matrix in matrices]
    budget = pruned_count(sum(sizes), target.sparsity)
    try:
        bounds_of_counts(sizes, budget, section.lowest, section.highest)
    except ValueError as error:
        raise ConfigError(f"allocation: {error}") from None
    group = target.comparison_group
    dense = DenseModel(decoder=decoder, windows=windows, stream=stream, comparison_group=group, sources=sources)

    def candidate(counts: list[int], row_costs: Evidence) -> Candidate:
        shares = {matrix.name: Fraction(count, matrix.size) for matrix, count in zip(matrices, counts, strict=True)}
        return Candidate(patterns={name: replace(target, sparsity=share) for name, share in shares.items()}, row_costs=row_costs)

    def allocated(evidence: Evidence, version: Any) -> Candidate:
        with PruningError.naming(f"allocation {section.name}"):
            counts = budgeted.counts(evidence, decoder.matrices, target, version)
        return candidate(counts, budgeted.row_costs(evidence, decoder.matrices, target, version))

    equal = meet_budget([float(target.sparsity)] * len(sizes), sizes=sizes, budget=budget, lowest=section.lowest, highest=section.highest)
    uniform, versions = candidate(equal, {}), budgeted.versions(section)

    def measured() -> Evidence:
        evidence = budgeted.evidence(dense, section)
        number = min(len(windows), max(JUDGED_BY, distributed.world_size()))
        few = windows[:: len(windows) // number][:number]  # of all sources
        candidates = [uniform, *(allocated(evidence, version) for version in versions)]
        open_stream = partial(stream, streams=1 + len(candidates))
        judging = held_out.repeat(-(-distributed.world_size() // len(held_out)), 1)  # at least one for each process
        losses = pruned_losses(open_stream(few), [open_stream(judging) for _ in candidates], candidates)
        return evidence | {UNIFORM_LOSS: torch.tensor(losses[0]), ALLOCATED_LOSSES: torch.tensor(losses[1:])}

    evidence = journal.allocation_evidence(measured)
    changes = [{key: value for key, value in asdict(version).items() if value != getattr(section, key)} for version in versions]
    losses = evidence[ALLOCATED_LOSSES].tolist()
    judgement = Judgement(uniform=evidence[UNIFORM_LOSS].item(), versions=changes, allocated=losses)
    chosen = allocated(evidence, versions[judgement.best]) if judgement.taken else uniform
    return replace(plan, patterns=dict[str, Pattern](chosen.patterns), row_costs=chosen.row_costs), judgement
