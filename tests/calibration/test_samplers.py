import random

import pytest

from stages.calibration.samplers import SAMPLERS, Window, document, packed, window_counts
from stages.errors import CalibrationError

PAGES = [list(range(100 * i, 100 * i + length)) for i, length in enumerate([5, 40, 12, 33, 8, 60])]


def published(pages: list[list[int]], windows: int, length: int, seed: int) -> list[list[int]]:
    """get_c4 of the published code, with its module-level generator."""
    random.seed(seed)
    drawn = []
    for _ in range(windows):
        while True:
            i = random.randint(0, len(pages) - 1)
            if len(pages[i]) > length:
                break
        i_start = random.randint(0, len(pages[i]) - length - 1)
        drawn.append(pages[i][i_start : i_start + length])
    return drawn


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_document_draws_what_the_published_code_draws(seed):
    assert [window.tokens for window in document(PAGES, 20, 10, seed, None)] == published(PAGES, 20, 10, seed)


def test_no_page_is_tokenised_twice():
    class Pages(list):
        read: list[int] = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    pages = Pages(PAGES)
    drawn = document(pages, 50, 10, 0, None)
    assert [window.tokens for window in drawn] == published(PAGES, 50, 10, 0)
    assert sorted(set(pages.read)) == sorted(pages.read)


def test_document_says_where_each_window_comes_from():
    for window in document(PAGES, 20, 10, 0, None):
        ((page, offset, count),) = window.spans
        assert window.tokens == PAGES[page][offset : offset + count]


def test_a_page_must_be_longer_than_the_window():
    with pytest.raises(CalibrationError, match="no document has more than 60 tokens: the longest of 6 has 60, all together 158"):
        document(PAGES, 1, 60, 0, None)


def test_packed_wastes_no_token():
    total = sum(map(len, PAGES)) + len(PAGES)
    windows = packed(PAGES, total // 8, 8, 0, end=-1)
    joined = [token for window in windows for token in window.tokens]
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert joined == [token for i in order for token in [*PAGES[i], -1]][: len(joined)]


def test_pages_without_tokens_leave_no_mark():
    pages = [[], PAGES[1], [], []]
    (window,) = packed(pages, 1, 41, 0, end=-1)
    assert window.tokens == [*PAGES[1], -1]
    with pytest.raises(CalibrationError, match="the corpus has 0 tokens in 3 documents, wanted 1 windows of 2 = 2"):
        packed([[], [], []], 1, 2, 0, end=-1)


def test_packed_says_where_each_token_comes_from():
    for window in packed(PAGES, 15, 10, 3, end=-1):
        text = [token for page, offset, count in window.spans for token in PAGES[page][offset : offset + count]]
        assert text == [token for token in window.tokens if token != -1]


def test_packed_depends_on_the_seed():
    assert packed(PAGES, 4, 10, 0, None) == packed(PAGES, 4, 10, 0, None)
    assert packed(PAGES, 4, 10, 0, None) != packed(PAGES, 4, 10, 1, None)


def test_a_corpus_that_is_too_small_says_how_many_tokens_it_has():
    with pytest.raises(CalibrationError, match="the corpus has 158 tokens in 6 documents, wanted 16 windows of 10 = 160"):
        packed(PAGES, 16, 10, 0, None)


def test_shares_sum_to_the_windows():
    assert window_counts({"a": 0.5, "b": 0.5}, 5) in ({"a": 3, "b": 2}, {"a": 2, "b": 3})
    assert window_counts({"a": 0.4, "b": 0.2, "c": 0.4}, 32) == {"a": 13, "b": 6, "c": 13}
    assert window_counts({"a": 0.1, "b": 0.9}, 10) == {"a": 1, "b": 9}


def test_a_window_names_the_document_of_each_of_its_tokens():
    """5 tokens of document 7 and their end token, 3 of document 2 and theirs, 2 of document 9."""
    window = Window(tokens=[*[1] * 5, 0, *[2] * 3, 0, *[3] * 2], spans=[(7, 40, 5), (2, 0, 3), (9, 0, 2)], starts=[0, 6, 10])
    assert [window.documents(start, 3) for start in (0, 2, 3, 4, 6, 7, 9)] == [[7], [7], [7], [7, 2], [2], [2], [9]]
    assert window.documents(4, 8) == [7, 2, 9]
    assert window.documents(5, 1) == []


@pytest.mark.parametrize("end", [None, -1])
def test_packed_says_where_in_the_window_each_document_begins(end):
    for window in packed(PAGES, 15, 10, 3, end=end):
        for (page, offset, count), start in zip(window.spans, window.starts, strict=True):
            assert window.tokens[start : start + count] == PAGES[page][offset : offset + count]


def test_the_table_names_the_samplers():
    assert {name: sampler.function for name, sampler in SAMPLERS.items()} == {"document": document, "packed": packed}
    assert "Frantar et al. 2023" in SAMPLERS["document"].reference
