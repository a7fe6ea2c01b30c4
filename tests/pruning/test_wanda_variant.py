import pytest
import torch

from stages.pruning.patterns import Nm, Unstructured, keep_highest
from stages.pruning.scores.wanda_variant import cumulative_share


def kept_at(alpha: float, scores: torch.Tensor) -> torch.Tensor:
    """In each row, drop from the lowest score on while what is dropped sums to at most alpha times the row's sum."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row, kept in zip(scores, mask, strict=True):
        dropped = 0.0
        for j in sorted(range(len(row)), key=lambda j, row=row: row[j].item()):
            dropped += row[j].item()
            if dropped > alpha * row.sum().item():
                break
            kept[j] = False
    return mask


def searched(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Halve an interval of alphas until it has closed."""
    low, high = 0.0, 1.0
    for _ in range(30):
        alpha = (low + high) / 2
        mask = kept_at(alpha, scores)
        low, high = (alpha, high) if (~mask).float().mean() < sparsity else (low, alpha)
    return mask


def test_shares_by_hand():
    assert cumulative_share(torch.tensor([[5.0, 1.0, 2.0], [0.5, 0.5, 1.0]])).tolist() == [[1.0, 0.125, 0.375], [0.25, 0.5, 1.0]]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_the_lowest_shares_of_the_matrix_are_what_a_search_for_alpha_drops(sparsity):
    torch.manual_seed(0)
    scores = torch.rand(8, 16) * torch.rand(8, 1).exp()
    expected = searched(scores, sparsity)
    found = keep_highest(cumulative_share(scores).view(1, -1), int((~expected).sum())).view(8, 16)
    assert abs((~expected).float().mean().item() - sparsity) < 0.01
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5, comparison_group="row"), Nm(kept=2, group=4)])
def test_within_a_row_nothing_changes_ties_included(pattern):
    torch.manual_seed(0)
    scores = torch.randint(0, 4, (8, 32)).float()
    assert torch.equal(pattern.mask(cumulative_share(scores)), pattern.mask(scores))


def test_small_scores_still_rank_beside_many_others():
    scores = torch.linspace(1, 1.001, 4096)[None]
    assert (cumulative_share(scores).diff() > 0).all()


def test_a_row_of_zeros_has_shares_of_zero():
    assert cumulative_share(torch.tensor([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0.0, 0.0], [0.25, 1.0]]


def test_a_weight_that_holds_most_of_its_row_outlives_larger_ones_of_an_even_row():
    scores = torch.tensor([[1.0, 9.0], [10.0, 10.0]])
    mask = Unstructured(sparsity=0.5, comparison_group="matrix").mask(cumulative_share(scores))
    assert mask.tolist() == [[False, True], [False, True]]
