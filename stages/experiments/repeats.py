"""Experiments that differ in the calibration seed alone, and how far their seeds lie apart.

    mean         over seeds, each counting alike; of perplexity exp(mean of ln)
    sd           standard deviation between seeds, n - 1 degrees of freedom; of perplexity that of ln, times the mean (delta method)
    interval     of the mean over seeds: Student's t with n - 1 degrees of freedom
    difference   of two settings that ran the same seeds: the paired t, Student's t of the differences seed by seed
                 of others: Welch's t, variances of their own, Welch and Satterthwaite's degrees of freedom
                 f = (v/n + w/m)^2 / ((v/n)^2 / (n - 1) + (w/m)^2 / (m - 1))          # Welch 1947, Biometrika 34

All seeds are scored on the same text. The error over that text is another one: it stands beside, and is in none of these. Of one seed
there is a value and no spread.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from stages.evaluation.statistics import Adjusted, Estimate, half_width, mean


class TTest(StrEnum):
    """How two settings are compared over their seeds."""

    PAIRED = "paired t"
    WELCH = "Welch's t"


Found = TypeVar("Found")
Params = dict[str, Any]


def seed_of(params: Params) -> int | None:
    """The calibration seed of an experiment's sections; None if they state none."""
    seed: int | None = params.get("calibration", {}).get("seed")
    return seed


def setting_of(params: Params) -> str:
    """What repeats of one setting have in common: all that shapes a score but calibration.seed, whatever the order of keys."""
    calibration = {key: value for key, value in params.get("calibration", {}).items() if key != "seed"}
    return json.dumps({**of_scores(params), "calibration": calibration}, sort_keys=True)


def of_scores(params: Params) -> Params:
    """The sections without `publish`, which changes no score: one model that was published twice is one result."""
    return {name: section for name, section in params.items() if name != "publish"}


def settings(found: Iterable[Found], params_of: Callable[[Found], Params]) -> list[list[Found]]:
    """Group what differs in calibration.seed alone.

    Args:
        found: of one protocol. params_of: from one of them to the sections of its params.yaml.

    Returns:
        The repeats of each setting by their seeds, of each seed the first that was found; settings in the order of their first.
    """
    seeds: dict[str, dict[int | None, Found]] = {}
    for one in found:
        params = params_of(one)
        seeds.setdefault(setting_of(params), {}).setdefault(seed_of(params), one)
    return [[repeats[seed] for seed in sorted(repeats, key=lambda seed: -1 if seed is None else seed)] for repeats in seeds.values()]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over the seeds of a setting, in the metric's own unit.

    scores: of each seed, on the scale on which they are compared. is_ratio: whether that is the logarithm.
    over_text: the mean over seeds of the standard error over text; None where one is not known.
    """

    scores: list[float]
    is_ratio: bool
    over_text: float | None

    @property
    def seeds(self) -> int:
        return len(self.scores)

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return self._natural(self._estimate.value)

    @property
    def sd(self) -> float | None:
        """The standard deviation between seeds; None of one seed."""
        stderr = self._estimate.stderr
        return None if stderr is None else stderr * math.sqrt(self.seeds) * (self.value if self.is_ratio else 1.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean over seeds; None of one seed."""
        ends = self._estimate.interval
        return None if ends is None else (self._natural(ends[0]), self._natural(ends[1]))

    def shown(self, digits: int) -> str:
        """The mean, and ± the standard deviation between seeds where there are several: "31.68 ± 0.42"."""
        return f"{self.value:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")

    @property
    def _estimate(self) -> Estimate:
        return mean(self.scores)

    def _natural(self, score: float) -> float:
        return math.exp(score) if self.is_ratio else score


def spread(values: Sequence[float], errors: Sequence[float | None], *, is_ratio: bool) -> Spread:
    """How far the seeds of a setting lie apart.

    Args:
        values: the metric of each seed, at least one; above 0 where is_ratio. errors: the standard error over text of each.
        is_ratio: whether values are compared by their ratio, and so averaged as logarithms.
    """
    known = [error for error in errors if error is not None]
    over_text = math.fsum(known) / len(known) if known and len(known) == len(values) else None
    return Spread(scores=[math.log(value) if is_ratio else value for value in values], is_ratio=is_ratio, over_text=over_text)


def between(ours: Sequence[float], theirs: Sequence[float], *, same_seeds: bool) -> tuple[Estimate | None, TTest]:
    """The difference of two means over seeds, ours less theirs, with its 95% interval, and how it was made.

    A seed draws the same calibration windows for every method, so that the same seeds are paired: what the windows make of both falls out.

    Args:
        ours, theirs: of each seed. same_seeds: whether both have the same ones, in the same order.

    Returns:
        None where either has one seed.
    """
    if not same_seeds:
        return welch(ours, theirs), TTest.WELCH
    return (mean([here - there for here, there in zip(ours, theirs, strict=True)]) if len(ours) > 1 else None), TTest.PAIRED


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Adjusted | None:
    """The difference of two means over seeds that are not paired, with the 95% interval of Welch's t; None where either has one seed."""
    if min(len(ours), len(theirs)) < 2:
        return None
    here, there = mean(ours), mean(theirs)
    variances = [(one.stderr or 0.0) ** 2 for one in (here, there)]
    total, value = sum(variances), here.value - there.value
    parts = sum(variance**2 / (one.count - 1) for variance, one in zip(variances, (here, there), strict=True))
    freedom = total**2 / parts if parts else here.count + there.count - 2  # without any spread the interval has no width
    reach = half_width(freedom) * math.sqrt(total)
    ends = (value - reach, value + reach)
    return Adjusted(value=value, stderr=math.sqrt(total), count=here.count + there.count, clusters=1 + math.floor(freedom), ends=ends)
