"""Learning that does no harm: balanced coordinates, rates, and checkpoints that are the same function at other scales."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.rescale import rescaled
from stages.checkpoint.reader import Checkpoint
from stages.pruning.block_loop import Plan, TeacherStreams, prune_blocks
from stages.pruning.distillation import Distillation, distill
from stages.pruning.learning import Outcome, balance, checks, factors, first_rate, next_rate
from stages.pruning.patterns import Unstructured
from stages.pruning.reconstruction import Reconstruction
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests import tiny
from tests.methods import WANDA

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (10, 24), generator=torch.Generator().manual_seed(0))


def weight(rows: int = 5, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_balanced_weights_have_rows_and_columns_of_size_one():
    rows, columns = balance(weight())
    balanced = (weight() / rows / columns).square()
    torch.testing.assert_close(balanced.mean(dim=1), torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(balanced.mean(dim=0), torch.ones(8), rtol=1e-3, atol=0)


def test_balanced_weights_by_hand():
    rows, columns = balance(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))  # of rank one: nothing but scales
    torch.testing.assert_close(rows @ columns, torch.tensor([[1.0, 2.0], [3.0, 6.0]]))


def test_the_same_matrix_at_other_scales_has_the_same_balanced_weights():
    left, right = torch.tensor([1e-3, 1.0, 50.0, 2.0, 1e4])[:, None], torch.logspace(-4, 4, 8)
    rows, columns = balance(weight())
    other_rows, other_columns = balance(left * weight() * right)
    torch.testing.assert_close(left * weight() * right / other_rows / other_columns, weight() / rows / columns, rtol=1e-3, atol=1e-5)


def test_rows_and_columns_of_zeros_have_the_mean_scale_and_harm_no_other():
    holed = weight()
    holed[1], holed[:, 2] = 0, 0
    rows, columns = balance(holed)
    assert rows[1].item() == pytest.approx(torch.cat([rows[:1], rows[2:]]).log().mean().exp().item(), rel=1e-5)
    assert columns[0, 2].item() == pytest.approx(torch.cat([columns[0, :2], columns[0, 3:]]).log().mean().exp().item(), rel=1e-5)
    assert all((scale == 1).all() for scale in balance(torch.zeros(2, 3)))
    kept = torch.ones(5, 8, dtype=torch.bool)
    kept[1], kept[:, 2] = False, False
    alone_rows, alone_columns = balance(holed[kept].view(4, 7))
    products = (rows @ columns)[kept].view(4, 7) / (alone_rows @ alone_columns)
    torch.testing.assert_close(products, products[0, 0].expand(4, 7), rtol=1e-3, atol=0)


@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_that_was_pruned_before_and_has_hardly_a_weight_harms_no_other(left, transposed):
    holed = weight(24, 64)
    holed[3, left:] = 0
    scales = balance(holed.T if transposed else holed)
    assert all(scale.min() > 0.2 and scale.max() < 5 for scale in scales)
    balanced = ((holed.T if transposed else holed) / scales[0] / scales[1]).square()
    for dim in (0, 1):
        means = balanced.sum(dim=dim) / (balanced > 0).sum(dim=dim)
        torch.testing.assert_close(means, torch.ones_like(means), rtol=1e-2, atol=0)


BOTH = (0.5, 2.0)


def tried_rates(rate: float, loss, ways: tuple[float, ...] = ()) -> list[float]:
    """The rates that are tried, one after another, where a rate leaves a loss; 1 before."""
    tried: dict[float, float] = {}
    while (following := next_rate(rate, 1.0, tried, ways)) is not None:
        tried[following] = loss(following)
    return list(tried)


def distance_from(best: float):
    """A loss that is least at a rate, and above 1 from eight times that on."""
    return lambda rate: abs(math.log2(rate / best)) / 3


def test_a_rate_that_does_not_help_is_followed_by_a_quarter_of_it():
    assert tried_rates(0.8, lambda rate: math.inf) == [0.8, 0.2, 0.05]
    assert tried_rates(0.8, lambda rate: math.inf, BOTH) == [0.8, 0.2, 0.05]
    assert tried_rates(0.8, distance_from(0.0625)) == [0.8, 0.2]


@pytest.mark.parametrize(
    ("best", "ways", "wanted"),
    [
        (0.01, BOTH, [0.01, 0.005, 0.02]),
        (0.02, BOTH, [0.01, 0.005, 0.02, 0.04]),
        (0.005, BOTH, [0.01, 0.005, 0.0025]),
        (0.001, BOTH, [0.01, 0.0025, 0.00125, 0.000625]),
        (1.0, BOTH, [0.01, 0.0025, 0.000625]),
        (0.05, BOTH, [0.01, 0.005, 0.02, 0.04, 0.08]),
        (0.01, (2.0,), [0.01, 0.02]),
        (0.04, (2.0,), [0.01, 0.02, 0.04, 0.08]),
        (0.04, (0.5,), [0.01, 0.005]),
        (0.001, (2.0,), [0.01, 0.0025, 0.005]),
    ],
)
def test_a_search_goes_on_as_long_as_it_helps(best, ways, wanted):
    assert tried_rates(0.01, distance_from(best), ways) == wanted


def test_a_search_tries_six_rates_at_most():
    assert len(tried_rates(0.01, lambda rate: 0.5 / (1 + rate), BOTH)) == 6


def outcome_of(tried: dict[float, float], before: float = 1.0) -> Outcome:
    return Outcome(before=before, tried=tried)


@pytest.mark.parametrize(
    ("tried", "wanted"),
    [
        ({0.01: 0.5, 0.02: 0.4, 0.04: 0.6}, (2.0,)),  # it went up, and on it goes
        ({0.01: 0.5, 0.005: 0.4, 0.0025: 0.6}, (0.5,)),
        ({0.01: 0.5, 0.02: 0.6}, (0.5,)),  # it stayed: now the other way
        ({0.01: 0.5, 0.005: 0.6}, (2.0,)),
        ({0.01: 0.5, 0.005: 0.6, 0.02: 0.7}, (0.5,)),
        ({0.01: 1.5, 0.0025: 0.5}, (2.0,)),
        ({0.01: 1.5, 0.0025: 1.5, 0.000625: 1.5}, (2.0,)),
        ({0.01: 0.5}, (2.0,)),
    ],
)
def test_a_search_tries_the_way_that_helped_last(tried, wanted):
    assert factors([outcome_of({0.3: 0.5}), outcome_of(tried)]) == wanted
    assert factors([]) == BOTH


def test_a_training_begins_with_the_mean_rate_of_the_last_three_by_how_much_the_loss_fell():
    halved, quartered, failed = outcome_of({0.01: 0.5}), outcome_of({0.04: 0.25}), outcome_of({0.3: 2.0})
    assert first_rate(0.7, []) == first_rate(0.7, [failed]) == 0.7
    assert first_rate(0.7, [halved, failed]) == 0.01
    assert first_rate(0.7, [halved, quartered]) == pytest.approx(0.01 ** (1 / 3) * 0.04 ** (2 / 3))
    assert first_rate(0.7, [quartered, halved, failed, halved, halved]) == pytest.approx(0.01)
    small = outcome_of({1e-5: 0.999})
    assert first_rate(0.7, [halved, small]) == pytest.approx(0.01, rel=0.02)
    assert first_rate(0.7, [outcome_of({1e-200: 0.5})] * 130) == pytest.approx(1e-200)


def test_windows_held_out_judge_after_every_quarter():
    assert checks(28) == {7, 14, 21, 28}
    assert checks(1) == {1}


def test_an_outcome_takes_the_rate_with_the_least_loss_if_that_is_less_than_before():
    outcome = Outcome(before=2.0, tried={0.8: math.inf, 0.2: 1.5})
    assert (outcome.rate, outcome.after) == (0.2, 1.5)
    assert outcome.as_dict() == {"before": 2.0, "tried": [[0.8, None], [0.2, 1.5]], "rate": 0.2, "after": 1.5}
    assert Outcome.of_dict(outcome.as_dict()) == outcome
    assert (Outcome(before=2.0, tried={0.8: 2.0}).rate, Outcome(before=2.0, tried={0.8: 3.0}).after) == (None, 2.0)


# The same function at other scales.


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[Checkpoint]:
    """A checkpoint, and the same at other scales."""
    directories = [tmp_path_factory.mktemp(name) for name in ("plain", "rescaled")]
    for directory in directories:
        tiny.write_checkpoint(directory, dtype=torch.float32)
    for shard in directories[1].glob("*.safetensors"):
        save_file(load_file(shard), shard, metadata={"format": "pt"})
    shards = sorted(directories[1].glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    other = rescaled(tensors, query_heads=4, value_heads=1, norms=True)
    for shard in shards:
        save_file({name: other[name] for name in load_file(shard)}, shard, metadata={"format": "pt"})
    return [Checkpoint(directory) for directory in directories]


def logits(base: Checkpoint, changes: dict) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    for name, change in changes.items():
        model.get_parameter(name).data.copy_(change.apply(base.tensor(name)))
    with torch.no_grad():
        return model(WINDOWS).logits


def learned(base: Checkpoint, **how) -> tuple[dict, list[Outcome]]:
    """Pruned and trained: the changes of all blocks, and the outcome of every training."""
    decoder = Decoder(base, torch.float32, CPU)
    patterns = {matrix.name: Unstructured(sparsity=0.5, comparison_group="row") for block in decoder.matrices for matrix in block}
    plan = Plan(method=WANDA, patterns=patterns, propagate="pruned", error_tokens=60, expert_tokens=0, **how)
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=2, held_out=2)
    teachers = TeacherStreams.of(stream, plan)
    blocks = list(prune_blocks(stream, plan, teachers=teachers))
    changes = {name: change for block in blocks for name, change in block.changes.items()}
    outcomes = [block.training for block in blocks if block.training]
    if plan.distillation:
        distilled = distill(teachers.student_inputs, teachers.teacher.hidden, plan.distillation, lambda index: blocks[index].changes)
        changes |= {name: change for _, block in distilled.changes() for name, change in block.items()}
        outcomes.append(distilled.outcome)
    return changes, outcomes


def test_the_rescaled_checkpoint_is_the_same_function_with_other_weights(written):
    plain, other = written
    torch.testing.assert_close(logits(plain, {}), logits(other, {}), rtol=1e-4, atol=1e-5)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"):
        ratio = other.tensor(f"model.layers.1.{name}.weight") / plain.tensor(f"model.layers.1.{name}.weight")
        assert ratio.max() / ratio.min() >= 16


@pytest.mark.parametrize(
    "how",
    [
        {"reconstruction": Reconstruction(epochs=6, learning_rate=0.02, search=False)},
        {"distillation": Distillation(first=1, epochs=6, learning_rate=0.005)},
    ],
    ids=["reconstruction", "distillation"],
)
def test_a_checkpoint_at_other_scales_learns_to_the_same_quality(written, how):
    (plain, outcomes), (other, others) = (learned(base, **how) for base in written)
    assert all(outcome.rate is not None for outcome in outcomes)
    for outcome, of_other in zip(outcomes, others, strict=True):
        assert of_other.before == pytest.approx(outcome.before, rel=1e-3)
        assert of_other.after == pytest.approx(outcome.after, rel=0.02)
    assert all(torch.equal(other[name].mask, change.mask) for name, change in plain.items())
    difference = (logits(written[0], plain) - logits(written[1], other)).norm() / logits(written[0], plain).norm()
    assert difference < 0.02
