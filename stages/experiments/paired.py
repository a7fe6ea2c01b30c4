"""How far two models lie apart on the same windows and rows, in each metric that both have.

    of text      mean over windows of the difference of what the metric keeps of them, in the metric's unit; of perplexity this is ln of
                 the ratio. Each metric declares what it keeps, see evaluation.metric.Shown
    a task       mean over rows of the difference; of right and wrong answers with Bonett and Price's interval, see evaluation.statistics;
                 of a group that weighs its tasks alike as all tasks
    all tasks    mean over tasks of their differences, which are independent: stderr = sqrt(sum of stderr^2) / tasks, and the interval
                 recovered from theirs; none where a task's score is no mean over rows

Intervals hold the noise of the text alone, not that of another calibration seed, and each of them on its own misses once in 20.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.evaluation.measurement import Measurement
from stages.evaluation.metrics import shown_measurements
from stages.evaluation.results import RAW, own_accuracies
from stages.evaluation.statistics import Estimate, difference, difference_of_rows, mean, mean_of_independent, mean_of_rows
from stages.experiments.details import Details, Scores, name_of

NEITHER = "neither"  # direction of a number that does not improve, such as a size


class Verdict(StrEnum):
    """What the interval of a difference says."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "within noise"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number by which experiments are compared.

    kind, name, metric: see evaluation.measurement.Measurement. label: what it is in words. unit: "" for none. better: "lower", "higher" or
    NEITHER.
    tasks: those that a mean is over, each with its own metric.
    digits: decimals in which it is written. kept, is_ratio, scale, itself: of a metric of text, see evaluation.metric.Shown.
    """

    kind: str
    name: str
    metric: str
    label: str
    unit: str
    better: str
    tasks: tuple[tuple[str, str], ...] = ()
    digits: int = 3
    kept: str | None = None
    is_ratio: bool = False
    scale: float = 1.0
    itself: float | None = None

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}/{self.metric}"

    @property
    def axis(self) -> str:
        """The title of its axis."""
        return f"{self.label}{f' [{self.unit}]' if self.unit else ''}, {self.better} is better"

    def of(self, details: Details) -> dict[str, Any] | None:
        """The measurement of an experiment; None if it has none."""
        return next((row for row in details.measurements if self.matches(row)), None)

    def matches(self, row: dict[str, Any]) -> bool:
        return (row["kind"], row["name"], row["metric"]) == (self.kind, self.name, self.metric)


def headline(results: Sequence[Details]) -> list[Metric]:
    """The metrics of the plots: the headlines of text on each corpus, and means over tasks, as far as any experiment has them."""
    known = shown_measurements()
    headlines = {name for name, shown in known.items() if shown.headline}
    return _found(results, lambda row: row["kind"] == "mean" or row["kind"] == "corpus" and row["metric"] in headlines)


def others(results: Sequence[Details]) -> list[Metric]:
    """The metrics of text that are shown but have no plots, on each corpus, as far as any experiment has them."""
    named = {name for name, shown in shown_measurements().items() if not shown.headline}
    return _found(results, lambda row: row["kind"] == "corpus" and row["metric"] in named)


def every(results: Sequence[Details]) -> list[Metric]:
    """All metrics that any experiment has: those of headline and others, then the rest in the order of their measurements."""
    found = {metric.id: metric for metric in (*headline(results), *others(results))}
    for row in (row for details in results for row in details.measurements):
        metric = _unshown(row)
        found.setdefault(metric.id, metric)
    return list(found.values())


def _unshown(row: dict[str, Any]) -> Metric:
    """The metric of a measurement that has no plots: in its own unit, and as it is."""
    facts = {key: row[key] for key in ("kind", "name", "metric", "label", "unit")}
    return Metric(**facts, better=row["better"] or NEITHER)


def _found(results: Sequence[Details], wanted: Callable[[dict[str, Any]], bool]) -> list[Metric]:
    """The metrics of the measurements that are wanted, corpus by corpus in the order of their measurements, means over tasks last."""
    found: dict[str, Metric] = {}
    for details in results:
        for row in details.measurements:
            if wanted(row):
                metric = metric_of(row, details.experiment.measurements)
                found.setdefault(metric.id, metric)
    corpora = list(dict.fromkeys(metric.name for metric in found.values()))
    return sorted(found.values(), key=lambda metric: (metric.kind == "mean", corpora.index(metric.name)))


def of_tasks(results: Sequence[Details]) -> dict[str, Metric]:
    """Each task's own metric, as far as any experiment has its rows' scores."""
    found: dict[str, Metric] = {}
    for details in results:
        for row in details.measurements:
            if row["kind"] == "task" and row["metric"] in details.scores.rows.get(row["name"], {}):
                facts = {"kind": "task", "name": row["name"], "metric": row["metric"], "label": row["name"], "unit": row["unit"]}
                found.setdefault(row["name"], Metric(**facts, better=row["better"] or "higher"))
    return found


def metric_of(row: dict[str, Any], measurements: Sequence[Measurement]) -> Metric:
    """The metric of a measurement, one of `measurements`: of a corpus, one that is shown; or a mean over tasks."""
    facts = {"kind": row["kind"], "name": row["name"], "metric": row["metric"], "unit": row["unit"], "better": row["better"] or "higher"}
    if row["kind"] != "mean":
        shown = shown_measurements()[row["metric"]]
        return Metric(
            **facts,
            label=f"{row['label']} on {row['name']}",
            digits=shown.digits,
            kept=shown.kept,
            is_ratio=shown.ratio,
            scale=shown.scale,
            itself=shown.itself,
        )
    own = own_accuracies(measurements, row["style"])
    label = row["label"] if row["style"] == RAW else f"{row['label']}, {row['style']}"
    return Metric(**facts, label=label, tasks=tuple((name_of(measured), measured.metric) for measured in own))


def apart(metric: Metric, ours: Scores, theirs: Scores) -> Estimate | None:
    """The difference of two models in a metric, ours less theirs, where it is a ratio its logarithm; None if either lacks it."""
    if metric.kind == "corpus":
        here, there = (scores.windows.get(metric.name, {}).get(metric.kept or "") for scores in (ours, theirs))
        if here is None or there is None:
            return None
        ours_scaled, theirs_scaled = ([metric.scale * value for value in of] for of in (here, there))
        return difference(ours_scaled, theirs_scaled, ours.window_clusters[metric.name])
    tasks = [(metric.name, metric.metric)] if metric.kind == "task" else metric.tasks
    if not all(own in scores.rows.get(task, {}) for task, own in tasks for scores in (ours, theirs)):
        return None
    estimates = [_of_task(task, own, ours, theirs) for task, own in tasks]
    return (estimates[0] if metric.kind == "task" else mean_of_independent(estimates)) if estimates else None


def _of_task(task: str, own: str, ours: Scores, theirs: Scores) -> Estimate:
    """The difference in a task's score, which both have."""
    pairs = zip(ours.of_task(task, own), theirs.of_task(task, own), strict=True)
    return _together([difference_of_rows(here, there, clusters) for (here, clusters), (there, _) in pairs])


def verdict(metric: Metric, estimate: Estimate) -> Verdict:
    """Whether a difference is one: its interval holds no 0; unknown without an interval, or where neither direction is better."""
    interval = estimate.interval
    if interval is None:
        return Verdict.UNKNOWN
    if interval[0] <= 0 <= interval[1]:
        return Verdict.NOISE
    if metric.better == NEITHER:
        return Verdict.UNKNOWN
    return Verdict.BETTER if (interval[1] < 0) == (metric.better == "lower") else Verdict.WORSE


def natural(metric: Metric, estimate: Estimate) -> tuple[float, tuple[float, float] | None]:
    """A difference with its interval as they are written: a ratio of perplexities, a difference of others."""
    if not metric.is_ratio:
        return estimate.value, estimate.interval
    return math.exp(estimate.value), estimate.interval and (math.exp(estimate.interval[0]), math.exp(estimate.interval[1]))


def of_scores(metric: Metric, scores: Scores) -> Estimate | None:
    """A model's own mean in a metric, as the evaluation estimates it; where the metric is a ratio its logarithm."""
    if metric.kind == "corpus":
        values = scores.windows.get(metric.name, {}).get(metric.kept or "")
        return None if values is None else mean([metric.scale * value for value in values], scores.window_clusters[metric.name])
    tasks = [(metric.name, metric.metric)] if metric.kind == "task" else metric.tasks
    if not tasks or not all(own in scores.rows.get(task, {}) for task, own in tasks):
        return None
    estimates = [_together([mean_of_rows(*part) for part in scores.of_task(task, own)]) for task, own in tasks]
    return estimates[0] if metric.kind == "task" else mean_of_independent(estimates)


def _together(parts: list[Estimate]) -> Estimate:
    """A task's score: of a group that weighs its tasks alike the mean over these."""
    return parts[0] if len(parts) == 1 else mean_of_independent(parts)
