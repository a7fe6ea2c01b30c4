"""Measures of degeneration by hand; a token is a letter here."""

import pytest

from stages.evaluation.degeneration import distinct, measure, ngrams, repeated
from stages.evaluation.measurement import Better, Kind
from stages.evaluation.statistics import accuracy_interval, difference_interval


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_ngrams_are_all_runs():
    assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert ngrams([1], 2) == []


def test_distinct_counts_over_all_answers_together():
    assert distinct([tokens("abab"), tokens("ab")], 1) == pytest.approx(2 / 6)
    assert distinct([tokens("abab"), tokens("ab")], 2) == pytest.approx(2 / 4)
    assert distinct([tokens("a")], 2) is None


def test_repetition_is_a_share_of_an_answers_own_4_grams():
    assert repeated(tokens("abcdabcd")) == pytest.approx(1 / 5)
    assert repeated(tokens("aaaaaa")) == pytest.approx(2 / 3)
    assert repeated(tokens("abc")) is None


def test_the_pruned_model_is_compared_with_the_dense_one_by_form():
    dense = [{"prompt": "x", "raw": "abcdefg", "chat": "abcd"}, {"prompt": "y", "raw": "abcd", "chat_refused": "no"}]
    sparse = [{"prompt": "x", "raw": "aaaaaaa", "chat": " "}, {"prompt": "y", "raw": "", "chat_refused": "no"}]
    found = {(each.name, each.metric): each for each in measure(sparse, dense, tokens)}
    empty, same, chat = found["raw", "empty"], found["raw", "repeated_4_grams"], found["chat", "empty"]
    assert (empty.kind, empty.value, empty.dense, empty.difference.value, empty.count) == (Kind.GENERATION, 0.5, 0.0, 0.5, 2)
    assert empty.better == Better.LOWER
    assert (same.value, same.dense, same.count) == (pytest.approx(3 / 4), 0.0, 1)  # the pair that both answer with four tokens
    assert (chat.value, chat.count, chat.stderr) == (1.0, 1, None)
    assert (found["raw", "distinct_1"].value, found["raw", "distinct_1"].dense) == (pytest.approx(1 / 7), pytest.approx(7 / 11))
    assert found["raw", "distinct_1"].better == Better.HIGHER


def test_a_few_answers_that_all_agree_have_an_interval_of_some_width():
    rows = [{"prompt": str(number), "raw": "abcdefg"} for number in range(3)]
    empty, *_ = measure(rows, rows, tokens)
    assert (empty.value, empty.stderr, empty.difference.value) == (0.0, 0.0, 0.0)
    assert (empty.low, empty.high) == accuracy_interval([0.0] * 3, range(3))
    assert (empty.difference.low, empty.difference.high) == difference_interval([0.0] * 3, [0.0] * 3, range(3))
    assert empty.high > 0 and empty.difference.low < 0 < empty.difference.high


def test_no_answers_are_no_measurements():
    assert measure([], None, tokens) == []
