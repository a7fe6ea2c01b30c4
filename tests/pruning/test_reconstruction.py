import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.checkpoint.model import load_model
from stages.errors import PruningError
from stages.pruning import block_loop
from stages.pruning.block_loop import Plan, prune_blocks
from stages.pruning.patterns import Unstructured
from stages.pruning.reconstruction import Reconstruction, part_output, reconstruct
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.methods import WANDA

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))
HOW = Reconstruction(epochs=4, learning_rate=1e-3, toward_model=False)


def decoder_of(base) -> Decoder:
    return Decoder(base, torch.float32, CPU)


def stream_of(decoder: Decoder) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, WINDOWS, batch=2)


def plan_of(decoder: Decoder, **how) -> Plan:
    patterns = {matrix.name: Unstructured(sparsity=0.5, comparison_group="row") for block in decoder.matrices for matrix in block}
    return Plan(method=WANDA, patterns=patterns, propagate="pruned", error_tokens=120, expert_tokens=0, **how)


def blocks_of(base, **how):
    decoder = decoder_of(base)
    return list(prune_blocks(stream_of(decoder), plan_of(decoder, **how)))


@pytest.fixture()
def halved(base):
    """A stream, the first block with half the weights of its MLP gone at random, their masks, and its dense outputs."""
    decoder = decoder_of(base)
    stream = stream_of(decoder)
    with decoder.loaded(0, decoder.read(0)) as block, torch.no_grad():
        calls = [stream.window(0, window) for window in range(len(WINDOWS))]
        targets = torch.cat([part_output(block, "mlp", hidden, call) for hidden, call in calls])
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
    calls = [stream.window(0, window) for window in range(len(WINDOWS))]
    lost = [
        (part_output(block, "mlp", hidden, call) - targets[i]).square() / size(hidden, targets[i]) for i, (hidden, call) in enumerate(calls)
    ]
    return float(torch.cat(lost).mean())


def size(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What an error is measured by, [..., tokens, 1]."""
    return torch.maximum(hidden.square().mean(-1, keepdim=True), target.square().mean(-1, keepdim=True))


def test_the_error_of_the_part_falls(halved):
    stream, block, masks, targets = halved
    before = error(stream, block, targets)
    reconstruct(stream, 0, block, "mlp", masks, values_of(block, masks), targets, HOW)
    assert error(stream, block, targets) < 0.9 * before


def test_dropped_weights_stay_exactly_zero_and_all_but_the_part_stays_as_it_was(halved):
    stream, block, masks, targets = halved
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    reconstruct(stream, 0, block, "mlp", masks, values_of(block, masks), targets, HOW)
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
        seen = []
        hook = block.mlp.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        run_block(block, hidden, call)
        hook.remove()
        with torch.enable_grad():
            gate, up = seen[0] @ weights[0].T, seen[0] @ weights[1].T
            output = (torch.nn.functional.silu(gate) * up) @ weights[2].T
            loss = ((output - targets[window]).square() / size(hidden, targets[window])).sum(-1).mean()
            gradients = torch.autograd.grad(loss, weights)
        for weight, (first, second), gradient, name in zip(literal, moments, gradients, names, strict=True):
            gradient = (gradient * masks[name]).double()
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.99).add_(0.01 * gradient**2)
            rate = 1e-3 * (1 - step / 5)
            weight -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    reconstruct(stream, 0, block, "mlp", masks, values_of(block, masks), targets, replace(HOW, epochs=1))
    for name, weight in zip(names, literal, strict=True):
        torch.testing.assert_close(block.get_parameter(name).detach(), weight.float(), rtol=1e-3, atol=1e-5)


def test_a_rate_that_explodes_is_refused_naming_the_block(halved):
    stream, block, masks, targets = halved
    with pytest.raises(PruningError, match="block 0: found NaN or infinity in the reconstruction of mlp.gate_proj.weight"):
        reconstruct(stream, 0, block, "mlp", masks, values_of(block, masks), targets, replace(HOW, learning_rate=1e30))


def test_weights_that_the_checkpoints_dtype_cannot_hold_are_refused_naming_the_layer(base, monkeypatch):
    def explode(stream, index, block, path, masks, values, *_):
        values["mlp.up_proj.weight"].masked_fill_(masks["mlp.up_proj.weight"], 3.4e38)  # infinity in bfloat16

    monkeypatch.setattr(block_loop, "reconstruct", explode)
    decoder = decoder_of(base)
    with pytest.raises(PruningError, match="layer model.layers.0.mlp.up_proj.weight: found NaN or infinity after its reconstruction"):
        list(prune_blocks(stream_of(decoder), plan_of(decoder, reconstruction=HOW)))


@pytest.mark.parametrize(("by_parts", "toward_model"), [(False, False), (True, False), (False, True)])
def test_reconstruction_keeps_the_counts_and_lowers_what_the_next_block_is_given_wrong(base, by_parts, toward_model):
    def last_hidden(**how):
        decoder = decoder_of(base)
        stream = stream_of(decoder)
        found = list(prune_blocks(stream, plan_of(decoder, by_parts=by_parts, **how)))
        return stream.hidden.clone(), found

    dense_decoder = decoder_of(base)
    dense = stream_of(dense_decoder)
    for index in range(2):
        with dense_decoder.loaded(index, dense_decoder.read(index)) as block, torch.no_grad():
            dense.advance(index, block)
    plain, _ = last_hidden()
    better, blocks = last_hidden(reconstruction=replace(HOW, toward_model=toward_model))
    assert (better - dense.hidden).norm() < (plain - dense.hidden).norm()
    for block in blocks:
        for change in block.changes.values():
            assert ((~change.mask).sum(dim=1) == change.mask.shape[1] // 2).all()
            assert change.values is not None


def test_toward_the_model_a_block_learns_the_dense_models_hidden_states(base, monkeypatch):
    targets = []
    monkeypatch.setattr(block_loop, "reconstruct", lambda *arguments: targets.append(arguments[6].clone()))
    blocks_of(base, reconstruction=replace(HOW, toward_model=True))
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    found = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(WINDOWS)
    assert len(targets) == len(found) == 3
    for target, dense in zip(targets, found, strict=True):
        torch.testing.assert_close(target, dense, rtol=1e-4, atol=1e-5)


def test_toward_the_model_takes_whole_blocks(base):
    with pytest.raises(ValueError, match="toward the dense model wants whole blocks"):
        plan_of(decoder_of(base), by_parts=True, reconstruction=replace(HOW, toward_model=True))


def test_the_relative_error_is_that_of_the_weights_that_the_delta_holds(base):
    decoder = decoder_of(base)
    stream = stream_of(decoder)
    (block, *_) = prune_blocks(stream, plan_of(decoder, reconstruction=HOW))
    found = {one.matrix.name: one.relative_error for one in block.matrices}
    name = "model.layers.0.self_attn.q_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        model(WINDOWS)
    weight = base.tensor(name).float()
    expected = (seen[0] @ (weight - block.changes[name].apply(weight)).T).norm() / (seen[0] @ weight.T).norm()
    assert found[name] == pytest.approx(expected.item(), rel=1e-3)


def test_by_parts_the_mlp_is_pruned_for_what_the_pruned_attention_gives_it(base):
    """The last block's down projection: its Wanda mask from a model in which all that comes before it is pruned."""
    blocks = blocks_of(base, by_parts=True)
    changes = {name: change for block in blocks for name, change in block.changes.items()}

    class Before:
        def __contains__(self, name):
            return name in changes and ".2.mlp." not in name

        def apply(self, name, tensor):
            return changes[name].apply(tensor) if name in self else tensor

    model, norms = load_model(base, Before().apply, dtype=torch.float32, device=CPU), []
    down = model.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(lambda _, arguments: norms.append(arguments[0].square().sum(dim=(0, 1))))
    with torch.no_grad():
        model(WINDOWS)
    scores = down.weight.abs() * norms[0].sqrt()
    lowest = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] // 2]
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
    found = changes["model.layers.2.mlp.down_proj.weight"].mask
    assert (found != mask).float().mean() < 0.005


def test_by_parts_attention_and_mlp_each_learn_what_they_would_give_with_dense_weights(base, monkeypatch):
    learned = {}
    monkeypatch.setattr(block_loop, "reconstruct", lambda _, index, __, path, *rest: learned.update({(index, path): rest[2].clone()}))
    first = blocks_of(base, reconstruction=HOW, by_parts=True)[0]
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    layer, given = model.model.layers[0], {}
    layer.self_attn.register_forward_hook(lambda _, __, output: given.update(self_attn=output[0]))
    layer.mlp.register_forward_hook(lambda _, __, output: given.update(mlp=output))
    with torch.no_grad():
        model(WINDOWS)
        torch.testing.assert_close(learned[0, "self_attn"], given["self_attn"], rtol=1e-4, atol=1e-6)
        dense_mlp = given["mlp"]
        for name, change in first.changes.items():
            if ".self_attn." in name:
                model.get_parameter(name).mul_(change.mask)
        model(WINDOWS)
    torch.testing.assert_close(learned[0, "mlp"], given["mlp"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(dense_mlp, given["mlp"], rtol=1e-2)


def test_by_parts_the_outputs_of_one_go_before_those_of_the_next_are_made(base, monkeypatch):
    """The budget of hidden states has room for one set of them."""
    made, alive, original = [], [], block_loop.room

    def watched(*how):
        alive.append(sum(reference() is not None for reference in made))
        tensor, place = original(*how)
        made.append(weakref.ref(tensor))
        return tensor, place

    monkeypatch.setattr(block_loop, "room", watched)
    blocks_of(base, reconstruction=HOW, by_parts=True)
    assert alive == [0] * 2 * 3
