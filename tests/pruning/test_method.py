import pytest
import torch

from stages.pruning.method import ScoreAndSelect, SparseGpt
from stages.pruning.patterns import Nm, Unstructured
from stages.pruning.statistics import Gram, SquaredNorm
from stages.pruning.updates.sparsegpt import sparsegpt

CPU = torch.device("cpu")


def sweep(block_size: int, score: str = "obs") -> SparseGpt:
    return SparseGpt(score=score, damping=0.01, damping_limit=0.01, block_size=block_size)


def gram_of(inputs: torch.Tensor) -> Gram:
    gram = Gram(inputs.shape[1], CPU)
    gram.add(inputs[None])
    gram.finish()
    return gram


def prune(method, weight: torch.Tensor, statistic, pattern) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix alone."""
    (outcome,) = method([weight], statistic, [pattern])
    return outcome.mask, outcome.values


def swept_literally(weight: torch.Tensor, damped: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Surgeon column by column, the inverse of what is left computed anew at every column."""
    weight = weight.clone().double()
    for j in range(weight.shape[1]):
        inverse = damped[j:, j:].double().inverse()
        for i in range(weight.shape[0]):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j].clone() / inverse[0, 0] * inverse[0]
                weight[i, j] = 0
    return weight.float()


@pytest.mark.parametrize("block_size", [1, 4, 5, 128])
def test_the_sweep_equals_its_literal_transcription(block_size):
    torch.manual_seed(0)
    weight, gram = torch.randn(6, 12), gram_of(torch.randn(40, 12))
    mask = torch.rand(6, 12) > 0.5
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(12)
    found_mask, found = sparsegpt(
        weight, gram.inverse_factor(0.01, 0.01), lambda w, _, j: mask[:, j : j + w.shape[1]], block_size, block_size
    )
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, swept_literally(weight, damped, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", ["row", "matrix"])
def test_with_uncorrelated_inputs_sparsegpt_is_magnitude_and_moves_nothing(threshold):
    torch.manual_seed(0)
    weight, gram = torch.randn(8, 16), Gram(16, CPU)
    gram.value = torch.eye(16)
    pattern = Unstructured(sparsity=0.5, threshold=threshold)
    mask, updated = prune(sweep(16), weight, gram, pattern)
    expected, _ = prune(ScoreAndSelect(score="magnitude"), weight, gram, pattern)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(updated, weight * mask)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize(
    "pattern", [Unstructured(sparsity=0.5, threshold="row"), Unstructured(sparsity=0.6, threshold="matrix"), Nm(kept=2, group=4)]
)
def test_compensation_lowers_the_output_error(score, pattern):
    torch.manual_seed(0)
    inputs = torch.randn(400, 32) @ torch.randn(32, 32)
    weight, gram = torch.randn(16, 32), gram_of(inputs)
    mask, updated = prune(sweep(8, score), weight, gram, pattern)
    with_update = (inputs @ (weight - updated).T).norm()
    without = (inputs @ (weight * ~mask).T).norm()
    assert with_update < without
    assert (updated[~mask] == 0).all()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8)])
def test_groups_keep_n_of_m_after_the_update(kept, group):
    torch.manual_seed(0)
    weight, gram = torch.randn(16, 32), gram_of(torch.randn(100, 32))
    mask, updated = prune(sweep(16), weight, gram, Nm(kept=kept, group=group))
    assert (mask.view(16, -1, group).sum(dim=2) == kept).all()
    assert torch.equal(updated != 0, mask)


def test_sparsegpt_prunes_exactly_what_is_asked_when_blocks_do_not_divide_the_matrix():
    torch.manual_seed(0)
    weight, gram = torch.randn(7, 30), gram_of(torch.randn(100, 30))
    mask, _ = prune(sweep(8), weight, gram, Unstructured(sparsity=0.7, threshold="matrix"))
    assert int((~mask).sum()) == 147


def test_weights_of_dead_inputs_go_first_and_what_is_kept_of_them_stays():
    torch.manual_seed(0)
    inputs = torch.randn(50, 8)
    inputs[:, :6] = 0
    weight = torch.randn(4, 8)
    mask, updated = prune(
        sweep(8),
        weight,
        gram_of(inputs),
        Unstructured(sparsity=0.5, threshold="row"),
    )
    assert mask[:, 6:].all()
    assert torch.equal(updated[:, :6][mask[:, :6]], weight[:, :6][mask[:, :6]])


def test_wanda_prunes_what_carries_least():
    statistic = SquaredNorm(2, CPU)
    statistic.add(torch.tensor([[[1.0, 10.0]]]))
    mask, updated = prune(
        ScoreAndSelect(score="wanda"), torch.tensor([[3.0, -1.0]]), statistic, Unstructured(sparsity=0.5, threshold="row")
    )
    assert mask.tolist() == [[False, True]]
    assert updated is None
