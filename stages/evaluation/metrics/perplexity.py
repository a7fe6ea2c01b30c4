"""Perplexity, and how far it lies from the dense model's on the same windows.

    perplexity = exp(mean over windows of the mean negative log-likelihood of all tokens of a window but the first)

as in the evaluations of SparseGPT and Wanda; logits in float32. Errors are clustered by document, by the delta method. Ratios of rises
depend on the dense model's perplexity, so that the logarithm of the ratio stands beside them.
"""

import math
from typing import Any

import torch

from stages.evaluation.measurement import Better, Difference, Measurement
from stages.evaluation.metric import Corpus, Metric, Observed, Predictions, Shown, WindowMeans, window_means
from stages.evaluation.statistics import Estimate, difference, mean

NLL = "nll"


def observe(predictions: Predictions) -> dict[str, torch.Tensor]:
    """The negative log-likelihood [nats] of each token."""
    return {NLL: -predictions.of_tokens(predictions.log_probabilities)}


def measure(corpus: Corpus, observed: Observed, dense: WindowMeans | None) -> list[Measurement]:
    """The perplexity; with the dense model's window means the ratio of both, and its logarithm."""
    losses = window_means(observed[NLL])
    ours = mean(losses, corpus.clusters)
    facts = {**corpus.facts, **exponential(ours), "metric": "perplexity", "label": "perplexity", "better": Better.LOWER}
    if dense is None:
        return [Measurement(**facts)]
    theirs, apart = mean(dense[NLL], corpus.clusters), difference(losses, dense[NLL], corpus.clusters)
    here, there = math.exp(ours.value), math.exp(theirs.value)
    rise = mean([here * loss - there * other for loss, other in zip(losses, dense[NLL], strict=True)], corpus.clusters)  # delta method
    reach = None if rise.interval is None else (rise.interval[1] - rise.interval[0]) / 2
    low, high = (None, None) if reach is None else (here - there - reach, here - there + reach)
    return [
        Measurement(**facts, dense=there, difference=Difference(value=here - there, stderr=rise.stderr, low=low, high=high)),
        Measurement(**corpus.facts, **exponential(apart), metric="perplexity_ratio", label="perplexity over dense", better=Better.LOWER),
        Measurement.of(
            apart, **corpus.facts, metric="perplexity_ln_ratio", label="ln of perplexity over dense", better=Better.LOWER, unit="nats"
        ),
    ]


def exponential(estimate: Estimate) -> dict[str, Any]:
    """The exponential of an estimated mean, as the fields of a measurement."""
    value = math.exp(estimate.value)
    low, high = (None, None) if estimate.interval is None else map(math.exp, estimate.interval)
    return {"value": value, "stderr": None if estimate.stderr is None else value * estimate.stderr, "low": low, "high": high}


PERPLEXITY = Metric(
    name="perplexity",
    needs_dense=False,
    observe=observe,
    kept=(NLL,),
    measure=measure,
    shown=(
        Shown(
            metric="perplexity",
            digits=2,
            headline=True,
            heading="perplexity",
            words="perplexity",
            kept=NLL,
            ratio=True,
            against={"×": "perplexity_ratio", "ln": "perplexity_ln_ratio"},
        ),
        Shown(metric="perplexity_ratio", digits=3, heading="over dense", kept=NLL, ratio=True, itself=1.0),
        Shown(metric="perplexity_ln_ratio", digits=3, kept=NLL, itself=0.0),
    ),
    summary="perplexity, and over the dense model's",
)
