"""Cumulative share: the fraction of a row's total score that is pruned with a weight and all weights of lower score.

    C_ij = sum_{k: S_ik <= S_ij} S_ik / sum_k S_ik     # the variant of Wanda in github.com/locuslab/wanda, --use_variant

The variant prunes, in every row, the lowest scores whose sum is at most alpha times the row's sum, and searches for the
alpha, one for the matrix, that gives the sparsity. This alpha prunes exactly the weights with C_ij <= alpha. Pruning the
lowest C_ij of the whole matrix is therefore the same without a search, and its count is exact. Within a row C has the order
of S: it changes a mask only if the comparison group is the matrix.
"""

import torch

from stages.pruning.entries import NoParameters, Score
from stages.pruning.scores.wanda import wanda
from stages.pruning.statistics import SquaredNorm
from stages.schema import Citation


def cumulative_share(scores: torch.Tensor) -> torch.Tensor:
    """Replace scores by their cumulative share of the row.

    Args:
        scores: [rows, columns], float32, 0 or more.

    Returns:
        [rows, columns], float32, 0 to 1 up to rounding; of equal scores the leftmost has the smallest share. A row of zeros gives zeros.
    """
    ascending, order = scores.sort(dim=1, stable=True)
    running = ascending.cumsum(dim=1)
    total = running[:, -1:]
    shares = running / total.where(total > 0, 1)
    return torch.empty_like(scores).scatter_(1, order, shares)


WANDA_VARIANT = Score(
    name="wanda_variant",
    of=lambda weight, inputs, _: cumulative_share(wanda(weight, inputs.squared_norm)),
    statistic=SquaredNorm,
    parameters=NoParameters,
    needs_matrix_comparison=True,
    summary="Wanda's scores, each as the cumulative share of its row's total: one alpha for the matrix",
    citation=Citation(text="Sun et al. 2024", url="https://github.com/locuslab/wanda"),
)
