"""Compare the pruned model's results with the dense model's."""

from typing import Any

from stages.checkpoint.delta import SparseDelta
from stages.evaluation.measurement import Better, Measurement
from stages.evaluation.results import Results, own_measurements
from stages.evaluation.statistics import mcnemar


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
        pairs = [
            (row["values"][measured.metric], other["values"][measured.metric]) for row, other in zip(rows, dense.samples[task], strict=True)
        ]
        lost, gained = sum(here < there for here, there in pairs), sum(here > there for here, there in pairs)
        if measured.better == Better.LOWER:
            lost, gained = gained, lost
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
