"""What no section can check alone."""

from typing import Any

from stages.pruning.allocations import ALLOCATIONS
from stages.schema import require, require_one_of


def check_together(sections: dict[str, Any]) -> None:
    """Check sections against each other.

    Raises:
        ConfigError: naming the key, the value found and the value wanted.
    """
    _check_text(sections)
    _check_pruning(sections)


def _check_text(sections: dict[str, Any]) -> None:
    """Every corpus and task that is named is also fetched."""
    text, calibration, evaluation = sections["text"], sections["calibration"], sections["evaluation"]
    for name in calibration.sources:
        require_one_of("calibration.sources", name, list(text.calibration) or ["(text.calibration is empty)"])
    fetched = list(text.evaluation) or ["(text.evaluation is empty)"]
    require_one_of("evaluation.perplexity.corpus", evaluation.perplexity.corpus, fetched)
    for name in evaluation.tasks:
        require_one_of("evaluation.tasks", name, fetched)


def _check_pruning(sections: dict[str, Any]) -> None:
    """Method, pattern, allocation, reconstruction and order fit each other."""
    pattern, allocation, prune = sections["pattern"], sections["allocation"], sections["prune"]
    sections["method"].check_with(pattern)
    if ALLOCATIONS.of(allocation).budgeted is not None:
        wanted = f"uniform: with pattern.name = {pattern.name} every matrix is {pattern.label}"
        require(not pattern.grouped, "allocation.name", allocation.name, wanted)
        allocation.check_sparsity(pattern.sparsity, "allocation")
    windows, wanted = getattr(allocation, "windows", 0), f"at most calibration.windows = {sections['calibration'].windows}"
    require(windows <= sections["calibration"].windows, "allocation.windows", windows, wanted)
    name, wanted = sections["reconstruction"].name, "none with prune.propagate = dense: no block is run pruned"
    require(name == "none" or prune.propagate == "pruned", "reconstruction.name", name, wanted)
