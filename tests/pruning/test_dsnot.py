import pytest
import torch

from stages.pruning.patterns import keep_highest
from stages.pruning.updates.dsnot import dsnot

ROWS, COLUMNS = 16, 24


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, their inputs' mean, variance and squared norm, and a Wanda mask that keeps 2 of 4."""
    torch.manual_seed(0)
    inputs = torch.randn(50, COLUMNS) * (torch.rand(COLUMNS) + 0.5) + torch.randn(COLUMNS)
    weight, squared_norm = torch.randn(ROWS, COLUMNS), inputs.square().sum(dim=0)
    mask = keep_highest((weight.abs() * squared_norm.sqrt()).view(-1, 4), 2).view(ROWS, COLUMNS)
    return weight, inputs.mean(dim=0), inputs.var(dim=0, correction=0), squared_norm, mask


def error_of(weight: torch.Tensor, mean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (weight * mean * ~mask).sum(dim=1)


def refined_literally(weight, mean, variance, squared_norm, mask, cycles, threshold, group):
    """One row, on lists."""
    columns, kept = range(len(weight)), mask.tolist()
    effect = [w * m for w, m in zip(weight.tolist(), mean.tolist(), strict=True)]
    steadiness = [abs(e) / v for e, v in zip(effect, variance.tolist(), strict=True)]
    importance = [abs(w) * s**0.5 for w, s in zip(weight.tolist(), squared_norm.tolist(), strict=True)]
    for _ in range(cycles):
        error = sum(effect[j] for j in columns if not kept[j])
        if abs(error) <= threshold:
            break
        pairs = [
            (q, p)
            for q in columns
            for p in columns
            if not kept[q] and kept[p] and effect[q] * error > 0 and effect[p] * error < 0 and (group is None or p // group == q // group)
        ]
        if not pairs:
            break
        grown = max((q for q, _ in pairs), key=lambda q: steadiness[q])
        pruned = min((p for q, p in pairs if q == grown), key=lambda p: importance[p])
        after = error - effect[grown] + effect[pruned]
        if abs(after) >= abs(error):
            break
        kept[grown], kept[pruned] = True, False
        if after * error <= 0:
            break
    return torch.tensor(kept)


def by_hand(weight: list[float], mask: list[bool], cycles: int = 50, threshold: float = 0.1, **given) -> list[bool]:
    """One row, every input with a mean, variance and squared norm of 1 unless they are given."""
    mean, variance, squared_norm = (torch.tensor(given.get(name, [1.0] * len(weight))) for name in ("mean", "variance", "squared_norm"))
    refined = dsnot(
        torch.tensor([weight]),
        mean,
        variance,
        squared_norm,
        torch.tensor([mask]),
        cycles=cycles,
        threshold=threshold,
        group=given.get("group"),
    )
    return refined[0].tolist()


def test_a_swap_by_hand():
    """2 is lost too much: it comes back, and -1 goes, the lowest of the negative."""
    assert by_hand([2.0, 1.0, -1.0, -4.0], [False, False, True, True]) == [True, False, False, True]


def test_the_steadiest_effect_grows_before_the_largest():
    assert by_hand([2.0, 1.0, -1.0], [False, False, True], variance=[4.0, 1.0, 1.0]) == [False, True, False]


def test_the_weight_that_carries_least_is_pruned_though_another_is_smaller():
    assert by_hand([4.0, -1.0, -2.0], [False, True, True], squared_norm=[1.0, 9.0, 1.0]) == [True, True, False]


def test_the_sign_of_the_mean_counts():
    assert by_hand([2.0, -1.0, 1.0], [False, True, True], mean=[1.0, 1.0, -1.0], squared_norm=[1.0, 2.0, 1.0]) == [True, True, False]


def test_a_row_whose_error_is_small_enough_stays():
    assert by_hand([0.25, -0.125], [False, True], threshold=0.25) == [False, True]


def test_a_swap_that_would_not_lower_the_error_is_not_taken():
    """The error of 1 would become -1."""
    assert by_hand([1.0, -1.0], [False, True]) == [False, True]


def test_after_a_change_of_sign_a_row_is_done():
    """The error of 2 becomes -1.5; growing -1 and pruning 0.25 would leave -0.25, and is not tried."""
    assert by_hand([3.0, -1.0, -0.5, 0.25], [False, False, True, True]) == [True, False, False, True]


def test_cycles_bound_the_swaps():
    weight, mask = [4.0, 3.0, 2.0, -0.5, -0.25], [False, False, False, True, True]
    assert by_hand(weight, mask, cycles=1) == [True, False, False, True, False]
    assert by_hand(weight, mask, cycles=2) == [True, True, False, False, False]


def test_the_pruned_weight_is_of_the_grown_ones_group():
    assert by_hand([2.0, -1.0, 1.0, -0.5], [False, True, False, True], group=2) == [True, False, False, True]


def test_a_group_with_nothing_to_prune_grows_nothing():
    assert by_hand([2.0, 1.0, 1.0, -0.5], [False, True, False, True], group=2) == [False, True, True, False]


def test_inputs_that_are_always_zero_swap_nothing():
    zeros = [0.0, 0.0]
    assert by_hand([2.0, -1.0], [False, True], mean=zeros, variance=zeros, squared_norm=zeros) == [False, True]


def test_an_input_without_variance_grows_first():
    assert by_hand([2.0, 1.0, -0.5], [False, False, True], variance=[1.0, 0.0, 1.0]) == [False, True, False]


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("cycles", [1, 2, 50])
def test_refinement_equals_its_definition_written_as_loops(cycles, group):
    weight, mean, variance, squared_norm, mask = problem()
    found = dsnot(weight, mean, variance, squared_norm, mask, cycles=cycles, threshold=0.1, group=group)
    expected = [refined_literally(weight[i], mean, variance, squared_norm, mask[i], cycles, 0.1, group) for i in range(ROWS)]
    assert not torch.equal(found, mask)
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("group", [None, 4])
def test_the_expected_error_of_no_row_rises_in_any_cycle(group):
    weight, mean, variance, squared_norm, mask = problem()
    masks = [dsnot(weight, mean, variance, squared_norm, mask, cycles=cycles, threshold=0.0, group=group) for cycles in range(8)]
    errors = torch.stack([error_of(weight, mean, kept).abs() for kept in masks])
    assert (errors.diff(dim=0) <= 1e-6).all()
    assert errors[-1].sum() < errors[0].sum() / 2


@pytest.mark.parametrize("group", [4, COLUMNS])
def test_rows_and_groups_keep_their_counts(group):
    weight, mean, variance, squared_norm, mask = problem()
    refined = dsnot(weight, mean, variance, squared_norm, mask, cycles=50, threshold=0.0, group=group)
    assert (refined.view(ROWS, -1, group).sum(dim=2) == group // 2).all()


def test_neither_the_weights_nor_the_mask_given_are_changed():
    weight, mean, variance, squared_norm, mask = problem()
    copies = weight.clone(), mask.clone()
    dsnot(weight, mean, variance, squared_norm, mask, cycles=50, threshold=0.0, group=None)
    assert torch.equal(weight, copies[0])
    assert torch.equal(mask, copies[1])
