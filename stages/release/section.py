"""The section `publish`."""

from dataclasses import dataclass, fields

from stages.release.names import LEGAL, is_legal, is_repository
from stages.schema import checked, is_sha256, one_of, require, require_one_of

FORMATS = ("safetensors", "gguf")
ZERO_KEEPING = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K")  # types of llama.cpp in which 0 stays exactly 0


@dataclass(kw_only=True, slots=True)
class Contents:
    """What a release is called, and what it consists of.

    name: of the release; null: made of the base, the recipe's label and the pattern, see naming.default_name.
    any_license: whether a base is published whose licence forbids changed copies, or is not known; for use of one's own.
    formats: safetensors, and with gguf a file for llama.cpp beside it, for each of gguf_types.
    gguf_types: llama.cpp's names; types in which zeros do not stay zero are refused.
    dtype: base: the base's. float8: the matrices in scope as E4M3 with a scale for each output channel, in the layout of
        compressed-tensors; the GGUF files are of the base's dtype all the same.
    packed: whether its shards are packed without loss, see docs/packed.md. masks_only: whether masks alone are packed, to be applied to
        the base; where kept weights did not change.
    frontier: SHA-256 of the file in frontiers/ that the card's picture shows the release in; null: no picture.
    """

    name: str | None = checked(is_legal, LEGAL)
    any_license: bool
    formats: list[str]
    gguf_types: list[str]
    dtype: str = one_of("base", "float8")
    packed: bool
    masks_only: bool
    frontier: str | None = checked(is_sha256, "the SHA-256 of a file in frontiers/, which `make compare` prints, or null")

    @property
    def written_gguf_types(self) -> list[str]:
        """Those of the files that are written."""
        return self.gguf_types if "gguf" in self.formats else []

    def check(self, key: str) -> None:
        for name in self.formats:
            require_one_of(f"{key}.formats", name, FORMATS)
        require("safetensors" in self.formats, f"{key}.formats", self.formats, "safetensors among them, which every client loads")
        for name in self.gguf_types:
            wanted = f"one of {', '.join(ZERO_KEEPING)}, in which zeros stay exactly zero"
            require(name in ZERO_KEEPING, f"{key}.gguf_types", name, wanted)
        for name, chosen in (("formats", self.formats), ("gguf_types", self.gguf_types)):
            require(len(set(chosen)) == len(chosen), f"{key}.{name}", chosen, "each of them once")
        require("gguf" not in self.formats or bool(self.gguf_types), f"{key}.gguf_types", self.gguf_types, "at least one type for gguf")
        require(self.packed or not self.masks_only, f"{key}.masks_only", self.masks_only, f"false, or {key}.packed true as well")
        require(not self.packed or self.dtype == "base", f"{key}.packed", self.packed, f"false with {key}.dtype={self.dtype}")


CONTENTS = tuple(field.name for field in fields(Contents))


@dataclass(kw_only=True, slots=True)
class Hub:
    """Where the release is sent; see release.uploading.

    repo: ORG/NAME; null: nowhere. private: whether only its members see it. existing: whether a repository that was not created from
    here may be taken, whose files the release then replaces. dry_run: say what would be sent, and send nothing.
    """

    repo: str | None = checked(is_repository, f"ORG/NAME, each {LEGAL}")
    private: bool
    existing: bool
    dry_run: bool


@dataclass(kw_only=True, slots=True)
class Publish(Contents):
    """What a release consists of, and where it is sent. A change of the second makes no release anew."""

    hub: Hub
