"""A method is a composition: a score, who competes, and what the survivors do about it."""

from dataclasses import dataclass

import torch

from stages.pruning.patterns import Pattern
from stages.pruning.scores.magnitude import magnitude
from stages.pruning.scores.obs import obs
from stages.pruning.scores.wanda import wanda
from stages.pruning.statistics import Gram, NoStatistic, SquaredNorm, Statistic
from stages.pruning.updates.sparsegpt import sparsegpt


@dataclass(frozen=True, kw_only=True)
class ScoreAndSelect:
    """Prune by score; the survivors stay as they are.

    score: magnitude or wanda.
    """

    score: str

    @property
    def statistic(self) -> type[Statistic]:
        return SquaredNorm if self.score == "wanda" else NoStatistic

    def __call__(self, weight: torch.Tensor, statistic: Statistic, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune one matrix.

        Args:
            weight: [rows, columns], float32.
            statistic: of its inputs, an instance of `self.statistic`.

        Returns:
            mask [rows, columns], bool, True = kept; the new weights, or None where the survivors did not move.
        """
        scores = wanda(weight, statistic.value) if isinstance(statistic, SquaredNorm) else magnitude(weight)
        return pattern.mask(scores), None


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Prune by score and compensate column by column.

    score: obs, or magnitude or wanda for a mask that is chosen before the sweep.
    damping: share of the Gram matrix's mean diagonal. block_size: columns.
    """

    score: str
    damping: float
    block_size: int

    statistic: type[Statistic] = Gram

    def __call__(self, weight: torch.Tensor, statistic: Statistic, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune one matrix; see ScoreAndSelect. A kept weight of a dead input stays as it is."""
        assert isinstance(statistic, Gram)
        factor, dead = statistic.inverse_factor(self.damping), statistic.dead
        live = weight.masked_fill(dead, 0)
        chosen = None
        if self.score != "obs":
            scores = wanda(live, statistic.value.diagonal()) if self.score == "wanda" else magnitude(live)
            chosen = pattern.mask(scores)

        def choose(columns: torch.Tensor, factor_diagonal: torch.Tensor, first: int) -> torch.Tensor:
            if chosen is not None:
                return chosen[:, first : first + columns.shape[1]]
            return pattern.mask(obs(columns, factor_diagonal), first)

        mask, updated = sparsegpt(live, factor, choose, pattern.decision_columns(self.block_size), self.block_size)
        return mask, torch.where(mask & dead, weight, updated)


PruneMatrix = ScoreAndSelect | SparseGpt
