"""Blocks whose experts are loaded one at a time, bit by bit as blocks that are loaded whole."""

import pytest
import torch

from stages.pruning.block_loop import prune_blocks
from stages.pruning.plan import Plan
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import ReservedTensor
from stages.streaming.stream import Stream
from tests.methods import WANDA, sparsegpt
from tests.pruning.test_architectures import CPU, HALF, WINDOWS, fetched

OTHERS = {  # of those whose experts are in one parameter: what is not transformers' interface of experts
    "llama4_text": "all experts in one batched product",
    "jetmoe": "two modules of experts",
}


def pruned(base, method=WANDA, propagate="pruned", *, apart: bool, done=lambda _: None):
    decoder = Decoder(base, torch.float32, CPU)
    if apart:
        assert decoder.take_experts_apart()
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(method=method, patterns=dict.fromkeys(names, HALF), propagate=propagate, error_tokens=60, expert_tokens=8)
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=2, held_out=2)
    return stream, list(prune_blocks(stream, plan, done))


def facts(matrix):
    return matrix.matrix, matrix.relative_error, matrix.held_out_error, matrix.tokens, matrix.calibrated_on, matrix.kept, matrix.damping


def require_same(ours, whole):
    assert [block.index for block in ours] == [block.index for block in whole]
    for block, expected in zip(ours, whole, strict=True):
        assert list(map(facts, block.matrices)) == list(map(facts, expected.matrices))
        for name, change in expected.changes.items():
            assert torch.equal(block.changes[name].mask, change.mask)
            assert (block.changes[name].values is None) == (change.values is None)
            assert change.values is None or torch.equal(block.changes[name].values, change.values)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("method", [WANDA, sparsegpt()], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_the_result_is_that_of_whole_blocks_bit_by_bit(kind, method, propagate, tmp_path):
    base = fetched(kind, tmp_path)
    stream, ours = pruned(base, method, propagate, apart=True)
    expected_stream, whole = pruned(base, method, propagate, apart=False)
    require_same(ours, whole)
    assert torch.equal(stream.hidden, expected_stream.hidden)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_run_goes_on_after_blocks_that_an_earlier_run_finished(kind, propagate, tmp_path):
    base = fetched(kind, tmp_path)
    _, whole = pruned(base, sparsegpt(), propagate, apart=False)
    changes = {0: whole[0].changes, 1: whole[1].changes}
    _, ours = pruned(base, sparsegpt(), propagate, apart=True, done=changes.get)
    require_same(ours, whole[2:])


def test_a_block_is_read_without_its_experts_and_an_expert_alone(tmp_path):
    decoder = Decoder(fetched("gpt_oss", tmp_path), torch.float32, CPU)
    whole = decoder.read(1)
    assert decoder.take_experts_apart()
    rest, expert = decoder.read(1), decoder.read_expert(1, 2)
    assert whole.keys() == rest.keys() | expert.keys()
    assert not rest.keys() & expert.keys()
    assert all(torch.equal(tensor, whole[name][2]) for name, tensor in expert.items())


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_of_another_interface_are_loaded_with_their_blocks(kind, tmp_path):
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    assert decoder.has_experts
    assert not decoder.take_experts_apart()


def test_the_memory_of_an_entry_is_freed():
    reserved = ReservedTensor(torch.Size((3, 1024, 16)), torch.float32)
    reserved.tensor.fill_(1)
    reserved.free(1)
    assert [entry.unique().tolist() for entry in reserved.tensor] == [[1], [0], [1]]


def test_a_reserved_tensor_may_be_larger_than_the_machine():
    tensor = ReservedTensor(torch.Size((2**10, 2**30)), torch.float32).tensor  # 4 TiB
    tensor[1000, 5] = 3
    assert tensor[1000, :10].tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 0]
