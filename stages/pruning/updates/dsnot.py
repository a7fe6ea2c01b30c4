"""DSnoT: exchange kept for pruned weights until the expected output error of a row is zero.

    E[error]_i = sum_{j pruned} W_ij * E[X_j]                        # Zhang et al. 2024 (DSnoT), arXiv:2310.08915
    grow  argmax_{j pruned} |W_ij * E[X_j]| / Var[X_j]                # among those whose return lowers |E[error]_i|
    prune argmin_{j kept} |W_ij| * ||X_j||_2                          # among those whose loss lowers |E[error]_i|

A swap is made if it lowers |E[error]_i|. A row is finished when |E[error]_i| is at most the threshold, when there is no swap or
the swap would not lower it, and after a swap that changes the sign of E[error]_i. So no weight moves twice. In groups, the
pruned weight is the lowest of the grown weight's group, and a group without a weight to prune grows none.

The authors' code, github.com/zyxxmu/DSnoT, differs by default: in whole rows it continues after a change of sign, in the other
direction, whether or not the error falls; in groups it prunes weights of either sign of effect and refuses a swap that changes
the sign of the error; and it does not change the masks of the MLP's matrices.
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
    """cycles: upper bound of swaps per row. threshold: expected error per token up to which a row is not changed."""

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
    """Refine a mask by one swap per row and cycle.

    Args:
        weight: [rows, columns], float32; not changed.
        mean: [columns], float32, mean of each input over the calibration tokens.
        variance: [columns], float32, variance of each input, 0 or more; an input without variance is grown first.
        squared_norm: [columns], float32, squared norm of each input, up to a common factor.
        mask: [rows, columns], bool, True = kept; not changed.
        cycles: upper bound of swaps per row.
        threshold: expected error per token up to which a row is not changed. (The
            authors' 0.1 is for the sum over a sample of 2048 tokens.)
        group: number of consecutive columns within which a swap must lie, a divisor of columns; None for the whole row.

    Returns:
        [rows, columns], bool, True = kept, with as many kept weights as `mask` in every row and group.
    """
    mask = mask.clone()
    rows = torch.arange(len(weight), device=weight.device)
    effect = weight * mean
    error = (effect * ~mask).sum(dim=1)
    steadiness = effect.abs() / variance  # NaN only where there is no effect, and so nothing to grow
    importance = weight.abs() * squared_norm.sqrt()
    for _ in range(cycles):
        unfinished = error.abs() > threshold
        rows, error, effect, steadiness, importance = (per_row[unfinished] for per_row in (rows, error, effect, steadiness, importance))
        if not len(rows):
            break
        has_swap, grown, pruned = _choose(effect * error.sign()[:, None], steadiness, importance, mask[rows], group or weight.shape[1])
        new_error = error + (effect.gather(1, pruned) - effect.gather(1, grown))[:, 0]
        accepted = has_swap & (new_error.abs() < error.abs())
        mask[rows[accepted], grown[accepted, 0]], mask[rows[accepted], pruned[accepted, 0]] = True, False
        error = new_error.where(accepted & (new_error * error > 0), 0)  # 0: the row is done
    return mask


def _choose(
    signed_effect: torch.Tensor, steadiness: torch.Tensor, importance: torch.Tensor, kept: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the rows that have a swap, [rows], bool, and the columns that are grown and pruned there, [rows, 1], int64.

    signed_effect: a weight's effect, positive if it has the error's sign.
    """
    prunable = kept & (signed_effect < 0)
    group_has_prunable = prunable.unflatten(1, (-1, group)).any(dim=2).repeat_interleave(group, dim=1)
    growable = ~kept & (signed_effect > 0) & group_has_prunable
    grown = steadiness.where(growable, -torch.inf).argmax(dim=1, keepdim=True)
    same_group = torch.arange(kept.shape[1], device=kept.device) // group == grown // group
    pruned = importance.where(prunable & same_group, torch.inf).argmin(dim=1, keepdim=True)
    return growable.any(dim=1), grown, pruned


def prune(weights: list[torch.Tensor], statistic: Moments, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Refine the masks of the score; see entries.Update."""
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
