import pytest

from stages.errors import TextError
from stages.rows import Rows, messages_of, require_columns, text_of, texts
from tests import tiny


def test_rows_are_read_by_number(tmp_path):
    rows = Rows(tiny.write_lines(tmp_path / "a.jsonl", [{"text": "é"}, {"text": "b"}, {"text": "c"}]))
    assert (len(rows), rows[2], rows[0]) == (3, {"text": "c"}, {"text": "é"})
    assert list(rows) == [{"text": "é"}, {"text": "b"}, {"text": "c"}]
    with pytest.raises(IndexError):
        rows[3]


def test_the_last_line_needs_no_line_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert texts(tmp_path / "a.jsonl") == ["a", "b"]


def test_empty_strings_are_texts(tmp_path):
    assert texts(tiny.write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}])) == ["", "a"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TextError, match=r"a\.jsonl: not found; has the fetch stage run\?"):
        Rows(tmp_path / "a.jsonl")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(TextError, match=r"a\.jsonl: found no rows, wanted at least one"):
        Rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"line 2: not JSON in UTF-8 \(Expecting value"),
        (b"", r"line 2: not JSON in UTF-8 \(Expecting value"),
        (b'{"text": "\xff"}', r"line 2: not JSON in UTF-8 \('utf-8' codec can't decode byte 0xff"),
        (b'{"text": "\\ud800"}', r"line 2: not JSON in UTF-8 \('utf-8' codec can't encode character"),
        (b'["text"]', r'line 2: found \["text"\], wanted an object'),
        (b"null", "line 2: found null, wanted an object"),
        (b'{"passage": "a", "label": 1}', 'line 2: found passage, label, wanted "text"'),
        (b"{}", 'line 2: found no keys, wanted "text"'),
        (b'{"text": null}', 'line 2, "text": found null, wanted a string'),
        (b'{"text": 7}', 'line 2, "text": found 7, wanted a string'),
        (b'{"text": ["a"]}', r'line 2, "text": found \["a"\], wanted a string'),
        (b'{"text": {"a": "' + 100 * b"b" + b'"}}', 'line 2, "text": found {"a": "b+…, wanted a string'),
    ],
)
def test_a_row_that_is_no_text_is_named_with_its_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(TextError, match=rf"a\.jsonl, {message}"):
        texts(tmp_path / "a.jsonl")


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["😀"]


def test_a_text_is_what_the_row_says():
    assert text_of({"text": "a", "url": "b"}, "here") == "a"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, '"messages": found null, wanted a list of messages'),
        ([], r'"messages": found \[\], wanted a list of messages'),
        ("hello", '"messages": found "hello", wanted a list of messages'),
        ({"role": "user"}, '"messages": found {"role": "user"}, wanted a list of messages'),
        (["hello"], 'message 1: found "hello", wanted an object with "role" and "content"'),
        ([{"role": "user"}], 'message 1: found role, wanted "content"'),
        ([{"content": "a"}], 'message 1: found content, wanted "role"'),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], 'message 2, "content": found null, wanted a string'),
        ([{"role": 1, "content": "a"}], 'message 1, "role": found 1, wanted a string'),
    ],
)
def test_messages_that_are_no_dialogue_are_named(messages, message):
    with pytest.raises(TextError, match=f"a.jsonl, line 3, {message}"):
        messages_of({"messages": messages}, "a.jsonl, line 3")


def test_a_row_without_messages_is_named():
    with pytest.raises(TextError, match='a.jsonl, line 3: found text, wanted "messages"'):
        messages_of({"text": "a"}, "a.jsonl, line 3")


def test_a_row_has_the_columns_asked_for():
    require_columns({"a": 1, "b": 2}, ["a"], "here")
    with pytest.raises(TextError, match='here: found a, b, wanted "c"'):
        require_columns({"a": 1, "b": 2}, ["a", "c"], "here")


def test_a_row_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(TextError, match="a.jsonl, line 1: not JSON in UTF-8 .*nested too deeply"):
        texts(tmp_path / "a.jsonl")
