import math

import pytest
import torch

from stages.checkpoint.model import load_model
from stages.errors import CheckpointError, ConfigError
from stages.evaluation.perplexity import WindowLosses, cut_windows, standard_error, window_losses
from tests import tiny


def test_perplexity_is_the_exponential_of_the_mean_of_window_means():
    losses = WindowLosses(losses=[1.0, 3.0])
    assert losses.perplexity == pytest.approx(math.exp(2))
    assert losses.stderr == pytest.approx(math.exp(2) * 1.0)


def test_the_ratio_compares_window_by_window():
    dense, sparse = WindowLosses(losses=[1.0, 5.0]), WindowLosses(losses=[1.5, 5.5])
    ratio, stderr = sparse.ratio(dense)
    assert ratio == pytest.approx(math.exp(0.5))
    assert stderr == pytest.approx(0)


def test_standard_error_by_hand():
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3 / 4))


def test_windows_are_the_joined_text_cut_and_the_remainder_dropped():
    tokenizer, texts = tiny.tokenizer(), tiny.sentences(4, seed=0)
    tokens = tokenizer("\n\n".join(texts))["input_ids"]
    windows = cut_windows(texts, tokenizer, 16, None, tiny.NO_BOS)
    assert windows.flatten().tolist() == tokens[: len(tokens) // 16 * 16]
    assert torch.equal(cut_windows(texts, tokenizer, 16, 3, tiny.NO_BOS), windows[:3])
    spread = [0, len(windows) // 3, 2 * len(windows) // 3]
    assert torch.equal(cut_windows(texts, tokenizer, 16, 3, tiny.NO_BOS, evenly=True), windows[spread])
    assert torch.equal(cut_windows(texts, tokenizer, 16, None, tiny.NO_BOS, evenly=True), windows)


def test_a_corpus_that_is_too_small_says_how_many_tokens_it_has():
    tokenizer, texts = tiny.tokenizer(), tiny.sentences(1, seed=0)
    count = len(tokenizer(texts[0])["input_ids"])
    with pytest.raises(ConfigError, match=f"the corpus has {count} tokens, wanted 2 windows of 512"):
        cut_windows(texts, tokenizer, 512, None, tiny.NO_BOS)


def test_a_loss_that_is_not_finite_is_refused(base):
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="perplexity window 0: found loss nan, wanted a finite number"):
        window_losses(model, torch.arange(20).view(2, 10))


def test_losses_are_those_that_transformers_computes(base):
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    windows = cut_windows(tiny.sentences(4, seed=0), tiny.tokenizer(), 32, 3, tiny.NO_BOS)
    expected = [model(window[None], labels=window[None]).loss.item() for window in windows]
    assert window_losses(model, windows).losses == pytest.approx(expected, rel=1e-5)
