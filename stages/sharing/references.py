"""The experiments that git knows: refs/exps/ of this clone and of its git remote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stages.experiments.command_output import output
from stages.experiments.reading import EXPERIMENTS

REFERENCE = re.compile(rf"{EXPERIMENTS}[0-9a-f]{{2}}/[0-9a-f]{{38}}/[^/]+")  # others are DVC's own, such as those of its queue


@dataclass(frozen=True, kw_only=True, order=True)
class Reference:
    """An experiment as git knows it. path: the full reference. commit: 40 hex digits."""

    path: str
    commit: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def of_clone() -> list[Reference]:
    """The experiments of this clone.

    Raises:
        SparsesweepError: git fails; with its words.
    """
    return _parsed(output("git", "for-each-ref", "--format=%(objectname) %(refname)", EXPERIMENTS))


def of_origin(git_remote: str) -> list[Reference]:
    """The experiments on a git remote.

    Raises:
        SparsesweepError: there is no such remote, or it does not answer; with git's words.
    """
    return _parsed(output("git", "ls-remote", git_remote, f"{EXPERIMENTS}*"))


def counted(references: Sequence[Reference]) -> str:
    """How many they are and what they are called, such as "2 experiments (wanda-50, wanda-60)"."""
    names = f" ({', '.join(one.name for one in references)})" if references else ""
    return f"{len(references)} experiment{'s' * (len(references) != 1)}{names}"


def _parsed(lines: str) -> list[Reference]:
    pairs = (line.split(maxsplit=1) for line in lines.splitlines())
    return sorted(Reference(path=path, commit=commit) for commit, path in pairs if REFERENCE.fullmatch(path))
