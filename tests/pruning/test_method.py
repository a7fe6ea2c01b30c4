import ast
from functools import cache
from pathlib import Path

import pytest
import torch

from stages.config import compose
from stages.errors import ConfigError
from stages.pruning.entries import NoParameters, Pruned, Update
from stages.pruning.method import Method, prune_matrices, prune_matrix
from stages.pruning.patterns import Nm, Pattern, Unstructured
from stages.pruning.scores import SCORES
from stages.pruning.statistics import Gram, Moments, NoStatistic, SquaredNorm, Statistic
from stages.pruning.updates import UPDATES
from stages.pruning.updates.sparsegpt import sparsegpt
from tests.methods import MAGNITUDE, WANDA, made
from tests.methods import sparsegpt as sweep

CPU = torch.device("cpu")
HALF = Unstructured(sparsity=0.5, comparison_group="row")
PATTERNS = [Unstructured(sparsity=0.3, comparison_group="row"), Unstructured(sparsity=0.7, comparison_group="matrix"), Nm(kept=2, group=4)]
PATTERNS += [Nm(kept=4, group=8)]


@cache
def composition(score: str, update: str) -> Method:
    """As a configuration names it."""
    return compose.method("wanda", "method.comparison_group=matrix", f"method/score={score}", f"method/update={update}")


def fits(score: str, update: str) -> bool:
    try:
        composition(score, update).check_with(HALF_OF_MATRIX)
    except ConfigError:
        return False
    return True


HALF_OF_MATRIX = Unstructured(sparsity=0.5, comparison_group="matrix")
COMPOSITIONS = [(score, update) for score in SCORES for update in UPDATES if fits(score, update)]
every_composition = pytest.mark.parametrize(("score", "update"), COMPOSITIONS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def gram_of(inputs: torch.Tensor) -> Gram:
    gram = Gram(inputs.shape[1], CPU)
    gram.add(inputs[None])
    gram.finish()
    return gram


def prune(method, weight: torch.Tensor, statistic, pattern) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix alone."""
    (outcome,) = prune_matrices([weight], statistic, method, [pattern])
    return outcome.mask, outcome.values


def swept_literally(weight: torch.Tensor, damped: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Surgeon column by column, the inverse of what is left computed anew at every column."""
    weight = weight.clone().double()
    for j in range(weight.shape[1]):
        inverse = damped[j:, j:].double().inverse()
        for i in range(weight.shape[0]):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j].clone() / inverse[0, 0] * inverse[0]
                weight[i, j] = 0
    return weight.float()


@pytest.mark.parametrize("block_size", [1, 4, 5, 128])
def test_the_sweep_equals_its_literal_transcription(block_size):
    torch.manual_seed(0)
    weight, gram = torch.randn(6, 12), gram_of(torch.randn(40, 12))
    mask = torch.rand(6, 12) > 0.5
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(12)
    found_mask, found = sparsegpt(
        weight, gram.inverse_factor(0.01, 0.01), lambda w, _, j: mask[:, j : j + w.shape[1]], block_size, block_size
    )
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, swept_literally(weight, damped, mask), rtol=1e-4, atol=1e-4)


def chosen_and_swept_literally(weight: torch.Tensor, damped: torch.Tensor, pattern: Pattern, block_size: int) -> torch.Tensor:
    """The published sweep: a mask for each block of columns, or group, by the weights as the sweep has left them."""
    weight, factor = weight.clone().double(), torch.linalg.cholesky(damped.double().inverse(), upper=True)
    decision = pattern.group if isinstance(pattern, Nm) else block_size
    for start in range(0, weight.shape[1], decision):
        part = slice(start, min(start + decision, weight.shape[1]))
        scores = (weight[:, part] / factor.diagonal()[part]).square()
        drop = torch.zeros_like(scores, dtype=torch.bool)
        if isinstance(pattern, Nm):
            drop.scatter_(1, scores.argsort(dim=1)[:, : pattern.group - pattern.kept], True)
        else:
            drop.view(-1)[scores.flatten().argsort()[: int(scores.numel() * pattern.sparsity)]] = True
        for j in range(part.start, part.stop):
            error = weight[:, j] * drop[:, j - start] / factor[j, j]
            weight[:, j:] -= error[:, None] * factor[j, j:]
            weight[drop[:, j - start], j] = 0
    return weight.float()


@pytest.mark.parametrize(
    "pattern", [Unstructured(sparsity=0.5, comparison_group="matrix"), Nm(kept=2, group=4), Nm(kept=4, group=8)], ids=str
)
@pytest.mark.parametrize("columns", [80, 208])
def test_a_mask_chosen_in_a_sweep_of_several_blocks_and_strips_is_the_published_one(columns, pattern):
    torch.manual_seed(0)
    weight, gram = torch.randn(8, columns), gram_of(torch.randn(300, columns) @ torch.randn(columns, columns))
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(columns)
    mask, found = prune(sweep(80), weight, gram, pattern)
    expected = chosen_and_swept_literally(weight, damped, pattern, 80)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_damping_that_a_sweep_took_is_told():
    gram = Gram(2, CPU)
    gram.value = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # needs more than half the diagonal
    (pruned,) = prune_matrices([torch.tensor([[1.0, 2.0]])], gram, sweep(2), [HALF])
    assert pruned.damping == 1.0


@pytest.mark.parametrize("comparison_group", ["row", "matrix"])
def test_with_uncorrelated_inputs_sparsegpt_is_magnitude_and_moves_nothing(comparison_group):
    torch.manual_seed(0)
    weight, gram = torch.randn(8, 16), Gram(16, CPU)
    gram.value = torch.eye(16)
    pattern = Unstructured(sparsity=0.5, comparison_group=comparison_group)
    mask, updated = prune(sweep(16), weight, gram, pattern)
    expected, _ = prune(MAGNITUDE, weight, gram, pattern)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(updated, weight * mask)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize(
    "pattern",
    [Unstructured(sparsity=0.5, comparison_group="row"), Unstructured(sparsity=0.6, comparison_group="matrix"), Nm(kept=2, group=4)],
)
def test_compensation_lowers_the_output_error(score, pattern):
    torch.manual_seed(0)
    inputs = torch.randn(400, 32) @ torch.randn(32, 32)
    weight, gram = torch.randn(16, 32), gram_of(inputs)
    mask, updated = prune(sweep(8, score=score), weight, gram, pattern)
    with_update = (inputs @ (weight - updated).T).norm()
    without = (inputs @ (weight * ~mask).T).norm()
    assert with_update < without
    assert (updated[~mask] == 0).all()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8)])
def test_groups_keep_n_of_m_after_the_update(kept, group):
    torch.manual_seed(0)
    weight, gram = torch.randn(16, 32), gram_of(torch.randn(100, 32))
    mask, updated = prune(sweep(16), weight, gram, Nm(kept=kept, group=group))
    assert (mask.view(16, -1, group).sum(dim=2) == kept).all()
    assert torch.equal(updated != 0, mask)


def test_sparsegpt_prunes_exactly_what_is_asked_when_blocks_do_not_divide_the_matrix():
    torch.manual_seed(0)
    weight, gram = torch.randn(7, 30), gram_of(torch.randn(100, 30))
    mask, _ = prune(sweep(8), weight, gram, Unstructured(sparsity=0.7, comparison_group="matrix"))
    assert int((~mask).sum()) == 147


def test_weights_of_dead_inputs_go_first_and_what_is_kept_of_them_stays():
    torch.manual_seed(0)
    inputs = torch.randn(50, 8)
    inputs[:, :6] = 0
    weight = torch.randn(4, 8)
    mask, updated = prune(sweep(8), weight, gram_of(inputs), HALF)
    assert mask[:, 6:].all()
    assert torch.equal(updated[:, :6][mask[:, :6]], weight[:, :6][mask[:, :6]])


def test_wanda_prunes_what_carries_least():
    statistic = SquaredNorm(2, CPU)
    statistic.add(torch.tensor([[[1.0, 10.0]]]))
    mask, updated = prune(WANDA, torch.tensor([[3.0, -1.0]]), statistic, HALF)
    assert mask.tolist() == [[False, True]]
    assert updated is None


# Every composition.


def seen(statistic: type[Statistic], inputs: torch.Tensor) -> Statistic:
    """What is known of inputs, [tokens, columns]."""
    found = statistic(inputs.shape[1], CPU)
    found.add(inputs[None])
    found.finish()
    return found


def correlated(seed: int, columns: int = 32, tokens: int = 120) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=random) @ torch.randn(columns, columns, generator=random)


def weights(seed: int, rows: int = 6, columns: int = 32) -> torch.Tensor:
    """As stored: bfloat16 values in float32."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def require_exact(pruned: Pruned, pattern: Pattern) -> None:
    mask = pruned.mask
    rows, columns = mask.shape
    if isinstance(pattern, Nm):
        assert (mask.view(rows, -1, pattern.group).sum(dim=2) == pattern.kept).all()
    elif pattern.comparison_group == "row":
        assert ((~mask).sum(dim=1) == int(columns * pattern.sparsity)).all()
    else:
        assert int((~mask).sum()) == int(rows * columns * pattern.sparsity)
    if pruned.values is not None:
        assert torch.isfinite(pruned.values).all()
        assert (pruned.values[~mask] == 0).all()


@every_composition
@every_pattern
def test_counts_are_exact_under_ties(score, update, pattern):
    method = composition(score, update)
    (pruned,) = prune_matrices([torch.ones(6, 32)], seen(method.statistic, torch.eye(32)), method, [pattern])
    require_exact(pruned, pattern)


@every_composition
@every_pattern
def test_counts_are_exact_on_bfloat16_values(score, update, pattern):
    method = composition(score, update)
    (pruned,) = prune_matrices([weights(1)], seen(method.statistic, correlated(1)), method, [pattern])
    require_exact(pruned, pattern)


@every_composition
@every_pattern
def test_a_method_says_whether_it_changes_weights(score, update, pattern):
    method = composition(score, update)
    (pruned,) = prune_matrices([weights(1)], seen(method.statistic, correlated(1)), method, [pattern])
    assert (pruned.values is not None) == method.changes_weights


@every_composition
@every_pattern
def test_inputs_that_are_always_zero_do_no_harm(score, update, pattern):
    method, inputs = composition(score, update), correlated(2)
    inputs[:, 3:7] = 0
    (pruned,) = prune_matrices([weights(2)], seen(method.statistic, inputs), method, [pattern])
    require_exact(pruned, pattern)


@every_composition
def test_inputs_that_are_all_zero_do_no_harm(score, update):
    method = composition(score, update)
    (pruned,) = prune_matrices([weights(2)], seen(method.statistic, torch.zeros(20, 32)), method, [HALF])
    require_exact(pruned, HALF)


@pytest.mark.parametrize(
    ("score", "update"), [(score, update) for score, update in COMPOSITIONS if SCORES[score].statistic is not NoStatistic]
)
def test_weights_of_inputs_that_are_always_zero_go_first(score, update):
    method, inputs = composition(score, update), correlated(3) / 100
    inputs[:, ::2] = 0
    (pruned,) = prune_matrices([weights(3)], seen(method.statistic, inputs), method, [HALF])
    assert torch.equal(pruned.mask, (torch.arange(32) % 2 == 1).expand(6, 32))


@every_composition
@every_pattern
def test_matrices_that_share_an_input_come_out_as_they_would_alone(score, update, pattern):
    method, both = composition(score, update), [weights(4), weights(5, rows=10)]
    together = prune_matrices(both, seen(method.statistic, correlated(4)), method, [pattern, pattern])
    for shared, weight in zip(together, both, strict=True):
        (alone,) = prune_matrices([weight], seen(method.statistic, correlated(4)), method, [pattern])
        assert torch.equal(shared.mask, alone.mask)
        if shared.values is not None:
            torch.testing.assert_close(shared.values, alone.values, rtol=1e-3, atol=1e-4)


def test_matrices_that_share_an_input_may_be_pruned_to_different_sparsities():
    for score, update in COMPOSITIONS:
        method, both = composition(score, update), [weights(4), weights(5)]
        first, second = prune_matrices(both, seen(method.statistic, correlated(4)), method, PATTERNS[:2])
        require_exact(first, PATTERNS[0])
        require_exact(second, PATTERNS[1])


@every_composition
def test_no_method_changes_the_weights_that_it_is_given(score, update):
    method, weight = composition(score, update), weights(6)
    prune_matrices([weight], seen(method.statistic, correlated(6)), method, [HALF])
    assert torch.equal(weight, weights(6))


@pytest.mark.parametrize(
    ("score", "update", "statistic"),
    [
        ("magnitude", "none", NoStatistic),
        ("wanda", "none", SquaredNorm),
        ("magnitude", "dsnot", Moments),
        ("obs", "none", Gram),
        ("magnitude", "swaps", Gram),
    ],
)
def test_a_method_asks_for_the_least_statistic_that_score_and_update_need(score, update, statistic):
    assert composition(score, update).statistic is statistic


# What an update gains.


def lost(weight: torch.Tensor, pruned: Pruned, gram: torch.Tensor) -> float:
    """||(W - W') X||_F^2, in float64."""
    values = weight * pruned.mask if pruned.values is None else pruned.values
    difference = (weight - values).double()
    return float((difference @ gram.double() * difference).sum())


def losses(method: Method, seed: int, pattern: Pattern, damping: float = 0.01) -> float:
    """By the Gram matrix as what refits has it, damped."""
    weight, gram = weights(seed, rows=16), seen(Gram, correlated(seed))
    (pruned,) = prune_matrices([weight], gram, method, [pattern])
    return lost(weight, pruned, gram.damped(damping))


@pytest.mark.parametrize("score", [name for name in SCORES if SCORES[name].scales])
def test_a_score_that_has_scales_is_one_product_of_each_weight(score):
    weight, gram, entry = weights(0, rows=16), seen(Gram, correlated(0)), SCORES[score]
    assert torch.equal(entry.of(weight, gram, composition(score, "none")), weight.abs() * entry.scales(weight, gram))


@pytest.mark.parametrize("score", SCORES)
@every_pattern
def test_swaps_never_raise_the_error_of_the_scores_mask(score, pattern):
    for seed in range(3):
        swapped, chosen = (losses(composition(score, update), seed, pattern, damping=0) for update in ("swaps", "none"))
        assert swapped <= chosen * (1 + 1e-5)


@pytest.mark.parametrize("score", SCORES)
@every_pattern
def test_least_squares_loses_less_than_no_update(score, pattern):
    for seed in range(3):
        assert losses(composition(score, "least_squares"), seed, pattern) < losses(composition(score, "none"), seed, pattern)


@every_pattern
def test_a_refit_after_swaps_loses_less_than_either(pattern):
    def of(cycles, refit_steps):
        return made("wanda", "swaps", cycles=cycles, candidates=16, refit_steps=refit_steps)

    for seed in range(3):
        both = losses(of(25, 20), seed, pattern)
        assert both < losses(of(25, 0), seed, pattern)
        assert both < losses(of(0, 20), seed, pattern)


def test_without_an_update_the_damping_that_the_score_took_is_told():
    (pruned,) = prune_matrices([weights(0)], seen(Gram, correlated(0)), made("obs"), [HALF])
    assert pruned.damping == 0.01


@pytest.mark.parametrize(("score", "update"), [*(("wanda", one) for one in UPDATES if one != "none"), ("magnitude", "dsnot")])
def test_a_statistic_that_is_not_finite_is_refused(score, update):
    method, inputs = composition(score, update), correlated(0)
    inputs[0, 0] = float("inf")
    with pytest.raises((ArithmeticError, ValueError), match="NaN or infinit"):
        prune_matrices([weights(0)], seen(method.statistic, inputs), method, [HALF])


# One matrix alone.


def test_one_matrix_by_hand():
    """Wanda compares 3 * 1 with 1 * 10."""
    pruned = prune_matrix(torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 10.0]]), WANDA, HALF)
    assert pruned.mask.tolist() == [[False, True]]
    assert pruned.values is None


@every_composition
@every_pattern
def test_one_matrix_is_pruned_as_the_block_loop_does_it(score, update, pattern):
    method, weight, inputs = composition(score, update), weights(8).bfloat16(), correlated(8)
    (expected,) = prune_matrices([weight.float()], seen(method.statistic, inputs), method, [pattern])
    pruned = prune_matrix(weight, inputs, method, pattern)
    assert torch.equal(pruned.mask, expected.mask)
    assert (pruned.values is None) == (expected.values is None)
    assert pruned.values is None or torch.equal(pruned.values, expected.values)


@pytest.mark.parametrize(
    ("weight", "inputs", "pattern", "message"),
    [
        (torch.ones(2, 4), torch.ones(0, 4), HALF, "found inputs of 0 tokens, wanted at least one"),
        (torch.ones(2, 4), torch.ones(3, 4), Unstructured(sparsity=0.01, comparison_group="matrix"), "wanted 0 or at least 1/8"),
        (torch.ones(2, 4), torch.ones(3, 5), HALF, r"found weight \[2, 4\] and inputs \[3, 5\], wanted \[rows, columns\] and"),
        (torch.ones(4), torch.ones(3, 4), HALF, r"found weight \[4\]"),
        (torch.ones(2, 6), torch.ones(3, 6), Nm(kept=2, group=4), "found 6 columns, wanted a multiple of pattern.group = 4"),
        (torch.full((2, 4), torch.nan), torch.ones(3, 4), HALF, "found a score that is NaN or infinite"),
    ],
)
def test_one_matrix_that_cannot_be_pruned_is_refused(weight, inputs, pattern, message):
    with pytest.raises(ValueError, match=message):
        prune_matrix(weight, inputs, WANDA, pattern)


# What a label says.


@pytest.mark.parametrize(
    ("method", "grouped", "expected"),
    [
        (made("wanda"), False, "wanda"),
        (made("wanda", comparison_group="matrix"), False, "wanda (wanda, per matrix)"),
        (made("wanda", comparison_group="matrix"), True, "wanda"),
        (sweep(), False, "obs (obs + sparsegpt, per row)"),
        (sweep(score="wanda"), True, "wanda (wanda + sparsegpt)"),
    ],
)
def test_a_label_names_score_update_and_comparison_group_where_the_presets_name_does_not(method, grouped, expected):
    assert method.label(grouped=grouped) == expected


def test_a_method_that_does_not_fit_itself_is_refused_for_one_matrix_too():
    with pytest.raises(ConfigError, match="method.score.name: found 'obs', wanted a score that needs no Gram statistic"):
        prune_matrix(torch.ones(2, 4), torch.ones(3, 4), made("obs", "dsnot", cycles=1, threshold=0.0), HALF)


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        (Pruned(mask=torch.ones(2, 4)), r"update odd: found a mask of torch.float32 and shape \[2, 4\], wanted torch.bool of \[2, 4\]"),
        (Pruned(mask=torch.ones(4, 2, dtype=torch.bool)), r"update odd: found a mask of torch.bool and shape \[4, 2\]"),
        (Pruned(mask=torch.ones(2, 4, dtype=torch.bool), values=torch.ones(2, 4)), "wanted none: it says that it changes no weights"),
    ],
)
def test_an_update_that_gives_something_else_than_it_says_is_named(pruned, message, monkeypatch):
    odd = Update(
        name="odd",
        prune=lambda *_: [pruned],
        statistic=NoStatistic,
        changes_weights=lambda _: False,
        parameters=NoParameters,
        summary="of this test",
    )
    monkeypatch.setitem(UPDATES._entries, "odd", odd)
    with pytest.raises(ValueError, match=message):
        prune_matrices([torch.ones(2, 4)], NoStatistic(4, CPU), made("magnitude", "odd"), [HALF])


PRUNING = Path(__file__).resolve().parents[2] / "stages/pruning"
MATHEMATICS = [
    "patterns.py",
    "statistics.py",
    "selection.py",
    "permutations.py",
    "allocation.py",
    "method.py",
    "scores/*.py",
    "updates/*.py",
]
STANDARD = {"bisect", "collections.abc", "dataclasses", "decimal", "enum", "fractions", "functools", "itertools", "math", "sys", "typing"}


def imported(file: Path) -> set[str]:
    statements = list(ast.walk(ast.parse(file.read_text())))
    whole = {alias.name for statement in statements if isinstance(statement, ast.Import) for alias in statement.names}
    return whole | {str(statement.module) for statement in statements if isinstance(statement, ast.ImportFrom)}


@pytest.mark.parametrize("names", MATHEMATICS)
def test_mathematics_imports_torch_and_nothing_of_the_world(names):
    """Neither a file, a network, a model nor a configuration is within a method's reach."""
    mathematics = {file.relative_to(PRUNING).with_suffix("") for pattern in MATHEMATICS for file in PRUNING.glob(pattern)}
    modules = {".".join(("stages.pruning", *file.parts)).removesuffix(".__init__") for file in mathematics}
    files = sorted(PRUNING.glob(names))
    assert files
    for file in files:
        assert imported(file) <= STANDARD | modules | {
            "torch",
            "stages.schema",
            "stages.groups",
            "stages.pruning.entries",
            "stages.pruning.gpu_sweep",
        }, file
