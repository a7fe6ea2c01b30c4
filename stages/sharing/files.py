"""The files of experiments, by the hashes in their locks: sent to the DVC remote, and brought from there, all at once.

`dvc exp push` and `dvc exp pull` use the remote that was set in the commit from which an experiment started: of one that ran before its
team set a remote they send nothing, and do not say so. Here it is the remote that is set now.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dvc.repo import Repo
from dvc_data.hashfile.hash_info import HashInfo

from stages.errors import SharingError
from stages.experiments.lock import read_lock
from stages.files import read_json

SHOWN = 3  # how many hashes a message names


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came: a number of files, and their size [bytes]."""

    files: int
    size: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.size / 1e6:.1f} MB"


def send(repo: Repo, commits: Sequence[str]) -> int:
    """Send all outputs of commits; how many files were not there yet.

    Raises:
        SharingError: a file was not sent, or is neither here nor there.
        DvcException, OSError: the remote refuses.
    """
    outputs = _outputs(commits, Path())
    hashes = outputs | _members(repo, {one for one in outputs if _path(repo, one).exists()})
    here = {one for one in hashes if _path(repo, one).exists()}
    there = set(repo.cloud.get_remote_odb(None, "push").list_oids_exists({_oid(one) for one in hashes - here}))
    if lost := sorted(_oid(one) for one in hashes - here if _oid(one) not in there):
        advice = "running the experiment again writes them"
        raise SharingError(f"found {len(lost)} files neither here nor on the remote ({_named(lost)}), wanted all; {advice}")
    result = repo.cloud.push(here)
    if result.failed:
        raise SharingError(f"found that {len(result.failed)} files were not sent, wanted all; share again, which sends what is left")
    return len(result.transferred)


def bring(repo: Repo, commits: Sequence[str], path: Path) -> Brought:
    """Bring the outputs of commits that lie under a path into the cache; and of all other directories the lists of their files.

    Without a list `dvc gc --cloud` takes the files in it for unused, and deletes them on the remote.

    Raises:
        SharingError: a file did not come, or is damaged on the remote.
        DvcException, OSError: the remote refuses.
    """
    hashes = _outputs(commits, path)
    came = _pull(repo, hashes | {one for one in _outputs(commits, Path()) if one.isdir})
    came |= _pull(repo, _members(repo, hashes))
    return Brought(files=len(came), size=sum(_path(repo, one).stat().st_size for one in came))


def _pull(repo: Repo, hashes: set[HashInfo]) -> set[HashInfo]:
    result = repo.cloud.pull(hashes)
    came: set[HashInfo] = result.transferred
    if missing := sorted(_oid(one) for one in hashes if not _path(repo, one).exists()):
        advice = "on the remote they are damaged or not there: the member who ran it shares it again"
        raise SharingError(f"found that {len(missing)} of {len(hashes)} files did not come ({_named(missing)}), wanted all; {advice}")
    return came


def _outputs(commits: Sequence[str], path: Path) -> set[HashInfo]:
    """The outputs under a path that the locks of commits name."""
    entries = [entry for commit in commits for stage in read_lock(commit).values() for entry in stage.get("outs", [])]
    return {HashInfo("md5", entry["md5"]) for entry in entries if Path(entry["path"]).is_relative_to(path)}


def _members(repo: Repo, hashes: Iterable[HashInfo]) -> set[HashInfo]:
    """The files of those that are directories."""
    return {HashInfo("md5", entry["md5"]) for one in hashes if one.isdir for entry in read_json(_path(repo, one))}


def _path(repo: Repo, one: HashInfo) -> Path:
    """Where a file lies in the cache."""
    return Path(repo.cache.local.oid_to_path(_oid(one)))


def _oid(one: HashInfo) -> str:
    return str(one.value)


def _named(hashes: list[str]) -> str:
    return ", ".join(hashes[:SHOWN]) + ", ..." * (len(hashes) > SHOWN)
