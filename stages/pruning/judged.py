"""Which choices windows held out judge, so that there must be some."""

from typing import Any

from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.method import Method
from stages.pruning.reconstructions import RECONSTRUCTIONS


def judged_choices(method: Method, allocation: Any, reconstruction: Any) -> list[str]:
    """The settings, as "key = value", of these sections whose outcome windows held out judge."""
    judged = {
        f"reconstruction.name = {reconstruction.name}": RECONSTRUCTIONS.of(reconstruction).trains,
        f"allocation.name = {allocation.name}": ALLOCATIONS.of(allocation).budgeted is not None,
        f"method.update.name = {method.update.name}": method.refines,
        "method.damping.shrinkage = true": method.shrinks,
    }
    return [choice for choice, is_judged in judged.items() if is_judged]
