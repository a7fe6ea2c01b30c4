"""Routers, told from shared experts by what is computed from them, in hand-made blocks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from stages.streaming.routers import find_routers

WIDTH, EXPERTS = 8, 4


class Experts(nn.Module):
    """With transformers' interface."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, 6, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, 6))

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            of_expert = linear(linear(tokens[token], self.up_proj[expert]).relu(), self.down_proj[expert])
            output.index_add_(0, token, of_expert * weights[token, slot, None])
        return output


class Gate(nn.Module):
    """A router of one matrix, which it casts to float32, as most of transformers do."""

    def __init__(self, outputs: int = EXPERTS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens.float(), self.weight.float())


def deep_gate() -> nn.Module:
    """A router of several layers, one of them as wide as the hidden states, whose last output stands for no expert."""
    return nn.Sequential(nn.Linear(WIDTH, 3), nn.GELU(), nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, EXPERTS + 1))


class Block(nn.Module):
    """Attention of a kind, and a mixture that lies in the block itself, with a shared expert that has as many rows as there are experts."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(WIDTH, EXPERTS), nn.Linear(EXPERTS, WIDTH)
        self.experts, self.gate = Experts(), gate
        self.shared_up, self.shared_down = nn.Linear(WIDTH, EXPERTS), nn.Linear(EXPERTS, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.o_proj(self.v_proj(hidden).cumsum(dim=1))
        tokens = hidden.reshape(-1, WIDTH)
        weights, chosen = self.gate(tokens)[:, :EXPERTS].softmax(dim=-1).topk(2, dim=-1)
        mixed = self.experts(tokens, chosen, weights.to(tokens.dtype))
        return hidden + (mixed + self.shared_down(self.shared_up(tokens).relu())).view_as(hidden)


class WithoutWeights(Block):
    """The router's outputs say which experts run, and these weigh the same."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        chosen = self.gate(tokens).argmax(dim=-1, keepdim=True)
        return hidden + self.experts(tokens, chosen, torch.ones_like(chosen, dtype=tokens.dtype)).view_as(hidden)


class Latent(Block):
    """Tokens are projected before the router and the experts read them."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = self.shared_down(self.shared_up(hidden.reshape(-1, WIDTH)))
        weights, chosen = self.gate(tokens).softmax(dim=-1).topk(2, dim=-1)
        return hidden + self.experts(tokens, chosen, weights.to(tokens.dtype)).view_as(hidden)


class ByNames(Block):
    """The experts are called by the names of their arguments, the tokens last; the gate's weight is multiplied from the left."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        scores = (self.gate.weight.float() @ tokens.float().mT).mT
        weights, chosen = scores.softmax(dim=-1).topk(2, dim=-1)
        mixed = self.experts(weights=weights.to(tokens.dtype), chosen=chosen, tokens=tokens)
        return hidden + (mixed + self.shared_down(self.shared_up(tokens).relu())).view_as(hidden)


def routers(block: nn.Module, dtype: torch.dtype = torch.float32, experts: str = "experts") -> set[str]:
    block = block.to(device="meta", dtype=dtype).requires_grad_(False)
    matrices = [name for name, parameter in block.named_parameters() if parameter.dim() == 2]
    return find_routers(block, matrices, {experts}, partial(nn.Module.__call__, hidden=torch.zeros(1, 2, WIDTH, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Block, WithoutWeights, Latent, ByNames])
def test_the_matrix_that_decides_on_experts_is_the_router_and_one_with_as_many_rows_is_none(kind, dtype):
    assert routers(kind(Gate()), dtype) == {"gate.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_router_belong_to_it_whatever_their_rows(dtype):
    assert routers(Block(deep_gate()), dtype) == {"gate.0.weight", "gate.2.weight", "gate.4.weight"}


def test_outputs_for_other_than_routed_experts_do_not_hide_a_router():
    assert routers(Block(Gate(EXPERTS + 2))) == {"gate.weight"}


class Shared(nn.Module):
    """Shared experts in one parameter, each scaled by an output of the router."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(2, WIDTH, WIDTH))

    def forward(self, tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return sum(linear(tokens * scales[:, expert, None], self.up_proj[expert]) for expert in range(2))


class WithShared(Block):
    """The router scales shared experts, too."""

    def __init__(self) -> None:
        super().__init__(Gate(EXPERTS + 2))
        self.shared = Shared()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        scores = self.gate(tokens).sigmoid()
        weights, chosen = scores[:, :EXPERTS].topk(2, dim=-1)
        return hidden + (self.experts(tokens, chosen, weights) + self.shared(tokens, scores[:, EXPERTS:])).view_as(hidden)


def test_a_router_may_scale_shared_experts_too():
    block = WithShared().to("meta").requires_grad_(False)
    run = partial(nn.Module.__call__, hidden=torch.zeros(1, 2, WIDTH))
    assert find_routers(block, ["gate.weight", "v_proj.weight"], {"experts", "shared"}, run) == {"gate.weight"}


class Heads(nn.Module):
    """A matrix for each head; the interface is not that of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, WIDTH // 2, WIDTH // 2))

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(half, weight) for half, weight in zip(tokens.chunk(2, dim=-1), self.weight, strict=True)], dim=-1) * scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.heads = nn.Linear(WIDTH, WIDTH), Heads()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.heads(hidden, self.scale(hidden))


def test_a_parameter_that_holds_heads_has_no_router():
    assert routers(Recurrent(), experts="heads") == set()


def test_weights_are_as_they_were():
    block = Block(Gate()).to("meta").requires_grad_(False)
    before = dict(block.named_parameters())
    routers(block)
    assert all(parameter is before[name] and parameter.is_meta for name, parameter in block.named_parameters())
    assert not block.experts._forward_hooks and not block.experts._forward_pre_hooks


class WithoutEpsilon(Block):
    """Hidden states are divided by their size, which is 0 in a block of zeros."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden / hidden.norm(dim=-1, keepdim=True))


def test_where_zeros_give_nan_no_router_is_told_and_that_is_said():
    with pytest.raises(ValueError, match="a block with experts gives NaN, wanted numbers, by which its router is told"):
        routers(WithoutEpsilon(Gate()))
