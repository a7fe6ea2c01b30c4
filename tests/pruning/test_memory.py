from dataclasses import replace

import pytest
import torch

from stages.pruning import memory
from stages.pruning.distillation import Distillation
from stages.pruning.memory import LIBRARIES, delta_bytes, host_bytes
from stages.pruning.method import Method
from stages.pruning.patterns import Unstructured
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import Reconstruction
from stages.streaming.decoder import Decoder
from tests.methods import WANDA, sparsegpt
from tests.pruning.test_architectures import fetched

UNIFORM = {"scores_blocks": False, "takes_gradients": False}
LARGEST = 32 * 112  # weights of a layer of the small checkpoint


@pytest.fixture()
def decoder(base) -> Decoder:
    return Decoder(base, torch.float32, torch.device("cpu"))


@pytest.fixture()
def block(decoder) -> int:
    """Weights."""
    return sum(torch.Size(decoder.checkpoint.shape(name)).numel() for name in decoder.tensors(0))


def always(decoder: Decoder) -> int:
    """The libraries, and the masks of two blocks, bytes."""
    return LIBRARIES + 2 * sum(matrix.size for matrix in decoder.matrices[0]) // 8


def plan(decoder: Decoder, method: Method) -> Plan:
    pattern = Unstructured(sparsity=0.75, comparison_group="row")
    names = [matrix.name for matrices in decoder.matrices for matrix in matrices]
    return Plan(method=method, patterns=dict.fromkeys(names, pattern), propagate="pruned", error_tokens=1, expert_tokens=0)


def test_a_block_is_there_twice_as_stored_and_once_as_computed_with_copies_of_its_largest_layer(decoder, block):
    wanda = host_bytes(decoder, plan(decoder, WANDA), 100, **UNIFORM)
    assert wanda == always(decoder) + 2 * 2 * block + 4 * block + 8 * 4 * LARGEST  # stored in bfloat16, computed in float32
    sweep = host_bytes(decoder, plan(decoder, sparsegpt()), 100, **UNIFORM)
    assert sweep == wanda + 4 * 4 * LARGEST + 4 * (6 * 32**2 + 112**2) + 7 * 4 * 112**2  # seven layers' Gram matrices
    how = Reconstruction(epochs=1, learning_rate=1e-3, search=False)
    assert host_bytes(decoder, replace(plan(decoder, WANDA), reconstruction=how), 100, **UNIFORM) == wanda + 10 * 4 * block


def test_gram_matrices_of_layers_that_several_blocks_have_are_there_from_all_uses_and_from_one_more(tmp_path):
    zamba = Decoder(fetched("zamba2", tmp_path), torch.float32, torch.device("cpu"))
    columns = {matrix.name: matrix.shape[1] for matrix in zamba.reused[3]}
    of_shared = 2 * 4 * sum(width**2 for width in columns.values())
    assert len(columns) == 10
    loaded = [sum(torch.Size(zamba.checkpoint.shape(name)).numel() for name in zamba.tensors(index)) for index in range(4)]
    loops = []
    for matrices, weights in zip(zamba.matrices, loaded, strict=True):
        grams = [4 * matrix.shape[1] ** 2 for matrix in matrices]
        loops.append(4 * weights + 12 * 4 * max(matrix.size for matrix in matrices) + sum(grams) + 7 * max(grams))
    masks = 2 * max(sum(matrix.size for matrix in matrices) for matrices in zamba.matrices) // 8
    bound = LIBRARIES + masks + 2 * 2 * max(loaded) + max(loops) + of_shared
    assert host_bytes(zamba, plan(zamba, sparsegpt()), 100, **UNIFORM) == bound


def test_gradients_take_a_pass_through_a_block_what_is_around_the_blocks_and_logits(decoder, block):
    outside = sum(torch.Size(decoder.checkpoint.shape(name)).numel() for name in decoder.layout) - 3 * block
    channels = sum(sum(matrix.shape) for matrix in decoder.matrices[0])
    gradients = 4 * (2 * block + outside) + 3 * 4 * 100 * channels + 4 * 4 * 400 * 256
    differentiated = host_bytes(decoder, plan(decoder, WANDA), 100, scores_blocks=False, takes_gradients=True)
    assert differentiated == always(decoder) + 4 * block + gradients
    how = Distillation(first=1, epochs=1, learning_rate=1e-3)
    distilled = host_bytes(decoder, replace(plan(decoder, WANDA), distillation=how), 100, **UNIFORM)
    assert distilled == always(decoder) + 4 * block + 10 * 4 * block + gradients


def test_an_allocation_may_hold_the_scores_of_a_block(decoder, block):
    scored = host_bytes(decoder, plan(decoder, WANDA), 100, scores_blocks=True, takes_gradients=False)
    assert scored == always(decoder) + 4 * block + 5 * 4 * block


def test_a_token_is_counted_for_the_experts_that_it_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "EXPERTS_CHOSEN", 2)  # of the four there are
    decoder = Decoder(fetched("olmoe", tmp_path), torch.float32, torch.device("cpu"))
    none, thousand = (host_bytes(decoder, plan(decoder, WANDA), tokens, scores_blocks=False, takes_gradients=True) for tokens in (0, 1000))
    experts = sum(sum(matrix.shape) for matrix in decoder.matrices[0] if matrix.parameter_slice.expert is not None)
    others = sum(sum(matrix.shape) for matrix in decoder.matrices[0] if matrix.parameter_slice.expert is None)
    assert experts and others
    assert thousand - none == 3 * 4 * 1000 * (others + experts / 2)


def test_of_experts_that_are_loaded_one_at_a_time_three_are_counted(tmp_path):
    decoder = Decoder(fetched("mixtral", tmp_path), torch.float32, torch.device("cpu"))
    whole, whole_grams = (host_bytes(decoder, plan(decoder, method), 100, **UNIFORM) for method in (WANDA, sparsegpt()))
    assert decoder.take_experts_apart()
    apart, grams = (host_bytes(decoder, plan(decoder, method), 100, **UNIFORM) for method in (WANDA, sparsegpt()))
    experts, count, expert = 4 * 3 * 32 * 48, 4, 3 * 32 * 48  # weights; three matrices of an expert
    assert whole - apart == 2 * 2 * experts + 4 * (experts - 3 * expert)
    assert whole_grams - grams == whole - apart + 4 * (count - 1) * (32**2 + 48**2)


def test_the_delta_takes_a_bit_a_weight_and_the_values_of_kept_weights_where_they_change(decoder):
    weights = sum(matrix.size for matrices in decoder.matrices for matrix in matrices)
    assert delta_bytes(decoder, plan(decoder, WANDA)) == weights // 8
    assert delta_bytes(decoder, plan(decoder, sparsegpt())) == weights // 8 + weights // 4 * 2
    assert delta_bytes(decoder, plan(decoder, WANDA), first=1) == 2 * weights // 3 // 8
    assert delta_bytes(decoder, plan(decoder, WANDA), first=2) == weights // 3 // 8
