"""The recipe of a pruned model: what was asked of the prune stage, and what it was applied to.

The delta's manifest holds it, so that evaluation, release and benchmarks describe the delta that exists, even if params.yaml has
changed since. Sections are plain data, as params.yaml has them: reading a recipe needs none of the code that made it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from stages.errors import CheckpointError

Section = dict[str, Any]
SECTIONS = ("method", "pattern", "allocation", "reconstruction", "prune")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What made a delta.

    method, pattern, allocation, reconstruction, prune: the sections.
    base: the fingerprint of the base checkpoint. calibration: the SHA-256 of the windows.
    label: what tells this method from another in a plot, without pattern and numbers. pattern_label: "unstructured" or "2:4".
    """

    method: Section
    pattern: Section
    allocation: Section
    reconstruction: Section
    prune: Section
    base: str
    calibration: str
    label: str
    pattern_label: str

    @property
    def sections(self) -> dict[str, Section]:
        """The sections of params.yaml that the prune stage reads, by name."""
        return {name: getattr(self, name) for name in SECTIONS}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, data: Any, where: str) -> "Recipe":
        """From JSON.

        Raises:
            CheckpointError: keys are missing or unknown, or a value is of another type; names `where` it was read.
        """
        wanted = {field.name: dict if field.name in SECTIONS else str for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != set(wanted):
            actual = sorted(data) if isinstance(data, dict) else data
            raise CheckpointError(f"{where}: found a recipe of {actual}, wanted {sorted(wanted)}; run the prune stage again")
        for key, kind in wanted.items():
            if not isinstance(data[key], kind):
                raise CheckpointError(f"{where}: recipe.{key}: found {data[key]!r}, wanted a {kind.__name__}; run the prune stage again")
        return cls(**data)


def fingerprint(recipe: dict[str, Any], shards: dict[str, str]) -> str:
    """SHA-256 [hex] that identifies a delta, over its recipe as plain data and the hashes of its files."""
    return hashlib.sha256(json.dumps({"recipe": recipe, "shards": shards}, sort_keys=True).encode()).hexdigest()
