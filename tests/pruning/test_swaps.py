import pytest
import torch

from stages.pruning.patterns import keep_highest
from stages.pruning.updates import swaps as module
from stages.pruning.updates.swaps import swaps

ROWS, COLUMNS = 5, 12


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, the Gram matrix of correlated inputs, and a mask that keeps 2 of 4 by magnitude."""
    torch.manual_seed(0)
    inputs = torch.randn(60, COLUMNS) @ torch.randn(COLUMNS, COLUMNS)
    weight = torch.randn(ROWS, COLUMNS)
    return weight, inputs.T @ inputs, keep_highest(weight.abs().view(-1, 4), 2).view(ROWS, COLUMNS)


def error_of(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[rows], float64."""
    dropped = (weight * ~mask).double()
    return ((dropped @ gram.double()) * dropped).sum(dim=1)


def swapped_once_literally(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, group: int | None) -> torch.Tensor:
    """Try every swap of every row, the error computed anew, and take each row's best if it helps."""
    best = mask.clone()
    for i in range(ROWS):
        for p in range(COLUMNS):
            for q in range(COLUMNS):
                if mask[i, p] and not mask[i, q] and (group is None or p // group == q // group):
                    tried = mask[i : i + 1].clone()
                    tried[0, p], tried[0, q] = False, True
                    if error_of(weight[i : i + 1], gram, tried) < error_of(weight[i : i + 1], gram, best[i : i + 1]):
                        best[i] = tried[0]
    return best


def refine(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, cycles: int = 100, group: int | None = None, candidates=COLUMNS):
    return swaps(weight, gram, mask, cycles=cycles, candidates=candidates, group=group)


def test_uncorrelated_inputs_keep_what_carries_most():
    mask = refine(torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([9.0, 1.0])), torch.tensor([[False, True]]))
    assert mask.tolist() == [[True, False]]


def test_two_weights_that_cancel_go_together():
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mask = refine(torch.tensor([[3.0, -3.0, 1.0]]), gram, torch.tensor([[True, False, False]]))
    assert mask.tolist() == [[False, False, True]]


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("cycles", [1, 2, 3, 100])
def test_every_cycle_takes_the_swap_that_brute_force_finds(cycles, group):
    weight, gram, mask = problem()
    expected = mask
    for _ in range(cycles):
        expected = swapped_once_literally(weight, gram, expected, group)
        if cycles == 100 and torch.equal(expected, swapped_once_literally(weight, gram, expected, group)):
            break
    assert not torch.equal(expected, mask)
    assert torch.equal(refine(weight, gram, mask, cycles, group), expected)


@pytest.mark.parametrize("group", [None, 4])
def test_in_the_end_no_single_swap_helps(group):
    weight, gram, mask = problem()
    refined = refine(weight, gram, mask, group=group)
    assert torch.equal(swapped_once_literally(weight, gram, refined, group), refined)


@pytest.mark.parametrize(("candidates", "group"), [(1, None), (3, None), (COLUMNS, None), (COLUMNS, 4)])
def test_the_error_of_no_row_rises_in_any_cycle(candidates, group):
    weight, gram, mask = problem()
    errors = torch.stack([error_of(weight, gram, refine(weight, gram, mask, cycles, group, candidates)) for cycles in range(12)])
    assert (errors.diff(dim=0) <= 0).all()
    assert errors[-1].sum() < errors[0].sum()


def test_rows_keep_their_counts():
    weight, gram, mask = problem()
    mask[0], mask[1] = True, False
    assert torch.equal(refine(weight, gram, mask).sum(dim=1), mask.sum(dim=1))


def test_groups_keep_their_counts():
    weight, gram, mask = problem()
    refined = refine(weight, gram, mask, group=4)
    assert (refined.view(ROWS, -1, 4).sum(dim=2) == 2).all()


def test_one_candidate_each_is_the_cheapest_to_drop_and_the_most_worth_bringing_back():
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    mask = refine(torch.ones(1, 4), gram, torch.tensor([[True, True, False, False]]), cycles=1, candidates=1)
    assert mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("group", [None, 4])
def test_slabs_of_rows_change_nothing(monkeypatch, group):
    weight, gram, mask = problem()
    expected = refine(weight, gram, mask, group=group)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 1)
    assert torch.equal(refine(weight, gram, mask, group=group), expected)


def test_inputs_that_are_always_zero_swap_nothing():
    weight, gram, mask = problem()
    assert torch.equal(refine(weight, torch.zeros_like(gram), mask), mask)


def test_neither_the_weights_nor_the_mask_given_are_changed():
    weight, gram, mask = problem()
    copies = weight.clone(), mask.clone()
    refine(weight, gram, mask)
    assert torch.equal(weight, copies[0])
    assert torch.equal(mask, copies[1])
