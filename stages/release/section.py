"""The section `publish`."""

from dataclasses import dataclass

from stages.release.naming import LEGAL, is_legal
from stages.schema import checked


@dataclass(kw_only=True, slots=True)
class Publish:
    """name: of the release; null: made of the base, the recipe's label and the pattern, see naming.default_name."""

    name: str | None = checked(is_legal, LEGAL)
