import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from stages.pruning.inputs import CalibratedOn
from stages.pruning.observer import Observer
from stages.pruning.statistics import SquaredNorm
from stages.streaming.architecture import Layer

HIDDEN = torch.arange(1.0, 13.0).view(2, 3, 2)
EXPERTS = [Layer("experts.weight", expert) for expert in range(3)]


class Experts(nn.Module):
    """Three experts of one layer each, in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            where, slot = (chosen == expert).nonzero(as_tuple=True)
            output[where] += linear(tokens[where], self.weight[expert]) * weights[where, slot, None]
        return output


class Block(nn.Module):
    """Sends the first token of the micro-batch to expert 1, and all others to expert 0."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, 2)
        chosen = torch.zeros(len(tokens), 1, dtype=torch.int64)
        chosen[0] = 1
        return self.experts(tokens, chosen, torch.ones(len(tokens), 1)).view_as(hidden)


@torch.no_grad()
def observed(minimum: int | None):
    block = Block()
    observer = Observer(block, EXPERTS, SquaredNorm, tokens=6, sampled=3)  # every second token
    observer.run(HIDDEN, block)
    return {inputs.layers[0].expert: inputs for inputs in observer.finish(minimum)}


def test_an_expert_is_calibrated_on_the_tokens_that_chose_it():
    inputs = observed(None)
    tokens = HIDDEN.view(6, 2)
    assert torch.equal(inputs[0].statistic.squared_norm, tokens[1:].square().sum(dim=0))
    assert torch.equal(inputs[1].statistic.squared_norm, tokens[0].square())
    assert (inputs[0].tokens, inputs[1].tokens) == (5, 1)


def test_without_a_minimum_an_expert_that_no_token_chose_is_left_out():
    assert observed(None).keys() == {0, 1}


@pytest.mark.parametrize(("minimum", "few"), [(0, {2}), (1, {2}), (2, {1, 2}), (6, {0, 1, 2})])
def test_an_expert_that_fewer_tokens_chose_is_calibrated_on_a_sample_of_all(minimum, few):
    inputs = observed(minimum)
    assert inputs.keys() == {0, 1, 2}
    assert {expert for expert in inputs if inputs[expert].calibrated_on is CalibratedOn.ALL_TOKENS} == few
    sample = HIDDEN.view(6, 2)[::2]
    for expert in few:
        assert torch.equal(inputs[expert].statistic.squared_norm, sample.square().sum(dim=0))
        assert torch.equal(inputs[expert].sampled(), sample[:1])
    assert [inputs[expert].tokens for expert in range(3)] == [5, 1, 0]


def test_the_sources_of_tokens_are_written_as_words():
    assert [str(source) for source in CalibratedOn] == ["its tokens", "all tokens"]
