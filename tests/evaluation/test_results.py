import pytest

from stages.errors import ComparisonError
from stages.evaluation.measurement import Better
from stages.evaluation.protocol import Protocol, TaskProtocol
from stages.evaluation.results import aggregate_measurements, mean_accuracy, read_results, task_measurements
from stages.files import write_json, write_lines

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


def test_such_a_score_has_the_error_and_the_interval_of_its_bootstrap():
    scored = {"value": 2.0, "count": 7, "stderr": 0.1, "clusters": 3, "resamples": 200}
    (measured,) = aggregate_measurements("a", {"loss": scored}, {}, GROUP, "raw")
    reach = 4.302653 * 0.1  # Student's t with 2 degrees of freedom
    assert (measured.stderr, measured.clusters) == (0.1, 3)
    assert (measured.low, measured.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))


def test_the_mean_accuracy_is_of_accuracies_of_one_style():
    made = task_measurements("a", rows(("a", 1.0), ("a", 0.0)), None)
    made += task_measurements("a", rows(("a", 0.0), ("a", 0.0)), None, style="chat")
    made += aggregate_measurements("b", {"loss": {"value": 2.0, "count": 7}}, {}, GROUP, "raw")
    ((raw,), (chat,)) = mean_accuracy(made), mean_accuracy(made, "chat")
    assert (raw.value, raw.count, raw.style) == (0.5, 1, "raw")
    assert (chat.value, chat.count, chat.style) == (0.0, 1, "chat")
    assert mean_accuracy([made[-1]]) == []


PROTOCOL = Protocol(
    base="b",
    tokenizer_sha256=None,
    bos=None,
    corpora={},
    metrics=[],
    tasks={"a": TaskProtocol(rows=1, sha256="", few_shot=0, metrics=["acc"])},
    prompts=[],
    new_tokens=0,
    dtype="float32",
    versions={},
)
ROW = {"row": 0, "cluster": 0, "task": "a", "values": {"acc": 1.0}}


def read(details, row: dict, aggregates: object = None):
    for name, data in (("windows", {}), ("generations", []), ("aggregates", {} if aggregates is None else aggregates)):
        write_json(details / f"{name}.json", data)
    write_lines(details / "samples-a.jsonl", [row])
    return read_results(details, PROTOCOL)


def test_results_are_read_as_they_were_written(tmp_path):
    found = read(tmp_path, ROW, {"raw": {"a": {"f1": {"value": 0.5, "count": 1}}}})
    unknown = {"stderr": None, "clusters": None, "resamples": 0}  # of an earlier evaluation
    assert (found.samples, found.aggregates) == ({"a": [ROW]}, {"raw": {"a": {"f1": {"value": 0.5, "count": 1, **unknown}}}})


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": {"a": 1}},
        {"cluster": None},
        {"task": [1]},
        {"row": 0.5},
        {"values": [1]},
        {"values": {"acc": 10**400}},
        {"values": {"acc": 1e200}},
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, changes):
    with pytest.raises(ComparisonError, match="samples-a.jsonl: wanted 1 rows in order, each with acc"):
        read(tmp_path, ROW | changes)


@pytest.mark.parametrize(
    "aggregates", [[], {"raw": 7}, {"raw": {"a": {"f1": {"value": "x", "count": 1}}}}, {"raw": {"a": {"f1": {"value": 1}}}}]
)
def test_aggregates_of_another_form_are_named(tmp_path, aggregates):
    with pytest.raises(ComparisonError, match="aggregates.json: aggregates"):
        read(tmp_path, ROW, aggregates)
