"""The table of experiments for the terminal: best first, and only what one protocol scored together."""

import json
import math
from dataclasses import replace
from itertools import groupby
from typing import Any

from tabulate import tabulate

from stages.evaluation import limits
from stages.evaluation.measurement import Measurement
from stages.evaluation.protocol import compared, differences
from stages.experiments.commands import command
from stages.experiments.reading import Experiment, Missing
from stages.release.card import scored_text

COLUMNS = (
    "experiment",
    "method",
    "pattern",
    "sparsity",
    "perplexity",
    "over dense",
    "mean KLD",
    "accuracy",
    "against dense",
    "seconds",
    "command",
)
SHORT = 12  # characters of a hash that are shown


def text(experiments: list[Experiment], missing: list[Missing], *, commands: bool) -> str:
    """One table for each protocol, the one with the most experiments first, and what each has that the first has not.

    Args:
        missing: what is not compared. commands: whether each row has the line that runs it again.
    """
    groups = by_protocol(experiments)
    pieces = []
    for group in groups:
        first, own = groups[0][0].protocol, group[0].protocol
        reason = "" if group is groups[0] else f"\nnot comparable with the first table: {said(differences(compared(first), compared(own)))}"
        best_first = sorted(group, key=_perplexity)
        rows = [row(experiment, commands=commands) for experiment in best_first]
        headers = COLUMNS if commands else COLUMNS[:-1]
        pieces.append(f"{title(group[0])}{dense_words(group[0])}{reason}\n\n{tabulate(rows, headers, disable_numparse=True)}\n")
    if not experiments:
        pieces.append("no experiment was evaluated yet; `dvc exp run` runs one\n")
    pieces += [f"left out {one.name}: {one.reason}\n" for one in missing]
    return "\n".join(pieces)


def by_protocol(experiments: list[Experiment]) -> list[list[Experiment]]:
    """The experiments that may be compared with each other, the largest group first; each result once, by its newest experiment."""
    newest: dict[str, Experiment] = {}
    for experiment in experiments:
        newest.setdefault(repr((experiment.params, experiment.measurements, experiment.prune_metrics)), experiment)
    ordered = sorted(newest.values(), key=_protocol)
    groups = [list(group) for _, group in groupby(ordered, key=_protocol)]
    return sorted(groups, key=len, reverse=True)


def title(experiment: Experiment) -> str:
    """What was pruned, what it was scored on, and how the columns are made of that."""
    protocol = experiment.protocol
    tasks = [f"{task} ({limits.short(facts)})" for task, facts in protocol["tasks"].items()]
    first, *others = protocol["corpora"]
    more = f" (make compare has {' and '.join(others)}, too)" if others else ""
    corpora = f"perplexity and KLD on {scored_text(protocol, first)}{more}"
    accuracy = f"; accuracy: the mean over tasks, every task alike; tasks, with their rows: {', '.join(tasks)}" if tasks else ""
    return f"{base_name(experiment)}; {corpora}{accuracy}"


def dense_words(experiment: Experiment) -> str:
    """The dense model's perplexity, with its standard error where that is known."""
    ours, dense = experiment.measured("perplexity"), experiment.measured_dense("perplexity")
    if dense is not None:
        return f"; the dense model has {_cell(dense, 2)}"
    return "" if ours is None or ours.dense is None else f"; the dense model has {ours.dense:.2f}"


def base_name(experiment: Experiment) -> str:
    """What was pruned."""
    base = experiment.params["base"]
    return next((base[key] for key in ("name", "repo", "path") if base.get(key)), "an unnamed base")


def line(experiment: Experiment) -> str:
    """The line that runs an experiment again; where conf/ has changed, the one that brings its parameters back."""
    apply = experiment.apply
    return command(experiment.params) or f"(conf/ composes it no more{f'; {apply}' if apply else ''})"


def row(experiment: Experiment, *, commands: bool) -> list[str]:
    """The cells of an experiment."""
    accuracy = experiment.measured("accuracy")
    cells = [
        experiment.name,
        experiment.method,
        experiment.pattern,
        f"{experiment.prune_metrics['sparsity']:.3g}",
        *(_cell(experiment.measured(metric), digits) for metric, digits in (("perplexity", 2), ("perplexity_ratio", 3), ("mean_kld", 3))),
        _cell(accuracy, 3),
        _difference(accuracy),
        f"{experiment.prune_metrics['seconds']:.0f}",
    ]
    return [*cells, line(experiment)] if commands else cells


def _perplexity(experiment: Experiment) -> float:
    measured = experiment.measured("perplexity")
    return math.inf if measured is None else measured.value


def _cell(measured: Measurement | None, digits: int) -> str:
    """A value and its standard error, without its unit, or nothing."""
    return "" if measured is None else replace(measured, unit="").shown(digits)


def _difference(measured: Measurement | None) -> str:
    """The paired difference to the dense model, with its standard error where that is known."""
    return "" if measured is None or measured.difference is None else measured.difference.shown(3)


def said(differing: dict[str, tuple[Any, Any]]) -> str:
    """The keys that differ, with both values."""
    return "; ".join(f"{key} {short(other)}, there {short(first)}" for key, (first, other) in differing.items())


def _protocol(experiment: Experiment) -> str:
    """What is compared of a protocol, whatever the order of its keys."""
    return json.dumps(compared(experiment.protocol), sort_keys=True)


def short(value: Any) -> str:
    """A value in few words; hashes are cut."""
    return value[:SHORT] if isinstance(value, str) and len(value) == 64 else str(value)
