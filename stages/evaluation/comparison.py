"""The pruned model's results beside the dense model's."""

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
    """The dense model's results, found to be of the protocol by which the pruned model is to be scored.

    Raises:
        ComparisonError: there are none, they are damaged, or they are of another protocol; names what differs.
    """
    details = directory / "details"
    try:
        dense = read_protocol(details / "protocol.json")
        results = read_results(details, dense)
    except ComparisonError as error:
        raise ComparisonError(f"{error}; {REMEDY}") from None
    require_same(dense, protocol, names=(str(directory), "this evaluation of the pruned model"), remedy=REMEDY)
    return results


def metrics_beside(dense: Results, sparse: Results) -> dict[str, float]:
    """The pruned model's metrics with the dense model's perplexity and mean accuracy, and the paired ratio of perplexities."""
    before, after = dense.metrics(), sparse.metrics()
    ratio, stderr = sparse.losses.ratio(dense.losses)
    first = {"perplexity": after.pop("perplexity"), "perplexity_stderr": after.pop("perplexity_stderr")}
    first |= {"perplexity_ratio": ratio, "perplexity_ratio_stderr": stderr, "dense_perplexity": before["perplexity"]}
    if "accuracy_mean" in before:
        first |= {"accuracy_mean": after.pop("accuracy_mean"), "accuracy_mean_stderr": after.pop("accuracy_mean_stderr")}
        first["dense_accuracy_mean"] = before["accuracy_mean"]
    return {**first, **after}


def generations_beside(dense: Results, sparse: Results) -> list[dict[str, str]]:
    """Each prompt with the dense model's continuations and the pruned model's."""
    rows = []
    for before, after in zip(dense.generations, sparse.generations, strict=True):
        row = {"prompt": after["prompt"]}
        for form in ("raw", "chat"):
            if form in after:
                row |= {f"{form}_dense": before[form], f"{form}_sparse": after[form]}
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
