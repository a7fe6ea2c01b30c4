"""Compare the pruned model's results with the dense model's."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from stages.checkpoint.delta import SparseDelta
from stages.errors import ComparisonError
from stages.evaluation.protocol import Protocol, read_protocol, require_same
from stages.evaluation.results import Results, read_results
from stages.evaluation.statistics import difference, mcnemar

REMEDY = (
    "evaluate the dense model again with the same parameters: `python -m stages.evaluate part=dense …`, "
    "or `dvc repro --force --single-item evaluate_dense`"
)


def read_dense(directory: Path, protocol: Protocol) -> Results:
    """Read the dense model's results and check that they have the protocol by which the pruned model is to be scored.

    Raises:
        ComparisonError: there are none, they are damaged, or their protocol is another; names the keys that differ.
    """
    details = directory / "details"
    try:
        dense = read_protocol(details / "protocol.json")
        results = read_results(details, dense)
    except ComparisonError as error:
        raise ComparisonError(f"{error}; {REMEDY}") from None
    require_same(dense, protocol, names=(str(directory), "this evaluation of the pruned model"), remedy=REMEDY)
    return results


def compared_metrics(dense: Results, sparse: Results, tasks: list[dict[str, Any]]) -> dict[str, float]:
    """The pruned model's metrics with the dense model's perplexity and mean accuracy, and how far they lie apart, window by window and
    row by row.

    Args:
        tasks: see paired_accuracies.
    """
    dense_metrics, sparse_metrics = dense.metrics(), sparse.metrics()
    ratio, stderr = sparse.losses.ratio(dense.losses)
    metrics = {"perplexity": sparse_metrics.pop("perplexity"), "perplexity_stderr": sparse_metrics.pop("perplexity_stderr")}
    metrics |= {"perplexity_ratio": ratio, "perplexity_ratio_stderr": stderr, "dense_perplexity": dense_metrics["perplexity"]}
    metrics |= {"perplexity_ln_ratio": math.log(ratio), "perplexity_ln_ratio_stderr": stderr / ratio}
    if "accuracy_mean" in dense_metrics:
        metrics |= {key: sparse_metrics.pop(key) for key in ("accuracy_mean", "accuracy_mean_stderr")}
        metrics["dense_accuracy_mean"] = dense_metrics["accuracy_mean"]
        metrics["accuracy_mean_difference"] = sum(task["difference"] for task in tasks) / len(tasks)
        if all(task["stderr"] is not None for task in tasks):
            metrics["accuracy_mean_difference_stderr"] = math.hypot(*(task["stderr"] for task in tasks)) / len(tasks)
    return {**metrics, **sparse_metrics}


def paired_accuracies(dense: Results, sparse: Results, documents: dict[str, list[Hashable]]) -> list[dict[str, Any]]:
    """Both models on the same rows of each task.

    Args:
        documents: task -> see tasks.Task.documents.

    Returns:
        For each task "task", "rows", "clusters"; "dense" and "sparse", the accuracies; "difference", sparse less dense, with "stderr",
        "low" and "high", clustered, the ends of a 95% interval within -1 and 1, see statistics.Estimate, None where all rows share a
        document; "lost" and "gained", the numbers of rows that only the dense and only the sparse model answers rightly; "p_value" of
        McNemar's exact test of these, in which rows are independent.
    """
    compared = []
    for task, rows in sparse.samples.items():
        ours, theirs = ([row["correct"] for row in samples] for samples in (rows, dense.samples[task]))
        apart = difference(ours, theirs, documents[task])
        low, high = (None, None) if apart.interval is None else (max(-1.0, apart.interval[0]), min(1.0, apart.interval[1]))
        lost = sum(there > here for here, there in zip(ours, theirs, strict=True))
        gained = sum(here > there for here, there in zip(ours, theirs, strict=True))
        compared.append(
            {
                "task": task,
                "rows": apart.count,
                "clusters": apart.clusters,
                "dense": sum(theirs) / len(theirs),
                "sparse": sum(ours) / len(ours),
                "difference": apart.value,
                "stderr": apart.stderr,
                "low": low,
                "high": high,
                "lost": lost,
                "gained": gained,
                "p_value": mcnemar(lost, gained),
            }
        )
    return compared


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


def frontier_row(delta: SparseDelta, metrics: dict[str, float]) -> dict[str, Any]:
    """One point of the plot of perplexity against sparsity."""
    return {
        "method": delta.recipe.label,
        "pattern": delta.recipe.pattern_label,
        "sparsity": delta.summary["sparsity"],
        "perplexity": metrics["perplexity"],
        "perplexity_ratio": metrics["perplexity_ratio"],
    }
