"""Least squares on a fixed mask: set the kept weights to the values with the least output error.

    min ||(W - W') X||_F²  over W' that are zero where the mask is False:   W'_S = argmin (w - w')ᵀ H (w - w'),  H = X Xᵀ

for each row; all rows at once by conjugate gradients, preconditioned by the diagonal of H, each row's residual and direction
masked by its own mask (Meng et al. 2024, ALPS, arXiv:2406.07831, section 3.3).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stages.pruning.entries import Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.selection import select
from stages.pruning.statistics import Gram
from stages.schema import Citation, number

if TYPE_CHECKING:
    from stages.pruning.method import Method


@dataclass(kw_only=True, slots=True)
class LeastSquaresParameters:
    """steps: number of steps of conjugate gradients."""

    name: str
    steps: int = number(minimum=1)


def least_squares(target: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, steps: int) -> torch.Tensor:
    """Refit the kept weights.

    The error falls with every step, up to rounding, so that the result is never worse than `start`.

    Args:
        target: [rows, columns], float32, the dense weights, whose products with the inputs are approximated.
        gram: [columns, columns], float32, symmetric, with a positive diagonal.
        mask: [rows, columns], bool, True = kept.
        start: [rows, columns], float32, initial weights; values outside the mask are ignored.
        steps: number of steps of conjugate gradients; as many as a row's kept weights solve the row exactly, up to rounding.

    Returns:
        [rows, columns], float32, zero where the mask is False.
    """
    diagonal = gram.diagonal()
    values = start * mask
    residual = (target - values) @ gram * mask
    direction = residual / diagonal
    slope = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(steps):
        gram_direction = direction @ gram * mask
        curvature = (direction * gram_direction).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, slope / curvature, 0)  # 0 where a row is solved
        values += step * direction
        residual -= step * gram_direction
        preconditioned = residual / diagonal
        previous_slope, slope = slope, (residual * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned + torch.where(previous_slope > 0, slope / previous_slope, 0) * direction
    return values


def prune(weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Take the masks of the score and refit the kept weights; see entries.Update."""
    damped = statistic.damped(method.damping.share)
    masks = select(weights, statistic, patterns, method)
    damping = max(method.damping.share, statistic.damping or 0)  # of the refit, or of a score that needed more
    return [
        Pruned(mask=mask, values=least_squares(weight, damped, mask, weight, method.update.steps), damping=damping)
        for weight, mask in zip(weights, masks, strict=True)
    ]


LEAST_SQUARES = Update(
    name="least_squares",
    prune=prune,
    statistic=Gram,
    refines=True,
    changes_weights=lambda _: True,
    parameters=LeastSquaresParameters,
    summary="kept weights refitted by conjugate gradients on the Gram matrix",
    citation=Citation(text="Meng et al. 2024", url="https://arxiv.org/abs/2406.07831"),
)
