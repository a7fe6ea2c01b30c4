"""The plan: names, what is there, what waits for what, and how long it takes."""

import subprocess
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import pytest
import yaml

from benchmarks.unconfigured import IDENTITY, NO_CONFIGURATION
from stages.errors import ConfigError
from stages.experiments.reading import Experiment
from stages.sweeps import plan as plans
from stages.sweeps.file import read_sweep
from stages.sweeps.plan import Plan, beginning_of, plan, points_of, summary, text
from tests.project import ROOT

GRID = "overrides: [evaluation=smoke]\ngrid: {calibration.seed: [0, 1], pattern.sparsity: [0.5, 0.6]}\n"


@pytest.fixture()
def sweep(tmp_path):
    def read(text: str = GRID):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return read_sweep(path)

    return read


@pytest.fixture()
def repository(tmp_path, monkeypatch):
    """A repository with this project's dvc.yaml, and a function that commits a lock as an experiment's."""
    root = tmp_path / "repository"
    (root / "stages").mkdir(parents=True)
    (root / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (root / "stages/prune.py").write_text("original\n")
    (root / "stages/errors.py").write_text("original\n")
    sha = md5(b"original\n").hexdigest()
    monkeypatch.chdir(root)
    for name, value in {**IDENTITY, **NO_CONFIGURATION}.items():
        monkeypatch.setenv(name, value)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def commit(point, name: str, *, seconds: float = 10.0, sparse: str = "b", code: str | None = None) -> Experiment:
        stages = {
            "prune": {"outs": [{"path": "artifacts/sparse", "md5": "b"}]},
            "evaluate_sparse": {
                "deps": [{"path": "artifacts/sparse", "md5": sparse}, {"path": "stages/errors.py", "md5": code or sha}],
                "params": {"params.yaml": _tracked(point.params)},
            },
        }
        (root / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", name)
        facts = {"measurements": [], "protocol": {}, "method": "m", "pattern": "p"}
        return Experiment(name=name, revision=git("rev-parse", "HEAD"), params=point.params, prune_metrics={"seconds": seconds}, **facts)

    git("init", "-q")
    (root / ".dvc").mkdir()
    monkeypatch.setattr(plans, "cache_directory", lambda: root)
    monkeypatch.setattr(plans.Files, "json", lambda self, path: {"seconds": 5.0})
    return commit


def _tracked(params: dict) -> dict:
    (stage,) = [stage for stage in plans.stages_of("evaluate_sparse", ROOT / "dvc.yaml") if stage.name == "evaluate_sparse"]
    return stage.values(params)


def test_a_point_is_named_by_its_values_and_a_hash_of_all_parameters(sweep):
    points = points_of(sweep())
    assert [point.name.rpartition("-")[0] for point in points] == ["mine-0-0.5", "mine-0-0.6", "mine-1-0.5", "mine-1-0.6"]
    assert len({point.name for point in points}) == 4
    assert points[3].overrides == ("evaluation=smoke", "calibration.seed=1", "pattern.sparsity=0.6")
    published = points_of(sweep("target: publish\n" + GRID))
    assert not {point.name for point in points} & {point.name for point in published}


def test_two_points_that_compose_the_same_are_one(sweep):
    (point,) = points_of(sweep("points: [[method=wanda], [pattern.sparsity=0.5]]\n"))
    assert point.varied == ("method=wanda",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=wandaa", "mine.yaml: the point method=wandaa does not compose: .*Available options"),
        ("pattern.sparsity=1.5", r"does not compose: .*pattern.sparsity: found 1.5, wanted a fraction"),
        ("pattern.sparsitty=0.5", "does not compose: .*pattern.sparsitty"),
    ],
)
def test_a_point_that_does_not_compose_is_refused(sweep, override, message):
    with pytest.raises(ConfigError, match=message):
        points_of(sweep(f"points: [[method=ria], ['{override}']]\n"))


def test_a_point_is_there_if_an_experiment_has_its_parameters_code_and_target(sweep, repository):
    made = sweep()
    first, *_, last = points_of(made)
    experiments = [repository(last, "stale", sparse="a"), repository(first, "by-hand")]
    planned = plan(made, experiments)
    assert planned.there == {first.name: "by-hand"}
    assert "there, as by-hand" in text(planned, at_once=1)
    assert plan(made, [replace(experiments[1], revision=None)]).there == {}  # the workspace is no experiment
    Path("stages/prune.py").write_text("edited\n")
    repository(first, "HEAD is another code now")
    assert plan(made, [experiments[1]]).there == {}


def test_points_wait_for_the_first_that_computes_what_they_share(sweep, repository):
    made = sweep()
    first, second, third, fourth = points_of(made)
    repository(first, "HEAD")
    after = plan(made, []).after
    assert after == {
        first.name: frozenset(),
        second.name: {first.name},
        third.name: {first.name},  # the text, the base and the dense scores
        fourth.name: {first.name, third.name},  # and the windows
    }
    assert [len(wave) for wave in plan(made, []).waves()] == [1, 2, 1]


def test_the_seconds_of_a_point_are_those_of_the_nearest_of_its_base(sweep, repository):
    made = sweep()
    first, second, third, fourth = points_of(made)
    experiments = [repository(first, "a", seconds=10), repository(third, "b", seconds=100)]
    planned = plan(made, experiments)
    assert planned.seconds == {second.name: 15.0, fourth.name: 105.0}
    assert summary(planned, at_once=2) == (
        "4 points: 2 there already, 2 to run; about 60 s of prune and evaluate, 2 at once, by the nearest points measured"
    )
    other = replace(experiments[0], params={**first.params, "base": {"source": "hub"}})
    assert plan(made, [other]).seconds[second.name] is None
    assert "unknown: no point of this base was measured" in summary(plan(made, [other]), at_once=1)


def test_a_plan_without_points_to_run_says_so(sweep):
    made = sweep("points: [[method=wanda]]\n")
    points = points_of(made)
    planned = Plan(sweep=made, points=points, results={points[0].name: points[0]}, after={}, seconds={})
    assert summary(planned, at_once=1) == "1 points: 1 there already, 0 to run"
    assert planned.waves() == []


def test_results_of_other_code_than_the_experiment_has_are_not_taken(sweep, repository):
    """As `dvc exp save` keeps them after an edit."""
    points = points_of(sweep())
    saved = repository(points[0], "saved", code="f" * 32)
    assert plan(sweep(), [saved]).there == {}
    assert plan(sweep(), [repository(points[0], "ran")]).there == {points[0].name: "ran"}


def test_names_begin_as_a_search_looks_for_them(sweep):
    named = replace(sweep(), name="gemma-search 2")
    assert all(point.name.startswith(beginning_of(named)) for point in points_of(named))
