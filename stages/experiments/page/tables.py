"""The numbers of the page as rows of CSV files."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.evaluation.measurement import Better
from stages.evaluation.statistics import flips, mcnemar
from stages.experiments.details import Details, Scores
from stages.experiments.page.content import costs
from stages.experiments.page.group import Group
from stages.experiments.page.repeats import repeat_difference_rows, repeat_rows
from stages.experiments.paired import Metric, apart, natural, verdict
from stages.experiments.repeats import seed_of

Row = dict[str, Any]

SPEED = ("tokens_per_second", "tokens", "seconds", "peak_memory_gib")  # of one model's continuations of the prompts


def write_tables(directory: Path, groups: Sequence[Group]) -> None:
    """Write a CSV file for each kind of row that there is; the column "protocol" numbers the groups from 1."""
    tables: dict[str, Callable[[Group], Iterable[Row]]] = {
        "experiments": experiment_rows,
        "measurements": measurement_rows,
        "differences": difference_rows,
        "repeats": repeat_rows,
        "repeat_differences": repeat_difference_rows,
        "matrices": matrix_rows,
    }
    for name, rows_of in tables.items():
        rows = [{"protocol": number, **row} for number, group in enumerate(groups, start=1) for row in rows_of(group)]
        if rows:
            write_csv(directory / f"{name}.csv", rows)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows under the names of all their columns; what a row has not stays empty."""
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def experiment_rows(group: Group) -> Iterable[Row]:
    """What each experiment is, what it cost, and the lines that run and apply it."""
    for details in group.results:
        experiment = details.experiment
        yield {
            **_names(details),
            "base": group.base,
            "calibration_seed": seed_of(experiment.params),
            "zeros_share": details.sparsity,
            "weights": details.weights,
            **costs(details),
            **{f"{name}_{key}": speed.get(key) for name, speed in _speeds(details).items() for key in SPEED},
            "run": details.command,
            "apply": experiment.apply,
        }


def measurement_rows(group: Group) -> Iterable[Row]:
    """Every measurement of every experiment, with its difference to the dense model as the evaluation wrote it."""
    for details in group.results:
        for row in details.measurements:
            difference = {f"difference_{key}": value for key, value in (row["difference"] or {}).items()}
            yield {**_names(details), **{key: value for key, value in row.items() if key != "difference"}, **difference}


def difference_rows(group: Group) -> Iterable[Row]:
    """Paired differences of each experiment to the dense model, and of each pair of one pattern and sparsity, in every metric
    of which windows or rows have scores; ratios of perplexities."""
    for metric in group.every_metric:
        for members in group.cells.values():
            for position, details in enumerate(members):
                for other in (None, *members[:position]):
                    yield from _difference(group, metric, details, other)


def matrix_rows(group: Group) -> Iterable[Row]:
    """Each matrix of each experiment, as the prune stage wrote it."""
    for details in group.results:
        for row in details.matrices:
            yield {"experiment": details.name, **{key: value for key, value in row.items() if key != "shape"}}


def _speeds(details: Details) -> dict[str, Row]:
    return {name: details.speed.get(name, {}) for name in ("dense", "sparse")}


def _names(details: Details) -> Row:
    experiment = details.experiment
    return {"experiment": experiment.name, "method": experiment.method, "pattern": experiment.pattern, "asked": details.asked}


def _difference(group: Group, metric: Metric, details: Details, other: Details | None) -> Iterable[Row]:
    """The difference of an experiment to another, None for the dense model; nothing where they cannot be paired."""
    estimate = apart(metric, details.scores, other.scores if other else group.dense)
    if estimate is not None:
        value, (low, high) = natural(metric, estimate)[0], natural(metric, estimate)[1] or (None, None)
        yield {
            **_names(details),
            "against": other.name if other else "dense",
            "metric": metric.id,
            "is": "ratio" if metric.is_ratio else "difference",
            "value": value,
            "low": low,
            "high": high,
            "count": estimate.count,
            "verdict": verdict(metric, estimate),
            **_flips(metric, details.scores, other.scores if other else group.dense),
        }


def _flips(metric: Metric, ours: Scores, theirs: Scores) -> Row:
    """Of a task, how many of its rows the other alone, and the experiment alone, answers rightly, with McNemar's exact test of these."""
    here, there = (scores.rows.get(metric.name, {}).get(metric.metric) for scores in (ours, theirs))
    if metric.kind != "task" or here is None or there is None:
        return {}
    lost, gained = flips(here, there, lower_is_better=metric.better == Better.LOWER)
    return {"lost": lost, "gained": gained, "p_value": mcnemar(lost, gained)}
