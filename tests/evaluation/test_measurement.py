import pytest

from stages.evaluation.measurement import Difference, Kind, Measurement, as_rows, from_rows, metrics
from stages.evaluation.results import mean_accuracy, task_measurements
from stages.evaluation.statistics import mean

FACTS = {
    "kind": Kind.CORPUS,
    "name": "articles",
    "metric": "perplexity",
    "label": "perplexity",
    "count": 8,
    "counted": "tokens",
    "clusters": 2,
}


def test_metrics_are_sections_of_names_of_numbers():
    first = Measurement(**FACTS, value=4.0, stderr=0.5, dense=2.0, difference=Difference(value=2.0, stderr=0.25))
    second = Measurement(**{**FACTS, "kind": Kind.TASK, "name": "boolq", "metric": "acc"}, value=0.5)
    assert metrics([first, second]) == {
        "corpora": {
            "articles": {
                "perplexity": 4.0,
                "perplexity_stderr": 0.5,
                "dense_perplexity": 2.0,
                "perplexity_difference": 2.0,
                "perplexity_difference_stderr": 0.25,
            }
        },
        "tasks": {"boolq": {"acc": 0.5}},
    }


def test_rows_are_read_back_as_they_were():
    measured = [Measurement(**FACTS, value=4.0, difference=Difference(value=1.0)), Measurement(**FACTS, value=1.0)]
    assert from_rows(as_rows(measured)) == measured
    with pytest.raises(ValueError, match=r"measurements\[0\]: found \"value\", wanted the keys of a Measurement"):
        from_rows([{"value": 1.0}])
    with pytest.raises(ValueError, match=r"measurements\[0\].value: found \"4\", wanted float"):
        from_rows([{**as_rows(measured)[0], "value": "4"}])


def test_a_value_is_shown_with_its_error_and_unit():
    assert Measurement(**FACTS, value=4.0, stderr=0.5).shown(1) == "4.0 ± 0.5"
    assert Measurement(**FACTS, value=4.0, unit="%").shown(2) == "4.00 %"
    assert Difference(value=0.5, stderr=0.125).shown(3) == "+0.500 ± 0.125"
    assert Difference(value=-0.5).shown(1) == "-0.5"


def test_percent_scale_value_and_errors_alike():
    measured = Measurement.of(mean([0.0, 1.0, 1.0, 0.0]), scale=100.0, **FACTS)
    assert (measured.value, measured.stderr) == (50.0, pytest.approx(100 * (1 / 3 / 4) ** 0.5))
    assert measured.low == pytest.approx(50 - 3.1824 * measured.stderr, rel=1e-4)


def rows(*values: float, clusters: list[int] | None = None) -> list[dict]:
    return [{"row": i, "cluster": (clusters or list(range(9)))[i], "values": {"acc": value}} for i, value in enumerate(values)]


def test_a_task_is_compared_row_by_row():
    (measured,) = task_measurements("boolq", rows(1, 0, 1, 0), rows(1, 1, 1, 0))
    assert (measured.value, measured.dense, measured.difference.value) == (0.5, 0.75, -0.25)
    assert measured.difference.stderr == pytest.approx(0.25)
    assert -1 <= measured.difference.low < -0.25 < measured.difference.high <= 1


def test_rows_that_all_agree_have_no_error_but_an_interval():
    (measured,) = task_measurements("boolq", rows(1, 1, 1, 1), rows(1, 1, 1, 1))
    assert (measured.stderr, measured.difference.stderr) == (0.0, 0.0)
    assert measured.low < 1.0 and measured.high == 1.0
    assert measured.difference.low < 0 < measured.difference.high


def test_rows_of_a_single_document_have_neither():
    (measured,) = task_measurements("boolq", rows(1, 0, clusters=[7, 7]), rows(1, 1, clusters=[7, 7]))
    assert (measured.stderr, measured.low, measured.difference.stderr, measured.difference.low) == (None, None, None, None)


def test_scores_that_are_no_shares_have_students_interval():
    (measured,) = task_measurements("f1", rows(0.5, 0.7, 0.9), None)
    assert measured.low == pytest.approx(0.7 - 4.3027 * measured.stderr, rel=1e-4)
    assert measured.dense is None and measured.difference is None


def test_the_mean_takes_every_task_alike():
    tasks = task_measurements("a", rows(1, 1, 0, 0), rows(1, 1, 1, 0)) + task_measurements("b", rows(1, 0), rows(1, 1))
    (average,) = mean_accuracy(tasks)
    assert (average.value, average.dense, average.count, average.counted) == (0.5, pytest.approx(0.875), 2, "tasks")
    assert average.difference.value == pytest.approx(-0.375)
    assert average.stderr == pytest.approx((tasks[0].stderr ** 2 + tasks[1].stderr ** 2) ** 0.5 / 2)
    assert mean_accuracy([]) == []
