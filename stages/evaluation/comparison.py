"""Compare the pruned model's results with the dense model's."""

from pathlib import Path
from typing import Any

from stages.checkpoint.delta import SparseDelta
from stages.errors import ComparisonError
from stages.evaluation.protocol import Protocol, read_protocol, require_same
from stages.evaluation.results import Results, read_results

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


def compared_metrics(dense: Results, sparse: Results) -> dict[str, float]:
    """The pruned model's metrics with the dense model's perplexity and mean accuracy, and the paired ratio of perplexities."""
    dense_metrics, sparse_metrics = dense.metrics(), sparse.metrics()
    ratio, stderr = sparse.losses.ratio(dense.losses)
    metrics = {"perplexity": sparse_metrics.pop("perplexity"), "perplexity_stderr": sparse_metrics.pop("perplexity_stderr")}
    metrics |= {"perplexity_ratio": ratio, "perplexity_ratio_stderr": stderr, "dense_perplexity": dense_metrics["perplexity"]}
    if "accuracy_mean" in dense_metrics:
        metrics |= {key: sparse_metrics.pop(key) for key in ("accuracy_mean", "accuracy_mean_stderr")}
        metrics["dense_accuracy_mean"] = dense_metrics["accuracy_mean"]
    return {**metrics, **sparse_metrics}


def paired_generations(dense: Results, sparse: Results) -> list[dict[str, str]]:
    """Each prompt with the dense model's continuations and the pruned model's."""
    rows = []
    for dense_row, sparse_row in zip(dense.generations, sparse.generations, strict=True):
        row = {"prompt": sparse_row["prompt"]}
        for form in ("raw", "chat"):
            if form in sparse_row:
                row |= {f"{form}_dense": dense_row[form], f"{form}_sparse": sparse_row[form]}
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
