"""Learning that does no harm: coordinates without a scale, and windows held out that judge.

The same function can be written with other weights: a norm's gain folded into the next matrix, the rows of a value matrix divided and
the columns of its output matrix multiplied by the same number. Adam moves every weight by about its learning rate in every step,
whatever the weight's size, so that a rate that suits one such checkpoint destroys another. Kept weights are therefore learned as

    V = D_r^-1 W D_c^-1,  mean_j V_ij^2 = 1 in every row and mean_i V_ij^2 = 1 in every column      # Sinkhorn & Knopp 1967, of W^2

with W the dense matrix. V is the same for every matrix D_1 W D_2 with diagonal D_1, D_2, and a learning rate is a fraction of the size
of V's entries, which is 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stages.streaming.architecture import Matrix

BALANCED = 1e-4  # relative: rows and columns whose mean square is this near to 1 are balanced
ITERATIONS = 100  # at most; a matrix without zeros takes about ten
ATTEMPTS = 3  # rates that are tried until one lowers the loss
SLOWER = 0.25  # times a rate that did not lower the loss
SEARCHED = 6  # rates that a search tries at most
SLOWDOWN, SPEEDUP = 0.5, 2.0  # by which a search goes on
REMEMBERED = 3  # trainings that say where the next begins
HARDLY = 2.0  # times as many entries of a row as columns / rows, below which means are over those that are not zero
CHECKED_AT = (0.25, 0.5, 0.75, 1.0)  # fractions of a training after which the windows held out judge it

Scales = tuple[torch.Tensor, torch.Tensor]


def balance(weight: torch.Tensor) -> Scales:
    """Find the scales of rows and columns that leave V.

    Args:
        weight: [rows, columns], float32, finite.

    Returns:
        D_r [rows, 1] and D_c [1, columns], float32, above 0: weight = D_r V D_c. Where a row or a column, as of a model that was
        pruned before, has hardly an entry but zeros, means are over the entries that are not zero: with less of them than columns / rows no
        scales would make the mean over all 1. A row or a column of zeros has the geometric mean of the other scales.
    """
    squares = weight.square()
    in_row, in_column = _entries(squares)
    rows, columns = squares.new_ones(len(weight), 1), squares.new_ones(1, weight.shape[1])
    for _ in range(ITERATIONS):
        rows = _or_one(squares @ columns.reciprocal().T / in_row[:, None])
        means = rows.reciprocal().T @ squares / in_column
        done = ((means / columns - 1).abs() <= BALANCED) | (means == 0)
        columns = _or_one(means)
        if done.all():
            break
    return _filled(rows, squares.any(dim=1, keepdim=True)).sqrt(), _filled(columns, squares.any(dim=0, keepdim=True)).sqrt()


def _entries(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over how many entries the mean of each row, [rows], and of each column, [columns], is taken."""
    number_of_rows, number_of_columns = squares.shape
    in_row, in_column = squares.count_nonzero(dim=1), squares.count_nonzero(dim=0)
    few = (in_row * number_of_rows < HARDLY * number_of_columns) & (in_row > 0)
    few_in_column = (in_column * number_of_columns < HARDLY * number_of_rows) & (in_column > 0)
    if few.any() or few_in_column.any():
        return in_row.clamp(min=1), in_column.clamp(min=1)
    return torch.full_like(in_row, number_of_columns), torch.full_like(in_column, number_of_rows)


def _filled(scales: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Scales with the geometric mean of those alive in place of the others."""
    return scales.where(alive, scales[alive].log().mean().exp()) if alive.any() else scales


def _or_one(means: torch.Tensor) -> torch.Tensor:
    return torch.where(means > 0, means, 1)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The scales of some matrices.

    scales: name of the matrix -> its scales, see balance.
    """

    scales: dict[str, Scales] = field(default_factory=dict)

    def add(self, matrix: Matrix, dense: torch.Tensor) -> None:
        """Add a matrix, given its dense weights, [rows, columns], float32."""
        self.scales[matrix.name] = balance(dense)

    def multiply(self, views: Iterable[tuple[Matrix, torch.Tensor]]) -> None:
        """From V to W, in place; from gradients by W to gradients by V.

        Args:
            views: matrices with views, [rows, columns], of the tensors that are changed.
        """
        for matrix, view in views:
            rows, columns = self.scales[matrix.name]
            view.mul_(rows).mul_(columns)

    def divide(self, views: Iterable[tuple[Matrix, torch.Tensor]]) -> None:
        """From W to V, in place. Args: see multiply."""
        for matrix, view in views:
            rows, columns = self.scales[matrix.name]
            view.div_(rows).div_(columns)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training went, on the windows held out.

    before: the loss before it. tried: learning rate -> the lowest loss on the way, infinity if none was finite.
    """

    before: float
    tried: dict[float, float]

    @property
    def rate(self) -> float | None:
        """The rate whose weights are taken; None: none lowered the loss, and the weights stay what they were."""
        best = min(self.tried, key=self.tried.__getitem__)
        return best if self.tried[best] < self.before else None

    @property
    def after(self) -> float:
        """The loss with the weights taken."""
        return min(self.before, *self.tried.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        tried = [[rate, loss if math.isfinite(loss) else None] for rate, loss in self.tried.items()]
        return {"before": self.before, "tried": tried, "rate": self.rate, "after": self.after}

    @classmethod
    def of_dict(cls, record: dict[str, Any]) -> "Outcome":
        """What `as_dict` gave."""
        return cls(before=record["before"], tried={rate: math.inf if loss is None else loss for rate, loss in record["tried"]})


def next_rate(rate: float, before: float, tried: dict[float, float], factors: Sequence[float] = ()) -> float | None:
    """The learning rate to try next, or None: no other is to be tried.

    A rate that did not lower the loss is followed by a quarter of it, three rates at most. From the best rate that did, a search goes on
    by its factors as long as that is better, six rates at most.

    Args:
        rate: the first. before, tried: see Outcome.
        factors: of the rates next to the best that are tried, in order; none: there is no search.
    """
    if not tried:
        return rate
    best = min(tried, key=tried.__getitem__)
    if not tried[best] < before:
        return min(tried) * SLOWER if len(tried) < ATTEMPTS else None
    if len(tried) >= SEARCHED:
        return None
    return next((best * factor for factor in factors if best * factor not in tried), None)


def first_rate(rate: float, earlier: Sequence[Outcome]) -> float:
    """The rate to begin with: the geometric mean of those that the last three trainings took, weighted by how much the loss fell.

    The first blocks of a model may want rates that are wrong for all others; little is won on them, and they weigh little.

    Args:
        rate: without earlier trainings that took one. earlier: in order.
    """
    taken = [(outcome.rate, math.log(outcome.before / outcome.after)) for outcome in earlier if outcome.rate is not None][-REMEMBERED:]
    if not taken:
        return rate
    first, gains = taken[0][0], math.fsum(gain for _, gain in taken)
    # the ratio of a rate to itself is exact: a rate alone comes back to the last bit
    return first * math.exp(math.fsum(gain / gains * math.log(other / first) for other, gain in taken))


def factors(earlier: Sequence[Outcome]) -> tuple[float, ...]:
    """Which rates a search tries: both half and twice the first time; then the way that helped last, or the other if it did not help.

    Args:
        earlier: the trainings before it, in order.
    """
    if not earlier:
        return SLOWDOWN, SPEEDUP
    last = earlier[-1]
    begun, *others = last.tried
    if last.rate is None or not last.tried[begun] < last.before:  # it went down by quarters: too far for the others, perhaps
        return (SPEEDUP,)
    if last.rate != begun:
        return (SPEEDUP if last.rate > begun else SLOWDOWN,)
    return (SLOWDOWN if others and others[-1] > begun else SPEEDUP,)


def checks(steps: int) -> set[int]:
    """After how many steps the windows held out judge a training."""
    return {max(1, round(steps * fraction)) for fraction in CHECKED_AT}
