"""ADMM: support and values together, by a penalty that grows until both agree.

    W ← (W₀ H + ρ (D - V)) (H + ρ I)⁻¹,   D ← keep(W + V),   V ← V + W - D         # Meng et al. 2024, ALPS, arXiv:2406.07831, eq. 4

with H = X Xᵀ scaled to a unit diagonal (Boža 2024, arXiv:2401.02938: columns by their norm), so that the penalty means the
same for every column and `keep` compares what weights carry, as Wanda does. ρ grows by a constant factor, where ALPS grows it by
how much the support still changes; H + ρ I is factored anew every few steps, and ρ is the same in between. V, the multipliers over
ρ, goes on as it is when ρ grows, which turned out to lose a little less here than to divide it. Far beyond the unit diagonal ρ
freezes the support before the values have told which: end near 1.
"""

from collections.abc import Callable

import torch

Keep = Callable[[torch.Tensor, bool], torch.Tensor]


def admm(
    target: torch.Tensor, gram: torch.Tensor, keep: Keep, *, steps: int, penalty: float, growth: float, hold: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a support and values for it; the values want a refit, see least_squares.

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
