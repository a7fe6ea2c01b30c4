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
    state. What is too long has the names of its choices instead of the label, and ends with a hash of the whole, such as
    SmolLM2-135M-Instruct-admm_short-loss-distilled-sparse50-per-matrix-0dc6b855; what then is too long still is cut.

    Args:
        base: its name, with or without ORG/.
    """
    short, amount = base.rsplit("/", 1)[-1], PATTERNS.section(recipe.pattern, "recipe.pattern").amount(recipe.method["comparison_group"])
    name = _joined(short, recipe.label, amount)
    if len(name) <= LONGEST and is_legal(name):
        return name
    digest = hashlib.sha256(f"{base} {name}".encode()).hexdigest()[:8]
    sections = (recipe.method, recipe.allocation, recipe.reconstruction)
    choices = [section["name"] for section in sections if section["name"] not in ("uniform", "none")]
    shorter = _joined(short, *choices, amount)
    return f"{shorter[: LONGEST - len(digest) - 1].rstrip('-.')}-{digest}"


def _joined(*parts: str) -> str:
    return "-".join(filter(None, map(_legal, parts)))


def _legal(text: str) -> str:
    """The text with - for what a name may not hold."""
    return re.sub(r"([^A-Za-z0-9_.]|\.{2,})+", "-", text).strip("-.")
