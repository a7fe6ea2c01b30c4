"""Means with their errors, against scipy, against formulas written out, and by simulation."""

import math
import random

import pytest
from scipy.stats import sem, t, ttest_1samp, ttest_rel

from stages.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    contrast_of_rows,
    difference,
    difference_interval,
    mcnemar,
    mean,
    mean_of_independent,
    mean_of_rows,
)

VALUES = [0.2, 1.0, 0.0, 0.7, 0.7, 0.1]
OTHERS = [0.1, 1.0, 0.3, 0.2, 0.9, 0.4]


def test_independent_values_have_scipys_error_and_interval():
    found = mean(VALUES)
    assert (found.value, found.stderr, found.count, found.clusters) == (pytest.approx(0.45), pytest.approx(sem(VALUES)), 6, 6)
    assert found.interval == pytest.approx(tuple(ttest_1samp(VALUES, 0).confidence_interval(0.95)))


def test_a_paired_difference_has_scipys_interval():
    assert difference(VALUES, OTHERS).interval == pytest.approx(tuple(ttest_rel(VALUES, OTHERS).confidence_interval(0.95)))


def test_clusters_by_hand():
    found = mean(VALUES, ["a", "a", "b", "b", "b", "c"])
    sums = [0.2 + 1.0 - 2 * 0.45, 0.0 + 0.7 + 0.7 - 3 * 0.45, 0.1 - 0.45]
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum(total**2 for total in sums)) / 6)
    assert (found.count, found.clusters) == (6, 3)


def test_clusters_of_one_size_have_the_error_of_their_means():
    clusters = [0, 0, 1, 1, 2, 2]
    means = [(VALUES[i] + VALUES[i + 1]) / 2 for i in (0, 2, 4)]
    assert mean(VALUES, clusters).stderr == pytest.approx(sem(means))


@pytest.mark.parametrize(("values", "clusters"), [([0.3], None), ([0.3, 0.5], ["a", "a"])])
def test_fewer_than_two_clusters_have_no_error(values, clusters):
    found = mean(values, clusters)
    assert (found.value, found.stderr, found.interval, found.clusters) == (pytest.approx(sum(values) / len(values)), None, None, 1)


def test_no_values_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="found no values, wanted at least one"):
        mean([])
    with pytest.raises(ValueError, match="found clusters of 2 values, wanted those of 6"):
        mean(VALUES, [1, 2])
    with pytest.raises(ValueError, match="found 6 values and 5 of the reference, wanted as many"):
        difference(VALUES, VALUES[1:])


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    """Rows share the error of their document: without clusters the interval would hold it in two cases of three."""
    generator, held, alone = random.Random(0), 0, 0
    for _ in range(400):
        clusters = [number // 5 for number in range(60)]
        shared = [generator.gauss(0, 1) for _ in range(12)]
        values = [shared[cluster] + generator.gauss(0, 1) for cluster in clusters]
        low, high = mean(values, clusters).interval
        held += low < 0 < high
        low, high = mean(values).interval
        alone += low < 0 < high
    assert 0.92 < held / 400 < 0.98
    assert alone / 400 < 0.85


@pytest.mark.parametrize(
    ("lost", "gained", "wanted"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 2**5), (1, 5, 2 * (1 + 6) / 2**6), (8, 1, 2 * (1 + 9) / 2**9)],
)
def test_mcnemars_test_by_hand(lost, gained, wanted):
    assert mcnemar(lost, gained) == pytest.approx(wanted)
    assert mcnemar(gained, lost) == pytest.approx(wanted)


def test_an_interval_of_a_share_is_that_of_agresti_and_coull_for_independent_rows():
    low, high = accuracy_interval([1.0] * 8 + [0.0] * 12, range(20))
    share = 10 / 24
    reach = t.ppf(0.975, 19) * math.sqrt(share * (1 - share) / 24 * 20 / 19)
    assert (low, high) == (pytest.approx(share - reach), pytest.approx(share + reach))


def test_an_interval_of_a_difference_is_that_of_bonett_and_price_for_independent_rows():
    ours, theirs = [1.0] * 3 + [0.0] * 5 + [1.0] * 12, [0.0] * 3 + [1.0] * 5 + [1.0] * 12
    low, high = difference_interval(ours, theirs, range(20))
    gained, lost = 4 / 22, 6 / 22
    reach = t.ppf(0.975, 19) * math.sqrt((gained + lost - (gained - lost) ** 2) / 22 * 20 / 19)
    assert (low, high) == (pytest.approx(gained - lost - reach), pytest.approx(gained - lost + reach))


def test_intervals_hold_the_truth_as_often_as_they_say_also_where_rows_seldom_flip():
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        theirs = [float(rng.random() < 0.5) for _ in range(40)]
        ours = [1 - value if rng.random() < 0.03 else value for value in theirs]
        low, high = difference_interval(ours, theirs, range(40))
        held += low <= 0 <= high
    assert held >= 940


@pytest.mark.parametrize("passages", [2, 3, 5])
def test_few_passages_give_intervals_that_hold_the_truth_about_as_often_as_of_numbers(passages):
    """Rows of a passage flip together: the rows that an interval adds must not count as passages."""
    rng, held, plain = random.Random(1), 0, 0
    clusters = [passage for passage in range(passages) for _ in range(40)]
    for _ in range(1000):
        shift = [rng.uniform(-0.3, 0.3) for _ in range(passages)]
        ours = [float(rng.random() < 0.5 + shift[passage]) for passage in clusters]
        theirs = [float(rng.random() < 0.5 - shift[passage]) for passage in clusters]
        low, high = difference_interval(ours, theirs, clusters)
        held += low <= 0 <= high
        low, high = difference(ours, theirs, clusters).interval
        plain += low <= 0 <= high
    assert held >= plain - 10
    assert held > 880


def test_a_single_document_gives_no_interval():
    assert accuracy_interval([1.0, 0.0], [0, 0]) is None
    assert difference_interval([1.0, 0.0], [1.0, 1.0], [0, 0]) is None


def test_the_interval_of_a_mean_of_independent_estimates_is_recovered_from_theirs():
    equal = Estimate(value=0.2, stderr=0.1, count=10, clusters=6)
    other = Estimate(value=0.4, stderr=0.1, count=10, clusters=6)
    found = mean_of_independent([equal, other])
    reach = t.ppf(0.975, 5) * math.sqrt(0.02) / 2
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(math.sqrt(0.02) / 2)
    assert found.interval == (pytest.approx(0.3 - reach), pytest.approx(0.3 + reach))
    assert (found.count, found.clusters) == (20, 12)
    unknown = Estimate(value=0.4, stderr=None, count=1, clusters=1)
    assert mean_of_independent([equal, unknown]).interval is None


def test_a_mean_over_tasks_that_all_went_wrong_has_a_width():
    wrong = mean_of_rows([0.0] * 20, range(20))
    low, high = accuracy_interval([0.0] * 20, range(20))
    found = mean_of_independent([wrong, wrong])
    assert (found.stderr, low) == (0.0, 0.0)
    assert found.interval == (0.0, pytest.approx(high / math.sqrt(2)))


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says():
    rng, held = random.Random(2), 0
    for _ in range(1000):
        tasks = [[float(rng.random() < share) for _ in range(40)] for share in (0.05, 0.3, 0.6)]
        low, high = mean_of_independent([mean_of_rows(values, range(40)) for values in tasks]).interval
        held += low <= 0.95 / 3 <= high
    assert held >= 940


def test_a_contrast_of_whole_values_has_a_width_where_all_agree():
    agreed = contrast_of_rows([0.0] * 4, range(4))
    assert (agreed.value, agreed.stderr) == (0.0, 0.0)
    reach = t.ppf(0.975, 3) * math.sqrt(2 * 4 / 3) / 6  # one row more of 1 and one of -1
    assert agreed.interval == (pytest.approx(-reach), pytest.approx(reach))
    assert contrast_of_rows([2.0] * 2, range(2)).interval[1] == 2.0
    shares = [0.25, -0.5, 0.1]
    assert contrast_of_rows(shares, range(3)).interval == mean(shares).interval
