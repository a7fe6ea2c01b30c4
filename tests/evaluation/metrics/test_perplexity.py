import math

import pytest
import torch

from stages.evaluation.metric import Corpus, Predictions
from stages.evaluation.metrics import METRICS
from stages.evaluation.metrics.perplexity import measure, observe


def corpus(windows: int, clusters: list[int] | None = None) -> Corpus:
    return Corpus(name="articles", windows=torch.zeros(windows, 3, dtype=torch.int64), clusters=clusters or list(range(windows)))


def losses(*values: float) -> dict[str, torch.Tensor]:
    """Two tokens a window, of which these are the means."""
    return {"nll": torch.tensor([[value - 0.5, value + 0.5] for value in values])}


def test_the_loss_of_a_token_is_its_negative_log_probability():
    log_probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    observed = observe(Predictions(tokens=torch.tensor([0, 1]), log_probabilities=log_probabilities, dense=None))
    assert observed["nll"].tolist() == pytest.approx([math.log(4), math.log(2)])


def test_perplexity_is_the_exponential_of_the_mean_of_window_means():
    (measured,) = measure(corpus(2), losses(1.0, 3.0), None)
    assert measured.value == pytest.approx(math.exp(2))
    assert measured.stderr == pytest.approx(math.exp(2) * 1.0)
    assert (measured.count, measured.counted, measured.clusters, measured.better) == (4, "tokens", 2, "lower")
    assert measured.low == pytest.approx(math.exp(2 - 12.7062), rel=1e-4)  # Student's t with one degree of freedom


def test_the_ratio_compares_window_by_window():
    perplexity, ratio, logarithm = measure(corpus(2), losses(1.5, 5.5), {"nll": [1.0, 5.0]})
    assert (ratio.value, logarithm.value) == (pytest.approx(math.exp(0.5)), pytest.approx(0.5))
    assert (ratio.stderr, logarithm.stderr) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert perplexity.dense == pytest.approx(math.exp(3.0))
    assert perplexity.difference.value == pytest.approx(math.exp(3.5) - math.exp(3.0))
    assert perplexity.difference.stderr == pytest.approx((math.exp(3.5) - math.exp(3.0)) * 2)  # both losses are 2 from their mean


def test_windows_of_one_document_are_one_draw():
    apart = measure(corpus(4), losses(1.0, 1.0, 3.0, 3.0), None)[0]
    together = measure(corpus(4, [0, 0, 1, 1]), losses(1.0, 1.0, 3.0, 3.0), None)[0]
    assert together.value == apart.value
    assert together.stderr == pytest.approx(math.exp(2))  # as of two windows
    assert together.clusters == 2 and apart.clusters == 4
    alone = measure(corpus(4, [0, 0, 0, 0]), losses(1.0, 1.0, 3.0, 3.0), None)[0]
    assert (alone.stderr, alone.low, alone.high) == (None, None, None)


def test_every_metric_is_found_by_its_name():
    assert list(METRICS) == ["divergence", "perplexity"]
    assert [metric.needs_dense for metric in METRICS.values()] == [True, False]
