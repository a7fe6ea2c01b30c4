"""The table of experiments for the terminal: best first, and only what one protocol scored together."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from tabulate import tabulate

from stages import limits
from stages.evaluation.measurement import Difference, Measurement, as_rows
from stages.evaluation.metric import Shown
from stages.evaluation.metrics import shown_measurements
from stages.evaluation.protocol import compared, differences
from stages.evaluation.statistics import mean
from stages.experiments.commands import command
from stages.experiments.reading import Experiment, Missing
from stages.experiments.repeats import Spread, of_scores, seed_of, settings, spread

OF_TASKS = ("accuracy", "against dense")  # columns; those of text are what metrics declare, see evaluation.metric.Shown
ACCURACY = Shown(metric="accuracy", digits=3, headline=True, heading="accuracy")  # the mean over tasks
SHORT = 12  # characters of a hash that are shown


def text(experiments: list[Experiment], missing: list[Missing], *, commands: bool = False, seeds: bool = False) -> str:
    """One table for each protocol, the one with the most experiments first, and what each has that the first has not.

    Args:
        missing: what is not compared. commands: whether each row has the line that runs it again.
        seeds: whether experiments that differ in the calibration seed alone stand in one row, with the spread between their seeds.
    """
    groups, missing = by_protocol(experiments), [*missing, *repeated(experiments)]
    pieces = []
    for group in groups:
        first, own = groups[0][0].protocol, group[0].protocol
        reason = "" if group is groups[0] else f"\nnot comparable with the first table: {said(differences(compared(first), compared(own)))}"
        of_group = of_settings(group) if seeds else of_experiments(group, commands=commands)
        remarks = "".join(f"\n{remark}" for remark in limits.remarks(own))
        pieces.append(f"{title(group[0])}{dense_words(group[0])}{reason}{remarks}\n\n{of_group}\n")
    return "\n".join([*pieces, *without_table(experiments, missing)])


def without_table(experiments: list[Experiment], missing: list[Missing]) -> list[str]:
    """What is said below the tables: that there are none, and what was left out."""
    nothing = [] if experiments else ["no experiment was evaluated yet; `dvc exp run` runs one\n"]
    return [*nothing, *(f"left out {one.name}: {one.reason}\n" for one in missing)]


def of_experiments(group: list[Experiment], *, commands: bool) -> str:
    """A row for each experiment, best first; below it which of them are repeats of each other. commands: see text."""
    text = columns(group)
    rows = [row(experiment, text, commands=commands) for experiment in sorted(group, key=_perplexity)]
    headers = ["experiment", "method", "pattern", "sparsity", *(shown.heading for shown in text), *OF_TASKS, "seconds"]
    table = tabulate(rows, [*headers, "command"] if commands else headers, disable_numparse=True)
    said_of_repeats = "".join(f"\n{repeats_line(repeats, text)}" for repeats in _settings(group) if len(repeats) > 1)
    return f"{table}\n{said_of_repeats}" if said_of_repeats else table


def of_settings(group: list[Experiment]) -> str:
    """A row for each setting, best first: mean ± standard deviation between calibration seeds, of one seed the value alone."""
    text = columns(group)
    rows = [setting_row(repeats, text) for repeats in sorted(_settings(group), key=_mean_perplexity)]
    headers = ["method", "pattern", "sparsity", "seeds", *(shown.heading for shown in text), *OF_TASKS, "seconds"]
    note = "mean ± standard deviation between calibration seeds, all on the same text; of one seed the value alone"
    return f"{tabulate(rows, headers, disable_numparse=True)}\n\n{note}"


def by_protocol(experiments: list[Experiment]) -> list[list[Experiment]]:
    """The experiments that may be compared with each other, the largest group first; each result once, by its newest experiment."""
    ordered = sorted((same[0] for same in _by_result(experiments)), key=_protocol)
    groups = [list(group) for _, group in groupby(ordered, key=_protocol)]
    return sorted(groups, key=len, reverse=True)


def repeated(experiments: Sequence[Experiment]) -> list[Missing]:
    """The experiments whose result another stands for. The workspace, which mostly has that of an experiment, is not named."""
    return [
        Missing(name=one.name, reason=f"its result is that of {same[0].name}")
        for same in _by_result(experiments)
        for one in same[1:]
        if one.revision is not None
    ]


def _by_result(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Those of the same settings and the same numbers together, the newest of each first."""
    found: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        result = [of_scores(experiment.params), as_rows(experiment.measurements), experiment.prune_metrics]
        found.setdefault(json.dumps(result, sort_keys=True), []).append(experiment)
    return list(found.values())


def title(experiment: Experiment) -> str:
    """What was pruned, what it was scored on, and how the columns are made of that."""
    protocol = experiment.protocol
    tasks = [f"{task} ({limits.short(facts)})" for task, facts in protocol["tasks"].items()]
    first, *others = protocol["corpora"]
    more = f" (make compare has {' and '.join(others)}, too)" if others else ""
    corpora = f"scored on {limits.scored_text(protocol, first)}{more}"
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
    """The line that runs an experiment again, as far as it ran; where conf/ has changed, the one that brings its parameters back."""
    apply = experiment.apply
    again = command(experiment.params, published=experiment.published)
    return again or f"(conf/ composes it no more{f'; {apply}' if apply else ''})"


def columns(group: list[Experiment]) -> list[Shown]:
    """What of the first corpus has a column, in the order of the measurements, as far as any experiment has it."""
    known = shown_measurements()
    names = dict.fromkeys(measured.metric for experiment in group for measured in experiment.measurements)
    return [known[name] for name in names if name in known and known[name].heading and any(one.measured(name) for one in group)]


def row(experiment: Experiment, text: list[Shown], *, commands: bool) -> list[str]:
    """The cells of an experiment. text: see columns."""
    accuracy = experiment.measured("accuracy")
    cells = [
        experiment.name,
        experiment.method,
        experiment.pattern,
        f"{experiment.prune_metrics['sparsity']:.3g}",
        *(_cell(experiment.measured(shown.metric), shown.digits) for shown in (*text, ACCURACY)),
        _difference(accuracy),
        f"{experiment.prune_metrics['seconds']:.0f}",
    ]
    return [*cells, line(experiment)] if commands else cells


def setting_row(repeats: list[Experiment], text: list[Shown]) -> list[str]:
    """The cells of experiments that differ in the calibration seed alone. text: see columns."""
    first = repeats[0]
    sparsity, seconds = (mean([one.prune_metrics[metric] for one in repeats]) for metric in ("sparsity", "seconds"))
    return [
        first.method,
        first.pattern,
        f"{sparsity.value:.3g}",
        str(len(repeats)),
        *(_spread_cell(repeats, shown) for shown in (*text, ACCURACY)),
        _spread_of_differences(repeats),
        f"{seconds.value:.0f}",
    ]


def repeats_line(repeats: list[Experiment], text: list[Shown]) -> str:
    """Which experiments are repeats of each other, and how far apart in the headlines. text: see columns."""
    named = ", ".join(f"{one.name} (seed {seed_of(one.params)})" for one in repeats)
    cells = [(shown.heading, _spread_cell(repeats, shown)) for shown in (*text, ACCURACY) if shown.headline]
    said = ", ".join(f"{heading} {cell}" for heading, cell in cells if cell)
    return f"repeats of one setting, mean ± standard deviation between {len(repeats)} calibration seeds: {named}: {said}"


def _settings(group: list[Experiment]) -> list[list[Experiment]]:
    return settings(group, lambda experiment: experiment.params)


def _spread(repeats: list[Experiment], shown: Shown) -> Spread | None:
    """How far the seeds lie apart in a metric; None where one of them lacks it."""
    rows = [measured for one in repeats if (measured := one.measured(shown.metric)) is not None]
    if len(rows) < len(repeats):
        return None
    return spread([measured.value for measured in rows], [measured.stderr for measured in rows], is_ratio=shown.ratio)


def _spread_cell(repeats: list[Experiment], shown: Shown) -> str:
    of = _spread(repeats, shown)
    return "" if of is None else of.shown(shown.digits)


def _spread_of_differences(repeats: list[Experiment]) -> str:
    """The differences of accuracy to the dense model over seeds."""
    apart = [measured.difference for one in repeats if (measured := one.measured("accuracy")) is not None and measured.difference]
    if len(apart) < len(repeats):
        return ""
    of = spread([difference.value for difference in apart], [], is_ratio=False)
    return Difference(value=of.value, stderr=of.sd).shown(3)


def _mean_perplexity(repeats: list[Experiment]) -> float:
    of = _spread(repeats, shown_measurements()["perplexity"])
    return math.inf if of is None else of.value


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
