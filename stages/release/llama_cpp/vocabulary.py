"""A tokenizer as llama.cpp has it: tokens with their kinds, merges or scores, and how text is cut before it is merged.

llama.cpp knows the regular expressions that cut text by name alone. A tokenizer is taken only if it cuts as one of these does.

    byte-level BPE           tokenizer.ggml.model gpt2, with its merges
    BPE with byte fallback   tokenizer.ggml.model llama, which merges the pair of the highest score: -i for what merge i makes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import SpecialVocab, TokenType

from stages.errors import ArchitectureError
from stages.files import read_json

WORD = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
Steps = tuple[tuple[str, object], ...]
BYTES, BYTES_AND_WORDS = ("ByteLevel", False), ("ByteLevel", True)  # whether it also cuts by GPT-2's expression
CUTS: dict[Steps, tuple[str, bool]] = {  # steps -> llama.cpp's name, whether a word that is a token is not merged
    (BYTES_AND_WORDS,): ("gpt-2", False),
    (("Digits", True), BYTES_AND_WORDS): ("smollm", False),
    (("Split", f"{SUFFIX}|{WORD}|\\p{{N}}{{1,3}}|{REST}"), BYTES): ("llama-bpe", True),
    (("Split", f"{SUFFIX}|{WORD}|\\p{{N}}|{REST}"), BYTES): ("qwen2", False),
}
SPACE = "\u2581"  # which stands for a space in tokens of the second kind


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp has of a tokenizer.

    model: gpt2 or llama. pre: name of the expression that cuts text.
    tokens, kinds: by id. scores: by id; None: merges say it. space_prefix: whether a space is put before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    scores: list[float] | None
    space_prefix: bool

    def write(self, writer: gguf.GGUFWriter, directory: Path) -> None:
        """Write it, with the special tokens and the chat template in a checkpoint's directory."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.space_prefix)
        special = SpecialVocab(directory, load_merges=self.scores is None, n_vocab=len(self.tokens))
        special.add_special_token.setdefault("bos", False)  # where it is not said, llama.cpp guesses
        special.add_to_gguf(writer, quiet=True)


def vocabulary_of(directory: Path, rows: int) -> Vocabulary:
    """Read a checkpoint's tokenizer.

    Args:
        rows: of the embedding; ids above the tokenizer's get unused tokens.

    Raises:
        ArchitectureError: llama.cpp has no such tokenizer, as far as it is known here; names what it does otherwise.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ArchitectureError(f"{directory}: found no tokenizer.json, wanted one to make the vocabulary of a GGUF file of")
    data = read_json(path)
    model = data["model"]
    if model["type"] != "BPE":
        raise ArchitectureError(f"{path}: found a tokenizer of type {model['type']}, wanted BPE for a GGUF file")
    tokens = _tokens(data, rows, path)
    if model["byte_fallback"]:
        _require(path, "pre_tokenizer", _steps(data["pre_tokenizer"]), _known_by_scores(data["pre_tokenizer"]))
        kinds, scores = _kinds(data, tokens, spaces=True), _scores(model, tokens)
        tokens = [token.replace(SPACE, " ") if kind is TokenType.USER_DEFINED else token for token, kind in zip(tokens, kinds, strict=True)]
        return Vocabulary(model="llama", pre="default", tokens=tokens, kinds=kinds, scores=scores, space_prefix=_prefixed(data))
    steps = _steps(data["pre_tokenizer"])
    _require(path, "pre_tokenizer", steps, steps in CUTS)
    pre, whole = CUTS[steps]
    _require(path, "normalizer", data["normalizer"], data["normalizer"] in (None, {"type": "NFC"}))
    _require(path, "ignore_merges", model.get("ignore_merges", False), model.get("ignore_merges", False) == whole)
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, kinds=_kinds(data, tokens, spaces=False), scores=None, space_prefix=False)


def _require(path: Path, key: str, found: object, known: bool) -> None:
    if not known:
        raise ArchitectureError(f"{path}: found {key} {found!r}, wanted what llama.cpp does; leave gguf out of publish.formats")


def _steps(pre_tokenizer: dict[str, Any] | None) -> Steps:
    """What cuts text, one after the other, each with the parameter that tells it from others of its type."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner))
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}:
            return (("ByteLevel", words),)
        case {"type": "Digits", "individual_digits": bool(individual)}:
            return (("Digits", individual),)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (("Split", pattern),)
        case _:
            return ((pre_tokenizer["type"], str(pre_tokenizer)),)


def _known_by_scores(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether text is merged as a whole, or cut at spaces that no merge crosses."""
    return pre_tokenizer is None or pre_tokenizer["type"] in ("Metaspace", "Split") and "Regex" not in str(pre_tokenizer)


def _prefixed(data: dict[str, Any]) -> bool:
    metaspace = data["pre_tokenizer"] or {}
    return "Prepend" in str(data["normalizer"]) or metaspace.get("prepend_scheme", "never") != "never"


def _tokens(data: dict[str, Any], rows: int, path: Path) -> list[str]:
    """Tokens by id."""
    by_id = {index: token for token, index in data["model"]["vocab"].items()}
    by_id |= {added["id"]: added["content"] for added in data["added_tokens"]}
    if max(by_id) >= rows:
        raise ArchitectureError(f"{path}: found the id {max(by_id)}, wanted ids below {rows}, the rows of the embedding")
    return [by_id.get(index, f"[PAD{index}]") for index in range(rows)]


def _kinds(data: dict[str, Any], tokens: list[str], *, spaces: bool) -> list[TokenType]:
    """Kinds by id: what is added to the vocabulary is found in text before it is cut.

    Args:
        spaces: whether bytes have tokens of their own, such as <0x0A>.
    """
    known = set(data["model"]["vocab"].values())
    kinds = [TokenType.NORMAL if index in known else TokenType.UNUSED for index in range(len(tokens))]
    if spaces:
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[index] = TokenType.BYTE
    for added in data["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if spaces and data["model"]["unk_token"] is not None:
        kinds[tokens.index(data["model"]["unk_token"])] = TokenType.UNKNOWN
    return kinds


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores by id: -i for what merge i makes, the first that does."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        first.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    return [-float(first.get(token, len(model["merges"]))) for token in tokens]
