"""Refinements that do harm on windows held out are given up."""

from dataclasses import replace

import torch

from stages.pruning.entries import Pruned
from stages.pruning.guard import without_harm
from stages.pruning.updates import UPDATES
from tests.methods import made
from tests.pruning.test_block_loop import HALF, pruned

WEIGHT = torch.tensor([[1.0, 2.0]])
MASK = torch.tensor([[False, True]])
OTHER = torch.tensor([[True, False]])


def judged(outcome: Pruned, inputs: list[list[float]], scale: torch.Tensor | None = None) -> Pruned:
    return without_harm([WEIGHT], [outcome], [MASK], [scale], torch.tensor(inputs).view(-1, 2))[0]


def test_of_two_masks_the_one_with_less_error_on_the_inputs_is_taken():
    swapped = Pruned(mask=OTHER, damping=0.1)
    taken = judged(swapped, [[5.0, 1.0]])  # 2 is lost, 5 was
    assert (taken.mask is OTHER, taken.refined) == (True, True)
    given_up = judged(swapped, [[1.0, 5.0]])
    assert (given_up.mask.tolist(), given_up.values, given_up.damping, given_up.refined) == ([[False, True]], None, 0.1, False)


def test_a_refit_that_does_harm_leaves_the_weights_as_they_were():
    refit = Pruned(mask=MASK, values=torch.tensor([[0.0, 3.0]]))  # right where the two inputs are equal
    assert judged(refit, [[1.0, 1.0]]).values is refit.values
    assert judged(refit, [[-1.0, 1.0]]).values.tolist() == [[0.0, 2.0]]


def test_with_equal_errors_the_refinement_stays_and_without_inputs_nothing_is_judged():
    swapped = Pruned(mask=OTHER)
    assert (judged(swapped, [[0.0, 0.0]]).mask is OTHER, judged(swapped, [[0.0, 0.0]]).refined) == (True, True)
    assert judged(swapped, []) is swapped
    assert swapped.refined is None


def test_rows_count_by_what_their_errors_cost():
    weights, masks = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[False, True], [True, False]])
    swapped = Pruned(mask=~masks)
    inputs = torch.tensor([[1.0, 1.0]])  # the first row of the swapped mask loses more, the second too
    assert not without_harm([weights], [swapped], [masks], [None], inputs)[0].refined
    mixed = Pruned(mask=torch.tensor([[False, True], [False, True]]))  # only the second row loses more
    other = torch.tensor([[True, False], [True, False]])  # only the first row does
    for scale, refined in (([1.0, 0.1], True), ([0.1, 1.0], False)):
        scales = [torch.tensor(scale)[:, None]]
        assert without_harm([weights], [mixed], [other], scales, inputs)[0].refined == refined


def test_in_the_block_loop_a_harmful_update_leaves_the_mask_of_its_score(base, monkeypatch):
    """An update that keeps the lowest scores instead of the highest."""

    def harmful(weights, statistic, patterns, method):
        return [Pruned(mask=~pattern.mask(weight.abs()), values=weight * 0) for weight, pattern in zip(weights, patterns, strict=True)]

    method = made("wanda", "least_squares", steps=1)
    entry = replace(UPDATES["least_squares"], prune=harmful)
    monkeypatch.setitem(UPDATES._entries, "least_squares", entry)
    changes, blocks = pruned(base, method, HALF, held_out=2)
    monkeypatch.setitem(UPDATES._entries, "least_squares", replace(entry, refines=False))
    harmed, _ = pruned(base, method, HALF, held_out=2)
    expected, _ = pruned(base, made("wanda", "none"), HALF, held_out=2)
    assert all(result.refined is False for block in blocks for result in block.matrices)
    for name, change in changes.items():
        assert torch.equal(change.mask, expected[name].mask)
        assert torch.equal(change.apply(base.tensor(name)), expected[name].apply(base.tensor(name)))
        assert not torch.equal(change.mask, harmed[name].mask)
