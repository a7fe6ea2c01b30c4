"""What numbers rest on, in words."""

from dataclasses import replace

import pytest

from stages.experiments.page.counts import basis, counted, no_interval
from tests.experiments import synthetic

GROUP = synthetic.group(sparsities=(0.5,))
ROW = {"kind": "corpus", "count": 18414, "counted": "tokens", "clusters": 7}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW, "18,414 tokens in 7 documents"),
        ({**ROW, "clusters": 1}, "18,414 tokens in 1 document"),
        ({**ROW, "kind": "task", "count": 20, "counted": "rows"}, "20 rows in 7 texts"),
        ({**ROW, "kind": "task", "count": 20, "counted": "rows", "clusters": 20}, "20 rows"),
        ({**ROW, "kind": "mean", "count": 9, "counted": "tasks"}, "9 tasks"),
    ],
)
def test_a_count_is_said_with_what_is_independent_of_it(row, words):
    assert counted(row) == words


@pytest.mark.parametrize(
    ("kind", "clusters", "words"),
    [
        ("corpus", 1, "no interval: 1 document"),
        ("task", 1, "no interval: 1 text"),
        ("task", 20, "no interval"),
        ("mean", 9, "no interval: a task has none"),
        ("size", 1, "no interval"),
    ],
)
def test_a_missing_interval_has_its_reason(kind, clusters, words):
    assert no_interval(kind, clusters) == words


def test_what_an_older_protocol_does_not_say_is_not_said():
    perplexity, _, accuracy = GROUP.metrics
    first = GROUP.results[0]
    older = {**first.experiment.protocol, "tasks": {}, "corpora": {"wikipedia": {"window_length": 1024, "windows": 18}}}
    group = replace(GROUP, results=[replace(first, experiment=replace(first.experiment, protocol=older))])
    assert basis(group, perplexity) == "18,414 tokens in 7 documents"
    assert basis(group, accuracy) == "9 tasks"
