"""The command that writes the page."""

import sys

import pytest

from stages import compare
from stages.errors import SparsesweepError
from stages.experiments.reading import Missing
from tests.experiments import synthetic


@pytest.fixture()
def run(monkeypatch, tmp_path):
    """Run the command in an empty directory, given what is read; what was written."""
    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "write", lambda directory, groups, missing: written.append((directory, groups, missing)))

    def go(experiments, groups, *arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        monkeypatch.setattr(compare, "read_experiments", lambda: experiments)
        monkeypatch.setattr(compare, "read_groups", lambda experiments: groups)
        compare.main()
        return written

    return go


def test_everything_that_is_read_is_written(run, tmp_path, capsys):
    group, first, second = synthetic.other_group(), Missing(name="a", reason="b"), Missing(name="c", reason="d")
    ((directory, groups, missing),) = run(([], [first]), ([group], [second]), "--out", "elsewhere")
    assert (str(directory), groups, missing) == ("elsewhere", [group], [first, second])
    (kept,) = (tmp_path / "frontiers").iterdir()
    said = f"wrote elsewhere/index.html: 2 experiments\nfor the picture of a card: -S publish.frontier={kept.stem}\n"
    assert capsys.readouterr().out == said


def test_without_a_directory_it_is_one_that_git_ignores_and_a_card_may_show_the_frontier(run, tmp_path, capsys):
    ((directory, _, _),) = run(([], []), ([synthetic.other_group()], []))
    assert str(directory) == "comparison"
    (kept,) = (tmp_path / "frontiers").iterdir()
    assert f"\nfor the picture of a card: -S publish.frontier={kept.stem}\n" in capsys.readouterr().out


def test_without_an_experiment_the_reasons_are_said(run):
    with pytest.raises(SystemExit, match="error: found no evaluated experiment, wanted at least one; .*\nleft out a: why"):
        run(([], [Missing(name="a", reason="why")]), ([], []))


def test_an_error_is_said_in_one_line(run, monkeypatch):
    def broken(directory, groups, missing):
        raise SparsesweepError("no place")

    monkeypatch.setattr(compare, "write", broken)
    with pytest.raises(SystemExit, match="^error: no place$"):
        run(([], []), ([synthetic.other_group()], []))
