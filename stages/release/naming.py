"""The release's name where the user gives none."""

import hashlib
import re

from stages.pruning.patterns import PATTERNS
from stages.recipe import Recipe
from stages.release.names import LONGEST, is_legal


def default_name(base: str, recipe: Recipe) -> str:
    """BASE-METHOD-AMOUNT, such as big-7b-wanda-sparse50 or big-7b-sparsegpt-obs-2of4.

    METHOD is the recipe's label: the method and all that differs from its preset. AMOUNT is the pattern with its numbers,
    and says where all weights of a matrix compete. So recipes whose names are equal differ in numbers alone, which the name does not
    state. What is too long is cut and ends with a hash of the whole.

    Args:
        base: its name, with or without ORG/.
    """
    amount = PATTERNS.section(recipe.pattern, "recipe.pattern").amount(recipe.method["comparison_group"])
    name = "-".join(filter(None, map(_legal, (base.rsplit("/", 1)[-1], recipe.label, amount))))
    if len(name) <= LONGEST and is_legal(name):
        return name
    digest = hashlib.sha256(f"{base} {name}".encode()).hexdigest()[:8]
    return f"{name[: LONGEST - len(digest) - 1].rstrip('-.')}-{digest}"


def _legal(text: str) -> str:
    """The text with - for what a name may not hold."""
    return re.sub(r"([^A-Za-z0-9_.]|\.{2,})+", "-", text).strip("-.")
