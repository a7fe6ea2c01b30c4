"""No update: the mask is that of the score, and kept weights do not change."""

from typing import TYPE_CHECKING, Any

import torch

from stages.pruning.entries import NoParameters, Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.selection import select
from stages.pruning.statistics import Gram, NoStatistic

if TYPE_CHECKING:
    from stages.pruning.method import Method


def prune(weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Take the masks of the score; see entries.Update."""
    masks = select(weights, statistic, patterns, method)  # may factor the statistic
    damping = statistic.damping if isinstance(statistic, Gram) else None
    return [Pruned(mask=mask, damping=damping) for mask in masks]


NONE = Update(
    name="none",
    prune=prune,
    statistic=NoStatistic,
    changes_weights=lambda _: False,
    parameters=NoParameters,
    summary="kept weights stay as they are",
)
