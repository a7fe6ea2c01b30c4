"""The section `publish`."""

from dataclasses import dataclass

from stages.release.naming import LEGAL, is_legal
from stages.schema import checked, one_of, require, require_one_of

FORMATS = ("safetensors", "gguf")
ZERO_KEEPING = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K")  # types of llama.cpp in which 0 stays exactly 0


@dataclass(kw_only=True, slots=True)
class Publish:
    """What a release is called and consists of.

    name: of the release; null: made of the base, the recipe's label and the pattern, see naming.default_name.
    formats: safetensors, and with gguf a file for llama.cpp beside it, for each of gguf_types.
    gguf_types: llama.cpp's names; types in which zeros do not stay zero are refused.
    dtype: base: the base's. float8: the matrices in scope as E4M3 with a scale for each output channel, in the layout of
        compressed-tensors; the GGUF files are of the base's dtype all the same.
    """

    name: str | None = checked(is_legal, LEGAL)
    formats: list[str]
    gguf_types: list[str]
    dtype: str = one_of("base", "float8")

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
