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
class Pruned:
    """One matrix's outcome.

    mask: [rows, columns], bool, True = kept. values: [rows, columns], float32, or None where the survivors did not move.
    damping: share of the Gram matrix's mean diagonal that it took to factor it, where it was factored.
    """

    mask: torch.Tensor
    values: torch.Tensor | None = None
    damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreAndSelect:
    """Prune by score; the survivors stay as they are.

    score: magnitude or wanda.
    """

    score: str

    moves = False  # the survivors stay as they are

    @property
    def statistic(self) -> type[Statistic]:
        return SquaredNorm if self.score == "wanda" else NoStatistic

    def __call__(self, weights: list[torch.Tensor], statistic: Statistic, patterns: list[Pattern]) -> list[Pruned]:
        """Prune the matrices that read one input.

        Args:
            weights: each [rows, columns], float32; not changed.
            statistic: of their input, an instance of `self.statistic`.
            patterns: one for each matrix.
        """
        return [Pruned(mask=pattern.mask(self._scores(weight, statistic))) for weight, pattern in zip(weights, patterns, strict=True)]

    def _scores(self, weight: torch.Tensor, statistic: Statistic) -> torch.Tensor:
        return wanda(weight, statistic.value) if isinstance(statistic, SquaredNorm) else magnitude(weight)


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Prune by score and compensate column by column.

    score: obs, or magnitude or wanda for a mask that is chosen before the sweep.
    damping: share of the Gram matrix's mean diagonal; damping_limit: up to where it is raised. block_size: columns.
    """

    score: str
    damping: float
    damping_limit: float
    block_size: int

    statistic = Gram
    moves = True

    def __call__(self, weights: list[torch.Tensor], statistic: Statistic, patterns: list[Pattern]) -> list[Pruned]:
        """Prune the matrices that read one input, in one sweep; see ScoreAndSelect. A kept weight of a dead input stays."""
        assert isinstance(statistic, Gram)
        factor, dead = statistic.inverse_factor(self.damping, self.damping_limit), statistic.dead
        rows = [len(weight) for weight in weights]
        whole = torch.cat(weights)
        live = whole.masked_fill(dead, 0)
        chosen = None if self.score == "obs" else torch.cat(self._chosen(live.split(rows), statistic, patterns))

        def choose(columns: torch.Tensor, factor_diagonal: torch.Tensor, first: int) -> torch.Tensor:
            if chosen is not None:
                return chosen[:, first : first + columns.shape[1]]
            parts = zip(patterns, obs(columns, factor_diagonal).split(rows), strict=True)
            return torch.cat([pattern.mask(scores, first) for pattern, scores in parts])

        decision = {pattern.decision_columns(self.block_size) for pattern in patterns}
        mask, updated = sparsegpt(live, factor, choose, min(decision), self.block_size)
        values = torch.where(mask & dead, whole, updated)
        parts = zip(mask.split(rows), values.split(rows), strict=True)
        return [Pruned(mask=kept, values=moved, damping=statistic.damping) for kept, moved in parts]

    def _chosen(self, weights: tuple[torch.Tensor, ...], statistic: Gram, patterns: list[Pattern]) -> list[torch.Tensor]:
        norms = statistic.value.diagonal()
        scores = [wanda(weight, norms) if self.score == "wanda" else magnitude(weight) for weight in weights]
        return [pattern.mask(score) for pattern, score in zip(patterns, scores, strict=True)]


PruneMatrices = ScoreAndSelect | SparseGpt
