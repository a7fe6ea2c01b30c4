"""Wanda: the score of a weight is its absolute value times the norm of its input.

S_ij = |W_ij| * ||X_j||_2          # Sun et al. 2024, arXiv:2306.11695, eq. 1
"""

import torch

from stages.pruning.entries import NoParameters, Score
from stages.pruning.statistics import SquaredNorm
from stages.schema import Citation


def wanda(weight: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """Score by weight and activation.

    Args:
        weight: [rows, columns], float32.
        squared_norm: [columns], float32, squared norm of each input over the calibration tokens, up to a common factor.

    Returns:
        [rows, columns], float32, 0 or more.
    """
    return weight.abs() * squared_norm.sqrt()


WANDA = Score(
    name="wanda",
    of=lambda weight, inputs, _: wanda(weight, inputs.squared_norm),
    scales=lambda _, inputs: inputs.squared_norm.sqrt(),
    statistic=SquaredNorm,
    parameters=NoParameters,
    summary="|W| * ||X||",
    citation=Citation(text="Sun et al. 2024", url="https://arxiv.org/abs/2306.11695"),
)
