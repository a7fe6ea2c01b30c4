"""From sections of the configuration to a plan for the block loop, whole before any weight is read."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from stages.errors import ConfigError, PruningError
from stages.pruning.allocation import bounds_of_counts
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.entries import DenseModel
from stages.pruning.journal import Journal
from stages.pruning.patterns import ComparisonGroup, Pattern, PatternSection, Unstructured, pruned_count
from stages.pruning.plan import Plan
from stages.pruning.reordering import require_candidates
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream


def plan_patterns(decoder: Decoder, comparison_group: ComparisonGroup, section: PatternSection) -> dict[str, Pattern]:
    """The pattern of every matrix in scope, found to fit its shape.

    Args:
        section: `pattern`.

    Raises:
        ConfigError: a matrix whose columns the pattern does not divide, or in which no weight would be pruned; names it.
        PruningError: a block without input channels that may be reordered, though that is asked; names it.
        ArchitectureError: see Decoder.matrices.
    """
    if section.permutation_rounds is not None:
        require_candidates(decoder)
    pattern, patterns = section.pattern(comparison_group), dict[str, Pattern]()
    for matrix in (matrix for block in decoder.matrices for matrix in block):
        try:
            pattern.check(matrix.shape[1], matrix.shape[0])
        except ValueError as error:
            raise ConfigError(f"{matrix.name}: {error}") from None
        patterns[matrix.name] = pattern
    return patterns


def allocate(
    plan: Plan,
    decoder: Decoder,
    section: Any,
    pattern: PatternSection,
    windows: torch.Tensor,
    stream: Callable[[torch.Tensor], Stream],
    journal: Journal,
) -> Plan:
    """Give every matrix a sparsity of its own, so that all together have the pattern's, to the weight.

    Args:
        section: `allocation`.
        pattern: the section; its sparsity is what all matrices together must have. windows, stream: see entries.DenseModel.
        journal: keeps what is measured.

    Raises:
        ConfigError: the bounds of the allocation do not allow the sparsity; before a weight is read.
        PruningError: what is measured is not finite, or a spectrum has no tail; names the matrix or the block.
    """
    budgeted = ALLOCATIONS.of(section).budgeted
    if budgeted is None:
        return plan
    target = Unstructured(sparsity=pattern.sparsity, comparison_group=plan.method.compared_within)
    matrices = [matrix for block in decoder.matrices for matrix in block]
    sizes = [matrix.size for matrix in matrices]
    try:
        bounds_of_counts(sizes, pruned_count(sum(sizes), target.sparsity), section.lowest, section.highest)
    except ValueError as error:
        raise ConfigError(f"allocation: {error}") from None
    dense = DenseModel(decoder=decoder, windows=windows, stream=stream, comparison_group=target.comparison_group)
    evidence = journal.allocation_evidence(lambda: budgeted.evidence(dense, section))
    with PruningError.naming(f"allocation {section.name}"):
        counts = budgeted.counts(evidence, decoder.matrices, target, section)
    patterns: dict[str, Pattern] = {
        matrix.name: replace(target, sparsity=Fraction(count, matrix.size)) for matrix, count in zip(matrices, counts, strict=True)
    }
    return replace(plan, patterns=patterns, row_costs=budgeted.row_costs(evidence, decoder.matrices, target, section))
