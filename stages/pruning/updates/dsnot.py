"""DSnoT: exchange kept for pruned weights until the expected output error of a row is zero.

    E[error]_i = sum_{j dropped} W_ij * E[X_j]                        # Zhang et al. 2024 (DSnoT), arXiv:2310.08915
    grow  argmax_{j dropped} |W_ij * E[X_j]| / Var[X_j]               # among those whose return lowers |E[error]_i|
    prune argmin_{j kept} |W_ij| * ||X_j||_2                          # among those whose loss lowers |E[error]_i|

A row's swap is taken if it lowers |E[error]_i|. The row is done when that is at most the threshold, when the swap would not
lower it or there is none, and after a swap that changes the sign of E[error]_i. So no weight moves twice. In groups, the
pruned weight is the lowest of the grown one's group, and a group that has none to prune grows none.

The authors' code, github.com/zyxxmu/DSnoT, differs by default: in whole rows it goes on after a change of sign, in the other
direction, whether or not the error falls; in groups it prunes whatever the sign of the weight's effect, and refuses a swap
that changes the sign of the error; and it leaves the MLP's matrices alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from stages.pruning.entries import Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.selection import select
from stages.pruning.statistics import Moments
from stages.schema import Citation, number

if TYPE_CHECKING:
    from stages.pruning.method import Method


@dataclass(kw_only=True, slots=True)
class DsnotParameters:
    """cycles: swaps in a row at most. threshold: of a row's expected error per token, below which the row is left alone."""

    name: str
    cycles: int = number(minimum=1)
    threshold: float = number(minimum=0)


def dsnot(
    weight: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    squared_norm: torch.Tensor,
    mask: torch.Tensor,
    *,
    cycles: int,
    threshold: float,
    group: int | None,
) -> torch.Tensor:
    """Refine a mask, in each row by one swap a cycle.

    Args:
        weight: [rows, columns], float32; not changed.
        mean: [columns], float32, of each input over the calibration tokens.
        variance: [columns], float32, of the same, 0 or more; an input without variance is grown first.
        squared_norm: [columns], float32, of the same, up to a common factor.
        mask: [rows, columns], bool, True = kept; not changed.
        cycles: swaps in a row at most.
        threshold: expected error, per token, that is small enough. (The authors' 0.1 is for the sum over a sample of 2048 tokens.)
        group: columns, consecutive and dividing the matrix's, within which a swap must lie; None for the whole row.

    Returns:
        [rows, columns], bool, True = kept, with the counts of `mask` in every row and group.
    """
    mask = mask.clone()
    rows = torch.arange(len(weight), device=weight.device)
    effect = weight * mean
    error = (effect * ~mask).sum(dim=1)
    steadiness = effect.abs() / variance  # NaN only where there is no effect, and so nothing to grow
    importance = weight.abs() * squared_norm.sqrt()
    for _ in range(cycles):
        left = error.abs() > threshold
        rows, error, effect, steadiness, importance = (each[left] for each in (rows, error, effect, steadiness, importance))
        if not len(rows):
            break
        found, grown, pruned = _choose(effect * error.sign()[:, None], steadiness, importance, mask[rows], group or weight.shape[1])
        after = error + (effect.gather(1, pruned) - effect.gather(1, grown))[:, 0]
        taken = found & (after.abs() < error.abs())
        mask[rows[taken], grown[taken, 0]], mask[rows[taken], pruned[taken, 0]] = True, False
        error = after.where(taken & (after * error > 0), 0)  # 0: the row is done
    return mask


def _choose(
    part_of_error: torch.Tensor, steadiness: torch.Tensor, importance: torch.Tensor, kept: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Say in which rows there is a swap, [rows], and which column grows and which is pruned there, each [rows, 1].

    part_of_error: a weight's effect, positive if it has the error's sign.
    """
    prunable = kept & (part_of_error < 0)
    partnered = prunable.unflatten(1, (-1, group)).any(dim=2).repeat_interleave(group, dim=1)
    growable = ~kept & (part_of_error > 0) & partnered
    grown = steadiness.where(growable, -torch.inf).argmax(dim=1, keepdim=True)
    together = torch.arange(kept.shape[1], device=kept.device) // group == grown // group
    pruned = importance.where(prunable & together, torch.inf).argmin(dim=1, keepdim=True)
    return growable.any(dim=1), grown, pruned


def prune(weights: list[torch.Tensor], statistic: Moments, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """The masks of the score, refined; see entries.Update."""
    statistic.require_finite()
    refine = partial(dsnot, mean=statistic.mean, variance=statistic.variance, squared_norm=statistic.squared_norm)
    refine = partial(refine, cycles=method.update.cycles, threshold=method.update.threshold)
    matrices = zip(weights, select(weights, statistic, patterns, method), patterns, strict=True)
    return [Pruned(mask=refine(weight, mask=mask, group=pattern.group)) for weight, mask, pattern in matrices]


DSNOT = Update(
    name="dsnot",
    prune=prune,
    statistic=Moments,
    changes_weights=lambda _: False,
    parameters=DsnotParameters,
    summary="the mask refined by swaps that lower the expected error",
    citation=Citation(text="Zhang et al. 2024", url="https://arxiv.org/abs/2310.08915"),
)
