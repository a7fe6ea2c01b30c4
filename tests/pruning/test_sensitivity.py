"""Evidence measured block by block, against plain transformers on the whole model; and the allocations made of it."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.memory import write_windows
from stages import prune
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.errors import ConfigError, PruningError
from stages.files import BASE, PRUNE_JOURNAL, PRUNE_RESULTS, read_json
from stages.pruning import planning, sensitivity
from stages.pruning.allocation import counts_by_curves, hill_exponent
from stages.pruning.allocations import alphapruning, loss, owl
from stages.pruning.block_loop import TeacherStreams, prune_blocks
from stages.pruning.entries import DenseModel
from stages.pruning.journal import Journal
from stages.pruning.patterns import Unstructured, UnstructuredSection
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.section import Propagation
from stages.pruning.sensitivity import Sensitivity, floored, outlier_shares, sensitivities, spectral_exponents
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream
from tests.methods import WANDA, made
from tests.pruning import test_journal as stage
from tests.pruning.test_architectures import WINDOWS as SMALL_WINDOWS
from tests.pruning.test_architectures import fetched
from tests.small_models import small
from tests.streaming.test_every_model_type import write

CPU = torch.device("cpu")
GRID = [0.0, 0.25, 0.5, 0.9]
WEIGHT = 0.3
HOW = {"gradient_weights": [WEIGHT], "fisher_floor": 1e-6}
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))


def stream_of(base: Checkpoint, windows: torch.Tensor = WINDOWS, batch: int = 2) -> Stream:
    decoder = Decoder(base, torch.float32, CPU)
    with decoder.before_blocks():
        return Stream(decoder, windows, batch=batch)


def streamed(base: Checkpoint, windows: torch.Tensor = WINDOWS, batch: int = 2, comparison_group: str = "row") -> dict[str, Sensitivity]:
    return sensitivities(stream_of(base, windows, batch), GRID, comparison_group, **HOW)[WEIGHT]


def whole(base: Checkpoint):
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@contextmanager
def products(model, receive) -> Iterator[None]:
    """Hand what every layer of the blocks read and gave to `receive`: (parameter, expert), inputs and outputs [tokens, width]."""
    names, hooks = {id(parameter): name for name, parameter in model.named_parameters()}, []

    def of_linear(module, arguments, output):
        receive((names[id(module.weight)], None), arguments[0].flatten(0, -2), output)

    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            hooks.append(module.register_forward_hook(of_linear))
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            module.forward = own_experts(module, names, receive)
    yield
    for hook in hooks:
        hook.remove()


def own_experts(module, names, receive):
    """A mixture's forward pass in a few lines."""

    def forward(tokens, chosen, weights):
        output = torch.zeros_like(tokens)
        for expert in range(len(module.down_proj)):
            where, slot = (chosen == expert).nonzero(as_tuple=True)
            own = tokens[where]
            both = linear(own, module.gate_up_proj[expert])
            between = module._apply_gate(both)
            out = linear(between, module.down_proj[expert])
            if len(own):
                receive((names[id(module.gate_up_proj)], expert), own, both)
                receive((names[id(module.down_proj)], expert), between, out)
            output = output.index_add(0, where, out * weights[where, slot, None])
        return output

    return forward


def literally(base: Checkpoint, windows: torch.Tensor, *, gradient_weight: float = WEIGHT) -> tuple[dict, dict]:
    """Of each layer: mean over its tokens of the squared gradient by its outputs; mean over windows of its inputs' squared norm, to a
    part with each token's own squared gradient as its weight."""
    rows, norms, by_gradients, tokens = {}, {}, {}, {}

    def take(layer, inputs, output):
        tokens[layer] = tokens.get(layer, 0) + inputs.numel() // inputs.shape[-1]
        inputs = inputs.detach()

        def add(gradient):
            for token, by_output in zip(inputs, gradient.flatten(0, -2), strict=True):
                norms[layer] = norms.get(layer, 0) + token.square()
                by_gradients[layer] = by_gradients.get(layer, 0) + token.square() * by_output.square().sum()
            rows[layer] = rows.get(layer, 0) + gradient.flatten(0, -2).square().sum(dim=0)

        output.register_hook(add)

    model = whole(base)
    with products(model, take):
        logits = model(windows, use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for layer, norm in norms.items():
        weighted = by_gradients[layer] * tokens[layer] / rows[layer].sum()
        norms[layer] = ((1 - gradient_weight) * norm + gradient_weight * weighted) / len(windows)
    return {layer: total / tokens[layer] for layer, total in rows.items()}, norms


def of_matrix(found: dict, decoder: Decoder, index: int, matrix) -> torch.Tensor:
    """What was found of the outputs of the layer in which a matrix appears: its own rows."""
    values = found[f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}", matrix.parameter_slice.expert]
    return values if matrix.parameter_slice.rows is None else values[slice(*matrix.parameter_slice.rows)]


def every_matrix(decoder: Decoder):
    return [(index, matrix) for index, block in enumerate(decoder.matrices) for matrix in block]


def stored(decoder: Decoder, matrix) -> torch.Tensor:
    tensor = decoder.checkpoint.tensor(matrix.tensor)
    tensor = (tensor if matrix.expert is None else tensor[matrix.expert]).float()
    return tensor.T if matrix.transposed else tensor


def literal_curve(squared: torch.Tensor, comparison_group: str) -> list[float]:
    """At each sparsity of the grid the sum of the lowest scores."""
    total = []
    for sparsity in GRID:
        competing = squared.double().tolist() if comparison_group == "row" else [squared.double().flatten().tolist()]
        total.append(sum(sum(sorted(scores)[: math.floor(len(scores) * Fraction(str(sparsity)))]) for scores in competing))
    return total


# Sensitivities.


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_fisher_estimates_are_the_squared_gradients_of_the_whole_model_whatever_the_micro_batch(base, batch):
    found, (expected, _) = streamed(base, batch=batch), literally(base, WINDOWS)
    decoder = Decoder(base, torch.float32, CPU)
    assert len(found) == 21
    for index, matrix in every_matrix(decoder):
        torch.testing.assert_close(found[matrix.name].fisher, of_matrix(expected, decoder, index, matrix), rtol=1e-4, atol=0)


@pytest.mark.parametrize("comparison_group", ["row", "matrix"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_curve_adds_up_the_lowest_scores_times_the_fisher_estimate_of_their_rows(base, comparison_group, batch):
    stream, weights = stream_of(base, batch=batch), [0.0, 0.3, 1.0]
    found = sensitivities(stream, GRID, comparison_group, gradient_weights=weights, fisher_floor=1e-6)
    decoder = Decoder(base, torch.float32, CPU)
    for weight in weights:
        rows, norms = literally(base, WINDOWS, gradient_weight=weight)
        for index, matrix in every_matrix(decoder):
            layer = f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}", None
            squared = stored(decoder, matrix).square() * norms[layer] * rows[layer][:, None]
            assert found[weight][matrix.name].curve == pytest.approx(literal_curve(squared, comparison_group), rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("batch", [1, 2])
def test_sensitivities_are_those_of_the_whole_model_whatever_holds_the_weights(kind, batch, tmp_path):
    base = fetched(kind, tmp_path)
    found, (rows, norms) = streamed(base, SMALL_WINDOWS, batch), literally(base, SMALL_WINDOWS)
    decoder = Decoder(base, torch.float32, CPU)
    for index, matrix in every_matrix(decoder):
        fisher = of_matrix(rows, decoder, index, matrix)
        torch.testing.assert_close(found[matrix.name].fisher, fisher, rtol=1e-3, atol=1e-5 * float(fisher.mean()))
        norm = norms[f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}", matrix.parameter_slice.expert]
        squared = stored(decoder, matrix).square() * norm * fisher[:, None]
        assert found[matrix.name].curve == pytest.approx(literal_curve(squared, "row"), rel=1e-3), matrix.name


def test_of_a_mixture_the_first_windows_of_every_source_are_taken():
    windows = torch.arange(12)[:, None]
    asked = partial(DenseModel, decoder=None, windows=windows, stream=None, comparison_group="row")
    assert asked(sources=(12,)).first(4)[:, 0].tolist() == asked().first(4)[:, 0].tolist() == [0, 1, 2, 3]
    assert asked(sources=(9, 3)).first(4)[:, 0].tolist() == [0, 1, 2, 9]
    assert asked(sources=(11, 1)).first(4)[:, 0].tolist() == [0, 1, 2, 3, 11]
    assert len(asked(sources=(9, 3)).first(20)) == 12


def test_an_expert_that_no_token_chose_has_no_sensitivity(tmp_path):
    base, one = fetched("mixtral", tmp_path), SMALL_WINDOWS[:1, :3]  # of two tokens queries and keys have no gradient, either
    found, decoder = streamed(base, one, 1), Decoder(base, torch.float32, CPU)
    unseen = [matrix for _, matrix in every_matrix(decoder) if matrix.name not in found]
    assert unseen
    assert all(matrix.parameter_slice.expert is not None for matrix in unseen)
    dense = DenseModel(decoder=decoder, windows=one, stream=lambda windows: stream_of(base, windows, 1), comparison_group="row")
    kept = loss.evidence(dense, replace(ALLOCATIONS["loss"], windows=1))
    assert {name.removesuffix(".0.3").rpartition(".")[0] for name in kept} == {matrix.name for _, matrix in every_matrix(decoder)}
    for matrix in unseen:
        assert len(kept[f"{matrix.name}.curve.0.3"]) == 0
        assert kept[f"{matrix.name}.rows.0.3"].tolist() == [1.0] * matrix.shape[0]


def test_a_matrix_without_a_curve_is_as_sparse_as_the_pattern(tmp_path):
    decoder = Decoder(fetched("mixtral", tmp_path), torch.float32, CPU)
    matrices = [matrix for _, matrix in every_matrix(decoder)]
    grid = torch.tensor(loss.GRID, dtype=torch.float64)
    curves = [[] if number % 5 == 0 else ((1 + number) * grid**2).tolist() for number in range(len(matrices))]
    counts = counts_by_curves(curves, loss.GRID, [matrix.size for matrix in matrices], 0.37, ALLOCATIONS["loss"])
    even = [math.floor(matrix.size * Fraction("0.37")) for matrix in matrices]
    assert [count for count, curve in zip(counts, curves, strict=True) if not curve] == even[::5]
    assert counts != even
    assert sum(counts) == math.floor(sum(matrix.size for matrix in matrices) * Fraction("0.37"))


def test_the_buffers_for_gradients_are_taken_from_one_budget(base, monkeypatch, tmp_path):
    """Both together are larger than the budget, each alone is not: the second lies in a file."""
    stream, buffers = stream_of(base), []
    block_inputs, gradient = 3 * stream.hidden.nbytes, stream.hidden.nbytes
    stream.memory = HostMemory(block_inputs + gradient - 1, tmp_path)
    original = stream.memory.buffer
    monkeypatch.setattr(stream.memory, "buffer", lambda *how: buffers.append(original(*how)) or buffers[-1])
    sensitivities(stream, GRID, "row", **HOW)
    assert [tensor.nbytes for tensor, _ in buffers] == [block_inputs, gradient]
    assert [location.split()[0] for _, location in buffers] == ["memory", "a"]


@pytest.mark.filterwarnings("default")  # of a model at its small sizes
def test_a_layer_whose_outputs_only_choose_what_attention_reads_has_no_gradient_and_is_not_measured(tmp_path):
    checkpoint = write(tmp_path, small("axk2"))
    stream = stream_of(checkpoint, SMALL_WINDOWS)
    found = sensitivities(stream, GRID, "row", **HOW)[WEIGHT]
    names = {matrix.name for block in stream.decoder.matrices for matrix in block}
    assert {name.split(".")[4] for name in names - set(found)} == {"indexer"}


def test_a_row_without_any_gradient_has_a_small_fisher_estimate_from_the_floor(base):
    """Nothing reads the fifth output of the last block's up projection here."""

    class Cut(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            if name == "model.layers.2.mlp.down_proj.weight":
                tensor[:, 5] = 0
            return tensor

    found = streamed(Cut(base.directory))["model.layers.2.mlp.up_proj.weight"].fisher
    assert 0.1e-6 < found[5] / found.mean() < 10e-6
    assert found[5] == found.min()


def test_gradients_that_are_not_finite_name_the_block(base):
    class Broken(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return tensor * 3e38 if name == "lm_head.weight" else tensor

    with pytest.raises(PruningError, match="block 2: found NaN or infinity in the gradients, wanted finite ones"):
        streamed(Broken(base.directory))


def loaded_blocks(decoder: Decoder) -> list[int]:
    return [index for index, block in enumerate(decoder.blocks) if not all(parameter.is_meta for parameter in block.parameters())]


@pytest.mark.parametrize(
    "measure",
    [
        lambda stream: sensitivities(stream, GRID, "row", **HOW),
        lambda stream: outlier_shares(stream, 3.0),
    ],
    ids=["sensitivities", "outlier_shares"],
)
def test_only_the_block_that_runs_has_weights(base, measure):
    stream, seen = stream_of(base), []
    decoder = stream.decoder
    assert all(decoder.matrices)  # which a run with zeros finds
    for index, block in enumerate(decoder.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: seen.append((index, loaded_blocks(decoder))))
    head = decoder.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(("head", loaded_blocks(decoder))))
    measure(stream)
    head.remove()
    assert {index for index, _ in seen} >= {0, 1, 2}
    assert all(loaded == ([] if index == "head" else [index]) for index, loaded in seen)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


# Evidence of the other allocations.


def test_activations_that_are_not_finite_name_the_block(base):
    class Broken(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return tensor * math.nan if name == "model.layers.1.mlp.up_proj.weight" else tensor

    with pytest.raises(PruningError, match="block 1: found NaN or infinity in its outputs, wanted finite activations"):
        outlier_shares(stream_of(Broken(base.directory)), 3.0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mistral", "gpt2", "mixtral"])
def test_outlier_shares_are_those_of_the_whole_model(kind, batch, tmp_path):
    base = fetched(kind, tmp_path)
    _, norms = literally(base, SMALL_WINDOWS, gradient_weight=0.0)
    decoder, expected = Decoder(base, torch.float32, CPU), []
    for index, matrices in enumerate(decoder.matrices):
        layers = [(f"{decoder.prefix}.{index}.{matrix.parameter_slice.name}", matrix.parameter_slice.expert) for matrix in matrices]
        scores = [stored(decoder, m).abs() * norms[layer].sqrt() for m, layer in zip(matrices, layers, strict=True)]
        together = torch.cat([score.flatten() for score in scores])
        expected.append(float((together > 3 * together.mean()).double().mean()))
    assert all(share > 0 for share in expected)
    assert outlier_shares(stream_of(base, SMALL_WINDOWS, batch), 3.0) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "mixtral"])
def test_a_blocks_exponent_is_the_mean_of_its_matrices(kind, tmp_path):
    decoder = Decoder(fetched(kind, tmp_path), torch.float32, CPU)
    expected = [[hill_exponent(stored(decoder, matrix)) for matrix in matrices] for matrices in decoder.matrices]
    assert spectral_exponents(decoder) == pytest.approx([sum(exponents) / len(exponents) for exponents in expected])
    assert len(set(spectral_exponents(decoder))) == 3


# The prune stage with each allocation.

project = stage.project


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """What is allocated is taken here, however little a random model gains; see test_judgement."""
    monkeypatch.setattr(planning, "pruned_losses", losses_that_fall)


def losses_that_fall(*_: object) -> list[float]:
    return [1.0, 0.5]


@dataclass(frozen=True)
class Taken:
    """The same in the process that is to be killed, before what arranges that."""

    kill: stage.AtCall

    def __call__(self) -> None:
        planning.pruned_losses = losses_that_fall
        self.kill()


BOUNDS = {"lowest": 0.2, "highest": 0.7}
PATTERN = UnstructuredSection(name="unstructured", sparsity=0.37)
ALLOCATIONS = {
    "owl": owl.OwlSection(name="owl", multiple=3.0, strength=0.08, **BOUNDS),
    "alphapruning": alphapruning.AlphaPruningSection(name="alphapruning", strength=0.3, **BOUNDS),
    "loss": loss.LossSection(name="loss", windows=3, gradient_weights=[0.3], row_strength=0.0, row_floor=1e-6, **BOUNDS),
    "loss with rows": loss.LossSection(name="loss", windows=3, gradient_weights=[0.3], row_strength=1.0, row_floor=1e-6, **BOUNDS),
}
MEASUREMENTS = {"sensitivities": loss, "outlier_shares": owl, "spectral_exponents": alphapruning}


def sparsities() -> list[dict]:
    return read_json(PRUNE_RESULTS / "sparsity.json")


@pytest.mark.parametrize("comparison_group", ["matrix", "row"])
@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "loss with rows"])
def test_an_allocation_meets_the_budget_to_the_weight_within_its_bounds(project, name, comparison_group):
    stage.run(method=replace(stage.METHOD, comparison_group=comparison_group), pattern=PATTERN, allocation=ALLOCATIONS[name])
    rows = sparsities()
    total = sum(row["weights"] for row in rows)
    assert sum(row["zeros"] for row in rows) == math.floor(total * Fraction("0.37"))
    assert all(0.2 <= row["sparsity"] <= 0.7 for row in rows)
    assert all(row["sparsity"] == pytest.approx(row["asked"]) for row in rows)
    assert len({row["sparsity"] for row in rows}) > 1


@pytest.mark.parametrize("windows", [SMALL_WINDOWS, SMALL_WINDOWS[:1, :2]], ids=["many tokens", "two tokens"])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_mixture_meets_the_budget_too_even_if_no_token_chose_some_experts(project, tmp_path, name, windows):
    shutil.rmtree(BASE)
    (tmp_path / "mixture").mkdir()
    fetched("mixtral", tmp_path / "mixture").directory.rename(BASE)
    write_windows(tmp_path, windows.clone())
    stage.run(pattern=PATTERN, allocation=ALLOCATIONS[name])
    rows = sparsities()
    assert any("experts" in row["matrix"] for row in rows)
    assert sum(row["zeros"] for row in rows) == math.floor(sum(row["weights"] for row in rows) * Fraction("0.37"))
    assert all(math.isfinite(row["relative_error"]) for row in rows)


def test_owl_tells_blocks_apart(project):
    stage.run(pattern=PATTERN, allocation=ALLOCATIONS["owl"])
    blocks = [[row["sparsity"] for row in sparsities() if row["block"] == index] for index in range(3)]
    assert all(max(block) - min(block) < 0.01 for block in blocks)
    assert len({round(block[0], 2) for block in blocks}) > 1


def test_the_loss_tells_matrices_apart(project):
    stage.run(pattern=PATTERN, allocation=ALLOCATIONS["loss"])
    assert len({round(row["sparsity"], 2) for row in sparsities() if row["block"] == 0 and "self_attn" in row["matrix"]}) > 1


@pytest.mark.parametrize(("name", "measurement"), [("owl", "outlier_shares"), ("alphapruning", "spectral_exponents")])
def test_blocks_are_as_sparse_as_the_rule_says_of_their_evidence(project, monkeypatch, name, measurement):
    """All sparsities are within the bounds, so that these do not hide the rule."""
    seen = [0.1, 0.4, 0.3]
    monkeypatch.setattr(MEASUREMENTS[measurement], measurement, lambda *_: seen)
    stage.run(pattern=PATTERN, allocation=ALLOCATIONS[name])
    if name == "owl":
        distances = [2 * 0.08 * (value - 0.1) / 0.3 for value in seen]
        expected = [0.37 + sum(distances) / 3 - distance for distance in distances]
    else:
        ratios = [1 - 0.3 + 2 * 0.3 * (value - 0.1) / 0.3 for value in seen]
        expected = [0.37 * ratio / (sum(ratios) / 3) for ratio in ratios]
    assert [row["sparsity"] for row in sparsities()] == pytest.approx([expected[row["block"]] for row in sparsities()], abs=2e-3)


def test_where_rows_do_not_compete_row_costs_change_nothing(base):
    """A row's best values do not depend on the cost of its error."""
    matrices = [matrix for block in Decoder(base, torch.float32, CPU).matrices for matrix in block]
    plan = Plan(
        method=made("wanda", "least_squares", steps=40),
        patterns={matrix.name: Unstructured(sparsity=0.5, comparison_group="row") for matrix in matrices},
        propagate=Propagation.PRUNED,
        error_tokens=60,
        expert_tokens=0,
    )
    costs = {matrix.name: torch.rand(matrix.shape[0], generator=torch.Generator().manual_seed(0)) + 0.1 for matrix in matrices}
    alike, apart = (next(prune_blocks(stream_of(base), replace(plan, row_costs=rows))) for rows in ({}, costs))
    for name, change in alike.changes.items():
        assert torch.equal(change.mask, apart.changes[name].mask)
        torch.testing.assert_close(change.values.float(), apart.changes[name].values.float(), rtol=2e-2, atol=1e-3)


def test_where_rows_compete_row_costs_change_masks_but_not_counts(project):
    alike = stage.run(pattern=PATTERN, allocation=ALLOCATIONS["loss"])
    zeros = {row["matrix"]: row["zeros"] for row in sparsities()}
    apart = stage.run(pattern=PATTERN, allocation=ALLOCATIONS["loss with rows"])
    assert {row["matrix"]: row["zeros"] for row in sparsities()} == zeros
    assert alike["block-00000.safetensors"] != apart["block-00000.safetensors"]


@pytest.mark.parametrize("score", ["ria", "wanda"])
def test_where_rows_do_not_compete_row_costs_change_no_mask(project, score):
    method = replace(stage.METHOD, score=compose.method(score).score, comparison_group="row")
    runs = [stage.run(method=method, pattern=PATTERN, allocation=ALLOCATIONS[name]) for name in ("loss", "loss with rows")]
    assert all(runs[0][name] == file for name, file in runs[1].items() if name.startswith("block"))


@pytest.mark.parametrize(("name", "scores", "gradients"), [("owl", True, False), ("alphapruning", False, False), ("loss", False, True)])
def test_host_memory_is_counted_for_what_an_allocation_holds(project, monkeypatch, name, scores, gradients):
    asked = {}
    monkeypatch.setattr(prune, "host_bytes", lambda *_, **how: asked.update(how) or 0)
    stage.run(pattern=PATTERN, allocation=ALLOCATIONS[name])
    assert asked == {"scores_blocks": scores, "takes_gradients": gradients, "judges": True}


def test_a_matrix_may_lose_all_where_the_bounds_allow_it(project):
    pattern = UnstructuredSection(name="unstructured", sparsity=0.995)
    stage.run(pattern=pattern, allocation=replace(ALLOCATIONS["loss"], lowest=0.0, highest=1.0))
    rows = sparsities()
    assert sum(row["zeros"] for row in rows) == math.floor(sum(row["weights"] for row in rows) * Fraction("0.995"))
    assert any(row["zeros"] == row["weights"] for row in rows)


def test_a_spectrum_without_a_tail_names_the_layer(base):
    class Broken(Checkpoint):
        def tensor(self, name, **how):
            tensor = super().tensor(name, **how)
            return torch.zeros_like(tensor) if name == "model.layers.1.mlp.up_proj.weight" else tensor

    with pytest.raises(PruningError, match=r"layer model.layers.1.mlp.up_proj.weight: found a matrix of .* with a rank below"):
        spectral_exponents(Decoder(Broken(base.directory), torch.float32, CPU))


def test_the_loss_gradient_is_the_same_some_tokens_at_a_time(base, monkeypatch):
    whole = streamed(base)
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 7)
    for name, found in streamed(base).items():
        torch.testing.assert_close(found.fisher, whole[name].fisher, rtol=1e-3, atol=0)


def test_bounds_that_do_not_allow_the_sparsity_are_refused_before_evidence_is_measured(project, monkeypatch):
    for measurement in MEASUREMENTS:
        monkeypatch.setattr(MEASUREMENTS[measurement], measurement, None)
    narrow = alphapruning.AlphaPruningSection(name="alphapruning", strength=0.3, lowest=0.4, highest=0.6)
    with pytest.raises(ConfigError, match=r"allocation: found a budget of .* weights, wanted .* from 0.4 to 0.6 allows"):
        stage.run(pattern=PATTERN, allocation=narrow)


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("finished", [1, 2])
def test_a_killed_run_goes_on_with_the_evidence_of_before_and_the_same_bytes(project, name, finished, monkeypatch):
    asked = {"pattern": PATTERN, "allocation": ALLOCATIONS[name]}
    expected = stage.run(**asked)
    assert stage.killed_while(Taken(stage.AtCall(f"{stage.JOURNAL}:Journal", "write", finished, False)), **asked)
    assert (PRUNE_JOURNAL / "evidence.safetensors").is_file()
    for measurement in MEASUREMENTS:
        monkeypatch.setattr(MEASUREMENTS[measurement], measurement, None)
    assert stage.run(**asked) == expected
    assert stage.resumed_after() == finished


def test_the_seconds_of_evidence_measured_before_a_kill_count(base, tmp_path):
    first = Journal(tmp_path, base=base)
    found = first.allocation_evidence(lambda: time.sleep(0.2) or {"blocks": torch.arange(3)})
    assert first.evidence_seconds == 0  # counted by this run's own stopwatch
    second = Journal(tmp_path, base=base)
    assert torch.equal(second.allocation_evidence(lambda: pytest.fail("measured again"))["blocks"], found["blocks"])
    assert second.evidence_seconds >= 0.2


def test_a_run_that_is_killed_while_it_measures_evidence_measures_again(project):
    asked = {"pattern": PATTERN, "allocation": ALLOCATIONS["loss"]}
    expected = stage.run(**asked)
    assert stage.killed_while(Taken(stage.AtCall(loss.__name__, "sensitivities", 1, False)), **asked)
    assert not (PRUNE_JOURNAL / "evidence.safetensors").exists()
    assert stage.run(**asked) == expected


def test_evidence_of_another_allocation_is_not_reused(project):
    asked = {"pattern": PATTERN, "allocation": ALLOCATIONS["owl"]}
    expected = stage.run(**asked)
    other = owl.OwlSection(name="owl", multiple=5.0, strength=0.08, **BOUNDS)
    assert stage.killed_while(stage.AtCall(f"{stage.JOURNAL}:Journal", "write", 1, False), pattern=PATTERN, allocation=other)
    assert stage.run(**asked) == expected
    assert stage.resumed_after() == 0


def test_a_row_costs_at_least_its_floor_and_rows_without_scores_keep_their_estimate():
    fisher, energy = torch.tensor([4.0, 0.0, 1.0, 7.0]), torch.tensor([1.0, 2.0, 4.0, 0.0])  # the rows cost 4, 0, 4 and 0: 2 on average
    assert floored(fisher, energy, 0.5).tolist() == [4.0, 0.5, 1.0, 7.0]


def test_every_row_costs_something_also_where_it_is_zero_or_nearly():
    fisher, energy = torch.tensor([4.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 4.0, 1e-44])
    assert floored(fisher, energy, 0.5).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert floored(torch.tensor([0.0, 3.0]), torch.ones(2), 0.0).tolist() == [3.0, 3.0]


def test_a_neuron_that_is_removed_already_is_pruned_and_trained_with_the_others(base):
    """As of an intermediate size that was padded with zeros."""

    class Cut(Checkpoint):
        def tensor(self, name, *arguments, **named):
            tensor = super().tensor(name, *arguments, **named)
            if name.endswith((".0.mlp.gate_proj.weight", ".0.mlp.up_proj.weight")):
                tensor = tensor.clone()
                tensor[5] = 0
            return tensor

    checkpoint = Cut(base.directory)
    found = streamed(checkpoint, comparison_group="matrix")
    costs = {name: of.fisher for name, of in found.items()}
    assert all((cost > 0).all() for cost in costs.values())
    decoder = Decoder(checkpoint, torch.float32, CPU)
    patterns = dict.fromkeys(found, Unstructured(sparsity=0.5, comparison_group="matrix"))
    settings = Reconstruction(epochs=2, learning_rate=0.01, search=False)
    plan = Plan(
        method=WANDA,
        patterns=patterns,
        row_costs=costs,
        propagate="pruned",
        error_tokens=60,
        expert_tokens=0,
        reconstruction=settings,
    )
    with decoder.before_blocks():
        stream = Stream(decoder, WINDOWS, batch=1, held_out=1)
    first, *_ = prune_blocks(stream, plan, teachers=TeacherStreams.of(stream, plan))
    assert first.training.rate is not None
    assert all(change.apply(checkpoint.tensor(name)).isfinite().all() for name, change in first.changes.items())


def test_the_floor_does_not_depend_on_the_scale_at_which_an_output_is_written():
    torch.manual_seed(0)
    fisher, energy, scale = torch.rand(50) ** 4, torch.rand(50), 2.0 ** torch.randint(-6, 7, (50,))
    expected, found = floored(fisher, energy, 0.1), floored(fisher / scale**2, energy * scale**2, 0.1)
    torch.testing.assert_close(found * scale**2, expected)
    assert (expected > fisher).any() and (expected == fisher).any()
