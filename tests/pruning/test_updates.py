"""Updates: least squares and ADMM by hand, against slow float64 loops, and against SparseGPT."""

import pytest
import torch

from stages.config import compose
from stages.pruning.method import Method, prune_matrices
from stages.pruning.patterns import Nm, Pattern, Unstructured
from stages.pruning.statistics import Gram
from stages.pruning.updates.admm import admm
from stages.pruning.updates.least_squares import least_squares
from tests.methods import made, sparsegpt

SWEEP = {"steps": 12, "penalty": 0.1, "growth": 1.3}
PATTERNS = [Unstructured(sparsity=0.5, comparison_group="matrix"), Unstructured(sparsity=0.5, comparison_group="row"), Nm(kept=2, group=4)]
PATTERNS += [Nm(kept=4, group=8)]


def correlated(seed: int, rows: int = 6, columns: int = 16, tokens: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=random) @ mixing
    return torch.randn(rows, columns, generator=random), inputs.T @ inputs + 0.01 * torch.eye(columns)


def some(shape: torch.Size, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def lost(weight: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> float:
    """||(W - W') X||_F^2, in float64."""
    difference = (weight - values).double()
    return float((difference @ gram.double() * difference).sum())


# least squares


def test_least_squares_by_hand():
    """(1 - w, 1) H (1 - w, 1) is least where 2 (1 - w) + 1 = 0."""
    found = least_squares(
        torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[True, False]]), torch.zeros(1, 2), steps=1
    )
    assert found.tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_solves_every_row_on_its_own_support(seed):
    weight, gram = correlated(seed)
    mask = some(weight.shape, seed)
    found = least_squares(weight, gram, mask, weight, steps=60)
    for row, kept, values in zip(weight.double(), mask, found, strict=True):
        h = gram.double()
        expected = torch.linalg.solve(h[kept][:, kept], h[kept] @ row)
        torch.testing.assert_close(values[kept].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_is_never_worse_for_another_step(seed):
    weight, gram = correlated(seed, tokens=20)
    mask = some(weight.shape, seed)
    errors = [lost(weight, least_squares(weight, gram, mask, weight, steps), gram) for steps in range(6)]
    assert errors[0] == pytest.approx(lost(weight, weight * mask, gram))
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[5] < errors[0]


def test_least_squares_goes_on_from_its_start():
    weight, gram = correlated(0)
    mask = some(weight.shape)
    start = least_squares(weight, gram, mask, weight, steps=60)
    assert lost(weight, least_squares(weight, gram, mask, start, steps=0), gram) == pytest.approx(lost(weight, start, gram))
    assert lost(weight, least_squares(weight, gram, mask, start, steps=3), gram) <= lost(weight, start, gram) * (1 + 1e-5)


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_least_squares_is_zero_outside_the_mask_and_ignores_what_was_there(steps):
    weight, gram = correlated(0)
    mask = some(weight.shape)
    found = least_squares(weight, gram, mask, weight, steps)
    assert (found[~mask] == 0).all()
    assert torch.equal(found, least_squares(weight, gram, mask, weight.masked_fill(~mask, 7.0), steps))


def test_a_row_that_keeps_everything_or_nothing_stays_as_it_is():
    weight, gram = correlated(0, rows=2)
    mask = torch.tensor([[True] * 16, [False] * 16])
    assert torch.equal(least_squares(weight, gram, mask, weight, steps=20), weight * mask)


def test_least_squares_changes_none_of_its_arguments():
    weight, gram = correlated(0)
    arguments = (weight, gram, some(weight.shape), weight + 1)
    before = [argument.clone() for argument in arguments]
    least_squares(*arguments, steps=3)
    assert all(map(torch.equal, arguments, before))


# ADMM


def half(scores: torch.Tensor, exactly: bool) -> torch.Tensor:
    dropped = scores.sort(dim=1).indices[:, : scores.shape[1] // 2]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, dropped, False)


def literally(weight: torch.Tensor, gram: torch.Tensor, keep, steps: int, penalty: float, growth: float, hold: int):
    """The formula of the module's docstring, one step after the other."""
    norms = gram.double().diagonal().sqrt()
    h, w0 = gram.double() / norms.outer(norms), weight.double() * norms
    d, v, eye = w0 * keep(w0.abs(), True), torch.zeros_like(w0), torch.eye(len(h), dtype=torch.float64)
    for step in range(steps):
        rho = penalty * growth ** (step // hold * hold)
        w = (w0 @ h + rho * (d - v)) @ torch.linalg.inv(h + rho * eye)
        mask = keep((w + v).abs(), True)
        d = (w + v) * mask
        v = v + w - d
    return d / norms, mask


@pytest.mark.parametrize("hold", [1, 5])
@pytest.mark.parametrize("seed", range(4))
def test_admm_equals_its_literal_transcription(seed, hold):
    weight, gram = correlated(seed)
    found, mask = admm(weight, gram, half, hold=hold, **SWEEP)
    expected, expected_mask = literally(weight, gram, half, hold=hold, **SWEEP)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)


def test_with_uncorrelated_inputs_admm_is_magnitude_and_moves_nothing():
    """Where the penalty outweighs the Gram matrix from the start, so that what was dropped cannot pile up in V."""
    weight, _ = correlated(0)
    found, mask = admm(weight, torch.eye(16), half, steps=12, penalty=1.5, growth=1.3, hold=3)
    assert torch.equal(mask, half(weight.abs(), True))
    torch.testing.assert_close(found, weight * mask)


def test_admm_compares_what_weights_carry():
    """With a diagonal Gram matrix that is |W| ||X||, as Wanda's."""
    weight, gram = torch.tensor([[3.0, -1.0]]), torch.diag(torch.tensor([1.0, 100.0]))
    found, mask = admm(weight, gram, half, steps=12, penalty=1.5, growth=1.3, hold=1)
    assert mask.tolist() == [[False, True]]
    assert found.tolist() == [[0.0, pytest.approx(-1.0)]]


def test_admm_asks_for_exact_counts_in_the_last_step_alone():
    weight, gram = correlated(0)
    asked = []

    def keep(scores, exactly):
        asked.append(exactly)
        return half(scores, exactly)

    admm(weight, gram, keep, steps=4, penalty=0.1, growth=1.3, hold=1)
    assert asked == [False] * 4 + [True]


def test_admm_is_zero_outside_the_mask_that_it_was_given_last():
    weight, gram = correlated(0)
    given = []

    def keep(scores, exactly):
        given.append(half(scores, exactly))
        return given[-1]

    found, mask = admm(weight, gram, keep, hold=5, **SWEEP)
    assert torch.equal(mask, given[-1])
    assert (found[~mask] == 0).all()


def outcome(method: Method, weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern):
    statistic = Gram(len(gram), gram.device)
    statistic.value = gram.clone()
    (pruned,) = prune_matrices([weight], statistic, method, [pattern])
    return pruned


def composed(hold: int = 5, limit: float = 1.0) -> Method:
    return made("wanda", "admm", limit=limit, steps=30, penalty=0.1, growth=1.3, hold=hold, refit_steps=12)


def mean_error(method: Method, pattern: Pattern, problems: int = 12) -> float:
    """Share of ||W X||^2 that is lost."""
    shares = []
    for seed in range(problems):
        weight, gram = correlated(seed, rows=32, columns=64, tokens=256)
        shares.append(lost(weight, outcome(method, weight, gram, pattern).values, gram) / lost(weight, 0 * weight, gram))
    return sum(shares) / problems


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["admm", "admm_short"])
def test_admm_loses_less_than_sparsegpt(name, pattern):
    assert mean_error(compose.method(name), pattern) < mean_error(sparsegpt(64), pattern)


@pytest.mark.parametrize("hold", [2, 5])
def test_a_factorisation_held_for_some_steps_loses_about_as_little(hold):
    assert mean_error(composed(hold), PATTERNS[0]) == pytest.approx(mean_error(composed(1), PATTERNS[0]), rel=0.05)


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_admm_prunes_exactly_what_is_asked(pattern):
    weight, gram = correlated(0, rows=5, columns=24)
    assert int((~outcome(composed(), weight, gram, pattern).mask).sum()) == 60


@pytest.mark.parametrize("pattern", PATTERNS[2:], ids=str)
def test_admm_keeps_n_of_every_m(pattern):
    weight, gram = correlated(0, rows=5, columns=24)
    mask = outcome(composed(), weight, gram, pattern).mask
    assert (mask.view(5, -1, pattern.group).sum(dim=2) == pattern.kept).all()


def test_the_refit_after_admm_lowers_the_error():
    weight, gram = correlated(0)
    statistic = Gram(16, gram.device)
    statistic.value = gram
    rough, mask = admm(weight, statistic.damped(0.01), half, hold=5, steps=30, penalty=0.1, growth=1.3)
    refitted = outcome(composed(), weight, gram, PATTERNS[1])
    assert torch.equal(refitted.mask, mask)
    assert lost(weight, refitted.values, gram) < lost(weight, rough, gram)


INDEFINITE = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # scaled to a unit diagonal: eigenvalues 1 ± 1.5 / (1 + damping), and the penalty


def test_admm_raises_the_damping_until_it_factors_and_says_which():
    weight = torch.tensor([[1.0, 2.0]])
    assert outcome(composed(), weight, torch.eye(2), PATTERNS[0]).damping == 0.01
    assert outcome(composed(), weight, INDEFINITE, PATTERNS[0]).damping == 1.0


def test_admm_refuses_what_does_not_factor_within_the_limit():
    with pytest.raises(ArithmeticError, match="does not factor at any damping from 0.01 to 0.1"):
        outcome(composed(limit=0.1), torch.ones(1, 2), INDEFINITE, PATTERNS[0])
