"""DVC's cache, rehashed: which files are not what their names say.

DVC takes a file of its cache to be sound as long as it is read-only: it does not notice one that was damaged on the disk, or was written
through a link to it.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dvc.utils import dict_sha256
from tqdm import tqdm

from stages.experiments.files import DIRECTORY
from stages.experiments.lock import LOCK, OUTPUTS, Loader, object_of, read_lock
from stages.files import read_json
from stages.sharing.references import of_clone

RECORDS = Path("runs")  # in the cache: DVC's records of runs by SHA-256
SIZES = ["size", "nfiles"]  # keys of a record that its hash leaves out
WORKSPACE = "workspace"


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A file of the cache that is not what its name says. found: its hash, or why it has none."""

    path: Path
    found: str

    @property
    def oid(self) -> str:
        """What its name says: the MD5 of an output, or the SHA-256 of a record."""
        return self.path.name if RECORDS.name in self.path.parts[-4:-3] else self.path.parent.name + self.path.name


def damaged(cache: Path) -> tuple[list[Damaged], int, int]:
    """Rehash a cache. A file that another process removes meanwhile is not counted.

    Returns:
        The damaged files, and how many files and bytes were read.
    """
    outputs = {path: path.stat().st_size for path in (cache / OUTPUTS).glob("??/*") if path.suffix in ("", DIRECTORY)}
    records = list((cache / RECORDS).glob("??/*/*"))
    found = []
    bar = tqdm(total=sum(outputs.values()), desc="rehashing", unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, digest in zip(outputs, threads.map(md5, outputs), strict=True):
            bar.update(outputs[path])
            if digest is not None and digest != (path.parent.name + path.name).removesuffix(DIRECTORY):
                found.append(Damaged(path=path, found=digest))
    found += [Damaged(path=path, found=digest) for path in records if (digest := _digest_of_record(path)) not in (None, path.name)]
    return found, len(outputs) + len(records), sum(outputs.values())


def md5(path: Path) -> str | None:
    """The MD5 [hex] of a file; None if it is gone."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"nothing that can be read ({error.strerror})"


def _digest_of_record(path: Path) -> str | None:
    """The SHA-256 [hex] of a record of a run, as DVC computes it; None if it is gone."""
    try:
        record = yaml.load(path.read_text(encoding="utf8"), Loader=Loader)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"nothing that can be read ({type(error).__name__})"
    if not isinstance(record, dict):
        return "no record"
    digest: str = dict_sha256(record, exclude=SIZES)
    return digest


def users(cache: Path, found: Iterable[Damaged]) -> dict[str, list[str]]:
    """Hash of each damaged output -> the experiments and paths that it belongs to; without those that no lock of this clone names."""
    wanted = {one.oid for one in found}
    named: dict[str, list[str]] = defaultdict(list)
    for name, lock in _locks():
        for oid, path in _entries(cache, lock):
            if oid in wanted:
                named[oid].append(f"{path} of {name}")
    return named


def drop(cache: Path, found: Iterable[Damaged]) -> list[str]:
    """Remove damaged files from the cache, and from the workspace those that are links to them or copies of them.

    Returns:
        The paths in the workspace that were removed.
    """
    wanted = {one.oid for one in found}
    named = [(oid, Path(path)) for oid, path in _entries(cache, _workspace()) if oid in wanted and not oid.endswith(DIRECTORY)]
    linked = [path for oid, path in named if path.is_file() and md5(path) != oid]
    for path in (*linked, *(one.path for one in found)):
        path.unlink(missing_ok=True)
    return [str(path) for path in linked]


def _locks() -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield WORKSPACE, _workspace()
    for reference in of_clone():
        yield reference.name, read_lock(reference.commit)


def _workspace() -> Mapping[str, Any]:
    lock = Path(LOCK)
    stages: Mapping[str, Any] = yaml.load(lock.read_text(encoding="utf8"), Loader=Loader).get("stages", {}) if lock.is_file() else {}
    return stages


def _entries(cache: Path, lock: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Hash and path of every output in a lock, and of the files in those that are directories; of a damaged list none."""
    for entry in (entry for stage in lock.values() for entry in stage.get("outs", [])):
        oid, path = entry["md5"], entry["path"]
        yield oid, path
        listed = object_of(cache, oid)
        if oid.endswith(DIRECTORY) and md5(listed) == oid.removesuffix(DIRECTORY):
            yield from ((file["md5"], f"{path}/{file['relpath']}") for file in read_json(listed))
