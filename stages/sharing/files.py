"""The files of experiments, by the hashes in their locks: sent to the DVC remote, and brought from there, all at once.

`dvc exp push` and `dvc exp pull` use the remote that was set in the commit from which an experiment started: of one that ran before its
team set a remote they send nothing, and do not say so. Here it is the remote that is set now.
"""

from collections.abc import Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dvc.fs import FileSystem
from dvc.fs.callbacks import TqdmCallback
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from tqdm import tqdm

from stages.errors import SharingError
from stages.experiments.files import DIRECTORY
from stages.experiments.lock import read_lock
from stages.files import read_json
from stages.sharing.objects import RECORDS, md5

SHOWN = 3  # how many hashes a message names
REPAIR = "`python -m stages.share --repair`"


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came: a number of files, and their size [bytes]."""

    files: int
    size: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.size / 1e6:.1f} MB"


def send(repo: Repo, commits: Sequence[str], *, repair: bool = False) -> int:
    """Send the outputs of commits that the remote has not, or has in another size; how many were sent.

    DVC's own push takes a file to be there if one of its name is, or the list of its directory, and does not look at what it sends.

    Args:
        repair: also rehash what the remote has of them, and replace what is damaged.

    Raises:
        SharingError: a file was not sent; is damaged here; is neither here nor there; or is damaged there and not here.
        DvcException, OSError: the remote refuses.
    """
    hashes = _sound_outputs(repo, commits)
    here = {one for one in hashes if _path(repo, one).exists()}
    remote = repo.cloud.get_remote_odb(None, "push")
    there = _there(remote, hashes)
    if lost := sorted(_oid(one) for one in hashes - here - there.keys()):
        advice = "running the experiment again writes them"
        raise SharingError(f"found {len(lost)} files neither here nor on the remote ({_named(lost)}), wanted all; {advice}")
    damaged = {one for one in here & there.keys() if there[one] != _path(repo, one).stat().st_size}
    if repair:
        damaged |= _damaged(remote, there.keys() - damaged)
    wanted = here & (damaged | (hashes - there.keys()))
    _require_sound(repo, wanted)
    for one in wanted & damaged:
        with suppress(FileNotFoundError):  # another member replaces it, too
            remote.delete(_oid(one))
    sent = _transfer(repo, remote, wanted)
    if left := sorted(_oid(one) for one in damaged - here):
        advice = f"a member who has them replaces them by {REPAIR}"
        raise SharingError(f"found {len(left)} files damaged on the remote, and not here ({_named(left)}), wanted all sound; {advice}")
    return sent


def send_records(repo: Repo) -> int:
    """Send DVC's records of runs; how many. DVC itself logs that one was not sent, and goes on.

    Raises:
        SharingError: a record was not sent.
        DvcException, OSError: the remote refuses.
    """
    cache, remote = repo.cache.legacy, repo.cloud.get_remote_odb(None, "push", hash_name=repo.cache.legacy.hash_name)
    listed = [Path(RECORDS, key[:2], key, value) for key, value in repo.stage_cache.push(None)]
    names = [name for name in listed if Path(cache.path, name).exists()]  # without what a run that goes on has renamed meanwhile
    found = _sizes(remote.fs, [remote.fs.join(remote.path, *name.parts) for name in names])
    if lost := [name.name for name, size in zip(names, found, strict=True) if size != Path(cache.path, name).stat().st_size]:
        advice = "share again, which sends what is left"
        raise SharingError(f"found that {len(lost)} run records were not sent ({_named(lost)}), wanted all; {advice}")
    return len(names)


def bring(repo: Repo, commits: Sequence[str], path: Path) -> Brought:
    """Bring the outputs of commits that lie under a path into the cache; and of all other directories the lists of their files.

    Without a list `dvc gc --cloud` takes the files in it for unused, and deletes them on the remote. What is damaged on the remote, or
    not there, does not come; see require_brought.

    Raises:
        DvcException, OSError: the remote refuses.
    """
    outputs = _outputs(commits, path)
    came: set[HashInfo] = set(repo.cloud.pull(outputs | _lists(commits)).transferred)
    came |= repo.cloud.pull(_members(repo, _here(repo, outputs))).transferred  # of the lists that have come
    here = _here(repo, came)
    return Brought(files=len(here), size=sum(_path(repo, one).stat().st_size for one in here))


def require_brought(repo: Repo, commit: str, path: Path) -> None:
    """Refuse a commit of which `bring` did not bring everything.

    Raises:
        SharingError: a file did not come, or is damaged on the remote.
    """
    outputs = _outputs([commit], path)
    wanted = outputs | _lists([commit]) | _members(repo, _here(repo, outputs))
    if missing := sorted(map(_oid, wanted - _here(repo, wanted))):
        advice = f"on the remote they are damaged or not there: a member who has them replaces them by {REPAIR}"
        raise SharingError(f"found that {len(missing)} of {len(wanted)} files did not come ({_named(missing)}), wanted all; {advice}")


def _lists(commits: Sequence[str]) -> set[HashInfo]:
    """The lists of the files of all outputs of commits that are directories."""
    return {one for one in _outputs(commits, Path()) if one.isdir}


def _here(repo: Repo, hashes: Iterable[HashInfo]) -> set[HashInfo]:
    """Those that the cache has."""
    return {one for one in hashes if _path(repo, one).exists()}


def _sound_outputs(repo: Repo, commits: Sequence[str]) -> set[HashInfo]:
    """All outputs of commits, and the files of those directories whose lists are here, none of them damaged."""
    outputs = _outputs(commits, Path())
    lists = _here(repo, _lists(commits))
    _require_sound(repo, lists)
    return outputs | _members(repo, lists)


def _there(remote: HashFileDB, hashes: set[HashInfo]) -> dict[HashInfo, int]:
    """The sizes [bytes] of those files that are on the remote."""
    found = zip(hashes, _sizes(remote.fs, [remote.oid_to_path(_oid(one)) for one in hashes]), strict=True)
    return {one: size for one, size in found if size is not None}


def _sizes(fs: FileSystem, paths: Sequence[str]) -> list[int | None]:
    """The size [bytes] of each path on a remote; None of one that is not there."""
    found: list[int | None] = []
    for info in fs.info(list(paths), return_exceptions=True):
        if isinstance(info, Exception) and not isinstance(info, FileNotFoundError | NotADirectoryError):
            raise info
        found.append(None if isinstance(info, Exception) else info["size"])
    return found


def _damaged(remote: HashFileDB, hashes: Set[HashInfo]) -> set[HashInfo]:
    """Those of a remote's files that are not what their names say; all of them are read."""
    listed = list(hashes)
    with ThreadPoolExecutor(remote.fs.jobs) as threads:
        digests = threads.map(lambda one: file_md5(remote.oid_to_path(_oid(one)), remote.fs), listed)
        rehashed = tqdm(zip(listed, digests, strict=True), total=len(listed), desc="rehashing the remote", unit="file")
        return {one for one, digest in rehashed if digest != _digest_of(one)}


def _require_sound(repo: Repo, hashes: Iterable[HashInfo]) -> None:
    """Refuse files of the cache that are not what their names say."""
    if damaged := sorted(_oid(one) for one in hashes if md5(_path(repo, one)) != _digest_of(one)):
        advice = "`make verify-cache` says of what they are, and how they come again"
        raise SharingError(f"found {len(damaged)} files damaged in the cache ({_named(damaged)}), wanted to send sound ones; {advice}")


def _transfer(repo: Repo, remote: HashFileDB, hashes: set[HashInfo]) -> int:
    """Send files of the cache that are not on the remote, the list of a directory after the files in it; how many were sent."""
    cache = repo.cache.local
    with TqdmCallback(desc="sending", unit="file") as bar:  # without DVC's index of the remote, which would say what was there once
        result = repo.cloud.transfer(cache, remote, hashes, cache_odb=cache, callback=bar)
    if result.failed:
        raise SharingError(f"found that {len(result.failed)} files were not sent, wanted all; share again, which sends what is left")
    return len(result.transferred)


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


def _digest_of(one: HashInfo) -> str:
    """The MD5 [hex] that a file has by its name."""
    return _oid(one).removesuffix(DIRECTORY)


def _named(hashes: list[str]) -> str:
    return ", ".join(hashes[:SHOWN]) + ", ..." * (len(hashes) > SHOWN)
