"""The bootstrap, on scores whose error is known."""

import math
from types import SimpleNamespace

import pytest
from lm_eval.api.metrics import f1_score

from stages.evaluation.bootstrap import RESAMPLES, bootstrap_error
from stages.evaluation.harness import _aggregate
from stages.evaluation.statistics import mean

CLOSE = 4 / math.sqrt(2 * RESAMPLES)  # four standard errors of the error, relative
VALUES = [float(number % 7) for number in range(60)]


def average(items) -> float:
    values = [value for of_task in items.values() for value in of_task]
    return sum(values) / len(values)


def test_the_error_of_a_mean_is_that_of_statistics():
    found = bootstrap_error(average, {"a": VALUES}, {"a": range(60)})
    assert found == pytest.approx(mean(VALUES).stderr, rel=CLOSE)
    assert bootstrap_error(average, {"a": VALUES}, {"a": range(60)}) == found  # seeded


def test_two_rows_have_the_error_of_two_coins():
    assert bootstrap_error(average, {"a": [0.0, 1.0]}, {"a": [0, 1]}) == pytest.approx(math.sqrt(1 / 8), rel=CLOSE)


def test_rows_that_share_a_document_are_drawn_together():
    doubled = [value for value in VALUES for _ in range(2)]
    clusters = [number for number in range(60) for _ in range(2)]
    assert bootstrap_error(average, {"a": doubled}, {"a": clusters}) == pytest.approx(mean(doubled, clusters).stderr, rel=CLOSE)
    assert bootstrap_error(average, {"a": VALUES}, {"a": [0] * 60}) is None


def test_a_score_of_a_task_is_lm_evals_with_its_error():
    """F1 of p true positives, q false positives and no false negatives: 2p / (2p + q); delta method for its error."""
    items = [(1, 1)] * 60 + [(0, 1)] * 30 + [(0, 0)] * 30
    questions = SimpleNamespace(tasks={"a": SimpleNamespace(aggregation=lambda: {"f1": f1_score})}, source=SimpleNamespace(aggregated={}))
    made = _aggregate(questions, ("f1", "none"), {"a": items}, {"a": list(range(120))})
    wanted = 2 * 60 / (2 * 60 + 30)
    rows = [(2 * (pair == (1, 1)) - wanted * (2 * (pair == (1, 1)) + (pair == (0, 1)))) / 1.25 for pair in items]  # over the mean of 2p + q
    assert (made["value"], made["count"], made["clusters"], made["resamples"]) == (pytest.approx(wanted), 120, 120, RESAMPLES)
    assert made["stderr"] == pytest.approx(mean(rows).stderr, rel=CLOSE)
