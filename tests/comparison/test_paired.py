"""The pruned model against the dense one; how far both drift apart by style of prompts, on numbers that can be checked in the head."""

import math

import pytest
from scipy.stats import t

from stages.comparison.paired import prompt_sensitivity
from stages.evaluation.measurement import Difference, Kind, Measurement
from stages.evaluation.results import Results, task_measurements
from stages.evaluation.statistics import mean


def samples(values: list[float], clusters: list[int] | None = None) -> list[dict]:
    return [{"row": i, "cluster": (clusters or list(range(9)))[i], "values": {"acc": value}} for i, value in enumerate(values)]


def results(raw: dict[str, list[dict]], chat: dict[str, list[dict]], dense: Results | None = None) -> Results:
    made: list[Measurement] = []
    for task, rows in raw.items():
        made += task_measurements(task, rows, None if dense is None else dense.samples[task])
    return Results(windows={}, samples=raw, generations=[], measurements=made, styles={"chat": chat})


def both(clusters: list[int] | None = None) -> tuple[Results, Results]:
    """Raw the pruned model loses 1 of 4 rows of a, and in chat 3 of 4; of b it gains 1 of 2 in both."""
    dense = results(
        {"a": samples([1, 1, 1, 0], clusters), "b": samples([0, 1])}, {"a": samples([1, 1, 1, 1], clusters), "b": samples([0, 1])}
    )
    sparse = results(
        {"a": samples([1, 1, 0, 0], clusters), "b": samples([1, 1])}, {"a": samples([0, 1, 0, 0], clusters), "b": samples([1, 1])}, dense
    )
    return dense, sparse


def test_drift_is_the_difference_of_differences_row_by_row():
    of_a, of_b, of_mean = prompt_sensitivity(*both())
    drifts = [-1.0, 0.0, 0.0, -1.0]  # chat -1, 0, -1, -1 less raw 0, 0, -1, 0
    assert (of_a["style"], of_a["task"], of_a["count"], of_a["counted"]) == ("chat", "a", 4, "rows")
    assert (of_a["raw"], of_a["styled"], of_a["drift"]) == (-0.25, -0.75, -0.5)
    assert of_a["stderr"] == pytest.approx(mean(drifts).stderr)
    reach = t.ppf(0.975, 3) * math.sqrt(30 / 9 * 4 / 3) / 6  # of -1, 0, 0, -1, and one row more of 1 and one of -1
    assert (of_a["low"], of_a["high"]) == (pytest.approx(-1 / 3 - reach), pytest.approx(-1 / 3 + reach))
    assert (of_b["drift"], of_b["stderr"]) == (0.0, 0.0)
    assert of_b["low"] < 0 < of_b["high"]
    assert (of_mean["task"], of_mean["count"], of_mean["counted"]) == (None, 2, "tasks")
    assert (of_mean["raw"], of_mean["styled"], of_mean["drift"]) == (0.125, -0.125, -0.25)
    assert of_mean["stderr"] == pytest.approx(mean(drifts).stderr / 2)


def test_rows_that_share_a_text_are_one_cluster():
    of_a, *_ = prompt_sensitivity(*both([0, 1, 1, 0]))
    assert of_a["stderr"] == pytest.approx(mean([-1.0, 0.0, 0.0, -1.0], [0, 1, 1, 0]).stderr)
    alone, _, of_mean = prompt_sensitivity(*both([0, 0, 0, 0]))
    assert (alone["drift"], alone["stderr"], alone["low"], of_mean["low"]) == (-0.5, None, None, None)


def test_a_score_that_is_no_mean_over_rows_is_left_out():
    dense, sparse = both()
    facts = {
        "kind": Kind.TASK,
        "name": "a",
        "metric": "acc",
        "label": "accuracy",
        "value": 0.5,
        "count": 4,
        "counted": "rows",
        "clusters": 4,
    }
    macro = Measurement(**facts, difference=Difference(value=-0.4))
    sparse.measurements[:] = [macro, *(measured for measured in sparse.measurements if measured.name == "b")]
    assert [row["task"] for row in prompt_sensitivity(dense, sparse)] == ["b", None]


def test_without_other_styles_there_is_none():
    dense, sparse = both()
    sparse.styles.clear()
    assert prompt_sensitivity(dense, sparse) == []
