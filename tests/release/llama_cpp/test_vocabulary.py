import json

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from stages.errors import ArchitectureError
from stages.release.llama_cpp.vocabulary import REST, SUFFIX, WORD, vocabulary_of


def saved(directory, raw: Tokenizer):
    raw.save(str(directory / "tokenizer.json"))
    return directory


def by_bytes(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    raw = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return raw


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(numbers: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(f"{SUFFIX}|{WORD}|{numbers}|{REST}"), "isolated")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([WORDS], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), WORDS], "smollm"),
        ([split("\\p{N}"), BYTES], "qwen2"),
    ],
)
def test_text_is_cut_by_the_expression_of_a_name(tmp_path, steps, name):
    vocabulary = vocabulary_of(saved(tmp_path, by_bytes(*steps)), rows=4)
    assert (vocabulary.model, vocabulary.pre, vocabulary.tokens) == ("gpt2", name, ["<s>", "a", "b", "ab"])


def test_llama_3_takes_a_word_that_is_a_token_as_it_is(tmp_path):
    raw = by_bytes(split("\\p{N}{1,3}"), BYTES)
    with pytest.raises(ArchitectureError, match="found ignore_merges False, wanted what llama.cpp does"):
        vocabulary_of(saved(tmp_path, raw), rows=4)
    raw.model.ignore_merges = True
    assert vocabulary_of(saved(tmp_path, raw), rows=4).pre == "llama-bpe"


def test_tokens_that_were_added_and_rows_without_a_token_have_kinds_of_their_own(tmp_path):
    raw = by_bytes(WORDS)
    raw.add_special_tokens(["<s>"])
    raw.add_tokens(["cat"])
    vocabulary = vocabulary_of(saved(tmp_path, raw), rows=6)
    assert vocabulary.tokens == ["<s>", "a", "b", "ab", "cat", "[PAD5]"]
    kinds = TokenType
    assert vocabulary.kinds == [kinds.CONTROL, kinds.NORMAL, kinds.NORMAL, kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED]


def test_the_score_of_a_token_falls_with_the_merge_that_makes_it(tmp_path):
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "\u2581": 5, "\u2581a": 6, "\u2581ab": 7}
    raw = Tokenizer(
        models.BPE(vocab, [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")], byte_fallback=True, unk_token="<unk>")
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.ByteFallback()
    vocabulary = vocabulary_of(saved(tmp_path, raw), rows=8)
    assert (vocabulary.model, vocabulary.space_prefix) == ("llama", True)
    assert vocabulary.scores == [-4.0, -4.0, -4.0, -4.0, 0.0, -4.0, -1.0, -2.0]
    assert vocabulary.kinds[:3] == [TokenType.UNKNOWN, TokenType.BYTE, TokenType.NORMAL]


def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path):
    with pytest.raises(ArchitectureError, match="found no tokenizer.json"):
        vocabulary_of(tmp_path, rows=4)
    with pytest.raises(ArchitectureError, match="found pre_tokenizer .*'Whitespace'.*, wanted what llama.cpp does; leave gguf out"):
        vocabulary_of(saved(tmp_path, by_bytes(pre_tokenizers.Whitespace())), rows=4)
    with pytest.raises(ArchitectureError, match="found the id 3, wanted ids below 3, the rows of the embedding"):
        vocabulary_of(saved(tmp_path, by_bytes(WORDS)), rows=3)
    raw = by_bytes(WORDS)
    raw.normalizer = normalizers.Lowercase()
    with pytest.raises(ArchitectureError, match="found normalizer {'type': 'Lowercase'}, wanted"):
        vocabulary_of(saved(tmp_path, raw), rows=4)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(ArchitectureError, match="found a tokenizer of type WordPiece, wanted BPE"):
        vocabulary_of(tmp_path, rows=4)
