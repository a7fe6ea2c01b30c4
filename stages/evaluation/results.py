"""The scores of a model, and the files in which the evaluation writes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import ComparisonError, SparsesweepError
from stages.evaluation import degeneration
from stages.evaluation.degeneration import Tokenize
from stages.evaluation.measurement import Better, Difference, Kind, Measurement, as_rows, estimated, metrics
from stages.evaluation.metric import Corpus, Metric, Observed, WindowMeans, window_means
from stages.evaluation.protocol import EMBEDDED, Protocol, TaskProtocol
from stages.evaluation.statistics import Adjusted, Estimate, difference_of_rows, mean, mean_of_independent, mean_of_rows
from stages.files import read_json, write_json, write_lines
from stages.plain_data import is_finite, of_type
from stages.rows import Rows

Samples = dict[str, list[dict[str, Any]]]
"""Task -> one entry for each of its rows: "row", its number; "cluster", the number of the document that it shares with others; "values", by
the names of the metrics, the task's own first; what the model said; "task", which of a group it is of; "cut", where it is longer than the
context."""

Aggregates = dict[str, dict[str, dict[str, Any]]]
"""Task -> score that is no mean of rows, such as a corpus's F1 -> see Aggregate."""


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A score that is no mean of rows, as the file of aggregates has it.

    value: lm-eval's own. count: number of its rows. stderr: its standard error by the bootstrap, see bootstrap.py; None: not known.
    clusters: how many of the rows are independent; None: not known. resamples: of the bootstrap.
    """

    value: float
    count: int
    stderr: float | None = None
    clusters: int | None = None
    resamples: int = 0


ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")  # metrics that the mean over tasks is made of
AGGREGATES = "aggregates.json"
RAW = "raw"
LARGEST_SCORE = 1e30


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model said to the rows of a task in a style.

    rows: see Samples. aggregates: those of the task, see Aggregates.
    """

    rows: list[dict[str, Any]]
    aggregates: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model said: style -> task -> its answers; and one row per prompt, see generation.generate."""

    answers: dict[str, dict[str, Answers]]
    generations: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The scores of one model.

    windows: corpus -> "clusters", the document of each window, and the window means that metrics keep, by name.
    samples: see Samples. generations: one row per prompt, see generation.generate.
    measurements: all numbers made of these.
    styles: style other than raw -> samples. aggregates: style -> see Aggregates.
    """

    windows: dict[str, dict[str, Any]]
    samples: Samples
    generations: list[dict[str, str]]
    measurements: list[Measurement]
    styles: dict[str, Samples] = field(default_factory=dict)
    aggregates: dict[str, Aggregates] = field(default_factory=dict)

    def samples_in(self, style: str) -> Samples:
        """The samples of a style."""
        return self.samples if style == RAW else self.styles.get(style, {})

    @property
    def metrics(self) -> dict[str, Any]:
        return metrics(self.measurements)

    def accuracy(self, model: str) -> list[dict[str, Any]]:
        """One row per task whose own metric is an accuracy, with the same keys in each row: DVC plots only such rows."""
        return [
            {"model": model, "task": own.name, "accuracy": own.value, "stderr": own.stderr, "rows": own.count}
            for own in own_accuracies(self.measurements)
        ]

    def write(self, details: Path) -> None:
        write_json(details / "windows.json", self.windows)
        write_json(details / "measurements.json", as_rows(self.measurements))
        write_json(details / "generations.json", self.generations)
        if any(of_task for of_style in self.aggregates.values() for of_task in of_style.values()):
            write_json(details / AGGREGATES, self.aggregates)
        for style, samples in {RAW: self.samples, **self.styles}.items():
            for task, rows in samples.items():
                path = samples_file(details, task, style)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_lines(path, rows)


def results_of(
    corpora: Sequence[Corpus],
    observed: Mapping[str, Observed],
    metrics: Sequence[Metric],
    scores: Scores,
    tasks: Mapping[str, TaskProtocol],
    dense: Results | None,
    tokenize: Tokenize,
) -> Results:
    """Make all measurements of a model.

    Args:
        observed: corpus -> see StreamedModels.observe. metrics: those that were observed.
        tasks: how each was scored. tokenize: see degeneration.measure.
        dense: the dense model's results on the same windows and rows; None for the dense model itself.
    """
    measurements = corpus_measurements(corpora, observed, metrics, dense)
    windows: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        kept = [name for metric in metrics for name in metric.kept]
        means = {name: window_means(observed[corpus.name][name]) for name in kept}
        windows[corpus.name] = {"clusters": list(corpus.clusters), **means}
    for style, of_tasks in scores.answers.items():
        of_style: list[Measurement] = []
        for task, answers in of_tasks.items():
            reference = None if dense is None else dense.samples_in(style)[task]
            of_style += task_measurements(task, answers.rows, reference, tasks[task], style)
            references = {} if dense is None else dense.aggregates.get(style, {}).get(task, {})
            of_style += aggregate_measurements(task, answers.aggregates, references, tasks[task], style)
        measurements += [*of_style, *mean_accuracy(of_style, style)]
    measurements += degeneration.measure(scores.generations, None if dense is None else dense.generations, tokenize)
    samples = {style: {task: answers.rows for task, answers in of_tasks.items()} for style, of_tasks in scores.answers.items()}
    aggregates = {style: {task: answers.aggregates for task, answers in of_tasks.items()} for style, of_tasks in scores.answers.items()}
    return Results(
        windows=windows,
        samples=samples.pop(RAW, {}),
        generations=scores.generations,
        measurements=measurements,
        styles=samples,
        aggregates=aggregates,
    )


def corpus_measurements(
    corpora: Sequence[Corpus], observed: Mapping[str, Observed], metrics: Sequence[Metric], dense: Results | None
) -> list[Measurement]:
    """The metrics of text on each corpus; args: see results_of."""
    measurements: list[Measurement] = []
    for corpus in corpora:
        theirs: WindowMeans | None = None if dense is None else dense.windows[corpus.name]
        for metric in metrics:
            measurements += metric.measure(corpus, observed[corpus.name], theirs)
    return measurements


def task_measurements(
    task: str,
    rows: list[dict[str, Any]],
    dense: list[dict[str, Any]] | None,
    facts: TaskProtocol | None = None,
    style: str = RAW,
) -> list[Measurement]:
    """The metrics of a task, the first its own; intervals of accuracies stay within 0 and 1, and have a width where no row tells.

    Scores of a group are means over its rows, or over its tasks where lm-eval weighs these alike.

    Args:
        facts: how the task was scored; None: all its metrics are better the higher they are.
    """
    clusters = [row["cluster"] for row in rows]
    made = []
    for metric in rows[0]["values"]:
        ours = [row["values"][metric] for row in rows]
        theirs = None if dense is None else [row["values"][metric] for row in dense if metric in row["values"]]
        theirs = theirs if theirs is not None and len(theirs) == len(ours) else None
        alike = facts is not None and metric in facts.macro
        scored = _over_tasks(rows, ours, theirs) if alike else _over_rows(ours, theirs, clusters)
        made.append(
            Measurement(
                kind=Kind.TASK,
                name=task,
                metric=metric,
                label=LABELS.get(metric, metric),
                count=len(ours),
                counted="rows",
                clusters=len(set(clusters)),
                better=_better(facts, metric),
                style=style,
                **scored,
            )
        )
    return made


LABELS = {"acc": "accuracy", "acc_norm": "accuracy, normalised by length", "exact_match": "exact match"}


def _better(facts: TaskProtocol | None, metric: str) -> Better | None:
    stated = Better.HIGHER if facts is None else facts.better.get(metric, Better.HIGHER)
    return None if stated is None else Better(stated)


def _over_rows(ours: list[float], theirs: list[float] | None, clusters: list[int]) -> dict[str, Any]:
    """Fields of a measurement: the mean over rows."""
    made = estimated(mean_of_rows(ours, clusters))
    if theirs is not None:
        made |= {"dense": mean(theirs).value, "difference": Difference.of(difference_of_rows(ours, theirs, clusters))}
    return made


def _over_tasks(rows: list[dict[str, Any]], ours: list[float], theirs: list[float] | None) -> dict[str, Any]:
    """Fields of a measurement: the mean over the tasks of a group, which are independent."""
    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row["task"], []).append(number)
    clusters = [[rows[number]["cluster"] for number in of] for of in members.values()]

    def by_task(values: list[float]) -> list[list[float]]:
        return [[values[number] for number in of] for of in members.values()]

    made = estimated(mean_of_independent(list(map(mean_of_rows, by_task(ours), clusters))))
    if theirs is not None:
        apart = mean_of_independent(list(map(difference_of_rows, by_task(ours), by_task(theirs), clusters)))
        made |= {"dense": math.fsum(mean(of).value for of in by_task(theirs)) / len(members), "difference": Difference.of(apart)}
    return made


def aggregate_measurements(
    task: str, ours: dict[str, dict[str, Any]], dense: dict[str, dict[str, Any]], facts: TaskProtocol, style: str
) -> list[Measurement]:
    """The scores of a task that are no means of rows: lm-eval's own values, with errors by the bootstrap.

    The difference to the dense model has none: its rows' parts are not kept.
    """
    return [
        Measurement(
            kind=Kind.TASK,
            name=task,
            metric=metric,
            label=LABELS.get(metric, metric),
            **estimated(_of_aggregate(scored)),
            count=scored["count"],
            counted="rows",
            clusters=scored.get("clusters") or scored["count"],
            better=_better(facts, metric),
            dense=dense[metric]["value"] if metric in dense else None,
            difference=Difference(value=scored["value"] - dense[metric]["value"]) if metric in dense else None,
            style=style,
        )
        for metric, scored in ours.items()
    ]


def _of_aggregate(scored: dict[str, Any]) -> Estimate:
    count = scored["count"]
    return Estimate(value=scored["value"], stderr=scored.get("stderr"), count=count, clusters=scored.get("clusters") or count)


def own_measurements(measurements: Sequence[Measurement], style: str = RAW) -> list[Measurement]:
    """The measurement of each task's own metric, the first of the task, in a style."""
    own: dict[str, Measurement] = {}
    for measured in measurements:
        if measured.kind == Kind.TASK and measured.style == style:
            own.setdefault(measured.name, measured)
    return list(own.values())


def own_accuracies(measurements: Sequence[Measurement], style: str = RAW) -> list[Measurement]:
    """Those that are accuracies."""
    return [own for own in own_measurements(measurements, style) if own.metric.partition(" ")[0] in ACCURACIES]


def mean_accuracy(measurements: Sequence[Measurement], style: str = RAW) -> list[Measurement]:
    """The mean of the accuracies that are tasks' own metrics, every task alike whatever its rows; its error takes the tasks as independent.
    None of no task."""
    tasks = own_accuracies(measurements, style)
    if not tasks:
        return []
    average = mean_of_independent([_of_task(task, task) for task in tasks])
    apart = [_of_task(task, task.difference) for task in tasks if task.difference is not None]
    compared = Difference.of(mean_of_independent(apart)) if apart else None
    return [
        Measurement(
            kind=Kind.MEAN,
            name="tasks",
            metric="accuracy",
            label="mean accuracy, every task alike",
            **estimated(average),
            count=len(tasks),
            counted="tasks",
            clusters=len(tasks),
            better=Better.HIGHER,
            dense=sum(task.dense for task in tasks if task.dense is not None) / len(tasks) if apart else None,
            difference=compared,
            style=style,
        )
    ]


def _of_task(task: Measurement, number: Measurement | Difference) -> Estimate:
    """A task's mean, or its difference, as an estimate."""
    ends = None if number.low is None or number.high is None else (number.low, number.high)
    return Adjusted(value=number.value, stderr=number.stderr, count=task.count, clusters=task.clusters, ends=ends)


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
    styles = [RAW, *(style for style, asked in protocol.styles.items() if asked.skipped is None)]
    samples = {style: {name: _samples(details, name, style, task) for name, task in protocol.tasks.items()} for style in styles}
    aggregates = _aggregates(details / AGGREGATES) if (details / AGGREGATES).is_file() else {}
    measurements = [
        measured for style in styles for task, rows in samples[style].items() for measured in _measurements(task, rows, protocol, style)
    ]
    return Results(
        windows=windows,
        samples=samples.pop(RAW),
        generations=generations,
        measurements=measurements,
        styles=samples,
        aggregates=aggregates,
    )


def _measurements(task: str, rows: list[dict[str, Any]], protocol: Protocol, style: str) -> list[Measurement]:
    return task_measurements(task, rows, None, protocol.tasks[task], style)


def _samples(details: Path, name: str, style: str, task: TaskProtocol) -> list[dict[str, Any]]:
    """The samples of a task, checked."""
    path = samples_file(details, name, style)
    rows = _read_lines(path)
    first = rows[0]["values"]
    metrics = task.metrics if task.source == EMBEDDED else list(first if isinstance(first, dict) else {})
    _require(_are_samples(rows, task.rows, metrics), path, f"{task.rows} rows in order, each with {_and(metrics)}")
    return rows


def samples_file(details: Path, task: str, style: str = RAW) -> Path:
    """The path of the samples of a task."""
    return (details if style == RAW else details / "styles" / style) / f"samples-{task}.jsonl"


def _aggregates(path: Path) -> dict[str, Aggregates]:
    try:
        scores: dict[str, dict[str, dict[str, Aggregate]]] = of_type(dict[str, dict[str, dict[str, Aggregate]]], _read(path), "aggregates")
    except ValueError as error:
        raise ComparisonError(f"{path}: {error}") from None
    return {
        style: {task: {name: asdict(score) for name, score in of_task.items()} for task, of_task in of_style.items()}
        for style, of_style in scores.items()
    }


def _and(names: Sequence[str]) -> str:
    return " and ".join(names) or "no metric"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ComparisonError(f"{path}: not found")
    try:
        rows = Rows(path)
        return [{key: row.get(key) for key in ("row", "cluster", "values", "task")} for row in rows]
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
    return isinstance(losses, list) and len(losses) == count and all(map(_is_score, losses))


def _are_samples(rows: list[dict[str, Any]], count: int, metrics: Sequence[str]) -> bool:
    numbered = len(rows) == count and all(row["row"] == number for number, row in enumerate(rows))
    clustered = all(isinstance(row["cluster"], int) and isinstance(row["task"], str | None) for row in rows)
    return numbered and clustered and all(_are_values(row["values"], metrics) for row in rows)


def _are_values(values: Any, metrics: Sequence[str]) -> bool:
    return isinstance(values, dict) and list(values) == list(metrics) and all(map(_is_score, values.values()))


def _is_score(value: Any) -> bool:
    """Whether a value is a number whose fourth power, as errors of errors need it, a float holds."""
    return is_finite(value) and abs(value) <= LARGEST_SCORE


def _are_generations(data: Any, prompts: list[str]) -> bool:
    rows = data if isinstance(data, list) and all(isinstance(row, dict) and "raw" in row for row in data) else [{}]
    return [row.get("prompt") for row in rows] == prompts
