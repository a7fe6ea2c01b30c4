"""What no section can check alone."""

from typing import Any

from stages.calibration import section as calibration
from stages.evaluation import section as evaluation
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.judged import judged_choices
from stages.pruning.reconstructions import RECONSTRUCTIONS
from stages.pruning.section import Propagation
from stages.quantisation.ggml import TYPES
from stages.schema import require, require_one_of
from stages.sources.readers import READERS


def check_together(sections: dict[str, Any]) -> None:
    """Check sections against each other.

    Raises:
        ConfigError: naming the key, the value found and the value wanted.
    """
    _check_text(sections)
    _check_pruning(sections)
    for name in sections["ruler"].types:
        require_one_of("ruler.types", name, TYPES)


def _check_text(sections: dict[str, Any]) -> None:
    """Every corpus and task that is named is fetched, and has the columns that it is read for."""
    text = sections["text"]
    columns = {split: {name: READERS.of(source).columns for name, source in sources.items()} for split, sources in text.parts.items()}
    calibration.check_text(sections["calibration"], columns["calibration"])
    evaluation.check_text(sections["evaluation"], columns["evaluation"])


def _check_pruning(sections: dict[str, Any]) -> None:
    """Method, pattern, allocation, reconstruction and order fit each other."""
    pattern, allocation, prune = sections["pattern"], sections["allocation"], sections["prune"]
    sections["method"].check_with(pattern)
    if ALLOCATIONS.of(allocation).budgeted is not None:
        wanted = f"uniform: with pattern.name = {pattern.name} every matrix is {pattern.label}"
        require(not pattern.grouped, "allocation.name", allocation.name, wanted)
        allocation.check_sparsity(pattern.sparsity, "allocation")
    require(
        prune.processes <= sections["calibration"].windows, "prune.processes", prune.processes, "at most one for each calibration window"
    )
    windows, wanted = getattr(allocation, "windows", 0), f"at most calibration.windows = {sections['calibration'].windows}"
    require(windows <= sections["calibration"].windows, "allocation.windows", windows, wanted)
    reconstruction, held_out = sections["reconstruction"], sections["calibration"].held_out
    for choice in judged_choices(sections["method"], allocation, reconstruction):
        require(held_out > 0, "calibration.held_out", held_out, f"at least 1 with {choice}: windows held out judge it")
    trains = RECONSTRUCTIONS.of(reconstruction).trains
    runs_pruned = prune.propagate != Propagation.DENSE
    wanted = f"none with prune.propagate = {prune.propagate}: no block is run pruned"
    require(runs_pruned or not trains, "reconstruction.name", reconstruction.name, wanted)
