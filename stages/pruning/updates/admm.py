"""ADMM: optimise mask and values together, under a penalty on their difference that grows until both agree.

    W ← (W₀ H + ρ (D - V)) (H + ρ I)⁻¹,   D ← keep(W + V),   V ← V + W - D         # Meng et al. 2024, ALPS, arXiv:2406.07831, eq. 4

with H = X Xᵀ scaled to a unit diagonal (Boža 2024, arXiv:2401.02938: columns by their norm), so that the penalty has the
same effect on every column and `keep` compares |W| * ||X||, as Wanda does. ρ grows by a constant factor, where ALPS adapts it to how much
the mask still changes; H + ρ I is factored anew every few steps, and ρ is the same in between. V, the multipliers over ρ, is kept
when ρ grows: in our trials this lost a little less than dividing it. ρ should end near 1, the unit diagonal: a larger ρ freezes the
mask before the values have converged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stages.pruning.entries import Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.scores.wanda import WANDA
from stages.pruning.statistics import Gram, first_to_factor
from stages.pruning.updates.least_squares import least_squares
from stages.schema import Citation, number

if TYPE_CHECKING:
    from stages.pruning.method import Method


@dataclass(kw_only=True, slots=True)
class AdmmParameters:
    """steps: number of ADMM steps.

    penalty: that of the first step, as a fraction of the scaled Gram matrix's diagonal. growth: factor of the penalty per step.
    hold: steps between two factorisations. refit_steps: steps of least squares on the chosen mask.
    """

    name: str
    steps: int = number(minimum=1)
    penalty: float = number(above=0)
    growth: float = number(minimum=1)
    hold: int = number(minimum=1)
    refit_steps: int = number(minimum=0)


Keep = Callable[[torch.Tensor, bool], torch.Tensor]


def admm(
    target: torch.Tensor, gram: torch.Tensor, keep: Keep, *, steps: int, penalty: float, growth: float, hold: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a mask and values for it; the values need a refit, see least_squares.

    Args:
        target: [rows, columns], float32, the dense weights, whose products with the inputs are approximated.
        gram: [columns, columns], float32, symmetric, positive definite.
        keep: called with scores, [rows, columns], float32, and whether counts must be exact, which they must be in the last
            step; returns the mask, bool.
        steps: number of steps. penalty: ρ of the first step, as a fraction of the unit diagonal. growth: factor of ρ per step.
            hold: steps between two factorisations.

    Returns:
        values [rows, columns], float32, zero where the mask is False; mask [rows, columns], bool, that of the last step.

    Raises:
        torch.linalg.LinAlgError: the Gram matrix plus the penalty does not factor.
    """
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale[:, None]
    scaled_target = target * scale
    target_products = scaled_target @ unit  # W₀ H
    kept = scaled_target * keep(scaled_target.abs(), False)  # D
    kept_minus_dual = kept.clone()  # D - V
    dual = torch.zeros_like(kept)  # V
    values, inverse = torch.empty_like(kept), torch.empty_like(unit)  # W, then W + V; (H + ρ I)⁻¹
    for step in range(steps):
        if step % hold == 0:
            rho = penalty * growth**step
            _invert(unit, rho, inverse)
        torch.mm(target_products.add(kept_minus_dual, alpha=rho), inverse, out=values)
        values += dual
        mask = keep(values.abs(), step == steps - 1)
        torch.mul(values, mask, out=kept)
        torch.sub(values, kept, out=dual)
        torch.sub(kept, dual, out=kept_minus_dual)
    return kept / scale, mask


def _invert(unit: torch.Tensor, rho: float, inverse: torch.Tensor) -> None:
    inverse.copy_(unit).diagonal().add_(rho)
    torch.cholesky_inverse(torch.linalg.cholesky(inverse), out=inverse)


def prune(weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Run ADMM on all matrices together, then least squares on the chosen masks; see entries.Update."""
    update, rows, target = method.update, [len(weight) for weight in weights], torch.cat(weights)

    def keep(scores: torch.Tensor, exactly: bool) -> torch.Tensor:
        matrices = zip(patterns, scores.split(rows), strict=True)
        return torch.cat([pattern.mask(matrix) if exactly else pattern.approximate_mask(matrix) for pattern, matrix in matrices])

    def solve(damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        gram = statistic.damped(damping)
        start, mask = admm(target, gram, keep, steps=update.steps, penalty=update.penalty, growth=update.growth, hold=update.hold)
        return mask, least_squares(target, gram, mask, start, update.refit_steps)

    (mask, values), damping = first_to_factor(solve, method.damping.share, method.damping.limit)
    outcomes = zip(mask.split(rows), values.split(rows), strict=True)
    return [Pruned(mask=matrix_mask, values=matrix, damping=damping) for matrix_mask, matrix in outcomes]


ADMM = Update(
    name="admm",
    prune=prune,
    statistic=Gram,
    changes_weights=lambda _: True,
    scores=(WANDA.name,),
    parameters=AdmmParameters,
    summary="mask and values by ADMM with a growing penalty, then a refit",
    citation=Citation(text="Meng et al. 2024", url="https://arxiv.org/abs/2406.07831"),
)
