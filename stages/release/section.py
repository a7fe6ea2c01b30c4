"""The section `publish`."""

from dataclasses import dataclass

from stages.release.naming import LEGAL, is_legal
from stages.schema import checked, require


@dataclass(kw_only=True, slots=True)
class Publish:
    """name: of the release; null: made of the base, the recipe's label and the pattern, see naming.default_name.

    packed: whether its shards are packed without loss, see docs/packed.md. masks_only: whether masks alone are packed, to be applied to
        the base; where kept weights did not change.
    """

    name: str | None = checked(is_legal, LEGAL)
    packed: bool
    masks_only: bool

    def check(self, key: str) -> None:
        require(self.packed or not self.masks_only, f"{key}.masks_only", self.masks_only, f"false, or {key}.packed true as well")
