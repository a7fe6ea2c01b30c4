"""The scores of a model, and the files in which the evaluation writes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import ComparisonError, SparsesweepError
from stages.evaluation.measurement import Better, Difference, Kind, Measurement, as_rows, metrics
from stages.evaluation.metric import Corpus, Metric, Observed, WindowMeans, window_means
from stages.evaluation.protocol import Protocol
from stages.evaluation.statistics import accuracy_interval, difference, difference_interval, mean, normal_interval
from stages.files import read_json, write_json, write_lines
from stages.rows import Rows

Samples = dict[str, list[dict[str, Any]]]
"""Task -> one entry for each of its rows: "row", its number; "cluster", the number of the document that it shares with others; "values", by
lm-eval's names of the metrics, the task's own first; and what the model said."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The scores of one model.

    windows: corpus -> "clusters", the document of each window, and the window means that metrics keep, by name.
    samples: see Samples. generations: one row per prompt, see generation.generate.
    measurements: all numbers made of these.
    """

    windows: dict[str, dict[str, Any]]
    samples: Samples
    generations: list[dict[str, str]]
    measurements: list[Measurement]

    @property
    def metrics(self) -> dict[str, Any]:
        return metrics(self.measurements)

    def accuracy(self, model: str) -> list[dict[str, Any]]:
        """One row per task with its own metric, with the same keys in each row: DVC plots only such rows."""
        own = {measurement.name: measurement for measurement in reversed(self.measurements) if measurement.kind == Kind.TASK}
        return [
            {"model": model, "task": task, "accuracy": own[task].value, "stderr": own[task].stderr, "rows": own[task].count}
            for task in self.samples
        ]

    def write(self, details: Path) -> None:
        write_json(details / "windows.json", self.windows)
        write_json(details / "measurements.json", as_rows(self.measurements))
        write_json(details / "generations.json", self.generations)
        for task, rows in self.samples.items():
            write_lines(samples_file(details, task), rows)


def results_of(
    corpora: Sequence[Corpus],
    observed: Mapping[str, Observed],
    metrics: Sequence[Metric],
    samples: Samples,
    generations: list[dict[str, str]],
    dense: Results | None,
) -> Results:
    """Make all measurements of a model.

    Args:
        observed: corpus -> see StreamedModels.observe. metrics: those that were observed.
        dense: the dense model's results on the same windows and rows; None for the dense model itself.
    """
    measurements: list[Measurement] = []
    windows: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        theirs: WindowMeans | None = None if dense is None else dense.windows[corpus.name]
        for metric in metrics:
            measurements += metric.measure(corpus, observed[corpus.name], theirs)
        kept = [name for metric in metrics for name in metric.kept]
        means = {name: window_means(observed[corpus.name][name]) for name in kept}
        windows[corpus.name] = {"clusters": list(corpus.clusters), **means}
    for task, rows in samples.items():
        measurements += task_measurements(task, rows, None if dense is None else dense.samples[task])
    measurements += mean_accuracy(measurements)
    return Results(windows=windows, samples=samples, generations=generations, measurements=measurements)


def task_measurements(task: str, rows: list[dict[str, Any]], dense: list[dict[str, Any]] | None) -> list[Measurement]:
    """The metrics of a task, the first its own; intervals of accuracies stay within 0 and 1, and have a width where no row tells."""
    clusters = [row["cluster"] for row in rows]
    made = []
    for metric in rows[0]["values"]:
        ours = [row["values"][metric] for row in rows]
        estimate, is_binary = mean(ours, clusters), set(ours) <= {0.0, 1.0}
        low, high = (accuracy_interval(ours, clusters) if is_binary else estimate.interval) or (None, None)
        theirs = None if dense is None else [row["values"][metric] for row in dense]
        made.append(
            Measurement(
                kind=Kind.TASK,
                name=task,
                metric=metric,
                label={"acc": "accuracy", "acc_norm": "accuracy, normalised by length"}.get(metric, metric),
                value=estimate.value,
                stderr=estimate.stderr,
                low=low,
                high=high,
                count=estimate.count,
                counted="rows",
                clusters=estimate.clusters,
                better=Better.HIGHER,
                dense=None if theirs is None else mean(theirs).value,
                difference=None if theirs is None else _apart(ours, theirs, clusters),
            )
        )
    return made


def _apart(ours: list[float], theirs: list[float], clusters: list[int]) -> Difference:
    """The paired difference of two models on the same rows."""
    estimate = difference(ours, theirs, clusters)
    is_binary = {*ours, *theirs} <= {0.0, 1.0}
    low, high = (difference_interval(ours, theirs, clusters) if is_binary else estimate.interval) or (None, None)
    return Difference(value=estimate.value, stderr=estimate.stderr, low=low, high=high)


def mean_accuracy(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The mean of the tasks' own metrics, every task alike whatever its rows; its error takes the tasks as independent. None of no task."""
    own = {measurement.name: measurement for measurement in reversed(measurements) if measurement.kind == Kind.TASK}
    tasks = list(own.values())
    if not tasks:
        return []
    value, low, high, stderr = _mean_of([(task.value, task.stderr) for task in tasks])
    apart = [task.difference for task in tasks if task.difference is not None]
    compared = None
    if apart:
        gap, gap_low, gap_high, gap_stderr = _mean_of([(task.value, task.stderr) for task in apart])
        compared = Difference(value=gap, stderr=gap_stderr, low=gap_low, high=gap_high)
    return [
        Measurement(
            kind=Kind.MEAN,
            name="tasks",
            metric="accuracy",
            label="mean accuracy, every task alike",
            value=value,
            stderr=stderr,
            low=low,
            high=high,
            count=len(tasks),
            counted="tasks",
            clusters=len(tasks),
            better=Better.HIGHER,
            dense=sum(task.dense for task in tasks if task.dense is not None) / len(tasks) if apart else None,
            difference=compared,
        )
    ]


def _mean_of(values: list[tuple[float, float | None]]) -> tuple[float, float | None, float | None, float | None]:
    """The mean of independent values with their standard errors: value, ends of its interval, standard error."""
    value = sum(number for number, _ in values) / len(values)
    errors = [error for _, error in values if error is not None]
    if len(errors) < len(values):
        return value, None, None, None
    stderr = math.hypot(*errors) / len(values)
    return value, *normal_interval(value, stderr), stderr


def read_results(details: Path, protocol: Protocol) -> Results:
    """Read what `Results.write` wrote, as far as it is compared; of the measurements those of tasks.

    Raises:
        ComparisonError: a file is missing or does not fit the protocol; names it.
    """
    windows, generations = (_read(details / f"{name}.json") for name in ("windows", "generations"))
    counts = {name: corpus.windows for name, corpus in protocol.corpora.items()}
    wanted = ", ".join(f"{count} finite losses of {name}" for name, count in counts.items()) or "no losses"
    _require(_are_windows(windows, counts), details / "windows.json", wanted)
    _require(_are_generations(generations, protocol.prompts), details / "generations.json", f"a row for each of {protocol.prompts}")
    samples = {}
    for name, task in protocol.tasks.items():
        path = samples_file(details, name)
        samples[name] = _read_lines(path)
        _require(_are_samples(samples[name], task.rows, task.metrics), path, f"{task.rows} rows in order, each with {_and(task.metrics)}")
    measurements = [measured for task, rows in samples.items() for measured in task_measurements(task, rows, None)]
    return Results(windows=windows, samples=samples, generations=generations, measurements=measurements)


def samples_file(details: Path, task: str) -> Path:
    """The path of the samples of a task."""
    return details / f"samples-{task}.jsonl"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ComparisonError(f"{path}: not found")
    try:
        rows = Rows(path)
        return [{key: row.get(key) for key in ("row", "cluster", "values")} for row in rows]
    except SparsesweepError as error:
        raise ComparisonError(str(error)) from None


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except SparsesweepError as error:
        raise ComparisonError(str(error)) from None


def _require(valid: bool, path: Path, expected: str) -> None:
    if not valid:
        raise ComparisonError(f"{path}: wanted {expected}, as protocol.json says; was it changed by hand?")


def _are_windows(data: Any, counts: dict[str, int]) -> bool:
    return isinstance(data, dict) and set(data) == set(counts) and all(_are_losses(data[name], count) for name, count in counts.items())


def _are_losses(data: Any, count: int) -> bool:
    losses = data.get("nll") if isinstance(data, dict) else None
    return isinstance(losses, list) and len(losses) == count and all(_is_finite(loss) for loss in losses)


def _are_samples(rows: list[dict[str, Any]], count: int, metrics: Sequence[str]) -> bool:
    return [row["row"] for row in rows] == list(range(count)) and all(_are_values(row["values"], metrics) for row in rows)


def _are_values(values: Any, metrics: Sequence[str]) -> bool:
    return isinstance(values, dict) and list(values) == list(metrics) and all(map(_is_finite, values.values()))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_generations(data: Any, prompts: list[str]) -> bool:
    rows = data if isinstance(data, list) and all(isinstance(row, dict) and "raw" in row for row in data) else [{}]
    return [row.get("prompt") for row in rows] == prompts
