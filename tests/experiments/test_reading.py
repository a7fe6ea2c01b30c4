"""Which states of a project are evaluated experiments."""

import pytest

from stages.evaluation.measurement import Measurement, as_rows
from stages.experiments import reading
from stages.experiments.reading import Unreadable
from stages.files import SPARSE
from tests.evaluation import delta as deltas


def test_scores_of_another_delta_than_the_workspaces_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    protocol = {"delta": "f" * 64}
    reading._require_of_delta(protocol)  # nothing was pruned here: these scores are of a run elsewhere
    delta = deltas.write(SPARSE, base)
    reading._require_of_delta({"delta": delta.fingerprint})
    with pytest.raises(Unreadable, match="what was pruned last is not evaluated yet"):
        reading._require_of_delta(protocol)


def test_an_experiment_that_runs_is_none_yet():
    running = {"rev": "workspace", "data": {}, "executor": {"state": "running", "name": "workspace"}}
    with pytest.raises(Unreadable, match="it is running"):
        reading._experiment("a", running)
    commit = {"experiments": [{"name": "a", "executor": {"state": "running"}, "revs": [{"rev": "workspace", "data": None}]}]}
    assert reading._experiments(commit) == [{"rev": "workspace", "data": None, "name": "a", "executor": {"state": "running"}}]


def test_a_dense_model_that_cannot_be_read_leaves_its_error_out(monkeypatch):
    def missing(path, revision):
        raise Unreadable(f"{path} is not there")

    monkeypatch.setattr(reading, "_read", missing)
    assert reading._dense(None) == []
    facts = {"kind": "corpus", "name": "news", "label": "", "count": 8, "counted": "tokens", "clusters": 2, "value": 10.0, "stderr": 0.5}
    rows = as_rows([Measurement(**facts, metric="perplexity")])
    monkeypatch.setattr(reading, "_read", lambda path, revision: rows if path == "results/dense/details/measurements.json" else None)
    assert [measured.stderr for measured in reading._dense("f00d")] == [0.5]


def test_scores_that_an_earlier_run_left_in_an_experiment_are_refused():
    """`dvc exp run -S pattern.sparsity=0.6 prune` leaves the scores of the run before as they are."""
    pruned = {"params": {"params.yaml": {"pattern": {"sparsity": 0.6}}}, "outs": [{"path": "artifacts/sparse", "md5": "new"}]}
    params = {"pattern": {"sparsity": 0.6}}
    reading._require_of_experiment({"prune": pruned}, params)
    stages = {"prune": pruned, "evaluate_sparse": {"deps": [{"path": "artifacts/sparse", "md5": "old"}]}}
    with pytest.raises(Unreadable, match="its scores are of another run .evaluate_sparse read another artifacts/sparse than prune wrote"):
        reading._require_of_experiment(stages, params)


def test_why_an_experiment_from_before_the_remote_cannot_be_read_is_said_with_the_way_out():
    state = {"rev": "a" * 40, "data": None, "error": {"msg": "config file error: expected 'url' for dictionary value"}}
    with pytest.raises(Unreadable, match="expected 'url' .*a remote was set after it ran: `dvc remote modify --local REMOTE url URL`"):
        reading._experiment("a", state)
    with pytest.raises(Unreadable, match="DVC cannot read it: broken$"):
        reading._experiment("a", state | {"error": {"msg": "broken"}})
