"""What a sweep asks git: whether what the points need is committed, and what of it an experiment has.

python -m stages.sweeps.git && dvc exp run --queue ...    refuses new files, which DVC leaves out of a queued run without a word
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from dvc.repo import Repo

from stages.errors import ConfigError, SparsesweepError
from stages.experiments.command_output import output
from stages.experiments.lock import md5_of_directory
from stages.sharing.references import of_clone, of_origin

COMPOSED = ("conf", "stages", "hydra_plugins", "dvc.yaml")  # what a point's parameters and stages are made from
ELSEWHERE = ("120000", "160000")  # git's modes of links and submodules
NEEDED = ("conf", "stages", "tasks", "hydra_plugins", "dvc.yaml", ".dvc/config")  # what a point is made of, besides its parameters


def same(first: str, second: str, paths: Sequence[str]) -> bool:
    """Whether two revisions have the same files at some paths."""
    return subprocess.run(["git", "diff", "--quiet", first, second, "--", *paths], capture_output=True).returncode == 0


@cache
def md5s(revision: str, paths: tuple[str, ...]) -> dict[str, str]:
    """The MD5 that DVC gives each of some files and directories as a commit has them.

    Without those that it has not, and those with a link or a submodule, whose contents it has not.
    """
    listed = output("git", "ls-tree", "-r", "-z", revision, "--", *paths).split("\0")
    entries = {name: entry.split() for entry, name in (line.split("\t", 1) for line in listed if line)}
    others = [name for name, (mode, *_) in entries.items() if mode in ELSEWHERE]
    objects = {name: entry[2] for name, entry in entries.items() if name not in others}
    with Repo() as repo:
        root = Path(repo.root_dir)
        objects = {name: oid for name, oid in objects.items() if not repo.dvcignore.is_ignored(repo.fs, str(root / name))}
    contents = subprocess.run(
        ["git", "cat-file", "--batch"], input="\n".join(objects.values()).encode(), capture_output=True, check=True
    ).stdout
    digests, start = dict[str, str](), 0
    for name in objects:
        head = contents.index(b"\n", start)
        end = head + 1 + int(contents[start:head].split()[2])
        digests[name] = hashlib.md5(contents[head + 1 : end], usedforsecurity=False).hexdigest()
        start = end + 1

    def under(path: str, names: Iterable[str]) -> bool:
        return any(Path(name).is_relative_to(path) for name in names)

    found = {path: digests[path] for path in paths if path in digests}
    directories = [path for path in paths if path not in found and under(path, digests) and not under(path, others)]
    return found | {path: md5_of_directory(digests, Path(path)) for path in directories}


def require_committed(paths: Sequence[str] = NEEDED) -> str:
    """The current commit, which has everything that a point needs: each point runs in a clone of it.

    Raises:
        SparsesweepError: a file is new to git or differs from the commit; names all of them.
    """
    changed = output("git", "status", "--porcelain", "--untracked-files=all", "--", *paths).splitlines()
    if changed:
        files = ", ".join(line[3:] + (" (new)" if line.startswith("??") else "") for line in changed)
        raise SparsesweepError(
            f"found {files}, wanted them committed: each point runs in a clone of the commit; `git add` and `git commit`"
        )
    return output("git", "rev-parse", "HEAD").strip()


def require_known(paths: Sequence[str] = NEEDED) -> None:
    """Refuse files that git does not know: DVC's queue runs experiments without them, in copies of what git knows.

    Raises:
        SparsesweepError: names all of them.
    """
    if new := output("git", "ls-files", "--others", "--exclude-standard", "--", *paths).splitlines():
        raise SparsesweepError(f"found {', '.join(new)}, wanted git to know them: a queued run is without them; `git add`")


def require_composed_from(revision: str, paths: Sequence[str] = COMPOSED) -> None:
    """Refuse files here that are not those of a revision whose code the points are to run: they are composed from those here.

    Raises:
        SparsesweepError: names all that differ.
    """
    changed = output("git", "diff", "--name-only", revision, "--", *paths).splitlines()
    changed += output("git", "ls-files", "--others", "--exclude-standard", "--", *paths).splitlines()
    if changed:
        wanted = f"wanted them as in {revision[:12]}: points are composed here, and run there; `git checkout` that commit"
        raise SparsesweepError(f"--revision: found {', '.join(changed)} changed, {wanted}")


def commit_of(revision: str) -> str:
    """The whole hash of a commit, branch or tag.

    Raises:
        ConfigError: git knows none.
    """
    try:
        return output("git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    except SparsesweepError:
        raise ConfigError(f"--revision: found {revision!r}, wanted a commit, a branch or a tag") from None


def require_at(remote: str, revision: str) -> None:
    """Refuse a revision that other machines cannot clone from a git remote.

    Raises:
        SparsesweepError: there is no such remote, or the revision was not pushed to it.
    """
    if remote not in output("git", "remote").split():
        raise SparsesweepError(f"found no git remote {remote!r}, wanted one from which other machines clone: `git remote add {remote} URL`")
    if not any(name.strip().startswith(f"{remote}/") for name in output("git", "branch", "--remotes", "--contains", revision).splitlines()):
        raise SparsesweepError(
            f"found commit {revision[:12]} on no branch of {remote}, wanted it there for other machines: `git push {remote}`"
        )


def fetch_experiments(remote: str, names: Sequence[str], ran: Sequence[str] = ()) -> None:
    """Bring those experiments of these names that a remote has: what git keeps of them, not their data.

    Args:
        ran: names of those that were run just now, since what was here was no result; of others what is here stays.
    """
    here = {reference.path for reference in of_clone() if reference.name not in set(ran)}
    found = [reference.path for reference in of_origin(remote) if reference.name in set(names) and reference.path not in here]
    wanted = [f"+{path}:{path}" for path in found]
    if wanted:
        output("git", "fetch", "--quiet", "--no-tags", remote, *wanted)


def url(remote: str) -> str:
    """Where a git remote is."""
    return output("git", "remote", "get-url", remote).strip()


def main() -> None:
    try:
        require_known()
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
