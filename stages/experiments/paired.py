"""How far two models lie apart on the same windows and rows, in each metric that both have.

    perplexity   ln of the ratio: mean over windows of the difference of their losses
    mean KLD     mean over windows of the difference [nats per token]
    a task       mean over rows of the difference; of right and wrong answers with Bonett and Price's interval, see evaluation.statistics
    all tasks    mean over tasks of their differences, which are independent:
                 stderr = sqrt(sum of stderr^2) / tasks, and Satterthwaite's degrees of freedom, rounded down

Intervals hold the noise of the text alone, not that of another calibration seed, and each of them on its own misses once in 20.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.evaluation.measurement import Measurement
from stages.evaluation.results import RAW, own_accuracies
from stages.evaluation.statistics import Estimate, difference, difference_of_rows, mean_of_independent
from stages.experiments.details import Details, Scores, name_of

PIECES = {"perplexity": "nll", "mean_kld": "kld"}  # metric of a corpus -> what is known of each window


class Verdict(StrEnum):
    """What the interval of a difference says."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "within noise"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number by which experiments are compared.

    kind, name, metric: see evaluation.measurement.Measurement. label: what it is in words. unit: "" for none. better: "lower" or "higher".
    tasks: those that a mean is over, each with its own metric.
    """

    kind: str
    name: str
    metric: str
    label: str
    unit: str
    better: str
    tasks: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}/{self.metric}"

    @property
    def is_ratio(self) -> bool:
        """Whether a difference is the logarithm of a ratio."""
        return self.metric == "perplexity"

    @property
    def digits(self) -> int:
        """Decimals in which it is written."""
        return 2 if self.is_ratio else 3

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
    """The metrics of the plots: perplexity and mean KLD on each corpus, and means over tasks, as far as any experiment has them."""
    found: dict[str, Metric] = {}
    for details in results:
        for row in details.measurements:
            if row["kind"] == "mean" or row["kind"] == "corpus" and row["metric"] in PIECES:
                metric = metric_of(row, details.experiment.measurements)
                found.setdefault(metric.id, metric)
    order = [*PIECES, *(metric.metric for metric in found.values())]
    corpora = list(dict.fromkeys(metric.name for metric in found.values()))
    return sorted(found.values(), key=lambda metric: (metric.kind == "mean", corpora.index(metric.name), order.index(metric.metric)))


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
    """The metric of a measurement, one of `measurements`."""
    facts = {"kind": row["kind"], "name": row["name"], "metric": row["metric"], "unit": row["unit"], "better": row["better"] or "higher"}
    if row["kind"] != "mean":
        return Metric(**facts, label=f"{row['label']} on {row['name']}")
    own = own_accuracies(measurements, row["style"])
    label = row["label"] if row["style"] == RAW else f"{row['label']}, {row['style']}"
    return Metric(**facts, label=label, tasks=tuple((name_of(measured), measured.metric) for measured in own))


def apart(metric: Metric, ours: Scores, theirs: Scores) -> Estimate | None:
    """The difference of two models in a metric, ours less theirs, of perplexity as ln of the ratio; None if either lacks it."""
    if metric.kind == "corpus":
        name = PIECES[metric.metric]
        here, there = (scores.windows.get(metric.name, {}).get(name) for scores in (ours, theirs))
        return None if here is None or there is None else difference(here, there, ours.window_clusters[metric.name])
    tasks = [(metric.name, metric.metric)] if metric.kind == "task" else metric.tasks
    estimates = [
        difference_of_rows(ours.rows[task][own], theirs.rows[task][own], ours.row_clusters[task])
        for task, own in tasks
        if own in ours.rows.get(task, {}) and own in theirs.rows.get(task, {})
    ]
    return (estimates[0] if metric.kind == "task" else mean_of_independent(estimates)) if estimates else None


def verdict(metric: Metric, estimate: Estimate) -> Verdict:
    """Whether a difference is one: its interval holds no 0; unknown without an interval."""
    interval = estimate.interval
    if interval is None:
        return Verdict.UNKNOWN
    if interval[0] <= 0 <= interval[1]:
        return Verdict.NOISE
    return Verdict.BETTER if (interval[1] < 0) == (metric.better == "lower") else Verdict.WORSE


def natural(metric: Metric, estimate: Estimate) -> tuple[float, tuple[float, float] | None]:
    """A difference with its interval as they are written: a ratio of perplexities, a difference of others."""
    if not metric.is_ratio:
        return estimate.value, estimate.interval
    return math.exp(estimate.value), estimate.interval and (math.exp(estimate.interval[0]), math.exp(estimate.interval[1]))


def of_scores(metric: Metric, scores: Scores) -> Estimate | None:
    """A model's own mean in a metric, of perplexity as its logarithm: how far it lies from a model whose every score is 0."""
    nothing = Scores(
        windows={name: {key: [0.0] * len(values) for key, values in of.items()} for name, of in scores.windows.items()},
        rows={name: {key: [0.0] * len(values) for key, values in of.items()} for name, of in scores.rows.items()},
        window_clusters=scores.window_clusters,
        row_clusters=scores.row_clusters,
    )
    return apart(metric, scores, nothing)
