"""The section `publish`."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Publish:
    """name: of the release; null: made of the base, the method, its allocation and reconstruction, and the sparsity."""

    name: str | None
