import math

import numpy as np
import pytest
import torch

from stages.evaluation.metric import Corpus, Predictions
from stages.evaluation.metrics.divergence import DELTA_P_QUANTILES, QUANTILES, correlation, measure, observe


def predictions(ours: list[list[float]], dense: list[list[float]], tokens: list[int]) -> Predictions:
    return Predictions(tokens=torch.tensor(tokens), log_probabilities=torch.tensor(ours).log(), dense=torch.tensor(dense).log())


def test_divergence_by_hand():
    observed = observe(predictions([[0.25, 0.75]], [[0.5, 0.5]], [0]))
    assert observed["kld"].item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert observed["delta_p"].item() == pytest.approx(-0.25)
    assert (observed["nll"].item(), observed["dense_nll"].item()) == (pytest.approx(math.log(4)), pytest.approx(math.log(2)))


def test_it_is_that_of_torch_and_none_of_a_model_from_itself():
    generator = torch.Generator().manual_seed(0)
    ours, dense = (torch.log_softmax(torch.randn(7, 11, generator=generator), dim=1) for _ in range(2))
    observed = observe(Predictions(tokens=torch.zeros(7, dtype=torch.int64), log_probabilities=ours, dense=dense))
    wanted = torch.nn.functional.kl_div(ours, dense, reduction="none", log_target=True).sum(dim=1)
    assert torch.allclose(observed["kld"], wanted, atol=1e-6)
    same = observe(Predictions(tokens=torch.zeros(7, dtype=torch.int64), log_probabilities=dense, dense=dense))
    assert same["kld"].tolist() == [0.0] * 7
    assert same["same_top"].tolist() == [1.0] * 7


def test_tokens_that_both_models_rule_out_do_not_count():
    observed = observe(predictions([[0.25, 0.75, 0.0]], [[0.5, 0.5, 0.0]], [0]))
    assert observed["kld"].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_without_the_dense_model_there_is_no_divergence():
    with pytest.raises(ValueError, match="found no predictions of the dense model"):
        observe(Predictions(tokens=torch.tensor([0]), log_probabilities=torch.zeros(1, 1), dense=None))


def measured(clusters: list[int]) -> dict:
    generator = torch.Generator().manual_seed(1)
    shape = (len(clusters), 5)
    observed = {name: torch.rand(shape, generator=generator) for name in ("kld", "nll", "dense_nll")}
    observed["delta_p"] = torch.rand(shape, generator=generator) - 0.5
    observed["same_top"] = (torch.rand(shape, generator=generator) > 0.3).float()
    corpus = Corpus(name="articles", windows=torch.zeros(len(clusters), 6, dtype=torch.int64), clusters=clusters)
    return observed | {one.metric: one for one in measure(corpus, observed, {})}


def test_the_fields_are_means_quantiles_and_a_correlation_over_all_tokens():
    fields = measured([0, 1, 2, 3])
    values = fields["kld"].double().numpy()
    assert fields["mean_kld"].value == pytest.approx(values.mean())
    for metric, (quantile, _) in QUANTILES.items():
        assert fields[metric].value == pytest.approx(np.quantile(values, quantile))
    changes = 100 * fields["delta_p"].double().numpy()
    for metric, (quantile, _) in DELTA_P_QUANTILES.items():
        assert fields[metric].value == pytest.approx(np.quantile(changes, quantile))
    assert (fields["delta_p_0_1"].label, fields["delta_p_99_9"].label) == ("0.1% Δp", "99.9% Δp")
    assert fields["same_top_p"].value == pytest.approx(100 * fields["same_top"].mean().item())
    assert fields["mean_delta_p"].value == pytest.approx(100 * fields["delta_p"].double().mean().item())
    assert fields["rms_delta_p"].value == pytest.approx(100 * fields["delta_p"].double().pow(2).mean().sqrt().item())
    wanted = np.corrcoef(fields["nll"].flatten().numpy(), fields["dense_nll"].flatten().numpy())[0, 1]
    assert fields["ln_ppl_correlation"].value == pytest.approx(100 * wanted, rel=1e-5)
    assert all(one.count == 20 for name, one in fields.items() if not isinstance(one, torch.Tensor))


def test_errors_are_clustered_by_document():
    apart, together = measured([0, 1, 2, 3]), measured([0, 0, 1, 1])
    means = apart["kld"].double().mean(dim=1).numpy()
    assert apart["mean_kld"].stderr == pytest.approx(means.std(ddof=1) / 2)
    pairs = means.reshape(2, 2).mean(axis=1)
    assert together["mean_kld"].stderr == pytest.approx(pairs.std(ddof=1) / math.sqrt(2))
    assert together["rms_delta_p"].clusters == 2


def test_constant_losses_have_no_correlation():
    assert correlation(torch.ones(3), torch.rand(3)) is None
