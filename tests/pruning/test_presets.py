"""Every method of conf/method: masks against the formula of its score written out, and a run of the block loop."""

import pytest
import torch

from stages.config import compose
from stages.config.compose import read
from stages.config.params import CONF
from stages.pruning import statistics
from stages.pruning.entries import Pruned
from stages.pruning.method import prune_matrices
from stages.pruning.patterns import Nm, Unstructured
from tests.pruning.test_block_loop import pruned
from tests.pruning.test_method import correlated, require_exact, seen, weights

PRESETS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
SPARSITY = 0.4
Table = list[list[float]]


def norms(inputs: torch.Tensor) -> list[float]:
    return [sum(float(value) ** 2 for value in column) ** 0.5 for column in inputs.T]


def magnitude(weight: torch.Tensor, inputs: torch.Tensor) -> Table:
    return [[abs(float(value)) for value in row] for row in weight]


def wanda(weight: torch.Tensor, inputs: torch.Tensor) -> Table:
    of = norms(inputs)
    return [[abs(float(value)) * of[j] for j, value in enumerate(row)] for row in weight]


def wanda_variant(weight: torch.Tensor, inputs: torch.Tensor) -> Table:
    """What goes with a weight when it and all below it in its row go."""
    return [[sum(other for other in row if other <= value) / sum(row) for value in row] for row in wanda(weight, inputs)]


def ria(weight: torch.Tensor, inputs: torch.Tensor) -> Table:
    sizes, of = weight.abs().tolist(), norms(inputs)
    columns = [sum(row[j] for row in sizes) for j in range(len(of))]
    return [[(value / sum(row) + value / columns[j]) * of[j] ** 0.5 for j, value in enumerate(row)] for row in sizes]


def obs(weight: torch.Tensor, inputs: torch.Tensor) -> Table:
    gram = inputs.double().T @ inputs.double()
    inverse = (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)).inverse()
    return [[float(value) ** 2 / float(inverse[j, j]) for j, value in enumerate(row)] for row in weight]


def dropped(scores: Table, comparison_group: str) -> set[tuple[int, int]]:
    places = [[(value, i, j) for j, value in enumerate(row)] for i, row in enumerate(scores)]
    competing = places if comparison_group == "row" else [sum(places, [])]
    return {(i, j) for those in competing for _, i, j in sorted(those)[: int(len(those) * SPARSITY)]}


@pytest.mark.parametrize(
    ("name", "score", "comparison_group"),
    [
        ("magnitude", magnitude, "row"),
        ("magnitude_per_matrix", magnitude, "matrix"),
        ("wanda", wanda, "row"),
        ("wanda_variant", wanda_variant, "matrix"),
        ("ria", ria, "matrix"),
        ("obs", obs, "row"),
        ("wanda_least_squares", wanda, "row"),
        ("wanda_sparsegpt", wanda, "row"),
    ],
)
def test_a_preset_prunes_what_its_formula_says(name, score, comparison_group):
    method = compose.method(name)
    weight, inputs = weights(7, rows=12), correlated(7)
    (found,) = prune_matrices(
        [weight], seen(method.statistic, inputs), method, [Unstructured(sparsity=SPARSITY, comparison_group=method.comparison_group)]
    )
    assert {(i, j) for i, j in (~found.mask).nonzero().tolist()} == dropped(score(weight, inputs), comparison_group)


@pytest.mark.parametrize("form", ["50%", "2:4", "4:8"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prunes_a_whole_model(base, name, form):
    method = compose.method(name)
    patterns = {
        "50%": Unstructured(sparsity=0.5, comparison_group=method.comparison_group),
        "2:4": Nm(kept=2, group=4),
        "4:8": Nm(kept=4, group=8),
    }
    changes, blocks = pruned(base, method, patterns[form])
    assert len(changes) == 21
    for change in changes.values():
        require_exact(Pruned(mask=change.mask), patterns[form])
    assert all((change.values is not None) == method.changes_weights for change in changes.values())
    assert all(0 < matrix.relative_error < 1 for block in blocks for matrix in block.matrices)


@pytest.mark.parametrize(
    ("name", "kept", "group"), [("nm_2_4", 2, 4), ("nm_4_8", 4, 8), ("nm_2_4_permuted", 2, 4), ("nm_4_8_permuted", 4, 8)]
)
def test_a_pattern_preset_is_what_its_name_says(name, kept, group):
    section = read(f"pattern={name}")["pattern"]
    assert (section.kept, section.group, section.permutation_rounds is not None) == (kept, group, name.endswith("permuted"))


def test_matrices_that_read_the_same_input_are_factored_once(base, monkeypatch):
    factored, original = [], statistics._inverse_factor

    def counted(gram, *rest):
        factored.append(len(gram))
        return original(gram, *rest)

    monkeypatch.setattr(statistics, "_inverse_factor", counted)
    pruned(base, compose.method("sparsegpt"), Unstructured(sparsity=0.5, comparison_group="matrix"))
    assert factored == [32, 32, 32, 112] * 3
