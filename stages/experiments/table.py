"""The table of experiments for the terminal: best first, and only what one protocol scored together."""

from itertools import groupby
from typing import Any

from tabulate import tabulate

from stages.evaluation.protocol import NOT_COMPARED, differences
from stages.experiments.commands import command
from stages.experiments.reading import Experiment, Missing
from stages.release.card import plus_minus, scored_text

COLUMNS = ("experiment", "method", "pattern", "sparsity", "perplexity", "over dense", "accuracy", "against dense", "seconds", "command")
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
        best_first = sorted(group, key=lambda experiment: experiment.metrics["perplexity"])
        rows = [row(experiment, commands=commands) for experiment in best_first]
        headers = COLUMNS if commands else COLUMNS[:-1]
        dense = f"the dense model has {group[0].metrics['dense_perplexity']:.2f}"
        pieces.append(f"{title(group[0])}; {dense}{reason}\n\n{tabulate(rows, headers, disable_numparse=True)}\n")
    if not experiments:
        pieces.append("no experiment was evaluated yet; `dvc exp run` runs one\n")
    pieces += [f"left out {one.name}: {one.reason}\n" for one in missing]
    return "\n".join(pieces)


def by_protocol(experiments: list[Experiment]) -> list[list[Experiment]]:
    """The experiments that may be compared with each other, the largest group first; each result once, by its newest experiment."""
    newest: dict[str, Experiment] = {}
    for experiment in experiments:
        newest.setdefault(repr((experiment.params, experiment.metrics, experiment.prune_metrics)), experiment)
    ordered = sorted(newest.values(), key=lambda one: repr(compared(one.protocol)))
    groups = [list(group) for _, group in groupby(ordered, key=lambda one: compared(one.protocol))]
    return sorted(groups, key=len, reverse=True)


def title(experiment: Experiment) -> str:
    """What was pruned, and what it was scored on."""
    protocol = experiment.protocol
    tasks = [f"{task} ({facts['rows']})" for task, facts in protocol["tasks"].items()]
    return f"{base_name(experiment)}; perplexity on {scored_text(protocol)}" + (
        f"; tasks, with their rows: {', '.join(tasks)}" if tasks else ""
    )


def base_name(experiment: Experiment) -> str:
    """What the base is called."""
    base = experiment.params["base"]
    return next((base[key] for key in ("name", "repo", "path") if base.get(key)), "an unnamed base")


def row(experiment: Experiment, *, commands: bool) -> list[str]:
    """The cells of an experiment."""
    metrics, prune_metrics = experiment.metrics, experiment.prune_metrics
    cells = [
        experiment.name,
        experiment.method,
        experiment.pattern,
        f"{prune_metrics['sparsity']:.3g}",
        _plus_minus(metrics, "perplexity", 2),
        _plus_minus(metrics, "perplexity_ratio", 3),
        _plus_minus(metrics, "accuracy_mean", 3),
        _plus_minus(metrics, "accuracy_mean_difference", 3),
        f"{prune_metrics['seconds']:.0f}",
    ]
    if not commands:
        return cells
    apply = "" if experiment.revision is None else f"; dvc exp apply {experiment.name}"
    return [*cells, command(experiment.params) or f"(conf/ composes it no more{apply})"]


def said(differing: dict[str, tuple[Any, Any]]) -> str:
    """The keys that differ, with both values."""
    return "; ".join(f"{key} {_short(other)}, there {_short(first)}" for key, (first, other) in differing.items())


def compared(protocol: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in two protocols before their results are compared."""
    return {key: value for key, value in protocol.items() if key not in NOT_COMPARED}


def _short(value: Any) -> str:
    """A value in few words; hashes are cut."""
    return value[:SHORT] if isinstance(value, str) and len(value) == 64 else str(value)


def _plus_minus(metrics: dict[str, float], key: str, digits: int) -> str:
    """A value with its standard error, as far as they are known."""
    if key not in metrics:
        return ""
    return plus_minus(metrics, key, digits) if f"{key}_stderr" in metrics else f"{metrics[key]:.{digits}f}"
