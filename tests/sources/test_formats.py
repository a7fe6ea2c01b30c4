"""Data files that would fill the memory: refused by name while they are read."""

import gzip

import pytest

from stages.errors import SourceError
from stages.sources import bounds, formats
from stages.sources.formats import read_rows, read_text


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 2000)
    for module in (bounds, formats):
        monkeypatch.setattr(module, "LARGEST", 10_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "' + b"x" * 5000, "a.jsonl, line 1: found more than 2,000 bytes"),
        ("a.jsonl", b'{"text": "a"}\n' + b" " * 5000, "a.jsonl, line 2: found more than 2,000 bytes"),
        ("a.json", b"[\n" + b'{"text": "a"},\n' * 2000, "a.json: found more than 10,000 bytes"),
        ("a.csv", b'text\n"' + b"x\n" * 5000, "a.csv, the row that ends in line 999 or later: found more than 2,000 bytes"),
        ("a.csv", b"\xff\xfe" + "text\n".encode("utf-16-le") * 5000, "a.csv: found more than 10,000 bytes"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_a_row_or_a_text_without_end_is_refused(tmp_path, name, content, message, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(SourceError, match=message.replace(name, path.name)):
        list(read_rows(path))


def test_a_text_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"river\n" * 5000)
    with pytest.raises(SourceError, match="a.txt: found more than 10,000 bytes"):
        read_text(tmp_path / "a.txt")


def test_rows_of_any_number_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"river\n" * 5000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 5000)
    assert [len(list(read_rows(tmp_path / name))) for name in ("a.csv", "a.jsonl")] == [5000, 5000]
