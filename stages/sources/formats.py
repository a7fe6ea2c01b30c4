"""Parse data files: JSON Lines, JSON, CSV and Parquet into rows, plain text into a string. Values stay as the file has them.

Each row comes with its location, for errors: the file's name, and the line, or the number of the row where there are no lines.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import SourceError
from stages.files import parsed_json
from stages.rows import Row, shown
from stages.sources.bounds import LARGEST, LONGEST_LINE, read_whole, too_large

TEXT_ENDING = ".txt"
LINES = (".jsonl", ".json", ".csv", TEXT_ENDING)
COMPRESSED = (".gz", ".zst")
ENDINGS = (".parquet", *LINES, *(ending + compressed for compressed in COMPRESSED for ending in LINES))
MAGIC = {  # the first bytes of what is no text
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
}
ENCODINGS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
UTF8 = "wanted text in UTF-8, such as `iconv -f LATIN1 -t UTF-8` makes of Latin-1"
BATCH = 1024  # rows of a Parquet file that are in memory together

Located = tuple[str, Row]


def ending(path: object) -> str | None:
    """The ending of a file's name that says its format, without that of its compression; None if it is no known one."""
    name = str(path).lower()
    if not isinstance(path, str | Path) or not name.endswith(ENDINGS):
        return None
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def is_text(path: object) -> bool:
    """Whether a file is plain text, by the ending of its name."""
    return ending(path) == TEXT_ENDING


def read_rows(path: Path, only: Collection[str] | None = None) -> Iterator[Located]:
    """Yield location and row.

    Args:
        only: columns that are wanted; where the file has any of them and its format allows it, the others are not read.

    Raises:
        SourceError: the file is not what its ending says; names file and line.
    """
    read = {".parquet": _parquet, ".csv": _csv}.get(str(ending(path)), _json)
    with _readable(path):
        yield from read(path, only)


def read_text(path: Path) -> str:
    """The text of a file, its lines ended by a line feed.

    Raises:
        SourceError: the file is not text in UTF-8, or its first line is a JSON object; names file and line.
    """
    with _readable(path), _opened(path) as stream:
        lines = [f"{line[:-2]}\n" if line.endswith("\r\n") else line for line in _held(_lines(stream, path), path)]
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("{") and _is_json(first):
        raise SourceError(f"{path.name}: found a JSON object in its first line, wanted plain text; name it {path.stem}.jsonl")
    return "".join(lines)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a damaged file into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error, UnicodeError, OverflowError) as error:
        raise SourceError(f"{path.name}: cannot be read as {ending(path)} ({error}); is it whole, and its ending right?") from error


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Yield the decompressed bytes of a file."""
    raw: Any
    match path.suffix.lower():
        case ".gz":
            raw = gzip.GzipFile(path)
        case ".zst":
            raw = pa.input_stream(str(path), compression="zstd")
        case _:
            raw = path.open("rb", buffering=0)
    with raw, io.BufferedReader(raw) as stream:
        yield stream


def _lines(stream: io.BufferedReader, path: Path) -> Iterator[str]:
    """Yield the lines of a text, ended by their line feed, without its byte order mark.

    Raises:
        SourceError: the bytes are no text in UTF-8, or in the UTF-16 or UTF-32 that a byte order mark says; names the line.
    """
    head = stream.peek(8)[:8]
    magic = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if magic is not None:
        raise SourceError(f"{path.name}: found the bytes of {magic}, wanted text; give the file the ending of its format")
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if head.startswith(mark)), None)
    if encoding is not None:
        yield from io.StringIO(read_whole(stream, path.name).decode(encoding), newline="\n")
        return
    for number, data in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
        if len(data) > LONGEST_LINE:
            raise too_large(f"{path.name}, line {number}", LONGEST_LINE)
        try:
            line = data.decode("utf8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path.name}, line {number}: found the byte {data[error.start]:#x}, {UTF8}") from None
        if "\0" in line:
            raise SourceError(f"{path.name}, line {number}: found a zero byte, as UTF-16 has them, {UTF8}")
        yield line.removeprefix("\ufeff") if number == 1 else line


def _held(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The same lines, of a text that is held in memory as a whole.

    Raises:
        SourceError: they are too large for that.
    """
    size = 0
    for line in lines:
        size += len(line)
        if size > LARGEST:
            raise too_large(path.name, LARGEST)
        yield line


def _json(path: Path, _: Collection[str] | None) -> Iterator[Located]:
    """JSON Lines; or one JSON array of objects; or one JSON object."""
    with _opened(path) as stream:
        lines = enumerate(_lines(stream, path), start=1)
        start, first = next(((number, line) for number, line in lines if line.strip()), (0, ""))
        if not first:
            return
        if first.lstrip().startswith("[") or first.strip().startswith("{") and not first.strip().endswith("}"):
            rest = list(_held((line for _, line in lines), path))
            if rest or first.lstrip().startswith("["):
                yield from _whole(first + "".join(rest), path)
                return
        for number, line in chain([(start, first)], lines):
            if line.strip():
                cut = "" if line.endswith("\n") else "; it is the last line: was the file cut off?"
                yield _row(_parsed(line, f"{path.name}, line {number}", cut), f"{path.name}, line {number}")


def _whole(text: str, path: Path) -> Iterator[Located]:
    """The rows of a JSON array, or of a single object."""
    value = _parsed(text, path.name, "; wanted one object a line, or one array of objects")
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _row(row, f"{path.name}, row {number}")


def _row(value: Any, location: str) -> Located:
    if not isinstance(value, dict):
        raise SourceError(f'{location}: found {shown(value)}, wanted an object such as {{"text": …}}')
    return location, value


def _parsed(text: str, location: str, advice: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise SourceError(f"{location}: found the key {shown(twice)} twice in one object, wanted it once")
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{location}: not JSON ({error}){advice}") from None


def _is_json(text: str) -> bool:
    try:
        parsed_json(text)
    except ValueError:
        return False
    return True


def _csv(path: Path, _: Collection[str] | None) -> Iterator[Located]:
    """Comma-separated values; the first line names the columns, and every value is a string."""
    csv.field_size_limit(LONGEST_LINE)
    size = 0  # of the row that is being read

    def counted(lines: Iterable[str]) -> Iterator[str]:
        nonlocal size
        for number, line in enumerate(lines, start=1):
            size += len(line)
            if size > LONGEST_LINE:
                raise too_large(f"{path.name}, the row that ends in line {number} or later", LONGEST_LINE)
            yield line

    with _opened(path) as stream:
        reader = csv.reader(counted(_lines(stream, path)), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise SourceError(f"{path.name}, line 1: found the columns {', '.join(map(shown, header))}, wanted each once")
        for cells in reader:
            size, location = 0, f"{path.name}, line {reader.line_num} (line 1 names the columns)"
            if not cells:
                continue
            if len(cells) != len(header):
                wanted = f"wanted {len(header)}, as its first line has; a cell with commas stands in double quotes"
                raise SourceError(f"{location}: found {len(cells)} cells, {wanted}")
            yield location, dict(zip(header, cells, strict=True))


def _parquet(path: Path, only: Collection[str] | None) -> Iterator[Located]:
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in only] if only is not None else []
        batches = file.iter_batches(BATCH, columns=columns or None)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            yield f"{path.name}, row {number}", row
