"""Receive experiments: their git references and their results, which the numbers and the page need; no weights unless asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from dvc.repo import Repo
from dvc_data.hashfile.hash_info import HashInfo

from stages.errors import SharingError
from stages.experiments.reading import output
from stages.files import DENSE_RESULTS, RELEASE, read_json
from stages.sharing.references import Reference, counted, of_clone, of_origin
from stages.sharing.remote import Remotes, checked, project

RESULTS = DENSE_RESULTS.parent  # what is brought of every experiment
LOCK = "dvc.lock"


def receive(names: Sequence[str]) -> Iterator[str]:
    """Receive experiments and their results, and say what was brought and what was here already. No stage is executed.

    Args:
        names: which; none: all that are on the git remote.

    Raises:
        SharingError: an experiment is not there; a remote cannot be shared by, or fails; or another experiment of the same name is here,
            after the others were received.
    """
    with project() as repo:
        remotes = checked(repo, writable=False)
        wanted = _named(of_origin(remotes.git), names, remotes)
        here = {reference.path: reference for reference in of_clone()}
        diverged = [one for one in wanted if one.path in here and here[one.path].commit != one.commit]
        received = [one for one in wanted if one not in diverged]
        repo.experiments.pull(remotes.git, [one.path for one in received], pull_cache=False)
        files = 0 if remotes.dvc is None else _fetch(repo, [one.commit for one in received], RESULTS)
    yield f"received from {remotes}: {counted([one for one in received if one.path not in here])}, {files} files of results"
    if known := [one for one in received if one.path in here]:
        yield f"here already: {counted(known)}"
    if diverged:
        raise SharingError("; ".join(_divergence(one, remotes) for one in diverged))


def apply(name: str, *, release: bool) -> Iterator[str]:
    """Bring an experiment of this clone into the workspace: its parameters, lock and results. No stage is executed.

    Args:
        release: whether its release comes, too.

    Raises:
        SharingError: it is not there, or it was not published; or a remote fails.
    """
    with project() as repo:
        remotes = checked(repo, writable=False)
        (one,) = _named(of_clone(), [name], remotes)
        if release:
            if not _outputs(one.commit, RELEASE):
                raise SharingError(f"{name}: found no release, wanted an experiment that was published: `dvc exp run` with all its stages")
            if remotes.dvc is not None:
                _fetch(repo, [one.commit], RELEASE)
        repo.experiments.apply(one.commit, allow_missing=True)
    yield f"applied {name}: params.yaml, dvc.lock and {RESULTS}/{f', and {RELEASE}/' if release else ''}"


def _named(references: Sequence[Reference], names: Sequence[str], remotes: Remotes) -> list[Reference]:
    known = sorted({one.name for one in references})
    if absent := [name for name in names if name not in known]:
        raise SharingError(f"found no experiment {', '.join(absent)} on {remotes.git}, wanted one of {known}")
    if not references:
        raise SharingError(f"found no experiment on {remotes.git}, wanted one that was shared: `make share` shares those of a clone")
    return [one for one in references if not names or one.name in names]


def _fetch(repo: Repo, commits: Sequence[str], path: Path) -> int:
    """Bring the outputs of commits that lie under a path into the cache, all at once; how many files came.

    `dvc fetch` reads dvc.yaml anew for every output of every commit, which takes minutes for a sweep.
    """
    outputs = {entry for commit in commits for entry in _outputs(commit, path)}
    hashes = {HashInfo("md5", entry) for entry in outputs}
    brought = _pull(repo, hashes)
    files = {HashInfo("md5", oid) for directory in hashes if directory.isdir for oid in _files(repo, directory)}
    return brought + _pull(repo, files)


def _pull(repo: Repo, hashes: set[HashInfo]) -> int:
    result = repo.cloud.pull(hashes)
    if result.failed:
        names = ", ".join(sorted(str(one.value) for one in result.failed)[:3])
        raise SharingError(f"found {len(result.failed)} files that did not come or are damaged ({names}, ...), wanted all; try again")
    return len(result.transferred)


def _files(repo: Repo, directory: HashInfo) -> list[str]:
    """The hashes of the files of a directory in the cache; none if the remote does not have it, which DVC has said."""
    path = Path(repo.cache.local.oid_to_path(directory.value))
    return [entry["md5"] for entry in read_json(path)] if path.exists() else []


def _outputs(commit: str, path: Path) -> list[str]:
    """The hashes of the outputs under a path that a commit's lock names."""
    lock = yaml.load(output("git", "show", f"{commit}:{LOCK}"), Loader=yaml.CSafeLoader)
    entries = [entry for stage in lock.get("stages", {}).values() for entry in stage.get("outs", [])]
    return [entry["md5"] for entry in entries if path in (Path(entry["path"]), *Path(entry["path"]).parents)]


def _divergence(one: Reference, remotes: Remotes) -> str:
    both = f"`dvc exp rename {one.name} NEW_NAME` and receiving again keeps both"
    return f"{one.name}: found another experiment of this name here than on {remotes.git}, wanted none or the same: {both}"
