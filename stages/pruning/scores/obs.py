"""Optimal Brain Surgeon: the score of a weight is the output error after it is removed and the other weights compensate.

    S_ij = W_ij² / [H⁻¹]_jj          # Frantar & Alistarh 2023, arXiv:2301.00774, eq. 3

In a column sweep H is the Gram matrix of the remaining columns, and [H⁻¹]_jj = U_jj² for the upper Cholesky factor U
of the whole inverse (section 3.2 there).
"""

from typing import TYPE_CHECKING

import torch

from stages.pruning.entries import NoParameters, Score
from stages.pruning.statistics import Gram
from stages.schema import Citation

if TYPE_CHECKING:
    from stages.pruning.method import Method


def obs(weight: torch.Tensor, root_inverse_diagonal: torch.Tensor) -> torch.Tensor:
    """Score by the output error after the removal of a weight.

    Args:
        weight: [rows, columns], float32.
        root_inverse_diagonal: [columns], float32, the root of [H⁻¹]_jj, above 0; in a sweep U_jj.

    Returns:
        [rows, columns], float32, 0 or more.
    """
    return weight.square() / root_inverse_diagonal.square()


def _of_gram(weight: torch.Tensor, gram: Gram, method: "Method") -> torch.Tensor:
    """Score with the factor of the damped inverse, see Gram.inverse_factor; weights of dead inputs score 0."""
    damping = method.damping
    return obs(weight.masked_fill(gram.dead, 0), gram.inverse_diagonal(damping.share, damping.limit, damping.shrinkage).sqrt())


OBS = Score(
    name="obs",
    of=_of_gram,
    statistic=Gram,
    parameters=NoParameters,
    summary="W^2 / diag(H^-1), the score of Optimal Brain Surgeon",
    citation=Citation(text="Frantar & Alistarh 2023", url="https://arxiv.org/abs/2301.00774"),
)
