"""Experiments of one protocol: what may stand on one axis, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.evaluation.protocol import compared, differences
from stages.experiments.details import Details, Scores, read_details
from stages.experiments.paired import Metric, every, headline, others
from stages.experiments.reading import WORKSPACE, Experiment, Missing
from stages.experiments.table import base_name, by_protocol, short

COMMIT = 10  # digits of a commit by which it is called
DENSE = "dense"  # what the page calls the dense model


@dataclass(frozen=True, kw_only=True)
class Group:
    """Experiments of one protocol.

    results: at least one. dense: the dense model's scores, which all of them share. differs: key of the protocol -> this group's value
    and that of the first group; empty for the first.
    """

    results: list[Details]
    dense: Scores
    differs: dict[str, tuple[Any, Any]]

    @property
    def metrics(self) -> list[Metric]:
        return headline(self.results)

    @property
    def columns(self) -> list[Metric]:
        """Metrics of text that the table shows when they are chosen."""
        return others(self.results)

    @property
    def every_metric(self) -> list[Metric]:
        """All that any experiment measured, those of the plots and of the table first."""
        return every(self.results)

    @property
    def base(self) -> str:
        return base_name(self.results[0].experiment)

    def quantised(self, metric: Metric) -> list[dict[str, Any]]:
        """The measurements of quantised models in a metric, one of each type."""
        rows = (row for details in self.results for row in details.ruler if metric.matches(row))
        return list({row["type"]: row for row in rows}.values())

    @property
    def methods(self) -> list[str]:
        return sorted({details.experiment.method for details in self.results})

    @property
    def patterns(self) -> list[str]:
        return sorted({details.experiment.pattern for details in self.results}, key=lambda name: (name != "unstructured", name))

    @property
    def cells(self) -> dict[str, list[Details]]:
        """Pattern and asked sparsity -> the experiments that have both: those whose methods may be compared."""
        order = {pattern: position for position, pattern in enumerate(self.patterns)}
        ordered = sorted(self.results, key=lambda details: (order[details.experiment.pattern], details.sparsity))
        cells: dict[str, list[Details]] = {}
        for details in ordered:
            cells.setdefault(details.asked, []).append(details)
        return cells

    @property
    def size(self) -> str:
        """How much was compared, in words."""
        parts = [(len(self.results), "experiment", "s"), (len(self.methods), "method", "s"), (len(self.cells), "pattern and sparsity", "")]
        experiments, methods, cells = (f"{count} {noun}{plural * (count > 1)}" for count, noun, plural in parts)
        return f"{experiments}: {methods} at {cells if len(self.cells) == 1 else f'{len(self.cells)} patterns and sparsities'}"

    @property
    def short_name(self) -> str:
        """What tells it from another group in a list."""
        count = len(self.results)
        return f"{self.base}, {', '.join(self.dense.windows)} ({count} experiment{'s' * (count > 1)})"


def read_groups(experiments: Sequence[Experiment]) -> tuple[list[Group], list[Missing]]:
    """Read the details of experiments, by protocol, the largest group first; and what cannot be read."""
    groups: list[Group] = []
    missing: list[Missing] = []
    for members in by_protocol(distinct(experiments)):
        results, dense, unread = read_details(members)
        missing += unread
        if results and dense is not None:
            first = (groups[0].results[0] if groups else results[0]).experiment.protocol
            own = results[0].experiment.protocol
            groups.append(Group(results=results, dense=dense, differs=differences(compared(own), compared(first))))
    return groups, missing


def distinct(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Experiments by names of their own: one whose name another has, or that the page has for the dense model or the workspace, is called
    by its commit, by which DVC applies it as well."""
    taken = {DENSE, WORKSPACE}
    named = []
    for experiment in experiments:
        repeated = experiment.name in taken and experiment.revision is not None
        named.append(replace(experiment, name=(experiment.revision or "")[:COMMIT]) if repeated else experiment)
        taken.add(named[-1].name)
    return named


def shortened(value: Any) -> str:
    """A value of a protocol in few words; hashes are cut."""
    return "absent" if value is None else short(value)
