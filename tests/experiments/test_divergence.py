"""The lines of llama.cpp's --kl-divergence: what reads that program's output reads ours."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.llama_cpp_divergence import PRINTED, printed_figures
from stages.evaluation.metric import Corpus, Predictions, window_means
from stages.evaluation.metrics import METRICS
from stages.experiments.divergence import lines, text
from stages.experiments.reading import Missing
from tests.experiments.test_table import experiment

WINDOWS, TOKENS, VOCABULARY = 4, 8, 16


@pytest.fixture(scope="module")
def evaluated():
    """An experiment with what the two metrics of text measure of random predictions."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (WINDOWS, 1 + TOKENS), generator=generator)
    dense, ours = (torch.randn(WINDOWS * TOKENS, VOCABULARY, generator=generator).log_softmax(dim=1) for _ in range(2))
    corpus = Corpus(name="news", windows=tokens, clusters=[0, 0, 1, 2])

    def observed(metric, predicted, beside=None):
        predictions = Predictions(tokens=tokens[:, 1:].flatten(), log_probabilities=predicted, dense=beside)
        return {name: values.unflatten(0, (WINDOWS, TOKENS)) for name, values in METRICS[metric].observe(predictions).items()}

    of_dense = observed("perplexity", dense)
    means = {name: window_means(values) for name, values in of_dense.items()}
    found = [
        one for metric in ("perplexity", "divergence") for one in METRICS[metric].measure(corpus, observed(metric, ours, dense), means)
    ]
    return replace(experiment("one", 20.0), measurements=found, dense=METRICS["perplexity"].measure(corpus, of_dense, None))


def test_a_reader_of_llama_cpps_output_reads_every_figure(evaluated):
    figures = printed_figures("\n".join(lines(evaluated, "news")))
    assert set(PRINTED.values()) <= set(figures)
    measured = {one.metric: one for one in evaluated.measurements}
    for name in PRINTED.values():
        assert figures[name] == pytest.approx(measured[name].value, abs=0.006), name
    for name in ("mean_kld", "perplexity_ln_ratio", "perplexity_ratio", "mean_delta_p", "rms_delta_p", "same_top_p"):
        assert figures[f"{name}_stderr"] == pytest.approx(measured[name].stderr, abs=6e-4), name
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(figures["perplexity_ln_ratio"]), abs=2e-6)


def test_the_lines_stand_as_llama_cpp_prints_them(evaluated):
    found = lines(evaluated, "news")
    labels = [line.split(":")[0] for line in found]
    assert [line for line in found if line.startswith("=")] == [
        "====== Perplexity statistics ======",
        "====== KL divergence statistics ======",
        "====== Token probability statistics ======",
    ]
    assert "Mean PPL(Q)                   " in labels and "Mean PPL(base)                " in labels
    assert {
        "Mean    KLD",
        "99.9%   KLD",
        "Median  KLD",
        " 5.0%   KLD",
        " 0.1%   KLD",
        "Mean    Δp",
        "75.0%   Δp",
        "RMS Δp    ",
        "Same top p",
    } <= set(labels)
    assert found[-1].endswith(" %") and found[-3].endswith("%")


def test_each_corpus_has_a_table_below_what_it_is_of(evaluated):
    shown = text([evaluated], [Missing(name="old", reason="gone")])
    assert "one: wanda, 2:4 50%; news, 512 tokens in windows of 128" in shown
    assert "none begun with BOS, of 3 documents\n" in shown
    assert shown.count("Mean    KLD") == 1
    assert shown.endswith("left out old: gone\n")
    without = replace(evaluated, measurements=[one for one in evaluated.measurements if one.metric == "perplexity"])
    assert "one: divergence from the dense model was not measured" in text([without], [])
    assert text([], []) == "no experiment was evaluated yet; `dvc exp run` runs one\n"
