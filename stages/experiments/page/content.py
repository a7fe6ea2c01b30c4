"""The data that the page embeds: what its plots draw, and the losses and rows from which it pairs any two experiments.

Scores of rows that are 0 or 1 are packed into bits, in base64; the first row is the lowest bit of the first byte. Other scores are
rounded to six decimals.
"""

import base64
import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from stages.evaluation.statistics import half_width
from stages.evaluation.statistics import numbered as numbers_of
from stages.experiments.commands import leaves
from stages.experiments.details import Details, Scores
from stages.experiments.page import charts
from stages.experiments.page.counts import basis, counted
from stages.experiments.page.group import Group, shortened
from stages.experiments.page.words import difference_words, measured, of_types
from stages.experiments.paired import Metric, apart, natural, of_scores, of_tasks
from stages.experiments.repeats import seed_of
from stages.prune import kind_of, short_names

DECIMALS = 6
TABULATED = 300  # degrees of freedom up to which every quantile is embedded
CLOSE = 0.05  # share of an axis within which labels overlap
STEP, COLUMN = 7, 42  # pixels between points of one sparsity, and of all of them
LETTER, GAP = 8, 8  # pixels of a letter of a label, and beside a label


def content(groups: Sequence[Group]) -> dict[str, Any]:
    """Everything that the page's script reads."""
    return {
        "groups": [group_content(group) for group in groups],
        "quantiles": quantiles(groups),
        "themes": {"light": charts.theme(dark=False), "dark": charts.theme(dark=True)},
        "charts": {"tasks": charts.tasks(), "matrices": {name: charts.matrices(name) for name in charts.QUANTITIES}},
    }


def group_content(group: Group) -> dict[str, Any]:
    """Experiments of one protocol."""
    params = [leaves(details.experiment.params) for details in group.results]
    shown = {metric.metric for metric in (*group.metrics, *group.columns)}
    experiments = [experiment_content(details, shown) for details in group.results]
    common = {key: value for key, value in params[0].items() if all(key in other and other[key] == value for other in params)}
    return {
        "base": group.base,
        "metrics": [metric_content(group, metric) for metric in group.metrics],
        "columns": [metric_facts(group, metric) for metric in group.columns],
        "methods": group.methods,
        "cells": {asked: [details.name for details in members] for asked, members in group.cells.items()},
        "layouts": layouts(experiments),
        "experiments": experiments,
        "params": {
            "common": common,
            "own": [{key: value for key, value in own.items() if key not in common} for own in params],
        },
        "dense": dense_content(group),
        "task_metrics": {task: task_metric(group, own) for task, own in of_tasks(group.results).items()},
        "clusters": {name: numbered(clusters) for name, clusters in group.dense.row_clusters.items()},
        "parts": {name: {own: numbers_of(of).tolist() for own, of in parts.items()} for name, parts in group.dense.parts.items()},
        "window_clusters": {name: numbered(clusters) for name, clusters in group.dense.window_clusters.items()},
        "prompts": [row["prompt"] for row in group.results[0].generations],
    }


def layouts(experiments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks and kinds of matrices, which most experiments share; each experiment is left with the number of its own."""
    found: list[dict[str, Any]] = []
    for experiment in experiments:
        matrices = experiment["matrices"]
        layout = {key: matrices.pop(key) for key in ("kinds", "cells")}
        if layout not in found:
            found.append(layout)
        matrices["layout"] = found.index(layout)
    return found


def task_metric(group: Group, own: Metric) -> dict[str, Any]:
    """A task's own metric."""
    return {"metric": own.metric, "better": own.better, "counted": basis(group, own)}


def metric_content(group: Group, metric: Metric) -> dict[str, Any]:
    """A metric of the plots with its plots and their data."""
    return {
        **metric_facts(group, metric),
        "points": columnar([rounded_row(row) for row in points(group, metric)]),
        "references": references(group, metric),
        "frontier": charts.frontier(metric, group.methods, group.patterns),
        "costs": {measure: charts.cost(metric, measure, group.methods, group.patterns) for measure in measured_costs(group)},
    }


def columnar(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the same keys with these stated once."""
    return {"keys": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def metric_facts(group: Group, metric: Metric) -> dict[str, Any]:
    """A metric as the page's script knows it."""
    return {
        "id": metric.id,
        "kind": metric.kind,
        "name": metric.name,
        "metric": metric.metric,
        "label": metric.label,
        "unit": metric.unit,
        "better": metric.better,
        "ratio": metric.is_ratio,
        "digits": metric.digits,
        "kept": metric.kept,
        "scale": metric.scale,
        "itself": metric.itself,
        "tasks": metric.tasks,
        "counted": basis(group, metric),
    }


def points(group: Group, metric: Metric) -> list[dict[str, Any]]:
    """One row for each experiment that has the metric, for the plots of it."""
    rows = []
    for details in group.results:
        row = metric.of(details)
        if row is not None:
            estimate = apart(metric, details.scores, group.dense)
            point = {
                "experiment": details.name,
                "method": details.experiment.method,
                "pattern": details.experiment.pattern,
                "asked": details.asked,
                "asked_short": details.asked.removeprefix("unstructured "),
                "seed": seed_of(details.experiment.params),
                "sparsity": round(details.sparsity, DECIMALS),
                "weights": details.weights,
                "value": row["value"],
                "low": row["low"],
                "high": row["high"],
                "text": measured(metric, row),
                "against_dense": "not paired" if estimate is None else difference_words(metric, estimate),
                "counted": counted(row),
            }
            rows.append({**point, **costs(details)})
    return dodged(front_marked(rows, metric.better))


def costs(details: Details) -> dict[str, Any]:
    """What pruning took: seconds, GiB, kJ where they were counted, and on what."""
    took = {key: details.run.get(key) for key in (charts.SECONDS, charts.MEMORY, "device")}
    joules = details.run.get("joules")
    return {**took, charts.ENERGY: round(sum(joules.values()) / 1e3, 2) if joules else None}


def measured_costs(group: Group) -> list[str]:
    """The costs that at least one experiment has."""
    return [measure for measure in charts.COSTS if any(costs(details)[measure] is not None for details in group.results)]


def front_marked(rows: list[dict[str, Any]], better: str) -> list[dict[str, Any]]:
    """Mark the Pareto front: the rows than which no other is as sparse and better, or sparser and as good."""
    sign = 1 if better == "lower" else -1
    ordered = sorted(rows, key=lambda row: (-row["sparsity"], sign * row["value"]))
    least, front = math.inf, set()
    for row in ordered:
        if sign * row["value"] < least:
            least = sign * row["value"]
            front.add(row["experiment"])
    return [{**row, "front": row["experiment"] in front} for row in rows]


def dodged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put points of nearly one sparsity side by side, so that their intervals can be told apart; "dodge" is in pixels."""
    columns: dict[float, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["pattern"] != "unstructured", row["pattern"], row["method"])):
        columns.setdefault(round(row["sparsity"], 2), []).append(row["experiment"])
    places: dict[str, float] = {}
    for names in columns.values():
        step = min(STEP, COLUMN / len(names))
        places |= {name: (position - (len(names) - 1) / 2) * step for position, name in enumerate(names)}
    return [{**row, "dodge": round(places[row["experiment"]], 1)} for row in rows]


def references(group: Group, metric: Metric) -> list[dict[str, Any]]:
    """Lines to measure by: the dense model, and quantised models where they were measured."""
    lines = []
    estimate = of_scores(metric, group.dense)
    if estimate is not None and metric.itself is None:
        value, ends = natural(metric, estimate)
        low, high = ends or (None, None)
        text = measured(metric, {"value": value, "low": low, "high": high, "clusters": estimate.clusters})
        lines.append({"kind": "dense", "label": "dense", "value": value, "text": text, "counted": basis(group, metric)})
    for row in group.quantised(metric):
        size = f"{row['bytes_per_weight']:.3g} bytes a weight"
        facts = {"value": row["value"], "text": measured(metric, row), "counted": counted(row)}
        lines.append({"kind": "quantised", "label": of_types(row["type"], row.get("shares", {})), "size": size, **facts})
    values = [found["value"] for details in group.results if (found := metric.of(details)) is not None]
    return _apart(lines, values, logarithmic=metric.is_ratio)


def _apart(lines: list[dict[str, Any]], values: list[float], *, logarithmic: bool) -> list[dict[str, Any]]:
    """Lines whose labels do not lie on each other: of close lines the lowest has its label below, and others above, side by side."""
    height = math.log if logarithmic else float
    heights = [height(value) for value in (*values, *(line["value"] for line in lines))]
    close = CLOSE * (max(heights) - min(heights))
    ordered = sorted(lines, key=lambda line: line["value"])
    near = [height(upper["value"]) - height(lower["value"]) < close for lower, upper in pairwise(ordered)]
    placed: list[dict[str, Any]] = []
    for line, follows, followed in zip(ordered, [False, *near], [*near, False], strict=False):
        beside = follows and not placed[-1]["below"]
        shift = placed[-1]["shift"] - LETTER * len(placed[-1]["label"]) - GAP if beside else -GAP
        placed.append({**line, "shift": shift, "below": followed and not follows})
    return placed


def experiment_content(details: Details, shown: Collection[str]) -> dict[str, Any]:
    """An experiment: what it is called, how it is run again, and what it scored. shown: names of the measurements of text that it keeps."""
    experiment = details.experiment
    return {
        "name": experiment.name,
        "method": experiment.method,
        "pattern": experiment.pattern,
        "asked": details.asked,
        "seed": seed_of(experiment.params),
        "sparsity": round(details.sparsity, DECIMALS),
        "weights": details.weights,
        "run": details.command,
        "apply": experiment.apply,
        "measurements": [measurement_content(row) for row in details.measurements if row["kind"] != "corpus" or row["metric"] in shown],
        **costs(details),
        **scores_content(details.scores),
        "generations": [{key: value for key, value in row.items() if key not in ("prompt", *_DENSE)} for row in details.generations],
        "matrices": matrices_content(details),
        "speed": details.speed,
        "sensitivity": list(map(rounded_row, details.sensitivity)),
    }


_DENSE = ("raw_dense", "chat_dense")


def measurement_content(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement without what its metric says."""
    kept = ("kind", "name", "metric", "value", "low", "high", "count", "counted", "clusters")
    content = rounded_row({key: row[key] for key in kept})
    return content | degeneration_content(row) if row["kind"] == "generation" else content


def rounded_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose floats have DECIMALS decimals."""
    return {key: _rounded(value) if isinstance(value, float) else value for key, value in row.items()}


def degeneration_content(row: dict[str, Any]) -> dict[str, Any]:
    """What a measure of generated text has besides: its label, and how far it lies from the dense model's, [value, low, high] or none."""
    apart = row["difference"] and [_rounded(row["difference"][key]) for key in ("value", "low", "high")]
    return {"label": row["label"], "dense": _rounded(row["dense"]), "difference": apart}


def dense_content(group: Group) -> dict[str, Any]:
    """The dense model as a row of the table: what it scored, by its own windows and rows."""
    measurements = []
    for metric in (*group.metrics, *group.columns):
        estimate = of_scores(metric, group.dense)
        row = metric.of(group.results[0])
        if estimate is not None and row is not None and metric.itself is None:
            value, ends = natural(metric, estimate)
            low, high = ends or (None, None)
            facts = {key: row[key] for key in ("kind", "name", "metric", "count", "counted", "clusters")}
            measurements.append({**facts, "value": _rounded(value), "low": _rounded(low), "high": _rounded(high)})
    measurements += [dense_task(group, metric) for metric in of_tasks(group.results).values()]
    generations = [{key: row[key] for key in _DENSE if key in row} for row in group.results[0].generations]
    return {"name": "dense", "measurements": measurements, **scores_content(group.dense), "generations": generations}


def dense_task(group: Group, metric: Metric) -> dict[str, Any]:
    """The dense model's score in a task's own metric."""
    row = next(found for details in group.results if (found := metric.of(details)) is not None)
    estimate = of_scores(metric, group.dense)
    if estimate is None:
        raise ValueError(f"{metric.name}: found no scores of the dense model, wanted those that the others are paired with")
    low, high = estimate.interval or (None, None)
    facts = {key: row[key] for key in ("kind", "name", "metric", "count", "counted", "clusters")}
    return {**facts, "value": _rounded(estimate.value), "low": _rounded(low), "high": _rounded(high)}


def scores_content(scores: Scores) -> dict[str, Any]:
    """What a model scored on every window and row."""
    return {
        "windows": {name: {key: list(map(_rounded, values)) for key, values in of.items()} for name, of in scores.windows.items()},
        "rows": {name: {key: packed(values) for key, values in of.items()} for name, of in scores.rows.items()},
    }


def packed(values: Sequence[float]) -> Any:
    """Scores of rows: bits in base64 where all are 0 or 1, else a list."""
    if all(value in (0, 1) for value in values):
        bits = np.packbits(np.array(values, dtype=bool), bitorder="little")
        return {"bits": base64.b64encode(bits.tobytes()).decode(), "count": len(values)}
    return list(map(_rounded, values))


def numbered(clusters: Sequence[Any]) -> list[int] | int:
    """Clusters by number, in the order of their first; where each piece is one of its own, only how many there are."""
    found: list[int] = numbers_of(clusters).tolist()
    return len(found) if len(set(found)) == len(found) else found


def matrices_content(details: Details) -> dict[str, Any]:
    """Relative error, sparsity and damping by block and kind of matrix; a mixture's experts as their mean.

    Returns:
        "kinds", their names; "tokens", the least and the most that a matrix was calibrated on; "error_tokens", about how many of them its
        error is measured on, None where that is not known; "cells", [block, index of the kind, number
        of matrices] of each; and of each quantity a value for each cell, or one value that all have.
    """
    kinds = {row["matrix"]: kind_of(row["matrix"]) for row in details.matrices}
    names = short_names(set(kinds.values()))
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in details.matrices:
        cells.setdefault((row["block"], names[kinds[row["matrix"]]]), []).append(row)
    labels = list(dict.fromkeys(name for _, name in cells))
    values = {quantity: [_mean(row.get(quantity) for row in members) for members in cells.values()] for quantity in charts.QUANTITIES}
    return {
        "kinds": labels,
        "tokens": [of(row["tokens"] for row in details.matrices) for of in (min, max)],
        "error_tokens": details.experiment.params["prune"].get("error_tokens"),
        "cells": [[block, labels.index(name), len(members)] for (block, name), members in cells.items()],
        **{quantity: of[0] if len(set(of)) == 1 else of for quantity, of in values.items()},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """To four significant digits; None where a value is not known."""
    known = list(values)
    return None if None in known else float(f"{math.fsum(map(float, known)) / len(known):.4g}")  # type: ignore[arg-type]


def quantiles(groups: Sequence[Group]) -> dict[int, float]:
    """Student's t by degrees of freedom: of every number up to TABULATED, and of those that the clusters of a corpus or task give."""
    freedom = set(range(1, TABULATED + 1))
    for scores in (group.dense for group in groups):
        freedom |= {len(set(clusters)) - 1 for clusters in (*scores.window_clusters.values(), *scores.row_clusters.values())}
    freedom |= {round(TABULATED * 1.1**step) for step in range(1, 60)}
    return {count: half_width(count) for count in sorted(freedom) if count}


def protocol_rows(group: Group) -> list[tuple[str, str, str]]:
    """What differs from the first group's protocol: key, this group's value, the first group's."""
    return [(key, shortened(own), shortened(first)) for key, (own, first) in group.differs.items()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DECIMALS)
