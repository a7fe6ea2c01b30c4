"""Optimal Brain Surgeon: a weight is worth the error that removing it leaves after the others made up for it.

    S_ij = W_ij² / [H⁻¹]_jj          # Frantar & Alistarh 2023, arXiv:2301.00774, eq. 3

In a column sweep H is the Gram matrix of the columns not yet passed, and [H⁻¹]_jj = U_jj² for the upper Cholesky factor U
of the whole inverse (section 3.2 there).
"""

import torch


def obs(weight: torch.Tensor, factor_diagonal: torch.Tensor) -> torch.Tensor:
    """Scores by the error left.

    Args:
        weight: [rows, columns], float32.
        factor_diagonal: [columns], float32, U_jj.

    Returns:
        [rows, columns], float32, 0 or more.
    """
    return weight.square() / factor_diagonal.square()
