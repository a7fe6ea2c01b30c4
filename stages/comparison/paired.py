"""Compare the pruned model's results with the dense model's.

How far both drift apart in a style of prompts, more than they do raw, is a difference of differences, row by row:

    drift = mean over rows i of (sparse_i - dense_i) in the style - (sparse_i - dense_i) raw
"""

import math
from collections.abc import Sequence
from typing import Any

from stages.checkpoint.delta import SparseDelta
from stages.evaluation.measurement import Better, Measurement
from stages.evaluation.results import RAW, Results, own_accuracies, own_measurements
from stages.evaluation.statistics import Estimate, contrast_of_rows, flips, mcnemar, mean_of_independent


def paired_accuracies(dense: Results, sparse: Results) -> list[dict[str, Any]]:
    """Both models on the same rows of each task, by the task's own metric; tasks whose metric is no mean of rows are left out.

    Returns:
        For each task "task", "metric", "rows", "clusters"; "dense" and "sparse", the accuracies; "difference", sparse less dense, with
        "stderr", "low" and "high", see measurement.Difference; "lost" and "gained", the numbers of rows that only the dense and only the
        sparse model answers rightly (or better); "p_value" of McNemar's exact test of these, in which rows are independent.
    """
    compared = []
    for measured in own_measurements(sparse.measurements):
        task, rows = measured.name, sparse.samples[measured.name]
        if measured.metric not in rows[0]["values"] or measured.difference is None:
            continue
        ours, theirs = ([row["values"][measured.metric] for row in of] for of in (rows, dense.samples[task]))
        lost, gained = flips(ours, theirs, lower_is_better=measured.better == Better.LOWER)
        compared.append({**_paired(measured), "lost": lost, "gained": gained, "p_value": mcnemar(lost, gained)})
    return compared


def _paired(measured: Measurement) -> dict[str, Any]:
    apart = measured.difference
    if apart is None:
        raise ValueError(f"{measured.name}: found no difference, wanted a measurement of the pruned model")
    return {
        "task": measured.name,
        "metric": measured.metric,
        "rows": measured.count,
        "clusters": measured.clusters,
        "dense": measured.dense,
        "sparse": measured.value,
        "difference": apart.value,
        "stderr": apart.stderr,
        "low": apart.low,
        "high": apart.high,
    }


def prompt_sensitivity(dense: Results, sparse: Results) -> list[dict[str, Any]]:
    """How far dense and pruned model drift apart in each style other than raw, by task and on the mean over the tasks of accuracies.

    Tasks whose own metric is no mean over rows are left out.

    Returns:
        For each style and task "style", "task" (None: the mean, in which every task weighs the same), "metric", "better", "count" and
        "counted", what it is the mean of; "raw" and "styled", sparse less dense; "drift", styled less raw, of an accuracy below 0 where the
        pruned model loses more in the style, with "stderr", "low" and "high", clustered as in paired_accuracies, None where not known.
    """
    accuracies = {measured.name for measured in own_accuracies(sparse.measurements)}
    rows = []
    for style in sparse.styles:
        own = [(measured, _drift(dense, sparse, style, measured)) for measured in own_measurements(sparse.measurements)]
        found = [(measured, drift) for measured, drift in own if drift is not None]
        for measured, drift in found:
            facts: dict[str, Any] = {"style": style, "task": measured.name, "metric": measured.metric, "better": measured.better}
            facts |= {"count": drift[2].count, "counted": "rows"}
            rows.append(facts | _drifted(*drift))
        averaged = [of for measured, of in found if measured.name in accuracies]
        if averaged:
            raw, styled, drifts = zip(*averaged, strict=True)
            facts = {"style": style, "task": None, "metric": "accuracy", "better": Better.HIGHER}
            facts |= {"count": len(averaged), "counted": "tasks"}
            rows.append(facts | _drifted(_mean(raw), _mean(styled), mean_of_independent(drifts)))
    return rows


def _drift(dense: Results, sparse: Results, style: str, measured: Measurement) -> tuple[float, float, Estimate] | None:
    """Both differences of a task, raw and in a style, and that of these; None where its score is no mean over rows."""
    task, metric, clusters = measured.name, measured.metric, [row["cluster"] for row in sparse.samples[measured.name]]
    pairs = []
    for of in (RAW, style):
        ours, theirs = (results.samples_in(of).get(task, []) for results in (sparse, dense))
        if len(ours) != len(clusters) or any(metric not in row["values"] for row in (*ours, *theirs)):
            return None
        pairs.append([row["values"][metric] - other["values"][metric] for row, other in zip(ours, theirs, strict=True)])
    raw, styled = map(_mean, pairs)
    if measured.difference is None or not math.isclose(raw, measured.difference.value, abs_tol=1e-9):
        return None  # lm-eval weighs the tasks of this group alike, whatever their rows
    return raw, styled, contrast_of_rows([there - here for here, there in zip(*pairs, strict=True)], clusters)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _drifted(raw: float, styled: float, estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval or (None, None)
    return {"raw": raw, "styled": styled, "drift": estimate.value, "stderr": estimate.stderr, "low": low, "high": high}


def paired_generations(dense: Results, sparse: Results) -> list[dict[str, str]]:
    """Each prompt with the dense model's continuations and the pruned model's; "chat_refused" as generation.generate has it."""
    rows = []
    for dense_row, sparse_row in zip(dense.generations, sparse.generations, strict=True):
        row = {"prompt": sparse_row["prompt"]}
        for form in ("raw", "chat"):
            if form in sparse_row:
                row |= {f"{form}_dense": dense_row[form], f"{form}_sparse": sparse_row[form]}
        if "chat_refused" in sparse_row:
            row["chat_refused"] = sparse_row["chat_refused"]
        rows.append(row)
    return rows


def frontier_rows(delta: SparseDelta, sparse: Results) -> list[dict[str, Any]]:
    """One point of the plot of perplexity against sparsity for each corpus."""
    return [
        {
            "method": delta.recipe.label,
            "pattern": delta.recipe.pattern_label,
            "corpus": corpus,
            "sparsity": delta.summary["sparsity"],
            "perplexity": numbers["perplexity"],
            "perplexity_ratio": numbers["perplexity_ratio"],
        }
        for corpus, numbers in sparse.metrics.get("corpora", {}).items()
    ]
