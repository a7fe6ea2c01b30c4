import itertools
from fractions import Fraction

import pytest
import torch

from stages.groups import keep_highest_of_few
from stages.pruning import patterns
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


def test_many_rows_are_cut_some_at_a_time(monkeypatch):
    scores = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    whole = keep_highest(scores, 17)
    monkeypatch.setattr(patterns, "WEIGHTS_AT_ONCE", 3 * 40 + 1)  # the last slab is smaller
    assert torch.equal(keep_highest(scores, 17), whole)
    scores[49, 39] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        keep_highest(scores, 17)


def test_a_sparsity_at_which_no_row_would_lose_a_weight_is_refused():
    Unstructured(sparsity=0.0, comparison_group="row").check(40)
    Unstructured(sparsity=0.025, comparison_group="row").check(40)
    Unstructured(sparsity=0.001, comparison_group="matrix").check(40, rows=25)
    with pytest.raises(ValueError, match="found sparsity 0.024, wanted 0 or at least 1/40"):
        Unstructured(sparsity=0.024, comparison_group="row").check(40)


def test_scores_that_differ_beyond_float32_are_told_apart():
    scores = torch.tensor([[1.0 + 2e-12, 1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert keep_highest(scores, 2).tolist() == [[True, False, False]]


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
    mask = Unstructured(sparsity=sparsity, comparison_group="row").mask(scores)
    assert (~mask).sum(dim=1).tolist() == [pruned_count(30, sparsity)] * 6


def test_a_matrix_threshold_lets_rows_differ_but_not_the_total():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = Unstructured(sparsity=0.5, comparison_group="matrix").mask(scores)
    assert mask.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("comparison_group", ["row", "matrix"])
def test_the_counts_of_column_ranges_add_up(comparison_group):
    torch.manual_seed(0)
    scores, pattern = torch.rand(3, 37), Unstructured(sparsity=0.61, comparison_group=comparison_group)
    parts = [pattern.mask(scores[:, a:b], a) for a, b in itertools.pairwise([0, 10, 20, 30, 37])]
    total = sum(int((~part).sum()) for part in parts)
    assert total == (3 * pruned_count(37, 0.61) if comparison_group == "row" else pruned_count(111, 0.61))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 16), (5, 24), (16, 32), (95, 96)])
def test_n_of_every_m_are_kept(kept, group):
    torch.manual_seed(0)
    mask = Nm(kept=kept, group=group).mask(torch.rand(5, 96))
    assert (mask.view(5, -1, group).sum(dim=2) == kept).all()


def test_four_of_eight_is_not_two_of_four():
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert Nm(kept=4, group=8).mask(scores).tolist() == [[True] * 4 + [False] * 4]


def test_columns_that_groups_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="found 10 columns, wanted a multiple of pattern.group = 4"):
        Nm(kept=2, group=4).mask(torch.rand(2, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 2, 4, 8, 16])
def test_among_few_columns_the_same_are_kept_as_among_many(columns, dtype):
    scores = torch.randint(0, 5, (60, columns), generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in range(columns + 1):
        assert torch.equal(keep_highest_of_few(scores, count), keep_highest(scores, count))


def test_scores_of_few_columns_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        Nm(kept=2, group=4).mask(torch.tensor([[1.0, 2.0, 3.0, float("nan")]]))


# What an allocation gave a matrix.


def test_a_fraction_is_met_to_the_weight():
    assert pruned_count(21, Fraction(10, 21)) == 10
    assert pruned_count(3 * 10**12, Fraction(1, 3)) == 10**12


@pytest.mark.parametrize("count", [0, 1, 29, 30, 31, 74, 149, 150])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_share_the_count_of_a_fraction_evenly(count, tied):
    scores = torch.ones(5, 30) if tied else torch.rand(5, 30, generator=torch.Generator().manual_seed(count))
    dropped = (~Unstructured(sparsity=Fraction(count, 150), comparison_group="row").mask(scores)).sum(dim=1)
    assert int(dropped.sum()) == count
    assert dropped.max() - dropped.min() <= 1


def test_one_more_goes_in_the_row_whose_next_weight_carries_least():
    scores = torch.tensor([[1.0, 5.0, 6.0], [4.0, 3.0, 2.0]])
    mask = Unstructured(sparsity=Fraction(3, 6), comparison_group="row").mask(scores)
    assert mask.tolist() == [[False, True, True], [True, False, False]]


def test_a_fraction_that_rows_share_without_remainder_is_the_decimals_mask():
    scores = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    fraction, decimal = (Unstructured(sparsity=sparsity, comparison_group="row").mask(scores) for sparsity in (Fraction(1, 4), 0.25))
    assert torch.equal(fraction, decimal)


@pytest.mark.parametrize("comparison_group", ["row", "matrix"])
@pytest.mark.parametrize("count", [0, 1, 50, 76, 110, 111])
def test_the_counts_of_column_ranges_add_up_to_a_fractions(comparison_group, count):
    scores = torch.rand(3, 37, generator=torch.Generator().manual_seed(0))
    pattern = Unstructured(sparsity=Fraction(count, 111), comparison_group=comparison_group)
    parts = [pattern.mask(scores[:, a:b], a) for a, b in itertools.pairwise([0, 10, 20, 30, 37])]
    assert sum(int((~part).sum()) for part in parts) == count


# At less cost.


def rough_share(sparsity: float | Fraction, scale: torch.Tensor) -> float:
    """Of zeros in the rough mask of a 512 x 512 matrix whose columns differ by a scale."""
    scores = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * scale
    return float((~Unstructured(sparsity=sparsity, comparison_group="matrix").approximate_mask(scores)).float().mean())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, Fraction(123457, 512 * 512)])
def test_one_threshold_from_a_sample_prunes_about_as_many_as_asked(sparsity):
    assert rough_share(sparsity, torch.ones(512)) == pytest.approx(float(sparsity), abs=0.02)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_a_sample_sees_all_columns_alike(sparsity):
    """Inputs differ in scale, and every stride-th weight of a matrix may be in every stride-th column."""
    assert rough_share(sparsity, 1 + 9.0 * (torch.arange(512) % 2)) == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(sparsity=0.3, comparison_group="row"),
        Unstructured(sparsity=Fraction(70, 240), comparison_group="row"),
        Nm(kept=2, group=4),
    ],
    ids=str,
)
def test_where_few_weights_compete_the_rough_mask_is_the_exact_one(pattern):
    scores = torch.rand(10, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pattern.approximate_mask(scores), pattern.mask(scores))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unstructured(sparsity=-0.5, comparison_group="row"), r"found sparsity -0.5, wanted a fraction of zeros in \[0, 1\]"),
        (lambda: Unstructured(sparsity=1.5, comparison_group="row"), "found sparsity 1.5"),
        (lambda: Unstructured(sparsity=0.5, comparison_group="rows"), "found comparison_group 'rows', wanted one of row, matrix"),
        (lambda: Nm(kept=5, group=4), "found 5 kept of every 4, wanted N of every M"),
        (lambda: Nm(kept=-1, group=4), "found -1 kept of every 4"),
    ],
)
def test_a_pattern_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_in_which_nothing_would_be_pruned_is_refused():
    Unstructured(sparsity=0.001, comparison_group="matrix").check(40, rows=25)
    with pytest.raises(ValueError, match="found sparsity 0.0001, wanted 0 or at least 1/1000: no weight of 1000 would be pruned"):
        Unstructured(sparsity=0.0001, comparison_group="matrix").check(40, rows=25)
