from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from stages.errors import PruningError
from stages.pruning import block_loop
from stages.pruning.block_loop import Plan, prune_blocks
from stages.pruning.patterns import Unstructured
from stages.pruning.reconstruction import Reconstruction, reconstruct
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.methods import WANDA

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))
HOW = Reconstruction(epochs=4, learning_rate=1e-3)


def decoder_of(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def stream_of(decoder: Decoder) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, WINDOWS, batch=2)


def plan_of(decoder: Decoder, **how) -> Plan:
    patterns = {matrix.name: Unstructured(sparsity=0.5, comparison_group="row") for block in decoder.matrices for matrix in block}
    return Plan(method=WANDA, patterns=patterns, propagate="pruned", error_tokens=120, expert_tokens=0, **how)


@pytest.fixture()
def halved(base):
    """A stream, the first block without half the weights of its MLP, chosen at random, their masks, and the dense block's outputs."""
    decoder = decoder_of(base)
    stream = stream_of(decoder)
    with decoder.loaded(0, decoder.read(0)) as block, torch.no_grad():
        targets = torch.cat([run_block(block, *stream.window(0, window)) for window in range(len(WINDOWS))])
        torch.manual_seed(0)
        masks = {}
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
            masks[name] = torch.rand_like(block.get_parameter(name)) > 0.5
            block.get_parameter(name).mul_(masks[name])
        yield stream, block, masks, targets


def values_of(block, masks) -> dict[str, torch.Tensor]:
    return {name: block.get_parameter(name).detach().clone() for name in masks}


@torch.no_grad()
def error(stream: Stream, block, targets) -> float:
    losses = []
    for window, target in enumerate(targets):
        hidden, call = stream.window(0, window)
        losses.append((run_block(block, hidden, call) - target).square() / size(hidden, target))
    return float(torch.cat(losses).mean())


def size(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What an error is divided by, [..., tokens, 1]."""
    return torch.maximum(hidden.square().mean(-1, keepdim=True), target.square().mean(-1, keepdim=True))


def test_the_error_of_the_block_falls(halved):
    stream, block, masks, targets = halved
    before = error(stream, block, targets)
    reconstruct(stream, 0, block, masks, values_of(block, masks), targets, HOW)
    assert error(stream, block, targets) < 0.9 * before


def test_pruned_weights_stay_exactly_zero_and_weights_without_a_mask_stay_as_they_were(halved):
    stream, block, masks, targets = halved
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    reconstruct(stream, 0, block, masks, values_of(block, masks), targets, HOW)
    for name, parameter in block.named_parameters():
        assert not parameter.requires_grad
        if name in masks:
            assert (parameter[~masks[name]] == 0).all()
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])


def test_the_steps_are_those_of_adam_on_the_loss_of_the_formula(halved):
    stream, block, masks, targets = halved
    names = list(masks)
    literal = [block.get_parameter(name).detach().clone().double() for name in names]
    moments = [[torch.zeros_like(weight), torch.zeros_like(weight)] for weight in literal]
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    for step, window in enumerate(order):
        hidden, call = stream.window(0, window)
        weights = [weight.float().requires_grad_() for weight in literal]
        with torch.enable_grad():
            output = functional_call(block, dict(zip(names, weights, strict=True)), (hidden, *call.arguments), call.keywords)
            loss = ((output - targets[window]).square() / size(hidden, targets[window])).sum(-1).mean()
            gradients = torch.autograd.grad(loss, weights)
        for weight, (first, second), gradient, name in zip(literal, moments, gradients, names, strict=True):
            gradient = (gradient * masks[name]).double()
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.99).add_(0.01 * gradient**2)
            rate = 1e-3 * (1 - step / 5)
            weight -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    reconstruct(stream, 0, block, masks, values_of(block, masks), targets, replace(HOW, epochs=1))
    for name, weight in zip(names, literal, strict=True):
        torch.testing.assert_close(block.get_parameter(name).detach(), weight.float(), rtol=1e-3, atol=1e-5)


def test_a_rate_that_explodes_is_refused_naming_the_block(halved):
    stream, block, masks, targets = halved
    with pytest.raises(PruningError, match="block 0: found NaN or infinity in the reconstruction of mlp.gate_proj.weight"):
        reconstruct(stream, 0, block, masks, values_of(block, masks), targets, replace(HOW, learning_rate=1e30))


def test_weights_that_the_checkpoints_dtype_cannot_hold_are_refused_naming_the_layer(base, monkeypatch):
    def explode(stream, index, block, masks, values, *_):
        values["mlp.up_proj.weight"].masked_fill_(masks["mlp.up_proj.weight"], 3.4e38)  # infinity in bfloat16

    monkeypatch.setattr(block_loop, "reconstruct", explode)
    decoder = decoder_of(base)
    with pytest.raises(PruningError, match="layer model.layers.0.mlp.up_proj.weight: found NaN or infinity after its reconstruction"):
        list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=HOW)))


def test_reconstruction_keeps_the_counts_and_lowers_the_error_of_the_next_blocks_inputs(base):
    def last_hidden(**how):
        decoder = decoder_of(base)
        stream = stream_of(decoder)
        blocks = list(prune_blocks(stream, plan_of(decoder, **how)))
        return stream.hidden.clone(), blocks

    dense_decoder = decoder_of(base)
    dense = stream_of(dense_decoder)
    for index in range(2):
        with dense_decoder.loaded(index, dense_decoder.read(index)) as block, torch.no_grad():
            dense.advance(index, block)
    plain, _ = last_hidden()
    better, blocks = last_hidden(reconstruction=HOW)
    assert (better - dense.hidden).norm() < (plain - dense.hidden).norm()
    for block in blocks:
        for change in block.changes.values():
            assert ((~change.mask).sum(dim=1) == change.mask.shape[1] // 2).all()
            assert change.values is not None


def test_a_block_is_trained_toward_the_dense_models_hidden_states(base, monkeypatch):
    targets, decoder = [], decoder_of(base)
    monkeypatch.setattr(block_loop, "reconstruct", lambda *arguments: targets.append(arguments[5].clone()))
    list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=HOW)))
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    expected = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: expected.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(WINDOWS)
    assert len(targets) == len(expected) == 3
    for target, dense in zip(targets, expected, strict=True):
        torch.testing.assert_close(target, dense, rtol=1e-4, atol=1e-5)


def test_the_relative_error_is_that_of_the_weights_that_the_delta_holds(base):
    decoder = decoder_of(base)
    stream = stream_of(decoder)
    (block, *_) = prune_blocks(stream, plan_of(decoder, reconstruction=HOW))
    errors = {result.matrix.name: result.relative_error for result in block.matrices}
    name = "model.layers.0.self_attn.q_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        model(WINDOWS)
    weight = base.tensor(name).float()
    expected = (seen[0] @ (weight - block.changes[name].apply(weight)).T).norm() / (seen[0] @ weight.T).norm()
    assert errors[name] == pytest.approx(expected.item(), rel=1e-3)
