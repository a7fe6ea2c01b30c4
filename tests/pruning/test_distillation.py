import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.errors import PruningError
from stages.pruning import block_loop, distillation
from stages.pruning.block_loop import Plan, TeacherStreams, prune_blocks
from stages.pruning.distillation import Distillation, DistilledBlocks, distill, divergence_and_gradient
from stages.pruning.learning import Outcome, balance, checks
from stages.pruning.patterns import Nm, Unstructured
from stages.pruning.reconstruction import BETAS, Reconstruction
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream
from tests import tiny
from tests.methods import MAGNITUDE
from tests.pruning.test_architectures import fetched
from tests.pruning.test_sensitivity import loaded_blocks

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 96, (7, 24), generator=torch.Generator().manual_seed(0))
FITTED, HELD_OUT = WINDOWS[:5], WINDOWS[5:]
HOW = Distillation(first=1, epochs=2, learning_rate=0.003)
Changes = dict[str, Change]


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Checkpoint:
    """A checkpoint in float32, so that no rounding hides what a step did."""
    return Checkpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("exact"), dtype=torch.float32))


def prepared(base: Checkpoint, pattern=None, how: Distillation = HOW, dtype=torch.float32, **more) -> tuple[TeacherStreams, list[Changes]]:
    """Pruned by magnitude, which no rounding of activations sways: what goes into a distillation, and every block's changes."""
    decoder = Decoder(base, dtype, CPU)
    pattern = pattern or Unstructured(sparsity=0.5, comparison_group="row")
    patterns = {matrix.name: pattern for block in decoder.matrices for matrix in block}
    plan = Plan(method=MAGNITUDE, patterns=patterns, propagate="pruned", error_tokens=9, expert_tokens=0, **{"distillation": how, **more})
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=2, held_out=len(HELD_OUT))
    teachers = TeacherStreams.of(stream, plan)
    return teachers, [block.changes for block in prune_blocks(stream, plan, teachers=teachers)]


def distilled(teachers: TeacherStreams, before: list[Changes], how: Distillation = HOW) -> tuple[DistilledBlocks, dict[int, Changes]]:
    outcome = distill(teachers.student_inputs, teachers.teacher.hidden, how, before.__getitem__)
    return outcome, dict(outcome.changes())


def literal(
    base: Checkpoint, before: list[Changes], windows: torch.Tensor, steps: list[list[int]], rate: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The whole model in memory, the mean gradient of the windows of a step, Adam on the last two of three blocks' balanced weights."""
    dense, pruned = (AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval() for _ in range(2))
    changes = {name: change for block in before for name, change in block.items()}
    weights = dict(pruned.named_parameters())
    for name, change in changes.items():
        weights[name].data.mul_(change.mask)
    names = [name for block in before[1:] for name in block]
    scales = {name: torch.mul(*balance(dense.get_parameter(name).detach())) for name in names}
    learning = {name: weights[name].detach() / scales[name] for name in names}
    optimiser = torch.optim.Adam(learning.values(), betas=BETAS)
    divergences = []
    for step, chosen in enumerate(steps):
        with torch.no_grad():
            wanted = dense(windows[chosen]).logits.log_softmax(-1)
        found = pruned(windows[chosen]).logits.log_softmax(-1)
        lost = (wanted.exp() * (wanted - found)).sum(dim=(1, 2)).mean()
        gradients = torch.autograd.grad(lost, [weights[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            learning[name].grad = gradient * changes[name].mask * scales[name]
        optimiser.param_groups[0]["lr"] = rate * (1 - step / len(steps))
        optimiser.step()
        for name in names:
            weights[name].data.copy_(learning[name] * scales[name])
        divergences.append(lost.item() / windows.shape[1])
    return {name: weights[name].detach()[changes[name].mask] for name in names}, divergences


@pytest.mark.parametrize(("epochs", "steps"), [(2, 10), (1.4, 7)])
def test_the_steps_are_those_of_adam_on_the_divergence_of_whole_models(exact, epochs, steps):
    teachers, before = prepared(exact)
    outcome, after = distilled(teachers, before, replace(HOW, epochs=epochs))
    generator = torch.Generator().manual_seed(0)
    order = [[window] for _ in range(2) for window in torch.randperm(5, generator=generator).tolist()][:steps]
    expected, divergences = literal(exact, before, FITTED, order, HOW.learning_rate)
    assert outcome.divergences == pytest.approx(divergences, rel=1e-4)
    found = {name: change.values for block in after.values() for name, change in block.items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=2e-5)


def test_the_divergence_falls(exact):
    teachers, before = prepared(exact)
    outcome, _ = distilled(teachers, before, replace(HOW, epochs=6, learning_rate=0.01))
    assert sum(outcome.divergences[-5:]) < 0.8 * sum(outcome.divergences[:5])


def test_masks_stay_and_earlier_blocks_do_not_change(base):
    teachers, before = prepared(base)
    _, after = distilled(teachers, before)
    assert list(after) == [1, 2]
    for index, changes in after.items():
        assert changes.keys() == before[index].keys()
        for name, change in changes.items():
            assert torch.equal(change.mask, before[index][name].mask)
            assert change.values.dtype == torch.bfloat16
            applied = change.apply(base.tensor(name))
            assert (applied[~change.mask] == 0).all()
            assert not torch.equal(applied, before[index][name].apply(base.tensor(name)))


def near_where_it_was(base: Checkpoint, name: str, change: Change, was: Change) -> bool:
    """Whether kept weights changed a little; weights of other indices are not correlated with them."""
    start = was.apply(base.tensor(name))[was.mask]
    assert change.values.shape == start.shape
    return bool(torch.corrcoef(torch.stack([change.values.float(), start.float()]))[0, 1] > 0.8)


def test_orders_of_channels_are_kept(base):
    teachers, before = prepared(base, Nm(kept=2, group=4), permutation_rounds=1)
    _, after = distilled(teachers, before)
    assert all(near_where_it_was(base, name, change, before[i][name]) for i, changes in after.items() for name, change in changes.items())
    moved = 0
    for index, changes in after.items():
        for name, change in changes.items():
            for key in ("rows", "columns"):
                order, was = getattr(change, key), getattr(before[index][name], key)
                assert (order is None) == (was is None)
                moved += order is not None and torch.equal(order, was)
    assert moved == 6  # gate's and up's rows, down's columns, of two blocks


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "granitemoe"])
def test_transposed_matrices_and_experts_are_trained_too(kind, tmp_path):
    """Experts: many tensors of the checkpoint in one parameter, and one tensor that holds them all."""
    base, how = fetched(kind, tmp_path), replace(HOW, epochs=8, learning_rate=0.01)
    teachers, before = prepared(base, how=how)
    outcome, after = distilled(teachers, before, how)
    assert sum(outcome.divergences[-5:]) < 0.9 * sum(outcome.divergences[:5])
    assert all(near_where_it_was(base, name, change, before[i][name]) for i, changes in after.items() for name, change in changes.items())


def test_computed_in_bfloat16_the_divergence_falls_too(base):
    how = replace(HOW, epochs=6, learning_rate=0.01)
    teachers, before = prepared(base, how=how, dtype=torch.bfloat16)
    outcome, _ = distilled(teachers, before, how)
    assert sum(outcome.divergences[-5:]) < 0.8 * sum(outcome.divergences[:5])


def test_files_serve_where_the_memory_budget_is_used_up(exact, tmp_path, monkeypatch):
    teachers, before = prepared(exact)
    _, expected = distilled(teachers, before)
    memory = HostMemory(0, tmp_path)
    locations, buffer = [], memory.buffer

    def noted(*arguments):
        tensor, location = buffer(*arguments)
        locations.append(location)
        return tensor, location

    monkeypatch.setattr(memory, "buffer", noted)
    monkeypatch.setattr(teachers.student_inputs, "memory", memory)
    _, found = distilled(teachers, before)
    assert all(torch.equal(found[index][name].values, change.values) for index in expected for name, change in expected[index].items())
    assert len(locations) == 10  # indices, kept weights, the best of them and two moments, of two blocks
    assert all(location.startswith("a file of ") for location in locations)


def test_only_the_block_that_runs_has_weights(exact):
    teachers, before = prepared(exact)
    decoder, seen = teachers.student_inputs.decoder, []
    for index, block in enumerate(decoder.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: seen.append((index, loaded_blocks(decoder))))
    distilled(teachers, before)
    step, judgement = [(1, [1]), (2, [2]), (1, [1])], [(1, [1]), (2, [2])] * len(HELD_OUT)
    steps = len(FITTED) * HOW.epochs
    expected = judgement.copy()
    for number in range(1, steps + 1):
        expected += step + (judgement if number in checks(steps) else [])
    assert seen == expected
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_the_divergence_and_its_gradient_are_the_same_some_tokens_at_a_time(exact, monkeypatch):
    decoder = Decoder(exact, torch.float32, CPU)
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", 7)
    torch.manual_seed(0)
    hidden, target = torch.randn(1, 24, 32), torch.randn(24, 32)
    with decoder.after_blocks():
        found, gradient = divergence_and_gradient(decoder, hidden, target)
        leaf = hidden.clone().requires_grad_()
        wanted, told = (decoder.logits(states).log_softmax(-1) for states in (target[None], leaf))
        expected = kl_div(told, wanted, reduction="sum", log_target=True)
        (by_hidden,) = torch.autograd.grad(expected, leaf)
    assert found.item() == pytest.approx(expected.item() / 24, rel=1e-5)
    torch.testing.assert_close(gradient, by_hidden, rtol=1e-4, atol=1e-5)


def test_the_divergence_of_equal_predictions_is_zero(exact):
    decoder = Decoder(exact, torch.float32, CPU)
    hidden = torch.randn(1, 24, 32)
    with decoder.after_blocks():
        found, gradient = divergence_and_gradient(decoder, hidden, hidden[0])
    assert found.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-4


def held_out_divergence(base: Checkpoint, before: list[Changes], after: dict[int, Changes]) -> float:
    """By whole models in memory."""
    dense, pruned = (AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval() for _ in range(2))
    for index, changes in enumerate(before):
        for name, change in {**changes, **after.get(index, {})}.items():
            pruned.get_parameter(name).data.copy_(change.apply(base.tensor(name)))
    with torch.no_grad():
        wanted, told = (model(HELD_OUT).logits.log_softmax(-1) for model in (dense, pruned))
    return kl_div(told, wanted, reduction="sum", log_target=True).item() / HELD_OUT.numel()


def test_the_divergence_falls_on_windows_that_it_never_saw(exact):
    teachers, before = prepared(exact)
    outcome, after = distilled(teachers, before, replace(HOW, epochs=6))
    assert outcome.outcome.before == pytest.approx(held_out_divergence(exact, before, {}), rel=1e-4)
    assert outcome.outcome.after == pytest.approx(held_out_divergence(exact, before, after), rel=1e-4)
    assert outcome.outcome.after < outcome.outcome.before
    assert (list(outcome.outcome.tried), outcome.outcome.rate) == ([HOW.learning_rate], HOW.learning_rate)


@pytest.mark.parametrize("rate", [0.3, 3.0])
def test_a_rate_a_hundred_times_too_large_and_more_does_no_harm(exact, rate):
    teachers, before = prepared(exact)
    outcome, after = distilled(teachers, before, replace(HOW, learning_rate=rate))
    assert list(outcome.outcome.tried)[:2] == [rate, rate / 4]  # the first did not help
    start = held_out_divergence(exact, before, {})
    assert outcome.outcome.after == pytest.approx(held_out_divergence(exact, before, after), rel=1e-4)
    assert held_out_divergence(exact, before, after) <= start * (1 + 1e-6)


def test_where_no_rate_helps_the_changes_stay_what_they_were(exact):
    teachers, before = prepared(exact)
    outcome, after = distilled(teachers, before, replace(HOW, learning_rate=1e30))
    assert (outcome.outcome.rate, outcome.outcome.after) == (None, outcome.outcome.before)
    assert json.loads(json.dumps(outcome.divergences, allow_nan=False)) == outcome.divergences  # JSON has no infinity
    for index, changes in after.items():
        assert all(change is before[index][name] for name, change in changes.items())


def test_a_pruned_model_whose_predictions_are_not_finite_is_refused(exact, monkeypatch):
    teachers, before = prepared(exact)
    monkeypatch.setattr(distillation, "held_out_divergence", lambda *_: float("nan"))
    with pytest.raises(PruningError, match="distillation: found NaN or infinity as the loss of the pruned model, wanted finite logits"):
        distilled(teachers, before)


def test_without_windows_held_out_nothing_is_learned(exact):
    teachers, before = prepared(exact)
    teachers.student_inputs.held_out = range(0)
    with pytest.raises(ValueError, match="found no windows held out, wanted at least one: they judge what is learned"):
        distilled(teachers, before)


def test_a_weight_that_the_checkpoints_dtype_cannot_hold_is_refused_naming_the_block(exact, monkeypatch):
    teachers, before = prepared(exact)
    outcome = distill(teachers.student_inputs, teachers.teacher.hidden, HOW, before.__getitem__)
    outcome._trained[0].best[0] = 1e9
    monkeypatch.setattr(exact, "dtype", lambda _: torch.float16)
    with pytest.raises(PruningError, match="block 1: found NaN or infinity in its distillation, wanted finite weights"):
        list(outcome.changes())


def test_blocks_that_are_distilled_are_not_reconstructed(base, monkeypatch):
    alone = []
    monkeypatch.setattr(block_loop, "reconstruct", lambda stream, index, *_: alone.append(index) or Outcome(before=1.0, tried={0.01: 2.0}))
    prepared(base, reconstruction=Reconstruction(epochs=1, learning_rate=1e-3, search=False))
    assert alone == [0]
