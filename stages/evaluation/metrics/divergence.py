"""Divergence from the dense model: what the pruned model predicts for the same tokens, distribution against distribution.

    KLD(t) = sum_v p_dense(v | t) (ln p_dense(v | t) - ln p(v | t))
    Δp(t)  = p(token | t) - p_dense(token | t)

Perplexity hides changes that cancel out; these do not. The fields and their names are those of llama.cpp's `llama-perplexity
--kl-divergence`, so that both tables can be laid side by side; llama.cpp scores the second half of each window alone and takes tokens as
independent, where we score all tokens but the first and cluster errors by document. Quantiles interpolate linearly, as there.
"""

import math

import numpy as np
import torch

from stages.evaluation.measurement import Better, Measurement
from stages.evaluation.metric import Corpus, Metric, Observed, Predictions, Shown, WindowMeans, window_means
from stages.evaluation.statistics import mean

KLD, DELTA_P, SAME_TOP, NLL, DENSE_NLL = "kld", "delta_p", "same_top", "nll", "dense_nll"
PERCENT = 100.0
QUANTILES = {
    "maximum_kld": (1.0, "Maximum KLD"),
    "kld_99_9": (0.999, "99.9% KLD"),
    "kld_99": (0.99, "99.0% KLD"),
    "kld_95": (0.95, "95.0% KLD"),
    "kld_90": (0.9, "90.0% KLD"),
    "median_kld": (0.5, "Median KLD"),
    "kld_10": (0.1, "10.0% KLD"),
    "kld_5": (0.05, "5.0% KLD"),
    "kld_1": (0.01, "1.0% KLD"),
    "kld_0_1": (0.001, "0.1% KLD"),
    "minimum_kld": (0.0, "Minimum KLD"),
}
DELTA_P_QUANTILES = {
    "maximum_delta_p": (1.0, "Maximum Δp"),
    **{f"delta_p_{percent:g}".replace(".", "_"): (percent / PERCENT, f"{percent:.1f}% Δp") for percent in (99.9, 99.0, 95.0, 90.0, 75.0)},
    "median_delta_p": (0.5, "Median Δp"),
    **{f"delta_p_{percent:g}".replace(".", "_"): (percent / PERCENT, f"{percent:.1f}% Δp") for percent in (25.0, 10.0, 5.0, 1.0, 0.1)},
    "minimum_delta_p": (0.0, "Minimum Δp"),
}


def observe(predictions: Predictions) -> dict[str, torch.Tensor]:
    """KLD [nats], Δp, whether both find the same token likeliest, and both negative log-likelihoods [nats], of each token."""
    ours, dense = predictions.log_probabilities, predictions.dense
    if dense is None:
        raise ValueError("found no predictions of the dense model, wanted both models'")
    probabilities, token, dense_token = dense.exp(), predictions.of_tokens(ours), predictions.of_tokens(dense)
    return {
        KLD: (probabilities * (dense - ours)).where(probabilities > 0, 0).sum(dim=1),
        DELTA_P: token.exp() - dense_token.exp(),
        SAME_TOP: (ours.argmax(dim=1) == dense.argmax(dim=1)).float(),
        NLL: -token,
        DENSE_NLL: -dense_token,
    }


def measure(corpus: Corpus, observed: Observed, dense: WindowMeans | None) -> list[Measurement]:
    """Mean and quantiles of KLD, the agreement of the likeliest tokens, and the change of the probability of the token that comes."""
    facts = corpus.facts
    kld, delta_p, same_top, square = (
        mean(window_means(values), corpus.clusters)
        for values in (observed[KLD], observed[DELTA_P], observed[SAME_TOP], observed[DELTA_P] ** 2)
    )
    root = math.sqrt(square.value)
    root_error = None if square.stderr is None or root == 0 else PERCENT * square.stderr / (2 * root)  # delta method
    quantiles = np.quantile(observed[KLD].double().numpy(), [quantile for quantile, _ in QUANTILES.values()])
    changes = PERCENT * np.quantile(observed[DELTA_P].double().numpy(), [quantile for quantile, _ in DELTA_P_QUANTILES.values()])
    correlated = correlation(observed[NLL], observed[DENSE_NLL])
    percent = {**facts, "unit": "%", "scale": PERCENT}
    return [
        Measurement.of(kld, **facts, metric="mean_kld", label="Mean KLD", unit="nats", better=Better.LOWER),
        *(
            Measurement(**facts, metric=metric, label=label, value=float(value), unit="nats", better=Better.LOWER)
            for (metric, (_, label)), value in zip(QUANTILES.items(), quantiles, strict=True)
        ),
        Measurement.of(delta_p, **percent, metric="mean_delta_p", label="Mean Δp"),
        Measurement(**facts, metric="rms_delta_p", label="RMS Δp", value=PERCENT * root, stderr=root_error, unit="%", better=Better.LOWER),
        *(
            Measurement(**facts, metric=metric, label=label, value=float(value), unit="%")
            for (metric, (_, label)), value in zip(DELTA_P_QUANTILES.items(), changes, strict=True)
        ),
        Measurement.of(same_top, **percent, metric="same_top_p", label="Same top p", better=Better.HIGHER),
        *(
            []
            if correlated is None
            else [
                Measurement(
                    **facts,
                    metric="ln_ppl_correlation",
                    label="Cor(ln(PPL(Q)), ln(PPL(base)))",
                    value=PERCENT * correlated,
                    unit="%",
                    better=Better.HIGHER,
                )
            ]
        ),
    ]


def correlation(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Pearson's correlation of two tensors of one shape, value by value; None if either is constant."""
    apart = [(values.double() - values.double().mean()).flatten() for values in (first, second)]
    spread = math.sqrt(float(apart[0] @ apart[0]) * float(apart[1] @ apart[1]))
    return float(apart[0] @ apart[1]) / spread if spread > 0 else None


DIVERGENCE = Metric(
    name="divergence",
    needs_dense=True,
    observe=observe,
    kept=(KLD, SAME_TOP),
    measure=measure,
    shown=(
        Shown(
            metric="mean_kld",
            digits=3,
            headline=True,
            heading="mean KLD",
            words="mean KL divergence from dense",
            kept=KLD,
            itself=0.0,
        ),
        Shown(metric="same_top_p", digits=1, words="same likeliest token as dense", kept=SAME_TOP, scale=PERCENT, itself=PERCENT),
    ),
    summary="Kullback-Leibler divergence from the dense model, and agreement of the likeliest tokens",
)
