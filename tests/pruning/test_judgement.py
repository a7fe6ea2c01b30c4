"""An allocation is judged on windows held out, and not taken where equal sparsities are as good."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.files import BASE, PRUNE_RESULTS, SPARSE, read_json
from stages.pruning import planning
from stages.pruning.allocations import loss, owl
from stages.pruning.patterns import Unstructured, UnstructuredSection
from stages.pruning.planning import Judgement
from stages.pruning.sensitivity import Candidate, next_token_loss, pruned_losses
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.pruning import test_journal as stage

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 400, (3, 24), generator=torch.Generator().manual_seed(1))
PATTERN = UnstructuredSection(name="unstructured", sparsity=0.37)
OWL = owl.OwlSection(name="owl", multiple=3.0, strength=0.08, lowest=0.2, highest=0.7)
LOSS = loss.LossSection(name="loss", windows=3, gradient_weights=[1.0], row_strength=0.0, row_floor=1e-6, lowest=0.2, highest=0.7)
project = stage.project


def stream_of(decoder: Decoder, windows: torch.Tensor) -> Stream:
    with decoder.before_blocks():
        return Stream(decoder, windows, batch=2)


def candidate(decoder: Decoder, sparsity: float, costs: bool = False) -> Candidate:
    matrices = [matrix for block in decoder.matrices for matrix in block]
    pattern = Unstructured(sparsity=Fraction(str(sparsity)), comparison_group="matrix")
    row_costs = {matrix.name: torch.linspace(0.1, 2, matrix.shape[0]) for matrix in matrices} if costs else {}
    return Candidate(patterns={matrix.name: pattern for matrix in matrices}, row_costs=row_costs)


def literally(base, sparsity: float, costs: bool) -> float:
    """The loss of a whole model, every matrix pruned by |W| ||X|| with the inputs of the dense model."""
    dense = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    pruned, squares = copy.deepcopy(dense), {}
    for name, module in dense.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: squares.update({name: inputs[0].square().sum(dim=(0, 1))}))
    with torch.no_grad():
        dense(WINDOWS)
        for name, square in squares.items():
            weight = pruned.model.layers.get_submodule(name).weight
            scores = weight.abs() * square.sqrt() * (torch.linspace(0.1, 2, len(weight)).sqrt()[:, None] if costs else 1)
            weight[scores.flatten().argsort(stable=True).argsort().view(weight.shape) < int(weight.numel() * sparsity)] = 0
        logits = pruned(HELD_OUT).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), HELD_OUT[:, 1:].flatten()).item()


def test_candidates_are_judged_by_the_loss_of_the_whole_pruned_model(base):
    decoder = Decoder(base, torch.float32, CPU)
    candidates = [candidate(decoder, 0.5), candidate(decoder, 0.75), candidate(decoder, 0.75, costs=True)]
    held_out = [stream_of(decoder, HELD_OUT) for _ in candidates]
    losses = pruned_losses(stream_of(decoder, WINDOWS), held_out, candidates)
    expected = [literally(base, sparsity, costs) for sparsity, costs in ((0.5, False), (0.75, False), (0.75, True))]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(set(losses)) == 3


def test_the_dense_loss_is_that_of_transformers(base):
    decoder = Decoder(base, torch.float32, CPU)
    stream = stream_of(decoder, HELD_OUT)
    for index in range(len(decoder.blocks)):
        with decoder.loaded(index, decoder.read(index)) as block, torch.no_grad():
            stream.advance(index, block)
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        assert next_token_loss(stream) == pytest.approx(model(HELD_OUT, labels=HELD_OUT).loss.item(), rel=1e-5)


def rows() -> list[dict]:
    return read_json(PRUNE_RESULTS / "sparsity.json")


@pytest.mark.parametrize(("losses", "taken"), [([2.0, 1.9], True), ([2.0, 2.0], False), ([2.0, 2.1], False)])
def test_what_is_no_better_than_equal_sparsities_is_not_taken_and_both_meet_the_budget(project, monkeypatch, caplog, losses, taken):
    monkeypatch.setattr(planning, "pruned_losses", lambda *_: losses)
    with caplog.at_level("INFO"):
        stage.run(pattern=PATTERN, allocation=OWL)
    total = sum(row["weights"] for row in rows())
    assert sum(row["zeros"] for row in rows()) == int(total * Fraction("0.37"))
    assert (max(row["sparsity"] for row in rows()) - min(row["sparsity"] for row in rows()) > 0.01) == taken
    judged = read_json(PRUNE_RESULTS / "provenance.json")["allocation_judged"]
    uniform, allocated = map(pytest.approx, losses)
    assert judged == {"uniform": uniform, "allocated": allocated, "taken": taken, "tried": [{"loss": allocated}]}
    refused = "allocation owl is not taken: it is no better than equal sparsities on the windows held out"
    assert (refused in caplog.messages) != taken
    labels = {read_json(PRUNE_RESULTS / "provenance.json")["label"], SparseDelta(SPARSE, Checkpoint(BASE).fingerprint).recipe.label}
    assert labels == {"obs (obs + sparsegpt, per matrix), owl allocation" + ("" if taken else " not taken")}


def test_a_judgement_takes_what_is_better():
    judgement = Judgement(uniform=2.0, versions=[{"gradient_weights": [0.5]}, {}], allocated=[1.9, 1.8])
    tried = [{"gradient_weights": [0.5], "loss": 1.9}, {"loss": 1.8}]
    assert judgement.as_dict() == {"uniform": 2.0, "allocated": 1.8, "taken": True, "tried": tried}
    assert judgement.best == 1
    assert not Judgement(uniform=2.0, versions=[{}], allocated=[2.0]).taken


def test_of_an_allocations_versions_the_best_on_the_windows_held_out_is_taken(project, monkeypatch, caplog):
    def sparsities(weights: list[float], losses: list[float]) -> list[float]:
        monkeypatch.setattr(planning, "pruned_losses", lambda *_: losses)
        with caplog.at_level("INFO"):
            stage.run(pattern=PATTERN, allocation=replace(LOSS, gradient_weights=weights))
        return [row["sparsity"] for row in rows()]

    first, second = sparsities([0.0], [2.0, 1.0]), sparsities([1.0], [2.0, 1.0])
    assert first != second
    assert sparsities([0.0, 1.0], [2.0, 1.8, 1.9]) == first
    assert sparsities([0.0, 1.0], [2.0, 1.9, 1.8]) == second
    said = "allocation loss, gradient_weights [1.0]: loss 1.8000 on the windows held out, 2.0000 with equal sparsities"
    assert said in caplog.messages
    tried = read_json(PRUNE_RESULTS / "provenance.json")["allocation_judged"]["tried"]
    assert [(version["gradient_weights"], pytest.approx(version["loss"])) for version in tried] == [([0.0], 1.9), ([1.0], 1.8)]
