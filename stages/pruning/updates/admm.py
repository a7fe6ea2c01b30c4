"""ADMM: mask and values together, by a penalty that grows until both agree.

    W ← (W₀ H + ρ (D - V)) (H + ρ I)⁻¹,   D ← keep(W + V),   V ← V + W - D         # Meng et al. 2024, ALPS, arXiv:2406.07831, eq. 4

with H = X Xᵀ scaled to a unit diagonal (Boža 2024, arXiv:2401.02938: columns by their norm), so that the penalty means the
same for every column and `keep` compares |W| * ||X||, as Wanda does. ρ grows by a constant factor, where ALPS adapts it to how much
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
    """steps: of ADMM.

    penalty: of the first step, as a share of the scaled Gram matrix's diagonal. growth: of the penalty, factor a step.
    hold: steps between two factorisations. refit_steps: of least squares on the mask found.
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
        target: [rows, columns], float32, the weights whose products with the inputs are to be met.
        gram: [columns, columns], float32, symmetric, positive definite.
        keep: gives the mask, bool, of a matrix of scores, [rows, columns], and is told whether counts must be exact; the last
            step's must.
        steps: how many. penalty: ρ of the first, as a share of the unit diagonal. growth: factor a step. hold: steps between
            two factorisations.

    Returns:
        values [rows, columns], float32, zero where the mask is False; mask [rows, columns], bool, the last one.

    Raises:
        torch.linalg.LinAlgError: the Gram matrix plus the penalty does not factor.
    """
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale[:, None]
    whole = target * scale
    wanted = whole @ unit
    kept = whole * keep(whole.abs(), False)
    signed = kept.clone()  # D - V
    dual = torch.zeros_like(kept)
    moved = torch.empty_like(kept)
    for step in range(steps):
        if step % hold == 0:
            rho = penalty * growth**step
            inverse = _inverse(unit, rho)
        torch.mm(wanted.add(signed, alpha=rho), inverse, out=moved)
        moved += dual
        mask = keep(moved.abs(), step == steps - 1)
        torch.mul(moved, mask, out=kept)
        torch.sub(moved, kept, out=dual)
        torch.sub(kept, dual, out=signed)
    return kept / scale, mask


def _inverse(unit: torch.Tensor, rho: float) -> torch.Tensor:
    shifted = unit.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def prune(weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """ADMM on all matrices together, then least squares on the masks found; see entries.Update."""
    how, rows, target = method.update, [len(weight) for weight in weights], torch.cat(weights)

    def keep(scores: torch.Tensor, exactly: bool) -> torch.Tensor:
        matrices = zip(patterns, scores.split(rows), strict=True)
        return torch.cat([pattern.mask(matrix) if exactly else pattern.roughly(matrix) for pattern, matrix in matrices])

    def solve(damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        gram = statistic.damped(damping)
        start, mask = admm(target, gram, keep, steps=how.steps, penalty=how.penalty, growth=how.growth, hold=how.hold)
        return mask, least_squares(target, gram, mask, start, how.refit_steps)

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
