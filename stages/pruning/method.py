"""A method is a composition: a score, a pattern, and what the survivors do about it.

A score says what a weight is worth; an update takes the score, each matrix's pattern and the statistic of the input that the
matrices share, and gives masks, and values where the survivors move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from stages.pruning.patterns import Nm, Pattern
from stages.pruning.scores.cumulative import cumulative_share
from stages.pruning.scores.magnitude import magnitude
from stages.pruning.scores.obs import obs
from stages.pruning.scores.ria import ria
from stages.pruning.scores.wanda import wanda
from stages.pruning.statistics import Gram, Moments, NoStatistic, SquaredNorm, Statistic, first_to_factor
from stages.pruning.updates.admm import admm
from stages.pruning.updates.dsnot import dsnot
from stages.pruning.updates.least_squares import least_squares
from stages.pruning.updates.sparsegpt import sparsegpt
from stages.pruning.updates.swaps import swaps

STATISTICS: tuple[type[Statistic], ...] = (NoStatistic, SquaredNorm, Moments, Gram)  # all but the first know squared norms


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """One matrix's outcome.

    mask: [rows, columns], bool, True = kept. values: [rows, columns], float32, or None where the survivors did not move.
    damping: what it took to factor the Gram matrix, where it was factored: a share of the diagonal's mean added to each entry of it
        (the score obs, SparseGpt), or of each entry (Admm).
    """

    mask: torch.Tensor
    values: torch.Tensor | None = None
    damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a weight is worth.

    of: from a matrix, [rows, columns], float32, and its input's statistic to scores of the same shape.
    statistic: what it needs to know of the input, at least.
    """

    of: Callable[[torch.Tensor, Any], torch.Tensor]
    statistic: type[Statistic]


MAGNITUDE = Score(of=lambda weight, _: magnitude(weight), statistic=NoStatistic)
WANDA = Score(of=lambda weight, inputs: wanda(weight, inputs.squared_norm), statistic=SquaredNorm)
WANDA_VARIANT = Score(of=lambda weight, inputs: cumulative_share(wanda(weight, inputs.squared_norm)), statistic=SquaredNorm)


def ria_score(power: float) -> Score:
    return Score(of=lambda weight, inputs: ria(weight, inputs.squared_norm, power), statistic=SquaredNorm)


def obs_score(damping: float, limit: float) -> Score:
    """See Gram.inverse_factor for the damping. Weights of dead inputs are worth nothing."""

    def scores(weight: torch.Tensor, gram: Gram) -> torch.Tensor:
        return obs(weight.masked_fill(gram.dead, 0), gram.inverse_diagonal(damping, limit).sqrt())

    return Score(of=scores, statistic=Gram)


class Update(Protocol):
    """What the survivors do. moves: whether they change. statistic: what it needs to know of the input, at least."""

    @property
    def moves(self) -> bool: ...

    @property
    def statistic(self) -> type[Statistic]: ...

    def __call__(self, weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern], score: Score) -> list[Pruned]:
        """Prune the matrices that read one input.

        Args:
            weights: each [rows, columns], float32; not changed.
            statistic: of their input.
            patterns: one for each matrix.

        Raises:
            ArithmeticError: the statistic has NaN or infinity, or does not factor.
            ValueError: a score is NaN or infinite.
        """


@dataclass(frozen=True, kw_only=True)
class Method:
    """A score and an update."""

    score: Score
    update: Update

    @property
    def moves(self) -> bool:
        return self.update.moves

    @property
    def statistic(self) -> type[Statistic]:
        return max(self.score.statistic, self.update.statistic, key=STATISTICS.index)

    def __call__(self, weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern]) -> list[Pruned]:
        """See Update."""
        return self.update(weights, statistic, patterns, self.score)


def chosen(weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern], score: Score) -> list[torch.Tensor]:
    """The mask of each matrix by score and pattern alone."""
    return [pattern.mask(score.of(weight, statistic)) for pattern, weight in zip(patterns, weights, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """No update: the survivors stay as they are."""

    moves = False
    statistic: type[Statistic] = NoStatistic

    def __call__(self, weights: list[torch.Tensor], statistic: Any, patterns: list[Pattern], score: Score) -> list[Pruned]:
        masks = chosen(weights, statistic, patterns, score)  # may factor the statistic
        damping = statistic.damping if isinstance(statistic, Gram) else None
        return [Pruned(mask=mask, damping=damping) for mask in masks]


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Compensate column by column, see updates.sparsegpt.

    damping: share of the Gram matrix's mean diagonal; damping_limit: up to where it is raised. block_size: columns.
    choose_while_sweeping: score the weights as the sweep has changed them (by obs), instead of choosing the mask before it.
    """

    damping: float
    damping_limit: float
    block_size: int
    choose_while_sweeping: bool

    moves = True
    statistic: type[Statistic] = Gram

    def __call__(self, weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], score: Score) -> list[Pruned]:
        """All matrices in one sweep. A kept weight of a dead input stays."""
        factor, dead = statistic.inverse_factor(self.damping, self.damping_limit), statistic.dead
        rows = [len(weight) for weight in weights]
        whole = torch.cat(weights)
        live = whole.masked_fill(dead, 0)
        mask_before = None if self.choose_while_sweeping else torch.cat(chosen(list(live.split(rows)), statistic, patterns, score))

        def choose(columns: torch.Tensor, factor_diagonal: torch.Tensor, first: int) -> torch.Tensor:
            if mask_before is not None:
                return mask_before[:, first : first + columns.shape[1]]
            parts = zip(patterns, obs(columns, factor_diagonal).split(rows), strict=True)
            return torch.cat([pattern.mask(scores, first) for pattern, scores in parts])

        decision = {pattern.decision_columns(self.block_size) for pattern in patterns}
        mask, updated = sparsegpt(live, factor, choose, min(decision), self.block_size)
        values = torch.where(mask & dead, whole, updated)
        parts = zip(mask.split(rows), values.split(rows), strict=True)
        return [Pruned(mask=kept, values=moved, damping=statistic.damping) for kept, moved in parts]


@dataclass(frozen=True, kw_only=True)
class Admm:
    """Support and values together, then a refit; see updates.admm, updates.least_squares.

    Weights compete by what they carry, as with Wanda's score; no other is asked.

    damping: share of the Gram matrix's diagonal; damping_limit: up to where it is raised. refit_steps: of least squares on the
        support found.
    """

    damping: float
    damping_limit: float
    steps: int
    penalty: float
    growth: float
    hold: int
    refit_steps: int

    moves = True
    statistic: type[Statistic] = Gram

    def __call__(self, weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], score: Score) -> list[Pruned]:
        rows, whole = [len(weight) for weight in weights], torch.cat(weights)

        def keep(scores: torch.Tensor, exactly: bool) -> torch.Tensor:
            parts = zip(patterns, scores.split(rows), strict=True)
            return torch.cat([pattern.mask(part) if exactly else pattern.roughly(part) for pattern, part in parts])

        def solve(damping: float) -> tuple[torch.Tensor, torch.Tensor]:
            gram = statistic.damped(damping)
            found, mask = admm(whole, gram, keep, steps=self.steps, penalty=self.penalty, growth=self.growth, hold=self.hold)
            return mask, least_squares(whole, gram, mask, found, self.refit_steps)

        (mask, values), damping = first_to_factor(solve, self.damping, self.damping_limit)
        parts = zip(mask.split(rows), values.split(rows), strict=True)
        return [Pruned(mask=kept, values=moved, damping=damping) for kept, moved in parts]


@dataclass(frozen=True, kw_only=True)
class SwapAndRefit:
    """Better the score's mask by exact swaps, or let it be (0 cycles); then refit the survivors, or let them be (0 steps).

    cycles, candidates: see updates.swaps. damping: share of the Gram matrix's diagonal, for the refit alone. refit_steps: of
        updates.least_squares.
    """

    damping: float
    cycles: int
    candidates: int
    refit_steps: int

    statistic: type[Statistic] = Gram

    @property
    def moves(self) -> bool:
        return self.refit_steps > 0

    def __call__(self, weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], score: Score) -> list[Pruned]:
        gram, damped = statistic.finite(), statistic.damped(self.damping) if self.moves else None
        masks = chosen(weights, statistic, patterns, score)
        outcomes = []
        for weight, mask, pattern in zip(weights, masks, patterns, strict=True):
            better = swaps(weight, gram, mask, cycles=self.cycles, candidates=self.candidates, group=group_of(pattern))
            values = None if damped is None else least_squares(weight, damped, better, weight, self.refit_steps)
            outcomes.append(Pruned(mask=better, values=values, damping=statistic.damping))
        return outcomes


@dataclass(frozen=True, kw_only=True)
class DsNoT:
    """Better the score's mask by swaps that lower the expected error, see updates.dsnot.

    threshold: of the expected error of an output, below which its row is left alone.
    """

    cycles: int
    threshold: float

    moves = False
    statistic: type[Statistic] = Moments

    def __call__(self, weights: list[torch.Tensor], statistic: Moments, patterns: list[Pattern], score: Score) -> list[Pruned]:
        statistic.require_finite()
        better = partial(dsnot, mean=statistic.mean, variance=statistic.variance, squared_norm=statistic.squared_norm)
        better = partial(better, cycles=self.cycles, threshold=self.threshold)
        triples = zip(weights, chosen(weights, statistic, patterns, score), patterns, strict=True)
        return [Pruned(mask=better(weight, mask=mask, group=group_of(pattern))) for weight, mask, pattern in triples]


def group_of(pattern: Pattern) -> int | None:
    """The M of N:M, within which weights compete."""
    return pattern.group if isinstance(pattern, Nm) else None
