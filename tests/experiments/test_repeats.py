"""Repeats by calibration seed: which experiments are, and how far they lie apart."""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_ind, ttest_rel

from stages.experiments.repeats import TTest, between, seed_of, settings, spread, welch

OURS, THEIRS = [31.2, 30.1, 33.9], [29.0, 29.9, 28.3, 30.4]


def params(seed: int, windows: int = 32, method: str = "wanda") -> dict:
    return {"calibration": {"seed": seed, "windows": windows}, "method": {"name": method}}


def grouped(*found: dict) -> list[list[dict]]:
    return settings(found, lambda one: one)


def test_experiments_that_differ_in_the_seed_alone_are_repeats():
    assert grouped(params(2), params(0), params(0, windows=64), params(10)) == [
        [params(0), params(2), params(10)],
        [params(0, windows=64)],
    ]


def test_the_order_of_keys_does_not_matter():
    other = {"method": {"name": "wanda"}, "calibration": {"windows": 32, "seed": 1}}
    assert grouped(params(0), other) == [[params(0), other]]


def test_how_a_model_was_published_makes_no_other_setting():
    published = {**params(1), "publish": {"frontier": "a hash"}}
    assert grouped(params(0), published) == [[params(0), published]]


def test_a_seed_that_is_there_twice_counts_once_by_the_first():
    found = [("new", params(0)), ("old", params(0)), ("other", params(1))]
    assert [[name for name, _ in repeats] for repeats in settings(found, lambda one: one[1])] == [["new", "other"]]


def test_sections_without_a_seed_are_a_setting_too():
    assert seed_of({"method": {}}) is None
    assert grouped({"method": {}}, {"calibration": {"seed": 1}, "method": {}}) == [
        [{"method": {}}, {"calibration": {"seed": 1}, "method": {}}]
    ]


def test_spread_and_interval_are_students():
    found = spread(OURS, [0.5, 0.7, 0.6], is_ratio=False)
    assert found.seeds == 3
    assert found.value == pytest.approx(np.mean(OURS))
    assert found.sd == pytest.approx(np.std(OURS, ddof=1))
    assert found.interval == pytest.approx(t.interval(0.95, 2, loc=np.mean(OURS), scale=np.std(OURS, ddof=1) / math.sqrt(3)))
    assert found.over_text == pytest.approx(0.6)
    assert found.shown(2) == "31.73 ± 1.96"


def test_perplexity_is_averaged_as_a_logarithm():
    found, logarithms = spread(OURS, [None, 0.7, 0.6], is_ratio=True), np.log(OURS)
    assert found.value == pytest.approx(math.exp(logarithms.mean()))
    assert found.sd == pytest.approx(found.value * logarithms.std(ddof=1))
    ends = t.interval(0.95, 2, loc=logarithms.mean(), scale=logarithms.std(ddof=1) / math.sqrt(3))
    assert found.interval == pytest.approx(np.exp(ends))
    assert found.over_text is None


def test_of_one_seed_nothing_is_claimed():
    found = spread([31.2], [0.5], is_ratio=True)
    assert (found.value, found.sd, found.interval) == (pytest.approx(31.2), None, None)
    assert found.shown(2) == "31.20"
    assert welch([31.2], THEIRS) is None
    assert welch(OURS, [29.0]) is None


def test_two_settings_are_compared_by_welchs_t():
    found, wanted = welch(OURS, THEIRS), ttest_ind(OURS, THEIRS, equal_var=False)
    assert found.value == pytest.approx(np.mean(OURS) - np.mean(THEIRS))
    assert found.value / found.stderr == pytest.approx(wanted.statistic)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert (found.count, found.clusters) == (7, 1 + math.floor(wanted.df))


def test_settings_that_no_seed_changes_differ_by_what_they_differ():
    assert welch([2.0, 2.0], [1.0, 1.0]).interval == (1.0, 1.0)
    assert welch([1.0, 1.0], [1.0, 1.0, 1.0]).interval == (0.0, 0.0)


def test_settings_that_ran_the_same_seeds_are_paired():
    theirs = THEIRS[:3]
    found, test = between(OURS, theirs, same_seeds=True)
    wanted = ttest_rel(OURS, theirs)
    assert test == TTest.PAIRED
    assert found.value / found.stderr == pytest.approx(wanted.statistic)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert between(OURS, THEIRS, same_seeds=False) == (welch(OURS, THEIRS), TTest.WELCH)
    assert between([1.0], [2.0], same_seeds=True) == (None, TTest.PAIRED)
