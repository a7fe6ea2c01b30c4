"""Means of scores with their errors, alone and paired.

Rows that share a document or a passage are not independent: their errors are clustered (Miller 2024, arXiv:2411.00640, eq. 4), with the
correction for few clusters that makes the error that of independent rows where every row is a cluster of its own. Intervals are those
of Student's t with one degree of freedom less than there are clusters.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtrit  # scipy.stats takes a second to import, in every stage and every composition

LEVEL = 0.95  # of an interval
Values: TypeAlias = Sequence[float] | NDArray[np.float64]
Clusters: TypeAlias = Sequence[Hashable] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean.

    stderr: its standard error; None with fewer than two clusters. count: number of values. clusters: how many of them are independent.
    """

    value: float
    stderr: float | None
    count: int
    clusters: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval that holds the mean with a probability of 95%; None without a standard error."""
        if self.stderr is None:
            return None
        reach = half_width(self.clusters - 1) * self.stderr
        return self.value - reach, self.value + reach


@cache
def half_width(freedom: float) -> float:
    """Half of the 95% interval in standard errors: a quantile of Student's t with so many degrees of freedom, above 0."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def mean(values: Values, clusters: Clusters | None = None) -> Estimate:
    """Estimate the mean of values.

    Args:
        values: at least one. clusters: of each value, what it shares with others, by an array the numbers of `numbered`; None: all are
            independent.

    Raises:
        ValueError: there are no values, or other numbers of values and clusters.
    """
    return _mean(values, clusters)


def _mean(values: Values, clusters: Clusters | None, added: tuple[float, ...] = ()) -> Estimate:
    """See mean.

    Args:
        added: values more, each of a cluster of its own; the correction for few clusters and the degrees of freedom leave them out.
    """
    if not len(values):
        raise ValueError("found no values, wanted at least one")
    size, array = len(values) + len(added), np.asarray(values, dtype=np.float64)
    value = math.fsum((*array.tolist(), *added)) / size
    totals: NDArray[np.float64] = array - value
    if clusters is not None:
        if len(clusters) != len(values):
            raise ValueError(f"found clusters of {len(clusters)} values, wanted those of {len(values)}")
        totals = np.bincount(clusters if isinstance(clusters, np.ndarray) else numbered(clusters), totals).astype(np.float64, copy=False)
    count = len(totals)
    if count < 2:
        return Estimate(value=value, stderr=None, count=size, clusters=count)
    squares = math.fsum((*np.square(totals).tolist(), *((other - value) ** 2 for other in added)))
    return Estimate(value=value, stderr=math.sqrt(squares * count / (count - 1)) / size, count=size, clusters=count)


def numbered(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """The clusters by numbers from 0, in the order of their first."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(cluster, len(numbers)) for cluster in clusters), dtype=np.int64, count=len(clusters))


def difference(values: Values, reference: Values, clusters: Clusters | None = None) -> Estimate:
    """Estimate the mean of values less that of a reference on the same rows. Args, errors: see mean."""
    return mean(_less(values, reference), clusters)


def _less(values: Values, reference: Values) -> NDArray[np.float64]:
    if len(values) != len(reference):
        raise ValueError(f"found {len(values)} values and {len(reference)} of the reference, wanted as many")
    return np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Adjusted(Estimate):
    """An estimate with an interval of another kind than its own. ends: of the interval, or None."""

    ends: tuple[float, float] | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.ends


def mean_of_independent(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each counting alike; its interval is recovered from theirs, whatever their kinds (Zou and Donner
    2008, the method of variance estimates recovery): on either side the root of the sum of the squares of theirs.

    Args:
        estimates: at least one.

    Returns:
        Without an error or an interval where one of them has none.
    """
    size = len(estimates)
    value, errors = math.fsum(one.value for one in estimates) / size, [one.stderr for one in estimates]
    stderr = None if None in errors else math.hypot(*(error or 0.0 for error in errors)) / size
    sides = [(one.value - one.interval[0], one.interval[1] - one.value) for one in estimates if one.interval is not None]
    below, above = (math.hypot(*side) / size for side in zip(*sides, strict=True)) if len(sides) == size else (None, None)
    ends = None if below is None or above is None else (value - below, value + above)
    facts = {"count": sum(one.count for one in estimates), "clusters": sum(one.clusters for one in estimates)}
    return Adjusted(value=value, stderr=stderr, **facts, ends=ends)


def mean_of_rows(values: Values, clusters: Clusters) -> Estimate:
    """The mean over the rows of a task; of right and wrong answers with the interval of accuracy_interval. Args: see mean."""
    estimate = mean(values, clusters)
    return _with_ends(estimate, accuracy_interval(values, clusters)) if _are_shares(values) else estimate


def difference_of_rows(values: Values, reference: Values, clusters: Clusters) -> Estimate:
    """The difference on the rows of a task; of right and wrong answers with the interval of difference_interval. Args: see difference."""
    estimate = difference(values, reference, clusters)
    shares = _are_shares(values) and _are_shares(reference)
    return _with_ends(estimate, difference_interval(values, reference, clusters)) if shares else estimate


def contrast_of_rows(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of a difference of differences on the rows of a task; of right and wrong answers, whose values are whole, with one row more
    of 1 and one of -1 in its interval, as in difference_interval. Args: see mean; values in [-2, 2]."""
    whole = all(float(value).is_integer() for value in values)
    return _with_ends(mean(values, clusters), _adjusted(values, clusters, (1.0, -1.0), (-2.0, 2.0))) if whole else mean(values, clusters)


def _are_shares(values: Values) -> bool:
    """Whether rows are right or wrong."""
    array = np.asarray(values)
    return bool(((array == 0) | (array == 1)).all())


def _with_ends(estimate: Estimate, ends: tuple[float, float] | None) -> Adjusted:
    return Adjusted(value=estimate.value, stderr=estimate.stderr, count=estimate.count, clusters=estimate.clusters, ends=ends)


def flips(ours: Sequence[float], theirs: Sequence[float], *, lower_is_better: bool) -> tuple[int, int]:
    """Of how many rows the other's value alone, and ours alone, is the better: what was lost, and what was gained."""
    pairs = list(zip(ours, theirs, strict=True))
    fewer, more = sum(here < there for here, there in pairs), sum(here > there for here, there in pairs)
    return (more, fewer) if lower_is_better else (fewer, more)


def mcnemar(lost: int, gained: int) -> float:
    """The exact test of McNemar (1947): how likely flips so one-sided are if both directions are equally likely.

    Args:
        lost, gained: numbers of rows that only the one and only the other model answers rightly.

    Returns:
        Two-sided p-value, in (0, 1].
    """
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5))) if lost + gained else 1.0


def accuracy_interval(values: Values, clusters: Clusters) -> tuple[float, float] | None:
    """The 95% interval of a share of rows, with two rows more of each kind (Agresti and Coull 1998), so that it has a width where all
    rows are alike; None where all rows share a document. Args: see mean; values are 0 or 1."""
    return _adjusted(values, clusters, (1.0, 1.0, 0.0, 0.0), (0.0, 1.0))


def difference_interval(values: Values, reference: Values, clusters: Clusters) -> tuple[float, float] | None:
    """The 95% interval of a paired difference of shares, with one row more that is lost and one that is gained (Bonett and Price 2012), so
    that it has a width where no row flips; None where all rows share a document. Args: see difference; values are 0 or 1."""
    return _adjusted(_less(values, reference), clusters, (1.0, -1.0), (-1.0, 1.0))


def _adjusted(values: Values, clusters: Clusters, added: tuple[float, ...], bounds: tuple[float, float]) -> tuple[float, float] | None:
    interval = _mean(values, clusters, added).interval
    return None if interval is None else (max(bounds[0], interval[0]), min(bounds[1], interval[1]))
