"""What metrics declare of their measurements is what they measure."""

import math

import pytest
import torch

from stages.evaluation.measurement import Measurement
from stages.evaluation.metric import Corpus, Metric, Observed, Predictions, Shown, window_means
from stages.evaluation.metrics import METRICS, shown_measurements

WINDOWS, TOKENS, VOCABULARY = 4, 6, 11
SHOWN = [pytest.param(metric, shown, id=shown.metric) for metric in METRICS.values() for shown in metric.shown]
CORPUS = Corpus(name="news", windows=torch.zeros(WINDOWS, TOKENS + 1, dtype=torch.int64), clusters=[0, 0, 1, 2])


def predictions(seed: int, dense: torch.Tensor | None) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(WINDOWS * TOKENS, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (WINDOWS * TOKENS,), generator=torch.Generator().manual_seed(0))
    return Predictions(tokens=tokens, log_probabilities=logits.log_softmax(dim=1), dense=dense)


def scored(metric: Metric, *, itself: bool) -> tuple[Observed, dict[str, Measurement]]:
    """What a metric keeps and measures of a model, or of the dense model against itself."""
    dense = predictions(1, None)
    ours = predictions(1 if itself else 2, dense.log_probabilities)
    observed = {name: values.view(WINDOWS, TOKENS) for name, values in metric.observe(ours).items()}
    reference = METRICS["perplexity"].observe(dense)
    means = {name: window_means(values.view(WINDOWS, TOKENS)) for name, values in reference.items()}
    return observed, {one.metric: one for one in metric.measure(CORPUS, observed, means)}


@pytest.mark.parametrize(("metric", "shown"), SHOWN)
def test_what_is_compared_is_kept(metric: Metric, shown: Shown):
    assert shown.kept in metric.kept
    assert set(shown.against.values()) <= set(shown_measurements())


@pytest.mark.parametrize(("metric", "shown"), SHOWN)
def test_a_measurement_is_the_mean_of_what_is_kept_or_its_exponential(metric: Metric, shown: Shown):
    observed, measured = scored(metric, itself=False)
    value = shown.scale * observed[shown.kept].double().mean().item()
    if shown.metric in ("perplexity_ratio", "perplexity_ln_ratio"):  # of which the dense model's mean is taken off
        value -= METRICS["perplexity"].observe(predictions(1, None))["nll"].double().mean().item()
    assert measured[shown.metric].value == pytest.approx(math.exp(value) if shown.ratio else value)


@pytest.mark.parametrize(("metric", "shown"), SHOWN)
def test_the_dense_model_against_itself_is_as_declared(metric: Metric, shown: Shown):
    if shown.itself is not None:
        assert scored(metric, itself=True)[1][shown.metric].value == pytest.approx(shown.itself)


def test_measurements_are_found_by_name():
    assert list(shown_measurements()) == ["mean_kld", "same_top_p", "perplexity", "perplexity_ratio", "perplexity_ln_ratio"]
    assert [name for name, shown in shown_measurements().items() if shown.headline] == ["mean_kld", "perplexity"]
