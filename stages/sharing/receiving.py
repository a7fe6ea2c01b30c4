"""Receive experiments: their git references and their results, which the numbers and the page need; no weights unless asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dvc.repo import Repo

from stages.errors import NotReceivedError, SharingError
from stages.experiments.command_output import output
from stages.experiments.lock import LOCK, PARAMS, no_release, read_lock, read_yaml
from stages.files import DENSE_RESULTS, RELEASE
from stages.sharing.files import bring, require_brought
from stages.sharing.references import Reference, counted, of_clone, of_origin
from stages.sharing.remote import Remotes, checked, project

RESULTS = DENSE_RESULTS.parent  # what is brought of every experiment


def receive(names: Sequence[str]) -> Iterator[str]:
    """Receive experiments and their results, and say what was brought and what was here already. No stage is executed.

    Args:
        names: which; none: all that are on the git remote.

    Raises:
        SharingError: an experiment is not there; or a remote cannot be shared by, or fails.
        NotReceivedError: of some experiments another of the same name is here, or not all files came; the others were received.
    """
    with project() as repo:
        remotes = checked(repo, writable=False)
        wanted = _named(of_origin(remotes.git), names, remotes.git)
        here = {reference.path: reference for reference in of_clone()}
        diverged = [one for one in wanted if one.path in here and here[one.path].commit != one.commit]
        received = [one for one in wanted if one not in diverged]
        if paths := [one.path for one in received]:  # without a path DVC takes all of HEAD's
            repo.experiments.pull(remotes.git, paths, pull_cache=False)
        brought, reasons = "", {one: _divergence(one, remotes) for one in diverged}
        if remotes.dvc is not None:
            brought = f", {bring(repo, [one.commit for one in received], RESULTS)} of results"
            reasons |= {one: reason for one in received if (reason := _not_whole(repo, one))}
    yield f"received from {remotes}: {counted([one for one in received if one.path not in here])}{brought}"
    if known := [one for one in received if one.path in here]:
        yield f"here already: {counted(known)}"
    if published := [one.name for one in received if _has_no_release(one) is None]:
        yield f"with a release: {', '.join(published)}"
    if reasons:
        raise NotReceivedError([one.name for one in reasons], "; ".join(reasons.values()))


def apply(name: str, *, release: bool) -> Iterator[str]:
    """Bring an experiment of this clone into the workspace: its parameters, lock and results. No stage is executed.

    Code and configuration stay as they are; `dvc exp apply` brings those of the commit from which the experiment started, too.

    Args:
        release: whether its release comes, too.

    Raises:
        SharingError: it is not there, or it was not published; what would be lost is in no experiment; or a remote fails.
    """
    with project() as repo:
        remotes = checked(repo, writable=False)
        one = _only(of_clone(), name)
        if release:
            require_release(name)
            if remotes.dvc is not None:
                brought = bring(repo, [one.commit], RELEASE)
                require_brought(repo, one.commit, RELEASE)
                yield f"received its release: {brought}"
    _require_saved()
    for path in (PARAMS, LOCK):
        Path(path).write_text(output("git", "show", f"{one.commit}:{path}"), encoding="utf8")
    with project() as repo:
        repo.checkout(allow_missing=True)
    yield f"applied {name}: params.yaml, dvc.lock and {RESULTS}/{f', and {RELEASE}/' if release else ''}"


def _require_saved() -> None:
    """Refuse to replace parameters and a lock that neither HEAD nor an experiment has."""
    states = ["HEAD", *(one.commit for one in of_clone())]
    saved = output("git", "rev-parse", *(f"{state}:{path}" for state in states for path in (PARAMS, LOCK))).split()
    here = output("git", "hash-object", PARAMS, LOCK).split()
    if here not in [saved[start : start + 2] for start in range(0, len(saved), 2)]:
        advice = "`dvc exp save -n NAME` keeps them, `git checkout` drops them"
        raise SharingError(f"{PARAMS}, {LOCK}: found changes that no experiment has, wanted none that would be lost: {advice}")


def require_release(name: str) -> None:
    """Refuse an experiment of this clone without a release, or with one that another run left.

    Raises:
        SharingError: naming it, and those that have one.
    """
    if reason := _has_no_release(_only(of_clone(), name)):
        have = [one.name for one in of_clone() if _has_no_release(one) is None]
        advice = (
            f"{', '.join(have) or 'none'} of this clone has one; `dvc exp run` with its overrides and without naming a stage publishes it"
        )
        raise SharingError(f"{name}: found no release of it, wanted one ({reason}); {advice}")


def _has_no_release(one: Reference) -> str | None:
    """Why an experiment has no release of its own, or None if it has one."""
    return no_release(read_lock(one.commit), read_yaml(one.commit, PARAMS))


def _named(references: Sequence[Reference], names: Sequence[str], git_remote: str) -> list[Reference]:
    if not references:
        raise SharingError(f"found no experiment on {git_remote}, wanted one that was shared: `make share` shares those of a clone")
    known = sorted({one.name for one in references})
    if absent := [name for name in names if name not in known]:
        raise SharingError(f"found no experiment {', '.join(absent)} on {git_remote}, wanted one of {', '.join(known)}")
    return [one for one in references if not names or one.name in names]


def _only(references: Sequence[Reference], name: str) -> Reference:
    found = [one for one in references if one.name == name]
    if len(found) != 1:
        raise SharingError(f"found {len(found)} experiments {name} in this clone, wanted one; `dvc exp rename` tells them apart")
    return found[0]


def _not_whole(repo: Repo, one: Reference) -> str | None:
    """What of an experiment did not come; None if all did."""
    try:
        require_brought(repo, one.commit, RESULTS)
    except SharingError as error:
        return f"{one.name}: {error}"
    return None


def _divergence(one: Reference, remotes: Remotes) -> str:
    both = f"`dvc exp rename {one.name} NEW_NAME` and receiving again keeps both"
    return f"{one.name}: found another experiment of this name here than on {remotes.git}, wanted none or the same: {both}"
