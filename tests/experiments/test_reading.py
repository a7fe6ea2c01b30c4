"""Which states of a project are evaluated experiments."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.evaluation.measurement import Measurement, as_rows
from stages.experiments import reading
from stages.experiments.reading import Unreadable
from stages.files import BASE, CALIBRATION, SPARSE
from tests.evaluation import delta as deltas


def test_scores_of_another_delta_than_the_workspaces_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"base": {}, "prune": {"device": "cuda"}, "pattern": {"sparsity": 0.6}}
    protocol = {"delta": "f" * 64, "evaluation": {"name": "quick"}}
    assert reading._as_recorded(params, protocol, Path()) == params  # nothing was pruned here: these scores are of a run elsewhere
    delta = deltas.write(SPARSE, base)
    found = reading._as_recorded(params, {**protocol, "delta": delta.fingerprint}, Path())
    assert (found["pattern"], found["evaluation"]) == (delta.recipe.pattern, {"name": "quick"})  # not what params.yaml says by now
    assert found["prune"] == {"device": "cuda", **delta.recipe.prune}
    with pytest.raises(Unreadable, match="what was pruned last is not evaluated yet"):
        reading._as_recorded(params, protocol, Path())


def test_the_workspaces_windows_are_those_that_it_was_pruned_with(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    delta = deltas.write(SPARSE, base)
    protocol = {"delta": delta.fingerprint, "evaluation": {}}
    CALIBRATION.mkdir(parents=True)
    for windows, section in ((delta.recipe.calibration, {"seed": 3}), ("another", {"seed": 4})):
        (CALIBRATION / "provenance.json").write_text(json.dumps({"windows_sha256": windows, "section": section}))
        if windows == "another":
            with pytest.raises(Unreadable, match="artifacts/calibration was made again since it was pruned; `dvc repro evaluate_sparse`"):
                reading._as_recorded({"base": {}, "prune": {}}, protocol, Path())
        else:
            assert reading._as_recorded({"base": {}, "prune": {}, "calibration": {"seed": 9}}, protocol, Path())["calibration"] == section


@pytest.mark.parametrize("damage", [{"windows_sha256": None}, {}, None])
def test_records_of_another_version_or_that_were_cut_off_leave_the_workspace_out(base, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    delta = deltas.write(SPARSE, base)
    CALIBRATION.mkdir(parents=True)
    (CALIBRATION / "provenance.json").write_text("{" if damage is None else json.dumps(damage))
    with pytest.raises(Unreadable, match="`dvc repro evaluate_sparse`"):
        reading._workspace({"prune": {}}, {"delta": delta.fingerprint, "evaluation": {}}, Path())


@pytest.mark.parametrize("fetched", [True, False])
def test_the_base_stands_as_it_was_stated_only_if_dvc_fetched_it_so(base, tmp_path, monkeypatch, fetched):
    """A record has no path of this machine, and a commit for a branch."""
    monkeypatch.chdir(tmp_path)
    delta = deltas.write(SPARSE, base)
    stated, recorded = {"source": "local", "path": "/models/mine"}, {"source": "local", "path": None}
    BASE.mkdir(parents=True)
    (BASE / "provenance.json").write_text(json.dumps({"fingerprint": delta.recipe.base, "section": recorded}))
    params = {"params.yaml": {"base": stated if fetched else {"source": "local", "path": "/models/other"}}}
    Path("dvc.lock").write_text(json.dumps({"stages": {"fetch_base": {"params": params}}}))
    found = reading._as_recorded({"prune": {}, "base": stated}, {"delta": delta.fingerprint, "evaluation": {}}, Path())
    assert found["base"] == (stated if fetched else recorded)


def test_scores_that_came_from_elsewhere_are_those_of_the_workspaces_params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = {"params": {"params.yaml": {"pattern": {"sparsity": 0.5}}}}
    Path("dvc.lock").write_text(json.dumps({"stages": {"evaluate_sparse": stage}}))
    with pytest.raises(Unreadable, match="its scores are of another run .evaluate_sparse read pattern="):
        reading._as_recorded({"pattern": {"sparsity": 0.6}}, {"delta": None}, Path())


def test_an_experiment_that_runs_waits_or_failed_is_none_yet(monkeypatch):
    state = SimpleNamespace(name=None, rev="beef")

    def collected(*names):
        return lambda repo, baselines: {"f00d": [SimpleNamespace(name=name, revs=[state]) for name in names]}

    monkeypatch.setattr(reading, "Repo", nullcontext)
    for function, names in (("collect_active", ["a"]), ("collect_queued", ["b", None]), ("collect_failed", [])):
        monkeypatch.setattr(reading, function, collected(*names))
    assert [(one.name, one.reason) for one in reading._unfinished(["f00d"])] == [
        ("a", "it is running"),
        ("b", reading.NO_RESULTS),
        ("beef", reading.NO_RESULTS),
    ]


def test_experiments_stand_newest_first_whatever_commit_they_started_from(monkeypatch):
    made = [("1" * 40, "b"), ("2" * 40, "a"), ("1" * 40, "c")]
    lines = [f"{number:040x} {9 - number} refs/exps/{of[:2]}/{of[2:]}/{name}" for number, (of, name) in enumerate(made)]
    lines.append(f"{'9' * 40} 5 refs/exps/celery/stash")
    monkeypatch.setattr(reading, "output", lambda *command: "\n".join(lines))
    assert [one.name for one in reading._references()] == ["b", "a", "c"]


class _Written:
    """Files that are these."""

    def __init__(self, **contents):
        self.contents = contents

    def json(self, path):
        if path.name not in self.contents:
            raise Unreadable(f"{path} is not there")
        return self.contents[path.name]


def test_a_dense_model_that_cannot_be_read_leaves_its_error_out():
    assert reading._dense(_Written(), {}) == []
    facts = {"kind": "corpus", "name": "news", "label": "", "count": 8, "counted": "tokens", "clusters": 2, "value": 10.0, "stderr": 0.5}
    rows = as_rows([Measurement(**facts, metric="perplexity")])
    written = _Written(**{"measurements.json": rows, "protocol.json": {"dtype": "float32", "evaluation": {}}})
    assert [measured.stderr for measured in reading._dense(written, {"dtype": "float32"})] == [0.5]
    assert reading._dense(written, {"dtype": "bfloat16"}) == []  # it was evaluated again since


def test_scores_that_an_earlier_run_left_in_an_experiment_are_refused():
    """`dvc exp run -S pattern.sparsity=0.6 prune` leaves the scores of the run before as they are."""
    pruned = {"params": {"params.yaml": {"pattern": {"sparsity": 0.6}}}, "outs": [{"path": "artifacts/sparse", "md5": "new"}]}
    params = {"pattern": {"sparsity": 0.6}}
    reading._require_of_experiment({"prune": pruned}, params, Path())
    stages = {"prune": pruned, "evaluate_sparse": {"deps": [{"path": "artifacts/sparse", "md5": "old"}]}}
    with pytest.raises(Unreadable, match="its scores are of another run .evaluate_sparse read another artifacts/sparse than prune wrote"):
        reading._require_of_experiment(stages, params, Path())
