"""How a corpus is cut into windows, and which document each is of."""

import pytest
import torch

from stages.errors import ConfigError, TextError
from stages.evaluation.documents import read_corpus
from stages.evaluation.section import Windows
from stages.evaluation.windows import cut_corpus
from tests import tiny

BOS = 1
DIALOGUE = {"messages": [{"role": "user", "content": "river stone"}, {"role": "assistant", "content": "lamp winter"}]}


def cut(texts: list[str], length: int, limit: int | None, **options: object) -> torch.Tensor:
    return cut_corpus("articles", texts, tiny.tokenizer(), length, limit, tiny.NO_BOS, **options).windows


def test_windows_are_the_joined_text_cut_and_the_remainder_dropped():
    texts = tiny.sentences(4, seed=0)
    tokens = tiny.tokenizer()("\n\n".join(texts))["input_ids"]
    windows = cut(texts, 16, None)
    assert windows.flatten().tolist() == tokens[: len(tokens) // 16 * 16]
    assert torch.equal(cut(texts, 16, 3), windows[:3])
    spread = [0, len(windows) // 3, 2 * len(windows) // 3]
    assert torch.equal(cut(texts, 16, 3, evenly=True), windows[spread])
    assert torch.equal(cut(texts, 16, None, evenly=True), windows)


def test_a_corpus_knows_how_many_windows_it_has():
    texts = tiny.sentences(4, seed=0)
    whole = cut_corpus("articles", texts, tiny.tokenizer(), 16, None, tiny.NO_BOS)
    some = cut_corpus("articles", texts, tiny.tokenizer(), 16, 3, tiny.NO_BOS)
    assert whole.available == some.available == len(whole.windows) > len(some.windows)


def test_a_window_is_of_the_document_that_most_of_its_tokens_are_of():
    texts = [" ".join(["river"] * count) for count in (40, 2, 40)]
    corpus = cut_corpus("articles", texts, tiny.tokenizer(), 10, None, tiny.NO_BOS)
    tokens = corpus.windows.flatten().tolist()
    ends = [len(tiny.tokenizer()("\n\n".join(texts[: number + 1]))["input_ids"]) for number in range(3)]
    of_token = [next(number for number, end in enumerate(ends) if index < end + 2) for index in range(len(tokens))]  # 2: of the empty line
    wanted = [max(set(span), key=span.count) for span in (of_token[start : start + 10] for start in range(0, len(tokens), 10))]
    assert corpus.clusters == wanted
    assert {0, 2} <= set(wanted)


def test_windows_of_short_documents_are_each_of_its_own():
    corpus = cut_corpus("articles", tiny.sentences(40, seed=1, length=4), tiny.tokenizer(), 32, None, tiny.NO_BOS)
    assert len(set(corpus.clusters)) == len(corpus.windows)


def test_a_corpus_that_is_too_small_says_how_many_tokens_it_has():
    texts = tiny.sentences(1, seed=0)
    count = len(tiny.tokenizer()(texts[0])["input_ids"])
    with pytest.raises(ConfigError, match=f"evaluation.corpora.articles: the corpus has {count} tokens, wanted 2 windows of 512"):
        cut(texts, 512, None)


def read(path, tokenizer=None):
    windows = Windows(window_length=8, windows=None, evenly=False)
    return read_corpus("chat", path, windows, tokenizer or tiny.tokenizer(), tiny.NO_BOS)


def test_dialogues_are_rendered_by_the_chat_template(tmp_path):
    path = tiny.write_lines(tmp_path / "chat.jsonl", [DIALOGUE] * 3)
    corpus, tokenizer = read(path), tiny.tokenizer()
    text = "<|user|>\nriver stone</s>\n<|assistant|>\nlamp winter</s>\n" * 3
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert corpus.windows.flatten().tolist() == tokens[: corpus.windows.numel()]
    assert sorted(set(corpus.clusters)) == [0, 1, 2]


def test_dialogues_that_cannot_be_rendered_are_named(tmp_path):
    path, tokenizer = tiny.write_lines(tmp_path / "chat.jsonl", [DIALOGUE] * 3), tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(TextError, match=r"chat.jsonl, line 1: the base's chat template refuses this dialogue \(no user\)"):
        read(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="evaluation.corpora.chat: found dialogues, wanted prose: .* no chat template"):
        read(path, tokenizer)
    path = tiny.write_lines(tmp_path / "mixed.jsonl", [DIALOGUE, {"text": "river"}])
    with pytest.raises(TextError, match='mixed.jsonl, line 2: .*wanted "messages"'):
        read(path)
