"""The search: which points it tries, what it says, and that it computes nothing twice."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.unconfigured import ENVIRONMENT
from stages.errors import ConfigError, SparsesweepError
from stages.evaluation.measurement import Better, Kind, Measurement
from stages.experiments.reading import Experiment
from stages.sweeps import search as module
from stages.sweeps.file import Resources, Search, Sweep
from stages.sweeps.plan import Plan, Point
from stages.sweeps.search import answer, steps, text

SEARCH = Search(parameter="pattern.sparsity", low=0.3, high=0.8, metric="perplexity", limit=1.5, points=6)
SWEEP = Sweep(path=Path("mine.yaml"), name="mine", target="evaluate_sparse", shared=(), varied=(), resources=Resources(), search=SEARCH)
FILE = """overrides: [evaluation=sweep]
search: {{parameter: pattern.sparsity, low: 0.2, high: 0.8, metric: perplexity, limit: 2.5, points: {points}}}
"""
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed: the extra search brings it")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: the extra ray brings it")


def experiment(value: float, metric: str = "perplexity", better: Better = Better.LOWER) -> Experiment:
    """One whose perplexity is 1 / (1 - sparsity) times the dense model's, and whose accuracy is 1 - sparsity of it."""
    score = 10 / (1 - value) if metric == "perplexity" else 10 * (1 - value)
    facts = {"kind": Kind.CORPUS, "name": "news", "label": "", "count": 8, "counted": "tokens", "clusters": 2, "dense": 10.0}
    return Experiment(
        name=f"mine-{value}",
        revision="f" * 40,
        params={},
        measurements=[Measurement(**facts, metric=metric, value=score, better=better)],
        prune_metrics={},
        protocol={"corpora": {"news": {}}},
        method="m",
        pattern="p",
    )


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Plans by name alone."""

    def plan(sweep, experiments, revision) -> Plan:
        ((override,),) = sweep.varied
        name = f"mine-{override.partition('=')[2]}"
        results = {one.name: one for one in experiments if one.name == name}
        return Plan(
            sweep=sweep,
            points=(Point(index=0, name=name, overrides=(override,), varied=(override,), params={}),),
            results=results,
            after={name: frozenset()},
            seconds={},
        )

    monkeypatch.setattr(module, "plan", plan)


class Runner:
    """Runs points, and counts them."""

    def __init__(self, **facts) -> None:
        self.made: list[Experiment] = []
        self.facts = facts

    def __call__(self, plan: Plan) -> list[Experiment]:
        self.made.append(experiment(float(plan.points[0].name.removeprefix("mine-")), **self.facts))
        return self.made


def test_each_point_halves_the_interval():
    run = Runner()
    found = list(steps(SWEEP, SEARCH, [], run))
    assert [step.value for step in found] == [0.55, 0.425, 0.3625, 0.33125, 0.346875, 0.3390625]  # the limit lies at 1 - 1/1.5
    assert [step.within for step in found] == [False, False, False, True, False, False]
    assert answer(SEARCH, found) == (
        "highest pattern.sparsity within perplexity at 1.5 of the dense model's: 0.33125; beyond it from 0.3390625"
    )
    assert ["0.33125", "1.495", "yes", "mine-0.33125"] in [line.split() for line in text(SEARCH, found).splitlines()]


def test_a_second_call_goes_on_and_computes_nothing_twice():
    run = Runner()
    first = list(steps(SWEEP, replace(SEARCH, points=3), [], run))
    found = list(steps(SWEEP, SEARCH, list(run.made), None))
    assert [step.value for step in found] == [*(step.value for step in first), 0.33125]
    assert (found[-1].ratio, len(run.made)) == (None, 3)
    assert answer(SEARCH, found).endswith("; beyond it from 0.3625; 3 of 6 points left, next 0.33125")
    list(steps(SWEEP, SEARCH, list(run.made), run))
    assert len(run.made) == 6


def test_where_higher_is_better_the_limit_is_the_least():
    wanted = replace(SEARCH, metric="accuracy", limit=0.5, points=2)
    found = list(steps(SWEEP, wanted, [], Runner(metric="accuracy", better=Better.HIGHER)))
    assert [(step.value, step.within) for step in found] == [(0.55, False), (0.425, True)]


def test_all_points_within_the_limit_or_beyond_it_are_said():
    within = list(steps(SWEEP, replace(SEARCH, limit=100.0, points=1), [], Runner()))
    assert answer(SEARCH, within).startswith("highest pattern.sparsity within perplexity at 1.5 of the dense model's: 0.55; up to 0.8 none")
    beyond = list(steps(SWEEP, replace(SEARCH, points=1), [], Runner()))
    assert answer(SEARCH, beyond).startswith("no pattern.sparsity is known within")


def test_a_point_that_failed_or_lacks_the_metric_ends_the_search():
    with pytest.raises(SparsesweepError, match="mine-0.55: found no result of it, wanted one to go on from"):
        list(steps(SWEEP, SEARCH, [], lambda plan: []))
    with pytest.raises(ConfigError, match="search.metric: found 'kld', wanted one that mine-0.55 has beside the dense model's: perplexity"):
        list(steps(SWEEP, replace(SEARCH, metric="kld"), [], Runner()))


def test_without_optuna_the_command_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"found no package optuna, wanted it for a search: pip install .*'\.\[search\]' brings it"):
        module.client()


@needs_optuna
def test_the_study_has_the_points_and_its_best_trial_is_the_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optuna = module.client()
    for _ in range(2):  # it is written anew
        path = module.record(optuna, SWEEP, SEARCH, list(steps(SWEEP, SEARCH, [], Runner())))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="mine", storage=storage)
    assert [trial.params["pattern.sparsity"] for trial in study.trials] == [0.55, 0.425, 0.3625, 0.33125, 0.346875, 0.3390625]
    assert study.best_params == {"pattern.sparsity": 0.33125}
    assert study.best_trial.user_attrs["perplexity over dense"] == pytest.approx(1 / (1 - 0.33125))


@needs_optuna
@needs_ray
def test_a_search_runs_here_and_goes_on_on_a_cluster(project):
    file = project.write("find.yaml", FILE.format(points=2))
    code, output = project.sweep(file, "--point", "0").finished()
    assert (code, "--slurm, --point: found 'one of them', wanted neither" in output) == (1, True), output
    code, output = project.sweep(file).finished()
    assert code == 0, output
    assert "highest pattern.sparsity within perplexity at 2.5 of the dense model's: 0.5; beyond it from 0.65\n" in output
    assert output.count("ran ") == 2
    file = project.write("find.yaml", FILE.format(points=3))
    code, output = project.sweep(file, "--dry-run").finished()
    assert code == 0, output
    assert "1 of 3 points left, next 0.575" in output
    code, output = project.sweep(file, "--ray").finished()
    assert code == 0, output
    assert ("highest pattern.sparsity within perplexity at 2.5 of the dense model's: 0.575" in output, output.count("ran ")) == (True, 1)
    assert len({name for name in project.experiments() if name.startswith("find-")}) == 3
    read = "import optuna; s = optuna.storages; print(optuna.load_study(study_name='find', storage=s.JournalStorage("
    read += "s.journal.JournalFileBackend('.dvc/tmp/sweeps/find.optuna'))).best_params)"
    done = subprocess.run([sys.executable, "-c", read], cwd=project.root, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'pattern.sparsity': 0.575}"
