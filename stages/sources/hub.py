"""Download files of a model hub's repositories: revisions are resolved to commits, files are checked against their hashes."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # the transport of huggingface_hub, whose errors it lets through
from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stages.errors import SourceError
from stages.files import is_inner_path, require_free_disk, sha256
from stages.rows import shown

log = logging.getLogger(__name__)

OTHER_ANSWERS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
)  # what huggingface_hub raises on answers of another form


@dataclass(kw_only=True, slots=True)
class Repository:
    """A repository at one commit.

    licenses: as its card states them. sizes: file -> bytes. hashes: file -> SHA-256 [hex], for files that the hub stores by content hash.
    """

    repo: str
    kind: str  # model or dataset
    commit: str
    licenses: tuple[str, ...]
    sizes: dict[str, int]
    hashes: dict[str, str]

    def directory(self, downloads: Path) -> Path:
        """The directory under `downloads` for this commit's files."""
        return downloads / f"{self.kind}--{self.repo.replace('/', '--')}@{self.commit}"


def require_free_disk_for(repository: Repository, files: list[str], directory: Path) -> None:
    """Refuse to download more than the disk can hold; files that are already in `directory` are not counted.

    Raises:
        SparsesweepError: names the bytes free and the bytes needed.
    """
    require_free_disk(directory, sum(repository.sizes[name] for name in files if not (directory / name).is_file()))


def resolve(repo: str, revision: str, kind: str) -> Repository:
    """Ask the hub for the files of `repo` at `revision`; none is downloaded.

    Args:
        kind: "model" or "dataset".

    Raises:
        SourceError: the repository or revision does not exist, it is gated and there is no token, or the hub does not answer.
    """
    try:
        info: Any = HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=True)
    except GatedRepoError:
        raise SourceError(_gated(repo, kind)) from None
    except RevisionNotFoundError:
        raise SourceError(f"hub {kind} {repo}: found no revision {revision!r}") from None
    except HFValidationError as error:
        raise SourceError(f"hub {kind}: found {repo!r}, wanted ORG/NAME ({error})") from None
    except RepositoryNotFoundError:
        raise SourceError(f"hub {kind} {repo}: not found; it may be private, or misspelled") from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise SourceError(f"hub {kind} {repo}: the hub does not answer ({error})") from error
    except OTHER_ANSWERS as error:
        raise SourceError(f"hub {kind} {repo}: found an answer that describes no repository ({error})") from error
    _require_described(info, f"hub {kind} {repo}")
    if info.gated and get_token() is None:
        raise SourceError(_gated(repo, kind))
    siblings = info.siblings or []
    card = info.card_data
    return Repository(
        repo=repo,
        kind=kind,
        commit=info.sha,
        licenses=_licenses(card),
        sizes={file.rfilename: file.size or 0 for file in siblings},
        hashes={file.rfilename: file.lfs.sha256 for file in siblings if file.lfs},
    )


def _require_described(info: Any, location: str) -> None:
    """Refuse an answer whose commit, which becomes the name of a directory, or whose files are not what a hub states."""
    if not (isinstance(info.sha, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", info.sha)):
        raise SourceError(f"{location}: found the commit {shown(info.sha)}, wanted 40 or 64 hexadecimal digits")
    for file in info.siblings or []:
        hashed = file.lfs is None or isinstance(file.lfs.sha256, str)
        if not (isinstance(file.rfilename, str) and isinstance(file.size, int | None) and (file.size or 0) >= 0 and hashed):
            raise SourceError(
                f"{location}: found the file {shown(file.rfilename)} of {shown(file.size)} bytes, wanted a name, a size, a hash"
            )
    stated = getattr(info.card_data, "license", None) if info.card_data else None
    if not (isinstance(stated, str | None) or isinstance(stated, list) and all(isinstance(name, str) for name in stated)):
        raise SourceError(f"{location}: found the licence {shown(stated)} on its card, wanted a name")


def _licenses(card: Any) -> tuple[str, ...]:
    stated = getattr(card, "license", None) if card else None
    return (stated,) if isinstance(stated, str) else tuple(stated or ())


def _gated(repo: str, kind: str) -> str:
    return f"hub {kind} {repo} is gated: accept its terms on the hub and set HF_TOKEN to a token that may read it"


def download(repository: Repository, files: list[str], directory: Path) -> None:
    """Download `files` into `directory`.

    A download resumes after a dropped connection at the byte where it stopped. A second call after a failure downloads only the
    files that were not finished.

    Raises:
        SourceError: the repository lacks a file, a name is a path out of `directory`, a hash differs, or the hub stops
            answering.
        SparsesweepError: before the first byte: the disk has not enough space.
    """
    location = f"hub {repository.kind} {repository.repo}"
    for name in files:
        if not is_inner_path(name):
            raise SourceError(f"{location}: found the file name {name!r}, wanted a path inside the repository")
        if name not in repository.sizes:
            raise SourceError(f"{location}: found no file {name!r} at {repository.commit}")
    require_free_disk_for(repository, files, directory)
    for name in files:
        try:
            path = hf_hub_download(repository.repo, name, repo_type=repository.kind, revision=repository.commit, local_dir=directory)
        except (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            EntryNotFoundError,
            httpx2.HTTPError,
            OSError,
            RuntimeError,
            *OTHER_ANSWERS,
        ) as error:
            raise SourceError(f"{location}, file {name}: {error}") from error
        expected_sha256 = repository.hashes.get(name)
        if expected_sha256 is not None and (actual_sha256 := sha256(Path(path))) != expected_sha256:
            Path(path).unlink()
            raise SourceError(f"{location}, file {name}: found hash {actual_sha256}, wanted {expected_sha256}")
        log.info("read %s of %s (%.1f MB)", name, repository.repo, repository.sizes[name] / 1e6)
