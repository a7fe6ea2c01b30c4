"""Send the evaluated experiments of this clone: git references, files and run records."""

from collections.abc import Iterator, Sequence

from dvc.repo import Repo

from stages.errors import SharingError
from stages.experiments.exporting import selected
from stages.experiments.reading import Experiment, Missing
from stages.schema import require
from stages.sharing.files import send, send_records
from stages.sharing.references import Reference, counted, of_clone, of_origin
from stages.sharing.remote import Remotes, checked, project


def share(experiments: Sequence[Experiment], missing: Sequence[Missing], names: Sequence[str], *, repair: bool = False) -> Iterator[str]:
    """Share experiments, and say what was sent and what was there already. What an interruption left out is sent the next time.

    Args:
        experiments, missing: as `read_experiments` reads them. names: which to share; none: all of them. repair: also rehash what the
            remote has of them, and replace what is damaged.

    Raises:
        SharingError: there is none; a remote cannot be shared by, or fails; a file is damaged here; or another experiment of the same name
            is there, after the others were sent.
        ConfigError: an experiment is not there or was not evaluated.
    """
    chosen = [one for one in selected(list(experiments), list(missing), list(names)) if one.revision is not None]
    if not chosen:
        advice = "`dvc exp run -n NAME` runs one, and `dvc exp save -n NAME` makes one of the workspace"
        reasons = "".join(f"\nleft out {one.name}: {one.reason}" for one in missing)
        raise SharingError(f"found no evaluated experiment, wanted one to share: {advice}{reasons}")
    commits = {one.revision for one in chosen}
    ours = [reference for reference in of_clone() if reference.commit in commits]
    with project() as repo:
        remotes = checked(repo, writable=True)
        there = {reference.path: reference for reference in of_origin(remotes.git)}
        diverged = [one for one in ours if one.path in there and there[one.path].commit != one.commit]
        sent = [one for one in ours if one not in diverged]
        files = _send_files(repo, remotes, sent, repair=repair)
        paths = [one.path for one in sent]
        pushed = repo.experiments.push(remotes.git, paths, push_cache=False) if paths else {}  # without a path DVC takes all of HEAD's
    if late := set(pushed.get("diverged", [])):  # another member has pushed since
        diverged += [one for one in sent if one.name in late]
    yield from _report(remotes, [one for one in sent if one not in diverged], set(there.values()), files)
    if not names:
        yield from (f"left out {one.name}: {one.reason}" for one in missing)
    if diverged:
        raise SharingError("; ".join(_divergence(one, remotes) for one in diverged))


def _send_files(repo: Repo, remotes: Remotes, sent: Sequence[Reference], *, repair: bool) -> str:
    """Send files and run records before the references, which then name nothing that is not there; what was sent, in words."""
    if remotes.dvc is None:
        require(not repair, "--repair", "no DVC remote but a shared cache", "a remote; `make verify-cache` rehashes the cache")
        return ""
    files = send(repo, [one.commit for one in sent], repair=repair)
    return f", {files} files, {send_records(repo)} run records (sent each time)"


def _report(remotes: Remotes, sent: Sequence[Reference], there: set[Reference], files: str) -> Iterator[str]:
    yield f"sent to {remotes}: {counted([one for one in sent if one not in there])}{files}"
    if known := [one for one in sent if one in there]:
        yield f"there already: {counted(known)}"


def _divergence(one: Reference, remotes: Remotes) -> str:
    keep = f"`dvc exp rename {one.name} NEW_NAME` and sharing again keeps both"
    return f"{one.name}: found another experiment of this name on {remotes.git}, wanted none or the same: {keep}"
