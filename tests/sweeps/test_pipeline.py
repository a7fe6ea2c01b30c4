"""Which stages a point needs, and what tells their results apart."""

import copy

import pytest

from stages.sweeps.pipeline import has_result, keys, stages_of
from tests.project import ROOT

STAGES = stages_of("evaluate_sparse", ROOT / "dvc.yaml")
PARAMS = {"method": {"name": "wanda"}, "calibration": {"seed": 0}, "publish": {"name": None}, "environment": {"torch": "2"}}
LOCKED = {
    "prune": {"outs": [{"path": "artifacts/sparse", "md5": "a"}]},
    "evaluate_sparse": {
        "deps": [{"path": "artifacts/sparse", "md5": "a"}, {"path": "stages/files.py", "md5": "c"}],
        "params": {"params.yaml": STAGES[-1].values(PARAMS)},
    },
}


def test_a_target_needs_what_it_reads_from_in_order():
    assert [stage.name for stage in STAGES] == [
        *("fetch_text", "fetch_base", "fetch_tasks", "sample", "observe", "prune", "evaluate_dense", "evaluate_sparse")
    ]
    for target in ("evaluate_sparse", "publish"):  # text of one's own is refused before the base is downloaded
        assert stages_of(target, ROOT / "dvc.yaml")[0].name == "fetch_text"
    assert [stage.name for stage in stages_of("publish", ROOT / "dvc.yaml")][-1] == "publish"
    prune = STAGES[-3]
    assert prune.inputs == {"artifacts/base": "fetch_base", "artifacts/calibration": "sample", "artifacts/statistics": "observe"}
    assert "stages/prune.py" in prune.code


def test_a_value_tells_apart_the_stages_that_depend_on_it():
    first = keys(STAGES, PARAMS)
    other = keys(STAGES, {**PARAMS, "calibration": {"seed": 1}})
    assert {name for name in first if first[name] != other[name]} == {"sample", "observe", "prune", "evaluate_sparse"}
    assert keys(STAGES, {**PARAMS, "publish": {"name": "x"}}) == first


def test_a_lock_has_a_result_only_of_its_parameters_and_inputs():
    target = STAGES[-1]
    assert has_result(target, PARAMS, LOCKED)
    assert not has_result(target, {**PARAMS, "environment": {"torch": "3"}}, LOCKED)
    assert not has_result(target, PARAMS, {})
    stale = copy.deepcopy(LOCKED)
    stale["prune"]["outs"][0]["md5"] = "b"
    assert not has_result(target, PARAMS, stale)


@pytest.mark.parametrize("key", ["evaluation.tasks", "environment.torch"])
def test_a_key_that_is_not_there_is_null(key):
    stage = next(stage for stage in STAGES if key in stage.parameters)
    assert stage.values({"evaluation": "none"})[key] is None
