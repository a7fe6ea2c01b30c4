"""What the numbers say, in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages import limits
from stages.evaluation.statistics import Estimate
from stages.experiments.details import Details
from stages.experiments.page.counts import no_interval
from stages.experiments.page.group import Group
from stages.experiments.paired import Metric, Verdict, apart, natural, verdict


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best experiment of a pattern and sparsity.

    name: see name_of. value: with its interval. against_dense: how far it lies from the dense model. against_quantised: which quantised
    models lie next to it. rest: how the others compare.
    """

    asked: str
    name: str
    value: str
    against_dense: str
    against_quantised: str
    rest: str
    details: Details


def number(value: float, digits: int) -> str:
    """A number with a fixed number of decimals, thousands set apart, and fewer decimals where it has many digits."""
    return f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def measured(metric: Metric, row: dict[str, Any]) -> str:
    """A measurement with its interval, or why it has none.

    Args:
        row: "value", "low", "high", "clusters".
    """
    value = number(row["value"], metric.digits)
    if row["low"] is None:
        return f"{value} ({no_interval(metric.kind, row['clusters'])})"
    return f"{value} [{number(row['low'], metric.digits)}, {number(row['high'], metric.digits)}]"


def difference_words(metric: Metric, estimate: Estimate) -> str:
    """A difference with its interval, or why it has none: a ratio of perplexities, a signed difference of others."""
    value, ends = natural(metric, estimate)
    digits = 3 if value < 10 or not metric.is_ratio else 1
    first, *rest = (number(end, digits) if metric.is_ratio else f"{end:+.3f}" for end in (value, *(ends or ())))
    interval = f"[{', '.join(rest)}]" if rest else f"({no_interval(metric.kind, estimate.clusters)})"
    return f"{'×' * metric.is_ratio}{first} {interval}"


def text_of(group: Group) -> list[str]:
    """What the models were scored on, and how much of it, one entry for each corpus, and one for all tasks."""
    first, entries = group.results[0], []
    protocol = first.experiment.protocol
    for corpus, means in first.scores.windows.items():
        tokens = next((row["count"] for row in first.measurements if row["kind"] == "corpus" and row["name"] == corpus), None)
        clusters = len(set(first.scores.window_clusters[corpus]))
        documents, length = limits.counted(clusters, "document"), protocol["corpora"][corpus]["window_length"]
        windows = limits.windows_of(protocol, corpus) or limits.counted(len(next(iter(means.values()))), "window")
        scored = f"{tokens:,} tokens of {documents}" if tokens else documents
        entries.append(f"{corpus}: {scored}, in {windows} of {length:,} tokens, {begun(protocol['bos'])}")
    if protocol["tasks"]:
        count, _, each = limits.rows_of_each(list(protocol["tasks"].values())).partition(", ")
        rows = {task: limits.rows_of(facts).removeprefix("first ").removesuffix(" rows") for task, facts in protocol["tasks"].items()}
        names = ", ".join(f"{task} ({scored})" for task, scored in rows.items())
        entries.append(f"{count}: {each}: {names}")
    return entries


def begun(token: int | None) -> str:
    """Whether windows begin with BOS. token: its id, or None."""
    return "none begun with BOS" if token is None else f"each begun with BOS (token {token})"


def ranked(metric: Metric, results: Sequence[Details]) -> list[tuple[Details, dict[str, Any]]]:
    """Experiments with their measurement, best first; those without one are left out."""
    rows = [(details, row) for details in results if (row := metric.of(details)) is not None]
    return sorted(rows, key=lambda pair: pair[1]["value"], reverse=metric.better == "higher")


def best(group: Group, metric: Metric) -> list[Best]:
    """The best experiment of every pattern and sparsity, as far as they were measured."""
    found = []
    for asked, members in group.cells.items():
        order = ranked(metric, members)
        if order:
            winner, row = order[0]
            found.append(
                Best(
                    asked=asked,
                    details=winner,
                    name=name_of(winner, members),
                    value=measured(metric, row),
                    against_dense=_against_dense(group, metric, winner),
                    against_quantised=against_quantised(metric, row, group.quantised(metric)),
                    rest=_rest(metric, [details for details, _ in order]),
                )
            )
    return found


def _against_dense(group: Group, metric: Metric, winner: Details) -> str:
    estimate = apart(metric, winner.scores, group.dense)
    if estimate is None or metric.itself is not None:  # such as a divergence, a distance from the dense model already
        return ""
    return f"{difference_words(metric, estimate)} {'of' if metric.is_ratio else 'against'} dense"


def against_quantised(metric: Metric, row: dict[str, Any], quantised: Sequence[dict[str, Any]]) -> str:
    """Between which quantised models a measurement lies, a sentence; nothing where none was measured.

    Args:
        quantised: their measurements of the metric, see Group.quantised.
    """
    if not quantised:
        return ""
    order = sorted(quantised, key=lambda other: other["value"], reverse=metric.better == "higher")  # best first
    better = [other for other in order if (other["value"] > row["value"] if metric.better == "higher" else other["value"] < row["value"])]
    before, after = better[-1:], order[len(better) :][:1]
    if not before:
        return f"Every quantised model here does more damage; the least: {quantised_words(metric, after[0])}."
    if not after:
        return f"Every quantised model here does less damage; the most: {quantised_words(metric, before[0])}."
    return f"Between the quantised models {quantised_words(metric, before[0])} and {quantised_words(metric, after[0])}."


def quantised_words(metric: Metric, row: dict[str, Any]) -> str:
    """A quantised model: its type, what it scored, and its size."""
    return f"{of_types(row['type'], row.get('shares', {}))}, {measured(metric, row)} at {row['bytes_per_weight']:.3g} bytes a weight"


def of_types(kind: str, shares: dict[str, float]) -> str:
    """A type of quantisation, and by what share of the weights another stands for it, whose rows do not divide into its blocks."""
    others = [f"{share:.0%} {name}" for name, share in shares.items() if name != kind]
    return f"{kind} ({', '.join(others)})" if others else kind


def _rest(metric: Metric, order: Sequence[Details]) -> str:
    """How the others lie against the best, the first in order."""
    winner, *others = order
    if not others:
        return "Nothing else was measured here."
    against = _against(metric, winner, others)
    near = [name_of(other, order) for other, _, said in against if said == Verdict.NOISE]
    if len(near) > 3:
        return f"{len(near)} of {len(others)} others are within noise of it."
    if near or not against:
        return f"Within noise of it: {', '.join(near)}." if near else "Others cannot be paired with it."
    second, estimate, _ = against[0]
    return f"Next: {name_of(second, order)}, {difference_words(metric, estimate)} {'of' if metric.is_ratio else 'against'} it."


def _against(metric: Metric, one: Details, others: Sequence[Details]) -> list[tuple[Details, Estimate, Verdict]]:
    """Each of the others less the one, where both can be paired."""
    pairs = [(other, apart(metric, other.scores, one.scores)) for other in others]
    return [(other, estimate, verdict(metric, estimate)) for other, estimate in pairs if estimate is not None]


def name_of(details: Details, among: Sequence[Details]) -> str:
    """What an experiment is called among those of its pattern and sparsity: by its method, and by its name where others have it too."""
    method = details.experiment.method
    alone = sum(other.experiment.method == method for other in among) == 1
    return method if alone else f"{method} ({details.name})"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Which pairs of a pattern and sparsity the text tells apart.

    within: those that it does not, each in words. unknown: those of whose difference no interval is known.
    """

    asked: str
    pairs: int
    within: list[str]
    unknown: list[str]


def noise(group: Group, metric: Metric) -> list[Noise]:
    """For every pattern and sparsity with two experiments or more, the pairs whose difference is within noise."""
    found = []
    for asked, members in group.cells.items():
        order = [details for details, _ in ranked(metric, members)]
        compared = [(one, *rest) for position, one in enumerate(order) for rest in _against(metric, one, order[position + 1 :])]
        said: dict[Verdict, list[str]] = {}
        for one, other, estimate, verdict_of in compared:
            pair = f"{name_of(other, members)} against {name_of(one, members)}: {difference_words(metric, estimate)}"
            said.setdefault(verdict_of, []).append(pair)
        if compared:
            within, unknown = (said.get(verdict_of, []) for verdict_of in (Verdict.NOISE, Verdict.UNKNOWN))
            found.append(Noise(asked=asked, pairs=len(compared), within=within, unknown=unknown))
    return found
