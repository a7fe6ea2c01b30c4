import itertools

import pytest
import torch

from stages.pruning.patterns import Nm, Unstructured, keep_highest, pruned_count


def test_keep_highest_by_hand():
    assert keep_highest(torch.tensor([[3.0, 1.0, 2.0]]), 2).tolist() == [[True, False, False]]


def test_of_equals_the_leftmost_go_first():
    assert keep_highest(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), 2).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_highest_equals_a_stable_sort(dtype):
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (50, 40)).to(dtype)
    for count in (0, 1, 17, 39, 40):
        order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
        expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)
        assert torch.equal(keep_highest(scores, count), expected)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        keep_highest(torch.tensor([[1.0, float("nan")]]), 1)


def test_the_count_is_that_of_the_decimal_the_user_wrote():
    assert int(100 * 0.29) == 28
    assert pruned_count(100, 0.29) == 29
    assert pruned_count(576, 0.55) == 316


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.73])
def test_every_row_has_exactly_the_count_asked(sparsity):
    scores = torch.ones(6, 30, dtype=torch.bfloat16)
    mask = Unstructured(sparsity=sparsity, threshold="row").mask(scores)
    assert (~mask).sum(dim=1).tolist() == [pruned_count(30, sparsity)] * 6


def test_a_matrix_threshold_lets_rows_differ_but_not_the_total():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = Unstructured(sparsity=0.5, threshold="matrix").mask(scores)
    assert mask.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("threshold", ["row", "matrix"])
def test_the_counts_of_column_ranges_add_up(threshold):
    torch.manual_seed(0)
    scores, pattern = torch.rand(3, 37), Unstructured(sparsity=0.61, threshold=threshold)
    parts = [pattern.mask(scores[:, a:b], a) for a, b in itertools.pairwise([0, 10, 20, 30, 37])]
    total = sum(int((~part).sum()) for part in parts)
    assert total == (3 * pruned_count(37, 0.61) if threshold == "row" else pruned_count(111, 0.61))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 16)])
def test_n_of_every_m_are_kept(kept, group):
    torch.manual_seed(0)
    mask = Nm(kept=kept, group=group).mask(torch.rand(5, 48))
    assert (mask.view(5, -1, group).sum(dim=2) == kept).all()


def test_four_of_eight_is_not_two_of_four():
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert Nm(kept=4, group=8).mask(scores).tolist() == [[True] * 4 + [False] * 4]


def test_columns_that_groups_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="found 10 columns, wanted a multiple of pattern.group = 4"):
        Nm(kept=2, group=4).mask(torch.rand(2, 10))
