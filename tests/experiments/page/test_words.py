"""What the numbers say, in sentences."""

from dataclasses import replace

import pytest

from stages.evaluation.statistics import Estimate
from stages.experiments.page.words import against_quantised, best, difference_words, measured, noise, number, text_of
from tests.experiments import synthetic

GROUP = synthetic.group(sparsities=(0.5,))
PERPLEXITY, KLD, ACCURACY = GROUP.metrics


@pytest.mark.parametrize(("value", "words"), [(3.14159, "3.14"), (-0.5, "-0.50"), (12345.6, "12,346")])
def test_numbers_are_written_with_few_digits(value, words):
    assert number(value, 2) == words


def test_a_measurement_is_written_with_its_interval():
    row = {"value": 29.971, "low": 26.4, "high": 34.0, "clusters": 7}
    assert measured(PERPLEXITY, row) == "29.97 [26.40, 34.00]"
    assert measured(PERPLEXITY, {**row, "low": None, "high": None, "clusters": 1}) == "29.97 (no interval: 1 document)"


def test_a_difference_is_written_as_its_metric_is_compared():
    certain = Estimate(value=0.0, stderr=0.0, count=2, clusters=2)
    assert difference_words(PERPLEXITY, certain) == "×1.000 [1.000, 1.000]"
    assert difference_words(ACCURACY, certain) == "+0.000 [+0.000, +0.000]"
    assert difference_words(ACCURACY, replace(certain, stderr=None)) == "+0.000 (no interval: a task has none)"
    assert difference_words(PERPLEXITY, replace(certain, stderr=None, clusters=1)) == "×1.000 (no interval: 1 document)"


def test_the_text_is_said_with_its_counts():
    assert text_of(GROUP) == [
        "wikipedia: 18,414 tokens of 7 documents, in the first 18 of 301 windows of 1,024 tokens, none begun with BOS",
        "9 tasks: 60 rows each, the first of 3,270: " + ", ".join(f"{task} (60 of 3,270)" for task in synthetic.TASKS),
    ]
    assert text_of(synthetic.other_group())[0].endswith(", each begun with BOS (token 1)")


def test_each_pattern_has_its_best():
    found = best(GROUP, PERPLEXITY)
    assert [(one.asked, one.name) for one in found] == [("unstructured 50%", "admm_short"), ("2:4", "admm_short"), ("4:8", "admm_short")]
    assert found[0].against_dense.endswith("] of dense")
    assert found[0].rest.startswith("Next: sparsegpt, ×1.")
    assert best(GROUP, KLD)[0].against_dense == ""


def test_the_best_lies_between_two_quantised_models():
    row = {"type": "Q4_0", "value": 20.0, "low": None, "high": None, "clusters": 1, "bytes_per_weight": 0.5625, "shares": {}}
    rows = [row, {**row, "type": "Q8_0", "value": 19.0, "bytes_per_weight": 1.0625}, {**row, "type": "Q2_K", "value": 40.0}]
    q4, q2 = (
        "Q4_0, 20.00 (no interval: 1 document) at 0.562 bytes a weight",
        "Q2_K, 40.00 (no interval: 1 document) at 0.562 bytes a weight",
    )
    assert against_quantised(PERPLEXITY, {"value": 21.0}, rows) == f"Between the quantised models {q4} and {q2}."
    assert against_quantised(PERPLEXITY, {"value": 41.0}, rows) == f"Every quantised model here does less damage; the most: {q2}."
    assert against_quantised(PERPLEXITY, {"value": 18.0}, rows[:1]) == f"Every quantised model here does more damage; the least: {q4}."
    assert against_quantised(PERPLEXITY, {"value": 18.0}, []) == ""
    scores = [{**row, "value": 0.5}, {**row, "type": "Q2_K", "value": 0.3}]
    assert against_quantised(ACCURACY, {"value": 0.4}, scores).startswith("Between the quantised models Q4_0, 0.500")
    assert best(GROUP, PERPLEXITY)[0].against_quantised.startswith("Every quantised model here does less damage; the most: Q2_K")
    assert best(replace(GROUP, results=GROUP.results[1:]), PERPLEXITY)[0].against_quantised == ""


def test_others_within_noise_of_the_best_are_named():
    first, *rest = GROUP.results[:3]
    twin = replace(first, experiment=replace(first.experiment, name="twin"))
    assert best(replace(GROUP, results=[first, twin]), PERPLEXITY)[0].rest == "Within noise of it: wanda (twin)."
    many = [replace(first, experiment=replace(first.experiment, name=f"twin-{number}")) for number in range(5)]
    assert best(replace(GROUP, results=many), PERPLEXITY)[0].rest == "4 of 4 others are within noise of it."
    assert best(replace(GROUP, results=[first]), PERPLEXITY)[0].rest == "Nothing else was measured here."


def test_pairs_within_noise_are_listed():
    first, second, _ = GROUP.results[:3]
    twin = replace(first, experiment=replace(first.experiment, name="twin"))
    (found,) = noise(replace(GROUP, results=[first, twin]), PERPLEXITY)
    assert (found.asked, found.pairs) == ("unstructured 50%", 1)
    assert found.within == ["wanda (twin) against wanda (wanda-50): ×1.000 [1.000, 1.000]"]
    assert noise(replace(GROUP, results=[first]), PERPLEXITY) == []
    assert found.unknown == []
    better = replace(GROUP, results=[second, GROUP.results[2]])
    assert noise(better, PERPLEXITY)[0].within == []


def test_pairs_without_an_interval_are_unknown_and_neither_noise_nor_a_difference():
    alone = {"wikipedia": [0] * synthetic.WINDOWS}
    members = [replace(details, scores=replace(details.scores, window_clusters=alone)) for details in GROUP.results[:2]]
    (found,) = noise(replace(GROUP, results=members), PERPLEXITY)
    assert (found.pairs, found.within) == (1, [])
    assert found.unknown[0].endswith("(no interval: 1 document)")
