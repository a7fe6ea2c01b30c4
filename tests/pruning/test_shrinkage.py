"""Damping by shrinkage: the estimate, its independence of scale, and the choice by windows held out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.pruning.method import prune_matrix
from stages.pruning.patterns import Unstructured
from stages.pruning.shrinkage import oas_share, shares, with_shrinkage
from stages.pruning.statistics import Gram
from tests.methods import made
from tests.pruning.test_block_loop import HALF, pruned

COLUMNS, ROWS = 48, 40
PATTERN = Unstructured(sparsity=0.5, comparison_group="matrix")
METHODS = {
    "sparsegpt": made("obs", "sparsegpt", comparison_group="matrix", block_size=16),
    "obs": made("obs", comparison_group="matrix"),
    "admm": made("wanda", "admm", comparison_group="matrix", steps=10, penalty=0.3, growth=1.2, hold=5, refit_steps=5),
    "least squares": made("wanda", "least_squares", steps=5),
    "swaps": made("wanda", "swaps", cycles=10, candidates=4, refit_steps=5),
}


def shrunk(name: str):
    method = METHODS[name]
    return replace(method, damping=replace(method.damping, shrinkage=True))


def gram_of(inputs: torch.Tensor) -> Gram:
    gram = Gram(inputs.shape[1], inputs.device)
    gram.add(inputs[None])
    gram.finish()
    return gram


def tokens(count: int, seed: int) -> torch.Tensor:
    """Correlated inputs, some of which are 1,000 times as large as others, [count, COLUMNS]."""
    mix = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(99))
    draws = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return draws @ (torch.eye(COLUMNS) + 0.2 * mix) * torch.logspace(-2, 1, COLUMNS)


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) / torch.logspace(-2, 1, COLUMNS)


def test_the_estimate_is_that_of_the_paper():
    """Eq. 23 in plain numpy, on the covariance of inputs scaled to a unit mean square."""
    inputs = tokens(100, 0).double().numpy()
    scaled = inputs / np.sqrt((inputs**2).mean(axis=0))
    covariance, n, p = scaled.T @ scaled / len(scaled), len(scaled), scaled.shape[1]
    squared_trace, trace = np.trace(covariance @ covariance), np.trace(covariance)
    rho = ((1 - 2 / p) * squared_trace + trace**2) / ((n + 1 - 2 / p) * (squared_trace - trace**2 / p))
    gram = gram_of(tokens(100, 0))
    assert oas_share(gram.value, gram.tokens) == pytest.approx(rho / (1 - rho), rel=1e-4)


def test_fewer_tokens_ask_for_more_and_one_for_no_end_of_it():
    few, many = (oas_share(gram_of(tokens(count, 0)).value, count) for count in (20, 2000))
    assert few > 10 * many
    assert oas_share(gram_of(tokens(1, 0)).value, 1) == float("inf")


def test_inputs_that_are_always_zero_do_not_count():
    inputs = tokens(100, 0)
    padded = torch.cat([inputs, torch.zeros(100, 7)], dim=1)
    assert oas_share(gram_of(padded).value, 100) == pytest.approx(oas_share(gram_of(inputs).value, 100))


@pytest.mark.parametrize("name", METHODS)
def test_shares_rise_from_the_methods_own_to_its_limit(name):
    tried = shares(gram_of(tokens(30, 0)), shrunk(name))
    assert tried == sorted(set(tried))
    assert tried[0] == METHODS[name].damping.share
    assert 1 < len(tried) <= 3 and tried[-1] <= METHODS[name].damping.limit
    assert shares(gram_of(torch.zeros(30, COLUMNS)), shrunk(name)) == [METHODS[name].damping.share]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_chosen_is_what_leaves_the_least_error_on_the_windows_held_out(name):
    gram, held_out, method = gram_of(tokens(40, 0)), tokens(500, 1), shrunk(name)
    chosen = with_shrinkage([weight()], gram, method, [PATTERN], held_out).damping.share

    def error(share: float) -> float:
        candidate = replace(method, damping=replace(method.damping, share=share))
        pruned = prune_matrix(weight(), tokens(40, 0), candidate, PATTERN)
        values = weight() * pruned.mask if pruned.values is None else pruned.values
        return ((weight() - values) @ held_out.T).square().sum().item()

    tried = shares(gram, method)
    assert chosen in tried
    assert error(chosen) == min(error(share) for share in tried)


def test_few_tokens_are_pruned_better_and_many_no_worse():
    for count, at_most in ((40, 0.97), (2000, 1.001)):
        held_out, judging = tokens(2000, 7), tokens(500, 1)
        chosen = with_shrinkage([weight()], gram_of(tokens(count, 0)), shrunk("admm"), [PATTERN], judging)
        errors = []
        for method in (METHODS["admm"], chosen):
            values = prune_matrix(weight(), tokens(count, 0), method, PATTERN).values
            errors.append(((weight() - values) @ held_out.T).norm().item())
        assert errors[1] <= at_most * errors[0]


@pytest.mark.parametrize(("count", "expected"), [(1, 1.0), (100, None), (100_000, 0.01)])
def test_without_windows_held_out_the_estimate_is_taken_within_the_methods_bounds(count, expected):
    gram = gram_of(tokens(count, 0))
    chosen = with_shrinkage([weight()], gram, shrunk("admm"), [PATTERN], tokens(0, 0))
    assert chosen.damping.share == (oas_share(gram.value, gram.tokens) if expected is None else expected)


def test_with_shrinkage_the_scale_of_an_input_does_not_matter():
    """SparseGPT adds a share of the mean diagonal otherwise, which is much for small inputs and little for large ones."""
    scales = 2.0 ** torch.randint(-6, 7, (COLUMNS,), generator=torch.Generator().manual_seed(3))
    masks = {
        shrinkage: [
            prune_matrix(weight() / factors, tokens(200, 0) * factors, method, PATTERN).mask for factors in (torch.ones(COLUMNS), scales)
        ]
        for shrinkage, method in ((False, METHODS["sparsegpt"]), (True, shrunk("sparsegpt")))
    }
    assert torch.equal(*masks[True])
    assert not torch.equal(*masks[False])


@pytest.mark.parametrize("name", ["admm", "least squares"])
def test_the_scale_of_an_input_does_not_matter_however_small_it_is(name):
    scales = torch.where(torch.arange(COLUMNS) % 3 == 0, 2.0**-20, 1.0)
    written = [(weight() / factors, tokens(200, 0) * factors) for factors in (torch.ones(()), scales)]
    first, second = (prune_matrix(*matrix, METHODS[name], PATTERN).mask for matrix in written)
    assert torch.equal(first, second)


def test_the_scale_of_a_matrix_decides_nothing_for_those_that_read_the_same():
    other, gram, held_out = weight().flip(0) * torch.logspace(0, 2, COLUMNS), gram_of(tokens(40, 0)), tokens(500, 1)
    chosen = {
        with_shrinkage([weight(), other * scale], gram, shrunk("admm"), [PATTERN] * 2, held_out).damping.share for scale in (1e-3, 1.0, 1e3)
    }
    assert len(chosen) == 1


def test_a_method_that_factors_nothing_has_nothing_to_shrink():
    swaps = made("wanda", "swaps", cycles=10, candidates=4, refit_steps=0)
    for method in (made("wanda"), swaps):
        assert not replace(method, damping=shrunk("admm").damping).shrinks
    assert shrunk("sparsegpt").shrinks


def test_the_block_loop_records_the_damping_and_leaves_less_error_on_the_windows_held_out(base):
    dampings, errors = {}, {}
    for shrinks, method in ((False, METHODS["sparsegpt"]), (True, shrunk("sparsegpt"))):
        _, blocks = pruned(base, method, HALF, held_out=2)
        results = [result for block in blocks for result in block.matrices]
        dampings[shrinks] = {result.damping for result in results}
        errors[shrinks] = sum(result.held_out_error for result in results) / len(results)
    assert dampings[False] == {0.01}
    assert len(dampings[True]) > 2 and min(dampings[True]) >= 0.01
    assert errors[True] < errors[False]
