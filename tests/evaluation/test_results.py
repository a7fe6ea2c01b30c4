import pytest

from stages.evaluation.measurement import Better
from stages.evaluation.protocol import TaskProtocol
from stages.evaluation.results import aggregate_measurements, mean_accuracy, task_measurements

GROUP = TaskProtocol(rows=4, sha256="", few_shot=0, metrics=["acc"], better={"acc": "higher", "loss": "lower"}, macro=["acc"])


def rows(*scores: tuple[str, float]) -> list[dict]:
    return [{"row": i, "cluster": i, "task": task, "values": {"acc": score}} for i, (task, score) in enumerate(scores)]


def test_tasks_of_a_group_weigh_alike_where_lm_eval_says_so():
    ours = rows(("a", 1.0), ("a", 1.0), ("a", 0.0), ("b", 1.0))
    dense = rows(("a", 1.0), ("a", 0.0), ("a", 0.0), ("b", 0.0))
    (measured,) = task_measurements("group", ours, dense, GROUP)
    assert (measured.value, measured.count) == (pytest.approx((2 / 3 + 1) / 2), 4)
    assert measured.dense == pytest.approx((1 / 3 + 0) / 2)
    assert measured.difference.value == pytest.approx((1 / 3 + 1) / 2)
    assert measured.stderr is None  # one task has a single row
    (weighted,) = task_measurements("group", ours, dense, TaskProtocol(rows=4, sha256="", few_shot=0, metrics=["acc"]))
    assert weighted.value == pytest.approx(3 / 4)


def test_a_score_that_is_no_mean_of_rows_has_lm_evals_value_and_no_error():
    (measured,) = aggregate_measurements("a", {"loss": {"value": 2.0, "count": 7}}, {"loss": {"value": 1.5, "count": 7}}, GROUP, "raw")
    assert (measured.value, measured.stderr, measured.count, measured.better) == (2.0, None, 7, Better.LOWER)
    assert (measured.dense, measured.difference.value, measured.difference.stderr) == (1.5, 0.5, None)


def test_the_mean_accuracy_is_of_accuracies_of_one_style():
    made = task_measurements("a", rows(("a", 1.0), ("a", 0.0)), None)
    made += task_measurements("a", rows(("a", 0.0), ("a", 0.0)), None, style="chat")
    made += aggregate_measurements("b", {"loss": {"value": 2.0, "count": 7}}, {}, GROUP, "raw")
    ((raw,), (chat,)) = mean_accuracy(made), mean_accuracy(made, "chat")
    assert (raw.value, raw.count, raw.style) == (0.5, 1, "raw")
    assert (chat.value, chat.count, chat.style) == (0.0, 1, "chat")
    assert mean_accuracy([made[-1]]) == []
