"""The readers of files inside wheels: what they take out, in a time that grows with the size alone."""

import gzip
import json
import time

import pytest

from stages.errors import SourceError
from stages.sources import bounds
from stages.sources.readers import READERS, _prose

PARAGRAPH = "The river runs past the stone and the lamp on every day of the year.\n" * 20


def requests(**document: object) -> bytes:
    return gzip.compress(json.dumps({"doc": document}).encode())


def read(name: str, data: bytes) -> list[dict]:
    return list(READERS[name].read(data))


@pytest.mark.parametrize(
    ("line", "prose"),
    [
        ("a <b>c</b> d>e", "a c d>e"),
        ("a <ref b <i> c", "a  c"),
        ("5 < 6 and no more", "5 < 6 and no more"),
        ("the river ( ; ) runs ( , north )", "the river runs (north)"),
        ("the river (  ) , the lamp .", "the river, the lamp."),
    ],
)
def test_markup_leaves_no_trace(line, prose):
    assert _prose(line) == prose


def test_articles_stand_between_their_marks():
    head = '<doc id="1" url="u" title="River">\nRiver\n'
    text = f"{head}{PARAGRAPH}\n\n</doc>\n{head}short\n</doc>\n{head}{PARAGRAPH}"
    (row,) = read("wikiextractor", text.encode())
    assert row["text"].startswith("River\n\nThe river")
    assert row["text"].endswith("year.")


def test_the_last_question_of_a_conversation_is_asked():
    document = {"source": "wikipedia", "id": "a_turn1", "story": "stone", "choices": ["lamp"]}
    query = "Question: one?\nAnswer: two\n\nQuestion: three?\nAnswer:"
    (row,) = read("coqa_chat", requests(**document, query=query))
    assert row["messages"][0]["content"] == "stone\n\nthree?"


FLOOD = 200_000
FLOODS = {
    "wikiextractor": ('<doc id="1" url="u" title="t">\n' * (FLOOD // 10)).encode(),
    "coqa_chat": requests(source="wikipedia", id="a_turn1", story="", choices=[""], query="Question: " * FLOOD + "\nAnswer:"),
    "gsm8k_chat": requests(question="river", answer="<<" * FLOOD),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_marks_takes_no_time(name):
    started = time.perf_counter()
    read(name, FLOODS[name])
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("mark", ["<", "( ", " ", "(", "[["])
def test_a_line_of_marks_takes_no_time(mark):
    started = time.perf_counter()
    _prose(mark * FLOOD)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("name", ["gsm8k_chat", "lambada_requests"])
def test_lines_that_grow_without_end_are_refused(name, monkeypatch):
    monkeypatch.setattr(bounds, "LARGEST", 1000)
    with pytest.raises(SourceError, match="its decompressed lines: found more than 1,000 bytes"):
        read(name, gzip.compress(b" " * 5000))


def test_bytes_that_are_no_arrow_stream_are_refused():
    with pytest.raises(ValueError, match="not an Arrow stream"):
        read("arrow", b"\xff" * 40)
