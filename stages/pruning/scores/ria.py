"""RIA: the score of a weight is the sum of its fractions of the column and of the row, times a power of the norm of its input.

    S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^power    # Zhang et al. 2024, openreview.net/forum?id=Tr0lPx9woF

A small weight that is large within its row or column scores high, so that no input or output loses all its weights.
"""

from dataclasses import dataclass

import torch

from stages.pruning.entries import Score
from stages.pruning.statistics import SquaredNorm
from stages.schema import Citation, number


@dataclass(kw_only=True, slots=True)
class RiaParameters:
    """power: exponent of the norm of a weight's input, 0 or more."""

    name: str
    power: float = number(minimum=0)


def ria(weight: torch.Tensor, squared_norm: torch.Tensor, power: float) -> torch.Tensor:
    """Score by relative importance and activation.

    Args:
        weight: [rows, columns], float32.
        squared_norm: [columns], float32, squared norm of each input over the calibration tokens, up to a common factor.
        power: 0 or more; at 0 the inputs do not matter.

    Returns:
        [rows, columns], float32, 0 or more; 0 where the weight is 0, in rows and columns of zeros, too.
    """
    magnitude = weight.abs()
    return (_relative_to_sum(magnitude, dim=0) + _relative_to_sum(magnitude, dim=1)) * squared_norm.pow(power / 2)


def _relative_to_sum(magnitude: torch.Tensor, dim: int) -> torch.Tensor:
    total = magnitude.sum(dim=dim, keepdim=True)
    return magnitude / total.clamp(min=torch.finfo(total.dtype).tiny)


RIA = Score(
    name="ria",
    of=lambda weight, inputs, method: ria(weight, inputs.squared_norm, method.score.power),
    statistic=SquaredNorm,
    parameters=RiaParameters,
    summary="(|W| / column sum + |W| / row sum) * ||X||^power, relative importance and activations",
    citation=Citation(text="Zhang et al. 2024", url="https://openreview.net/forum?id=Tr0lPx9woF"),
)
