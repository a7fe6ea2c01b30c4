"""Repeats by calibration seed: what the page says of them, and their rows for CSV files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stages.evaluation.statistics import Estimate
from stages.experiments.details import Details
from stages.experiments.page.group import Group
from stages.experiments.page.words import difference_words, number
from stages.experiments.paired import Metric, Verdict, natural, verdict
from stages.experiments.repeats import Spread, TTest, between, seed_of, settings, spread

Row = dict[str, Any]
TOO_FEW = "too few seeds"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Experiments of one pattern and sparsity that differ in the calibration seed alone.

    name: the method, with the name of the first experiment where another setting of this pattern and sparsity has the method too.
    """

    name: str
    repeats: list[Details]

    @property
    def asked(self) -> str:
        return self.repeats[0].asked

    @property
    def pattern(self) -> str:
        return self.repeats[0].experiment.pattern

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, as achieved, the mean over seeds."""
        return sum(details.sparsity for details in self.repeats) / len(self.repeats)

    @property
    def seeds(self) -> list[int | None]:
        return [seed_of(details.experiment.params) for details in self.repeats]

    @property
    def experiments(self) -> str:
        """Each seed with its experiment."""
        return ", ".join(f"{seed_of(details.experiment.params)} ({details.name})" for details in self.repeats)

    def spread(self, metric: Metric) -> Spread | None:
        """How far the seeds lie apart in a metric; None where one of them lacks it."""
        rows = [row for details in self.repeats if (row := metric.of(details)) is not None]
        if len(rows) < len(self.repeats):
            return None
        return spread([row["value"] for row in rows], [row["stderr"] for row in rows], is_ratio=metric.is_ratio)


def settings_of(group: Group) -> dict[str, list[Setting]]:
    """Pattern and asked sparsity -> the settings that have both."""
    cells: dict[str, list[Setting]] = {}
    for asked, members in group.cells.items():
        found = settings(members, lambda details: details.experiment.params)
        methods = [repeats[0].experiment.method for repeats in found]
        cells[asked] = [
            Setting(name=method if methods.count(method) == 1 else f"{method} ({repeats[0].name})", repeats=repeats)
            for method, repeats in zip(methods, found, strict=True)
        ]
    return cells


def repeated(group: Group) -> list[Setting]:
    """The settings with more than one seed."""
    return [setting for members in settings_of(group).values() for setting in members if len(setting.repeats) > 1]


def said_of_single(group: Group) -> str:
    """How many settings have one seed, of whose spread nothing is known."""
    every, several = sum(map(len, settings_of(group).values())), len(repeated(group))
    single = every - several
    if not single:
        return "Every setting has several seeds."
    subject = f"{single} of {every} settings {'has' if single == 1 else 'have'}" if several else "Every setting has"
    return f"{subject} one seed: of the spread between seeds nothing is known there. A run line with -S calibration.seed=1 makes another."


def spread_words(metric: Metric, of: Spread) -> tuple[str, str, str]:
    """Mean ± standard deviation between seeds; the interval of the mean; the error over text. Empty what is not known."""
    digits = metric.digits
    sd = "" if of.sd is None else f" ± {number(of.sd, digits)}"
    over_text = "" if of.over_text is None else f"± {number(of.over_text, digits)} over text"
    ends = "" if of.interval is None else f" [{', '.join(number(end, digits) for end in of.interval)}]"
    return f"{number(of.value, digits)}{sd}", ends, over_text


@dataclass(frozen=True, kw_only=True)
class Between:
    """What seeds say of the pairs of settings of a pattern and sparsity.

    exceeding, within: pairs whose difference does and does not exceed the spread between seeds, in words. too_few: how many pairs have a
    setting with one seed.
    """

    asked: str
    exceeding: list[str]
    within: list[str]
    too_few: int

    @property
    def pairs(self) -> int:
        return len(self.exceeding) + len(self.within) + self.too_few


def between_settings(group: Group, metric: Metric) -> list[Between]:
    """For each pattern and sparsity with two settings or more, whether they differ by more than their seeds do; nothing without repeats."""
    if not repeated(group):
        return []
    found = []
    for asked, members in settings_of(group).items():
        said: dict[bool, list[str]] = {True: [], False: []}
        pairs = list(pairs_of(members, metric))
        for ours, theirs, estimate, test in pairs:
            if estimate is not None:
                words = f"{ours.name} against {theirs.name}: {difference_words(metric, estimate)} ({test})"
                said[verdict(metric, estimate) != Verdict.NOISE].append(words)
        if pairs:
            told = len(said[True]) + len(said[False])
            found.append(Between(asked=asked, exceeding=said[True], within=said[False], too_few=len(pairs) - told))
    return found


def pairs_of(members: Sequence[Setting], metric: Metric) -> Iterator[tuple[Setting, Setting, Estimate | None, TTest]]:
    """Each pair of settings that have the metric, the worse one first, with their difference, None where one has too few seeds, and how
    it was made."""
    known = [(setting, of) for setting in members if (of := setting.spread(metric)) is not None]
    ordered = sorted(known, key=lambda pair: pair[1].value, reverse=metric.better == "higher")
    for (best, its), (other, of) in combinations(ordered, 2):
        yield other, best, *between(of.scores, its.scores, same_seeds=other.seeds == best.seeds)


def repeat_rows(group: Group) -> Iterator[Row]:
    """Each setting in each metric: mean, spread and interval over its seeds, which are empty of one seed, and the error over text."""
    for setting in (setting for members in settings_of(group).values() for setting in members):
        for metric in group.every_metric:
            of = setting.spread(metric)
            if of is not None:
                low, high = of.interval or (None, None)
                yield {
                    **_names(setting),
                    "sparsity": setting.sparsity,
                    "experiments": setting.experiments,
                    "metric": metric.id,
                    "mean": of.value,
                    "sd_between_seeds": of.sd,
                    "low": low,
                    "high": high,
                    "stderr_over_text": of.over_text,
                }


def repeat_difference_rows(group: Group) -> Iterator[Row]:
    """Each pair of settings of one pattern and sparsity in each metric, over their seeds; ratios of perplexities."""
    for metric in group.every_metric:
        for members in settings_of(group).values():
            for ours, theirs, estimate, test in pairs_of(members, metric):
                pair = {**_names(ours), "against": theirs.name, "against_seeds": len(theirs.repeats), "metric": metric.id}
                if estimate is None:
                    yield {**pair, "verdict": TOO_FEW}
                else:
                    value, ends = natural(metric, estimate)
                    low, high = ends or (None, None)
                    kind = "ratio" if metric.is_ratio else "difference"
                    yield {**pair, "is": kind, "value": value, "low": low, "high": high, "verdict": verdict(metric, estimate), "test": test}


def _names(setting: Setting) -> Row:
    return {"setting": setting.name, "pattern": setting.pattern, "asked": setting.asked, "seeds": len(setting.repeats)}
