"""What a number of the page rests on, in words: how many tokens, rows and texts, and why it has no interval where it has none."""

from typing import Any

from stages import limits
from stages.experiments.details import name_of
from stages.experiments.page.group import Group
from stages.experiments.paired import Metric

INDEPENDENT = {"corpus": "document", "task": "text", "generation": "answer"}  # what values are clustered by


def counted(row: dict[str, Any]) -> str:
    """What a measurement is the mean of: "18,414 tokens in 7 documents"."""
    noun = INDEPENDENT.get(row["kind"])
    clusters = "" if noun is None or row["clusters"] == row["count"] else f" in {limits.counted(row['clusters'], noun)}"
    return f"{row['count']:,} {row['counted']}{clusters}"


def no_interval(kind: str, clusters: int) -> str:
    """Why a mean or a difference has no interval."""
    if kind == "mean":
        return "no interval: a task has none"
    return f"no interval: 1 {INDEPENDENT[kind]}" if clusters < 2 and kind in INDEPENDENT else "no interval"


def basis(group: Group, metric: Metric) -> str:
    """What a metric is measured on in all experiments of a protocol: its counts, and how much of the text that is."""
    protocol = group.results[0].experiment.protocol
    row = next(found for details in group.results if (found := metric.of(details)) is not None)
    if metric.kind == "corpus":
        some = limits.windows_of(protocol, metric.name)
        return f"{counted(row)}{some and ', '}{some}"
    named = {name_of(measured): measured.name for details in group.results for measured in details.experiment.measurements}
    names = [metric.name] if metric.kind == "task" else [task for task, _ in metric.tasks]
    tasks = [protocol["tasks"].get(named[name]) for name in names]
    if None in tasks or not tasks:
        return counted(row)
    return limits.rows_of(tasks[0]) if metric.kind == "task" else limits.rows_of_each(tasks)
