import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from stages.errors import PruningError
from stages.pruning import block_loop
from stages.pruning.block_loop import Plan, prune_blocks
from stages.pruning.entries import Pruned
from stages.pruning.learning import Outcome, balance, first_rate
from stages.pruning.patterns import Unstructured
from stages.pruning.reconstruction import BlockTraining, Reconstruction, reconstruct
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.methods import WANDA

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (7, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = 2
HOW = Reconstruction(epochs=4, learning_rate=0.01, search=False)
NAMES = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def decoder_of(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def stream_of(decoder: Decoder, held_out: int = HELD_OUT) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, WINDOWS, batch=2, held_out=held_out)


def plan_of(decoder: Decoder, **how) -> Plan:
    patterns = {matrix.name: Unstructured(sparsity=0.5, comparison_group="row") for block in decoder.matrices for matrix in block}
    return Plan(method=WANDA, patterns=patterns, propagate="pruned", error_tokens=120, expert_tokens=0, **how)


@pytest.fixture()
def halved(base):
    """A stream, and the training of the first block without half the weights of its MLP, chosen at random."""
    decoder = decoder_of(base)
    stream = stream_of(decoder)
    with decoder.loaded(0, decoder.read(0)) as block, torch.no_grad():
        targets = torch.cat([run_block(block, *stream.window(0, window)) for window in range(len(WINDOWS))])
        yield stream, prepared(decoder, block, targets, HOW)


def prepared(decoder: Decoder, block, targets: torch.Tensor, how: Reconstruction) -> BlockTraining:
    """Half the weights of the MLP are zero, in the block, too."""
    training = BlockTraining(how, block, targets)
    torch.manual_seed(0)
    for matrix in decoder.matrices[0]:
        if matrix.parameter_slice.name in NAMES:
            weight = matrix.of(block).detach().clone()
            mask = torch.rand_like(weight) > 0.5
            matrix.of(block).mul_(mask)
            training.add(matrix, weight, Pruned(mask=mask), [torch.zeros(1, weight.shape[1])], torch.float32)
    return training


def of_settings(training: BlockTraining, **changes) -> BlockTraining:
    training.settings = replace(HOW, **changes)
    return training


def weights_of(block) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


@torch.no_grad()
def error(stream: Stream, training: BlockTraining, windows: range) -> float:
    """The loss of the formula, from the text."""
    losses = []
    for window in windows:
        hidden, call = stream.window(0, window)
        target = training.targets[window]
        losses.append((run_block(training.block, hidden, call) - target).square().sum(-1) / size(hidden, target)[..., 0])
    return float(torch.cat(losses).mean())


def size(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What an error is divided by, [..., tokens, 1]."""
    return torch.maximum(hidden.square().mean(-1, keepdim=True), target.square().mean(-1, keepdim=True))


def test_the_error_of_the_block_falls_on_windows_that_it_never_saw(halved):
    stream, training = halved
    fitted, before = error(stream, training, stream.fitted), error(stream, training, stream.held_out)
    outcome = reconstruct(stream, 0, training)
    assert outcome.before == pytest.approx(before, rel=1e-5)
    assert outcome.after == pytest.approx(error(stream, training, stream.held_out), rel=1e-5)
    assert outcome.after < before
    assert error(stream, training, stream.fitted) < 0.95 * fitted
    assert (list(outcome.tried), outcome.rate) == ([0.01], 0.01)


def test_pruned_weights_stay_exactly_zero_and_weights_without_a_mask_stay_as_they_were(halved):
    stream, training = halved
    before = weights_of(training.block)
    reconstruct(stream, 0, training)
    for name, parameter in training.block.named_parameters():
        assert not parameter.requires_grad
        if name in training.masks:
            assert (parameter[~training.masks[name]] == 0).all()
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])


def test_the_steps_are_those_of_adam_on_the_loss_of_the_formula_in_balanced_coordinates(halved):
    stream, training = halved
    block, names = training.block, list(NAMES)
    dense = {name: block_of(stream).get_parameter(name).detach() for name in names}
    scales = [rows @ columns for rows, columns in (balance(dense[name]) for name in names)]
    literal = [block.get_parameter(name).detach().double() / scale for name, scale in zip(names, scales, strict=True)]
    moments = [[torch.zeros_like(weight), torch.zeros_like(weight)] for weight in literal]
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    for step, window in enumerate(order):
        hidden, call = stream.window(0, window)
        weights = [(weight * scale).float().requires_grad_() for weight, scale in zip(literal, scales, strict=True)]
        with torch.enable_grad():
            output = functional_call(block, dict(zip(names, weights, strict=True)), (hidden, *call.arguments), call.keywords)
            target = training.targets[window]
            loss = ((output - target).square() / size(hidden, target)).sum(-1).mean()
            gradients = torch.autograd.grad(loss, weights)
        for weight, (first, second), gradient, name, scale in zip(literal, moments, gradients, names, scales, strict=True):
            gradient = (gradient * training.masks[name] * scale).double()
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.99).add_(0.01 * gradient**2)
            rate = 0.01 * (1 - step / 5)
            weight -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    outcome = reconstruct(stream, 0, of_settings(training, epochs=1))
    assert outcome.tried[0.01] == outcome.after == pytest.approx(error(stream, training, stream.held_out))
    for name, weight, scale in zip(names, literal, scales, strict=True):
        torch.testing.assert_close(block.get_parameter(name).detach(), (weight * scale).float(), rtol=1e-3, atol=1e-5)


def block_of(stream: Stream):
    """The dense first block."""
    model = AutoModelForCausalLM.from_pretrained(stream.decoder.checkpoint.directory, dtype=torch.float32)
    return model.model.layers[0]


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_rate_a_hundred_times_too_large_and_more_does_no_harm(halved, rate):
    stream, training = halved
    before = error(stream, training, stream.held_out)
    outcome = reconstruct(stream, 0, of_settings(training, learning_rate=rate))
    assert list(outcome.tried)[:2] == [rate, rate / 4]  # the first did not help
    assert outcome.after == pytest.approx(error(stream, training, stream.held_out), rel=1e-5)
    assert outcome.after <= before * (1 + 1e-6)


def test_where_no_rate_helps_the_weights_stay_to_the_last_bit(halved):
    stream, training = halved
    weights, values = weights_of(training.block), {name: value.clone() for name, value in training.values.items()}
    outcome = reconstruct(stream, 0, of_settings(training, learning_rate=1e30))
    assert (outcome.rate, outcome.after) == (None, outcome.before)
    assert list(outcome.tried.values()) == [math.inf] * 3
    assert outcome.as_dict()["tried"] == [[1e30, None], [1e30 / 4, None], [1e30 / 16, None]]
    assert all(torch.equal(training.values[name], value) for name, value in values.items())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in training.block.named_parameters())


def test_every_block_searches_from_the_rates_that_blocks_before_it_took(base):
    decoder, how = decoder_of(base), replace(HOW, learning_rate=0.01, search=True)
    outcomes = [block.training for block in prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=how))]
    for number, outcome in enumerate(outcomes):
        assert next(iter(outcome.tried)) == first_rate(0.01, outcomes[:number])
        assert outcome.after == min(outcome.before, *outcome.tried.values())
    first, second, _ = outcomes
    assert {first.rate / 2, first.rate * 2} <= set(first.tried)
    assert first.rate == 0.02
    assert list(second.tried)[:2] == [0.02, 0.04]  # up, as it helped before


def test_without_a_search_every_block_begins_with_the_rate_of_the_settings(base):
    decoder = decoder_of(base)
    outcomes = [block.training for block in prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=HOW))]
    assert [next(iter(outcome.tried)) for outcome in outcomes] == [HOW.learning_rate] * 3


@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_begins_with_the_rates_that_were_found_before(base, finished):
    decoder, how = decoder_of(base), replace(HOW, learning_rate=0.01, search=True)
    blocks = list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=how)))
    before = dict(enumerate(block.changes for block in blocks[:finished]))
    trained = [block.training for block in blocks[:finished]]
    resumed = list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=how), before.get, trained=trained))
    for block, wanted in zip(resumed, blocks[finished:], strict=True):
        assert block.training == wanted.training
        for name, change in wanted.changes.items():
            assert torch.equal(block.changes[name].apply(base.tensor(name)), change.apply(base.tensor(name)))


def test_without_windows_held_out_nothing_is_learned(base):
    decoder = decoder_of(base)
    with pytest.raises(ValueError, match="found no windows held out, wanted at least one: they judge what is learned"):
        list(prune_blocks(stream_of(decoder, held_out=0), plan_of(decoder, reconstruction=HOW)))


def test_a_block_that_cannot_be_improved_is_what_the_method_made_of_it(base):
    decoder = decoder_of(base)
    how = replace(HOW, learning_rate=1e30)
    plain = list(prune_blocks(stream_of(decoder), plan_of(decoder)))
    kept = list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=how)))
    for block, without in zip(kept, plain, strict=True):
        assert block.training.rate is None
        assert without.training is None
        for name, change in block.changes.items():
            assert change.values is None
            assert torch.equal(change.mask, without.changes[name].mask)
        assert [result.relative_error for result in block.matrices] == [result.relative_error for result in without.matrices]


def test_weights_that_the_checkpoints_dtype_cannot_hold_are_refused_naming_the_layer(base, monkeypatch):
    def explode(stream, index, training, earlier):
        name = "mlp.up_proj.weight"
        training.values[name].masked_fill_(training.masks[name], 3.4e38)  # infinity in bfloat16
        return Outcome(before=1.0, tried={0.01: 0.5})

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


UNCHANGED = Outcome(before=1.0, tried={0.01: 2.0})


def test_a_block_is_trained_toward_the_dense_models_hidden_states(base, monkeypatch):
    targets, decoder = [], decoder_of(base)
    monkeypatch.setattr(block_loop, "reconstruct", lambda stream, index, training, _: targets.append(training.targets.clone()) or UNCHANGED)
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
    errors = {result.matrix.name: (result.relative_error, result.held_out_error) for result in block.matrices}
    name = "model.layers.0.self_attn.q_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        model(WINDOWS)
    weight = base.tensor(name).float()
    fitted, held_out = seen[0].split([(len(WINDOWS) - HELD_OUT) * 24, HELD_OUT * 24])
    for inputs, measured in zip((fitted, held_out), errors[name], strict=True):
        expected = (inputs @ (weight - block.changes[name].apply(weight)).T).norm() / (inputs @ weight.T).norm()
        assert measured == pytest.approx(expected.item(), rel=1e-3)
