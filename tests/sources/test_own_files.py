"""Files of people's own, as they report them: each becomes canonical rows, or is refused by name before a base is downloaded."""

import codecs
import gzip
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import schema
from stages.errors import ConfigError, SourceError, SparsesweepError, TextError
from stages.files import sha256
from stages.rows import Rows
from stages.sources import text
from stages.sources.text import LocalText, Text

KEY = "text.calibration.mine"
COLUMNS = {"text": "text", "messages": "messages", "role": "role", "content": "content"}


@dataclass(frozen=True, kw_only=True)
class File:
    """A file and what becomes of it: rows, or an error."""

    name: str = "pages.jsonl"
    content: bytes
    settings: dict = field(default_factory=dict)
    rows: list | None = None
    error: type[SparsesweepError] | None = None
    match: str = ""


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def works(*rows: dict, content: bytes, **others) -> File:
    return File(content=content, rows=list(rows), **others)


def refused(match: str, *, content: bytes, error: type[SparsesweepError] = TextError, **others) -> File:
    return File(content=content, error=error, match=match, **others)


def prose(*texts: str) -> list[dict]:
    return [{"text": one} for one in texts]


def said(*turns: str) -> dict:
    """A dialogue that the user begins."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def messages(*pairs: tuple, role: str = "role", content: str = "content", column: str = "messages") -> dict:
    return {column: [{role: who, content: what} for who, what in pairs]}


HELLO = said("Hi", "Hello")
SHAREGPT = messages(("human", "Hi"), ("gpt", "Hello"), role="from", content="value", column="conversations")
PARTS = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TREE = "one\ntwo\n\n \nthree\n"

FILES = {
    # columns
    "text": works(*prose("a b", "c"), content=jsonl({"text": "a b", "url": "u"}, {"text": "c"})),
    "content": refused(
        rf'^{KEY}: pages.jsonl, line 1: found content, url, wanted "text" for prose or "messages" for a dialogue; '
        rf"set {KEY}.text=content if it holds the prose$",
        content=jsonl({"content": "a long page", "url": "u"}),
    ),
    "content, said": works(*prose("a"), content=jsonl({"content": "a"}), settings={"text": "content"}),
    "a column with a space": refused(rf'set {KEY}.text="page text"', content=jsonl({"page text": "a"})),
    "ShareGPT": works(HELLO, content=jsonl(SHAREGPT)),
    "ShareGPT with a system prompt": works(
        {"messages": [{"role": "system", "content": "Be brief"}, *HELLO["messages"]]},
        content=jsonl(messages(("system", "Be brief"), ("human", "Hi"), ("bot", "Hello"), role="from", content="value")),
    ),
    "ShareGPT with keys of its own": works(
        HELLO,
        content=jsonl(messages(("human", "Hi"), ("gpt", "Hello"), role="speaker", content="said", column="chat")),
        settings={"messages": "chat", "role": "speaker", "content": "said"},
    ),
    "keys of a message that are not known": refused(
        rf'line 1, "messages", message 1: found speaker, said, wanted "role"; set {KEY}.role=NAME',
        content=jsonl(messages(("human", "Hi"), role="speaker", content="said")),
    ),
    "a list of messages in another column": refused(
        rf"found id, chat, wanted .*; set {KEY}.messages=chat if it holds dialogues",
        content=jsonl({"id": "7", **messages(("user", "a"), column="chat")}),
    ),
    "an empty turn of ShareGPT": refused(
        '"conversations", message 1: found from, text, wanted "value"', content=jsonl({"conversations": [{"from": "human", "text": "Hi"}]})
    ),
    "Alpaca": refused(
        'found instruction, input, output, wanted .*; write "instruction" and "output" as two messages',
        content=jsonl({"instruction": "Add", "input": "1 2", "output": "3"}),
    ),
    "prompt and completion": refused('write "prompt" and "completion" as two messages', content=jsonl({"prompt": "a", "completion": "b"})),
    "no columns": refused("line 1: found no keys, wanted", content=jsonl({})),
    "both columns": refused(
        rf'found both "text" and "messages", wanted one of them; set {KEY}.messages=null to read the text or set {KEY}.text=null to read',
        content=jsonl({"text": "a", **HELLO}),
    ),
    "text and conversations": refused(
        rf'found both "text" and "conversations", wanted one of them; set {KEY}.messages=null to read the text or set {KEY}.text=null to',
        content=jsonl({"text": "a", "conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]}),
    ),
    "both columns, said": works(HELLO, content=jsonl({"text": "a", **HELLO}), settings={"text": None}),
    "prose, then dialogues": refused(
        'line 2: found "messages", wanted rows of "text" as before; make two sources of it', content=jsonl({"text": "a"}, HELLO)
    ),
    "dialogues, then prose": refused('line 2: found "text", wanted rows of "messages" as before', content=jsonl(HELLO, {"text": "a"})),
    # values
    "a number": refused('line 2, "text": found 7, wanted a string; write it as one', content=jsonl({"text": "a"}, {"text": 7})),
    "null": refused('line 2, "text": found null, wanted a string; leave such rows out', content=jsonl({"text": "a"}, {"text": None})),
    "not a number": refused('"text": found NaN, wanted a string', content=b'{"text": NaN}\n'),
    "a list": refused(r'"text": found \["a", \["b"\]\], wanted a string', content=jsonl({"text": ["a", ["b"]]})),
    "an object as text": refused('"text": found {"en": "a"}, wanted a string', content=jsonl({"text": {"en": "a"}})),
    "blank texts alone": refused(rf"^{KEY}: found blank text in every row of 2, wanted", content=jsonl({"text": ""}, {"text": " \n"})),
    "a blank text among others": works(*prose("", "a"), content=jsonl({"text": ""}, {"text": "a"})),
    "a date": works(*prose("2024-01-01"), content=jsonl({"text": "2024-01-01"})),
    "shorter than any window": works(*prose("a"), content=jsonl({"text": "a"})),  # only the tokenizer knows
    "one huge document": works(*prose("word " * 600_000), content=jsonl({"text": "word " * 600_000})),
    "half of a surrogate pair": refused(
        r'line 1, "text": found half of a surrogate pair, U\+D83D at character 4, wanted text', content=b'{"text": "oh \\ud83d"}\n'
    ),
    "an emoji as a surrogate pair": works(*prose("😀"), content=b'{"text": "\\ud83d\\ude00"}\n'),
    "messages without content": refused(
        'line 1, "messages", message 2, "content": found null, wanted a string', content=jsonl(messages(("user", "a"), ("assistant", None)))
    ),
    "a tool call": refused(
        'message 2: found "tool_calls", which is not read, wanted text alone',
        content=jsonl({"messages": [{"role": "user", "content": "a"}, CALL]}),
    ),
    "an answer of a tool": works(messages(("user", "a"), ("tool", "b")), content=jsonl(messages(("user", "a"), ("function", "b")))),
    "parts of text": works(said("Look\nhere"), content=jsonl(messages(("user", PARTS)))),
    "a part that is an image": refused(
        r'"content": found {"type": "image_url", .*wanted a string, or parts',
        content=jsonl(messages(("user", [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]))),
    ),
    "a part without text": refused("a part: found null, wanted a string", content=jsonl(messages(("user", [{"type": "text"}])))),
    "a number as content": refused('"content": found 7, wanted a string', content=jsonl(messages(("user", 7)))),
    "empty turns alone": refused("found 2 messages without a word, wanted text in them", content=jsonl(said("", " "))),
    "a role that is none": refused('"role": found "narrator", wanted one of system', content=jsonl(messages(("narrator", "a")))),
    "a role that is a number": refused('"role": found 1, wanted one of system', content=jsonl(messages((1, "a")))),
    "roles in capitals": works(HELLO, content=jsonl(messages(("User", "Hi"), ("Assistant", "Hello")))),
    "no messages": refused(r'"messages": found \[\], wanted a list of messages', content=jsonl({"messages": []})),
    "messages as a string": refused('"messages": found "Hi", wanted a list', content=jsonl({"messages": "Hi"})),
    "messages as an object": refused('"messages": found {"role": "user"}, wanted a list', content=jsonl({"messages": {"role": "user"}})),
    "lists of messages": refused(
        'message 1: found .*, wanted an object with "role" and "content"', content=jsonl({"messages": [["user", "Hi"]]})
    ),
    # JSON and its lines
    "empty": refused(rf"^{KEY}: found no rows in rows", error=SourceError, content=b""),
    "blank lines": works(*prose("a", "b"), content=b'\n{"text": "a"}\n\n  \n{"text": "b"}\n\n'),
    "the line after a blank one": refused("line 3, ", content=b'{"text": "a"}\n\n{"text": 1}\n'),
    "CRLF": works(*prose("a", "b"), content=b'{"text": "a"}\r\n{"text": "b"}\r\n'),
    "a byte order mark": works(*prose("a"), content=codecs.BOM_UTF8 + jsonl({"text": "a"})),
    "UTF-16": works(*prose("é"), content='{"text": "é"}\n'.encode("utf-16")),
    "UTF-16, cut": refused("pages.jsonl: cannot be read", error=SourceError, content='{"text": "é"}\n'.encode("utf-16")[:-1]),
    "UTF-16 without a mark": refused(
        "line 1: found a zero byte, as UTF-16 has", error=SourceError, content='{"text"}\n'.encode("utf-16-le")
    ),
    "Latin-1": refused(
        "pages.jsonl, line 2: found the byte 0xe9, wanted text in UTF-8, such as `iconv",
        error=SourceError,
        content=jsonl({"text": "a"}) + '{"text": "é"}\n'.encode("latin1"),
    ),
    "an array": works(*prose("a", "b"), content=json.dumps(prose("a", "b"), indent=1).encode()),
    "an array named .json": works(*prose("a", "b"), name="pages.json", content=json.dumps(prose("a", "b")).encode()),
    "an array of strings": refused('row 1: found "a", wanted an object such as', error=SourceError, content=b'["a", "b"]'),
    "an object": works(*prose("a"), name="pages.json", content=json.dumps({"text": "a"}, indent=2).encode()),
    "an object that holds the rows": refused(
        "row 1: found version, data, wanted .*set text.calibration.mine.messages=data if it holds dialogues",
        name="pages.json",
        content=json.dumps({"version": 1, "data": prose("a")}, indent=2).encode(),
    ),
    "objects over several lines": refused(
        r"not JSON \(Extra data.*wanted one object a line, or one array",
        error=SourceError,
        content=(json.dumps(prose("a")[0], indent=1) + "\n").encode() * 2,
    ),
    "a last line cut off": refused(
        r"line 2: not JSON \(.*; it is the last line: was the file cut off\?", error=SourceError, content=b'{"text": "a"}\n{"text": "b'
    ),
    "a last line without its end": works(*prose("a", "b"), content=b'{"text": "a"}\n{"text": "b"}'),
    "a key twice": refused('line 1: found the key "text" twice in one object', error=SourceError, content=b'{"text": "a", "text": "b"}\n'),
    "strings in quotes": refused('line 1: found "a page", wanted an object', error=SourceError, content=b'"a page"\n'),
    "nested without end": refused("line 1: not JSON", error=SourceError, content=b'{"text": ' + b"[" * 100_000 + b"}\n"),
    # other formats
    "gzip": works(*prose("a"), name="pages.jsonl.gz", content=gzip.compress(jsonl({"text": "a"}))),
    "gzip, cut": refused(
        "cannot be read as .jsonl", error=SourceError, name="p.jsonl.gz", content=gzip.compress(jsonl({"text": "a" * 99}))[:-9]
    ),
    "no gzip": refused("cannot be read as .jsonl", error=SourceError, name="p.jsonl.gz", content=jsonl({"text": "a"})),
    "Zstandard": works(*prose("a"), name="pages.jsonl.zst", content=zst(jsonl({"text": "a"}))),
    "no Zstandard": refused("cannot be read as .jsonl", error=SourceError, name="p.jsonl.zst", content=b"no Zstandard"),
    "gzip named .jsonl": refused("found the bytes of gzip, wanted text", error=SourceError, content=gzip.compress(b"{}")),
    "Parquet": works(*prose("a", "b"), name="p.parquet", content=parquet({"text": "a", "n": 1}, {"text": "b", "n": 2})),
    "Parquet of ShareGPT": works(HELLO, name="p.parquet", content=parquet(SHAREGPT)),
    "Parquet with null": refused('row 2, "text": found null', name="p.parquet", content=parquet({"text": "a"}, {"text": None})),
    "Parquet of bytes": refused('row 1, "text": found "b\'a\'", wanted a string', name="p.parquet", content=parquet({"text": b"a"})),
    "Parquet of content": refused(
        rf"row 1: found body, n, wanted .*; set {KEY}.text=body", name="p.parquet", content=parquet({"body": "a", "n": 1})
    ),
    "Parquet named .jsonl": refused(
        "pages.jsonl: found the bytes of Parquet, wanted text", error=SourceError, content=parquet({"text": "a"})
    ),
    "JSON Lines named .parquet": refused(
        "p.parquet: cannot be read as .parquet", error=SourceError, name="p.parquet", content=jsonl({"text": "a"})
    ),
    "CSV": works(*prose("a, b", "7"), name="p.csv", content=b'id,text\r\n1,"a, b"\r\n2,7\r\n'),
    "CSV with lines in a cell": works(*prose("a\nb", "NA"), name="p.csv", content=b'text\n"a\nb"\n\nNA\n'),
    "CSV without a header": refused(
        r'p.csv, line 2 \(line 1 names the columns\): found "Once upon a time", wanted "text"',
        name="p.csv",
        content=b"Once upon a time\nThe end\n",
    ),
    "CSV of another column": refused(rf"set {KEY}.text=body", name="p.csv", content=b"id,body\n1,a longer text\n"),
    "CSV of semicolons": refused('found "id;text", wanted', name="p.csv", content=b"id;text\n1;a\n"),
    "CSV with commas unquoted": refused(
        "line 2 .*: found 3 cells, wanted 2, as its first line has", error=SourceError, name="p.csv", content=b"id,text\n1,a, b\n"
    ),
    "CSV with a column twice": refused(
        'line 1: found the columns "text", "text", wanted each once', error=SourceError, name="p.csv", content=b"text,text\na,b\n"
    ),
    "CSV with an open quote": refused("p.csv: cannot be read as .csv", error=SourceError, name="p.csv", content=b'text\n"a\n'),
    "CSV of a huge cell": works(*prose("a" * 200_000), name="p.csv", content=b"text\n" + b"a" * 200_000 + b"\n"),
    "text, whole": works(*prose("one\ntwo\n\n \nthree\n"), name="p.txt", content=TREE.encode(), settings={"reader": "text_file"}),
    "text by the line": works(*prose("one", "two", "three"), name="p.txt", content=TREE.encode(), settings={"reader": "text_lines"}),
    "text by the paragraph": works(
        *prose("one\ntwo", "three"), name="p.txt", content=TREE.encode(), settings={"reader": "text_paragraphs"}
    ),
    "text with CRLF": works(
        *prose("one\ntwo", "three"), name="p.txt", content=b"one\r\ntwo\r\n\r\nthree\r\n", settings={"reader": "text_paragraphs"}
    ),
    "text, gzip": works(*prose("one"), name="p.txt.gz", content=gzip.compress(b"one\n"), settings={"reader": "text_lines"}),
    "text with a mark": works(*prose("one"), name="p.txt", content=codecs.BOM_UTF8 + b"one\n", settings={"reader": "text_lines"}),
    "text in Latin-1": refused(
        "line 2: found the byte 0xe9",
        error=SourceError,
        name="p.txt",
        content="one\né\n".encode("latin1"),
        settings={"reader": "text_file"},
    ),
    "text, empty": refused("found no rows in text_file", error=SourceError, name="p.txt", content=b" \n", settings={"reader": "text_file"}),
    "JSON Lines named .txt": refused(
        "found a JSON object in its first line, wanted plain text; name it p.jsonl",
        error=SourceError,
        name="p.txt",
        content=jsonl({"text": "a"}),
        settings={"reader": "text_lines"},
    ),
    "text by no reader": refused(
        "mine.reader: found 'rows', wanted one of text_file, text_lines, text_paragraphs", error=ConfigError, name="p.txt", content=b"one\n"
    ),
    "JSON Lines by a text reader": refused(
        "mine.reader: found 'text_lines', wanted one of rows",
        error=ConfigError,
        content=jsonl({"text": "a"}),
        settings={"reader": "text_lines"},
    ),
    "a word document": refused(
        "mine.path: found .*, wanted a file that ends in .parquet, .jsonl", error=ConfigError, name="p.docx", content=b"PK"
    ),
    "the same column twice": refused(
        "mine.text: found 'text', wanted another column than messages", error=ConfigError, content=b"", settings={"messages": "text"}
    ),
    "a column without a name": refused(
        "mine.role: found '', wanted the name of the key", error=ConfigError, content=b"", settings={"role": ""}
    ),
}


def source(path: Path | str, digest: str, **settings) -> LocalText:
    facts = {"source": "local", "path": str(path), "sha256": digest, "reader": "rows", "license": "cc0-1.0"}
    return LocalText(**{**COLUMNS, **facts, **settings})


def fetched(one: LocalText, directory: Path) -> list[dict]:
    """The rows that the stage writes for a source, which it checks first."""
    section = Text(calibration={"mine": one}, evaluation={})
    schema.check(section, "text")
    text.fetch(section, directory / "out", directory / "downloads")
    return list(Rows(directory / "out/calibration/mine.jsonl"))


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_file_of_ones_own_works_or_is_refused_by_name(file, tmp_path):
    path = tmp_path / file.name
    path.write_bytes(file.content)
    one = source(path, sha256(path), **file.settings)
    if file.error is None:
        assert fetched(one, tmp_path) == file.rows
    else:
        with pytest.raises(file.error, match=file.match) as caught:
            fetched(one, tmp_path)
        assert str(caught.value).startswith(KEY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.jsonl", "found a directory at .*folder.jsonl, wanted one file; join its files"),
        ("*.jsonl", r"found no file .*\*.jsonl .*patterns are not expanded"),
        ("~nobody-by-this-name/a.jsonl", ".* cannot be read \\(RuntimeError"),
        ("a\0.jsonl", "found no file"),
        ("x" * 5000 + ".jsonl", ".* cannot be read \\(OSError"),
    ],
)
def test_a_path_that_is_no_file_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SourceError, match=rf"^{KEY}: {message}"):
        fetched(source(name, "0" * 64), tmp_path)


def test_a_path_may_start_at_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pages.jsonl").write_bytes(jsonl({"text": "a"}))
    assert fetched(source("~/pages.jsonl", sha256(tmp_path / "pages.jsonl")), tmp_path) == prose("a")


def test_dialogues_are_a_corpus_of_evaluation_too(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(jsonl(HELLO))
    text.fetch(Text(calibration={}, evaluation={"chat": source(path, sha256(path))}), tmp_path / "out", tmp_path / "downloads")
    assert list(Rows(tmp_path / "out/evaluation/chat.jsonl")) == [HELLO]


def test_the_rows_of_a_task_keep_their_columns(tmp_path):
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(row))
    text.fetch(Text(calibration={}, evaluation={"piqa": source(path, sha256(path))}), tmp_path / "out", tmp_path / "downloads")
    assert list(Rows(tmp_path / "out/evaluation/piqa.jsonl")) == [row]
