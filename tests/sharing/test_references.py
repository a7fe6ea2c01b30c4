"""What git calls an experiment."""

import subprocess

import pytest

from stages.errors import SparsesweepError
from stages.sharing.references import Reference, counted, of_clone, of_origin
from tests.project import ENVIRONMENT


@pytest.fixture()
def commit(tmp_path, monkeypatch) -> str:
    """The one commit of a repository in the current directory, which is its own remote "origin"."""
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "A commit"], ["remote", "add", "origin", str(tmp_path)]):
        subprocess.run(["git", *command], env=ENVIRONMENT, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_experiments_are_found_here_and_on_a_remote_and_dvcs_own_references_are_not(commit):
    experiment = f"refs/exps/{commit[:2]}/{commit[2:]}/wanda-50"
    for path in (experiment, "refs/exps/exec/EXEC_HEAD", "refs/exps/celery/stash", "refs/heads/refs/exps/x"):
        subprocess.run(["git", "update-ref", path, commit], check=True)
    wanted = [Reference(path=experiment, commit=commit)]
    assert of_clone() == of_origin("origin") == wanted
    assert wanted[0].name == "wanda-50"


def test_a_remote_that_is_not_there_is_an_error_in_gits_words(commit):
    with pytest.raises(SparsesweepError, match="git ls-remote absent failed: fatal: 'absent' does not appear to be a git repository"):
        of_origin("absent")


@pytest.mark.parametrize(("names", "words"), [([], "0 experiments"), (["a"], "1 experiment (a)"), (["a", "b"], "2 experiments (a, b)")])
def test_experiments_are_counted_and_named(names, words):
    assert counted([Reference(path=f"refs/exps/ab/c/{name}", commit="c") for name in names]) == words
