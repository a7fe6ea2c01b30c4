"""Magnitude: a weight is worth its absolute value.

S_ij = |W_ij|          # Han et al. 2015, arXiv:1506.02626
"""

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Scores by magnitude.

    Args:
        weight: [rows, columns], any float dtype.

    Returns:
        [rows, columns], same dtype, 0 or more.
    """
    return weight.abs()
