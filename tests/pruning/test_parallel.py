"""A single process; test_distributed runs two."""

import pytest
import torch

from stages.pruning.entries import Pruned
from stages.pruning.parallel import broadcast_group, solve_own


def test_a_single_process_solves_no_group_ahead():
    assert solve_own(["a", "b"], lambda _: pytest.fail("solved ahead")) == {}


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("values", [None, torch.tensor([[1.0, 0.0]])])
def test_what_is_broadcast_is_the_outcome_itself(values, damping):
    own = Pruned(mask=torch.tensor([[True, False]]), values=values, damping=damping)
    (same,) = broadcast_group([own], [torch.ones(1, 2)], 0, changes_weights=values is not None)
    assert torch.equal(same.mask, own.mask)
    assert same.mask.dtype == torch.bool
    assert same.values is values or torch.equal(same.values, values)
    assert same.damping == damping
