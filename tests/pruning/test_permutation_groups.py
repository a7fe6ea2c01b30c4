import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from stages.checkpoint.layout import ParameterSlice
from stages.checkpoint.reader import Checkpoint
from stages.pruning.permutation_groups import candidates, largest_change, permutation_groups
from stages.streaming.architecture import Matrix
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from tests.pruning.test_architectures import fetched

CPU = torch.device("cpu")
HIDDEN = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@contextmanager
def loaded(base: Checkpoint, index: int):
    """A decoder, a block of it with weights, and a function that runs the block."""
    decoder = Decoder(base, torch.float32, CPU)
    with decoder.before_blocks():
        call = decoder.calls(WINDOWS)[index]
    with decoder.loaded(index, decoder.read(index)) as block, torch.no_grad():
        yield decoder, block, partial(run_block, block, call=call)


def groups_of(base: Checkpoint, index: int) -> dict[str, list[str]]:
    """Consumer -> producers, named as in the checkpoint, without what the names of a block begin with."""
    with loaded(base, index) as (decoder, block, run):
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        groups = permutation_groups(block, candidates(block, decoder.matrices[index]), run, HIDDEN)
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        start = f"{decoder.prefix}.{index}."
        return {
            group.consumer.name.removeprefix(start): [producer.name.removeprefix(start) for producer in group.producers] for group in groups
        }


def test_the_down_projection_is_permuted_with_gate_and_up_and_nothing_else_is(base):
    for index in range(3):
        assert groups_of(base, index) == {"mlp.down_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}


def test_reordering_a_permutation_group_leaves_the_block_as_it_was(base):
    with loaded(base, 1) as (decoder, block, run):
        (group,) = permutation_groups(block, candidates(block, decoder.matrices[1]), run, HIDDEN)
        expected, order = run(HIDDEN), torch.arange(112).flip(0)
        group.consumer.of(block).copy_(group.consumer.of(block)[:, order])
        assert largest_change(run(HIDDEN), expected, HIDDEN) > 1e-2
        for producer in group.producers:
            producer.of(block).copy_(producer.of(block)[order])
        assert largest_change(run(HIDDEN), expected, HIDDEN) < 1e-5


def test_a_group_is_proven_where_the_output_nearly_cancels_the_input_and_rounding_exceeds_what_is_left(base):
    with loaded(base, 1) as (decoder, block, run):
        cancelled = 0.99999 * run(HIDDEN)
        left = run(HIDDEN) - cancelled
        order = torch.arange(112).flip(0)
        (group,) = permutation_groups(block, candidates(block, decoder.matrices[1]), lambda hidden: run(hidden) - cancelled, HIDDEN)
        for matrix, dimension in [(group.consumer, 1), *((producer, 0) for producer in group.producers)]:
            matrix.of(block).copy_(matrix.of(block).index_select(dimension, order))
        rounding = torch.linalg.vector_norm(run(HIDDEN) - cancelled - left, dim=-1) / torch.linalg.vector_norm(left, dim=-1)
        assert rounding.max() > 1e-3


def test_the_change_of_tokens_that_are_zero_or_not_finite_is_not_a_number():
    zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    assert math.isnan(largest_change(zero, zero, zero))
    assert math.isnan(largest_change(one / 0, one / 0, one))
    assert largest_change(one + 0.25, one, 2 * one) == 0.125
    assert largest_change(one + 0.25, 2 * one, one) == 0.375


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "phi", "starcoder2"])
def test_there_is_no_group_where_the_producers_have_biases(kind, tmp_path):
    assert groups_of(fetched(kind, tmp_path), 1) == {}


def test_there_is_no_group_where_gate_and_up_are_one_matrix(tmp_path):
    assert groups_of(fetched("phi3", tmp_path), 1) == {}


@pytest.mark.parametrize(
    ("kind", "producer", "consumer"),
    [
        ("falcon", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
        ("mpt", "ffn.up_proj.weight", "ffn.down_proj.weight"),
        ("nemotron", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    ],
)
def test_a_plain_mlp_is_a_group_under_whatever_names(kind, producer, consumer, tmp_path):
    assert groups_of(fetched(kind, tmp_path), 1) == {consumer: [producer]}


@pytest.mark.parametrize("kind", ["cohere", "gemma2"])
def test_parallel_attention_and_further_norms_do_not_matter(kind, tmp_path):
    assert groups_of(fetched(kind, tmp_path), 1) == {"mlp.down_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}


def test_every_expert_that_is_a_tensor_of_its_own_is_a_group(tmp_path):
    experts = [f"block_sparse_moe.experts.{number}." for number in range(4)]
    assert groups_of(fetched("mixtral", tmp_path), 1) == {
        f"{expert}w2.weight": [f"{expert}w1.weight", f"{expert}w3.weight"] for expert in experts
    }


def test_an_expert_that_no_token_reaches_proves_nothing(tmp_path):
    with loaded(fetched("mixtral", tmp_path), 1) as (decoder, block, _):
        one_token = HIDDEN[:1, :1]
        groups = permutation_groups(block, candidates(block, decoder.matrices[1]), lambda hidden: hidden + block.mlp(hidden), one_token)
        assert len(groups) == 2  # of four experts, those it chose


def test_experts_that_are_slices_of_one_tensor_are_left_out(tmp_path):
    assert groups_of(fetched("granitemoe", tmp_path), 1) == {}


def test_a_shared_expert_is_a_group_too(tmp_path):
    groups = groups_of(fetched("deepseek_v3", tmp_path), 1)
    assert groups["mlp.shared_experts.down_proj.weight"] == ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"]
    assert not any("self_attn" in consumer for consumer in groups)


class TwoLayers(nn.Module):
    """x + second(between(first(x)) + factor * third(x))."""

    def __init__(self, between: nn.Module, factor: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(*sizes, bias=False) for sizes in ((32, 24), (24, 32), (32, 24)))
        self.between, self.factor = between, factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.second(self.between(self.first(hidden)) + self.factor * self.third(hidden))

    def matrices(self, *names: str) -> list[Matrix]:
        return [
            Matrix(
                tensor=name,
                expert=None,
                parameter_slice=ParameterSlice(name=f"{name}.weight"),
                transposed=False,
                shape=tuple(self.get_submodule(name).weight.shape),
            )
            for name in names
        ]


def consumers(block: TwoLayers, *names: str) -> list[str]:
    return [group.consumer.name for group in permutation_groups(block, candidates(block, block.matrices(*names)), block, HIDDEN)]


def test_channels_with_an_elementwise_function_between_can_be_permuted():
    assert consumers(TwoLayers(nn.GELU()), "first", "second") == ["second"]


@pytest.mark.parametrize("between", [nn.Softmax(dim=-1), nn.LayerNorm(24, bias=False)])
def test_channels_with_a_symmetric_function_between_can_be_permuted(between):
    assert consumers(TwoLayers(between), "first", "second") == ["second"]


def test_channels_that_are_scaled_differently_cannot_be_permuted():
    scaled = nn.LayerNorm(24)
    scaled.weight.data = torch.linspace(0.5, 1.5, 24)
    assert consumers(TwoLayers(scaled), "first", "second") == []


def test_with_a_producer_that_is_not_among_the_matrices_there_is_no_group():
    block = TwoLayers(nn.GELU(), factor=1.0)
    assert consumers(block, "first", "second") == []
    assert consumers(block, "first", "second", "third") == ["second"]


def test_a_matrix_without_effect_is_no_producer():
    """Reordered with the others it changes nothing, but neither does it alone."""
    assert consumers(TwoLayers(nn.GELU()), "first", "second", "third") == []


def test_a_block_whose_output_hides_its_layers_proves_nothing():
    block = TwoLayers(nn.GELU())
    block.second.weight.data *= 1e-6
    assert consumers(block, "first", "second") == []


def test_outputs_that_are_not_finite_prove_nothing():
    block = TwoLayers(nn.GELU())
    block.second.weight.data[0, 0] = float("inf")
    assert consumers(block, "first", "second") == []


def test_weights_are_restored_when_a_trial_fails():
    block, runs = TwoLayers(nn.GELU()), []

    def breaks(hidden):
        runs.append(1)
        if len(runs) > 1:
            raise RuntimeError("out of memory")
        return block(hidden)

    before = [parameter.clone() for parameter in block.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        permutation_groups(block, candidates(block, block.matrices("first", "second")), breaks, HIDDEN)
    assert all(torch.equal(parameter, old) for parameter, old in zip(block.parameters(), before, strict=True))


def test_hidden_states_of_a_coarser_dtype_are_refused():
    block = TwoLayers(nn.GELU())
    with pytest.raises(ValueError, match=r"found torch.bfloat16 hidden states, wanted torch.float32"):
        permutation_groups(block, candidates(block, block.matrices("first", "second")), block, HIDDEN.bfloat16())
