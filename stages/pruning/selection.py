"""The mask of a matrix by score and pattern alone."""

from typing import TYPE_CHECKING, Any

import torch

from stages.pruning.patterns import Pattern
from stages.pruning.scores import SCORES

if TYPE_CHECKING:
    from stages.pruning.method import Method


def scores(weight: torch.Tensor, statistic: Any, method: "Method") -> torch.Tensor:
    """What each weight of a matrix is worth, by the method's score; see entries.Score.of."""
    return SCORES.of(method.score).of(weight, statistic, method)


def select(weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern], method: "Method") -> list[torch.Tensor]:
    """The masks of the matrices that read one input, each [rows, columns], bool, True = kept."""
    return [pattern.mask(scores(weight, statistic, method)) for pattern, weight in zip(patterns, weights, strict=True)]
