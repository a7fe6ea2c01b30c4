"""Magnitude: the score of a weight is its absolute value.

S_ij = |W_ij|          # Han et al. 2015, arXiv:1506.02626
"""

import torch

from stages.pruning.entries import NoParameters, Score
from stages.pruning.statistics import NoStatistic
from stages.schema import Citation


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Score by magnitude.

    Args:
        weight: [rows, columns], any float dtype.

    Returns:
        [rows, columns], same dtype, 0 or more.
    """
    return weight.abs()


MAGNITUDE = Score(
    name="magnitude",
    of=lambda weight, *_: magnitude(weight),
    scales=lambda weight, _: torch.ones_like(weight[0]),
    statistic=NoStatistic,
    parameters=NoParameters,
    summary="|W|",
    citation=Citation(text="Han et al. 2015", url="https://arxiv.org/abs/1506.02626"),
)
