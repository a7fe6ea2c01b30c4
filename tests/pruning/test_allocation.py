import math
import random

import numpy
import pytest
import torch

from stages.pruning.allocation import (
    alphapruning,
    hill_exponent,
    least_sum,
    meet_budget,
    outlier_share,
    owl,
    removal_curve,
)
from stages.pruning.patterns import Unstructured, pruned_count

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


def within(counts, sizes, lowest, highest):
    return all(lowest * size - 1e-9 <= count <= highest * size + 1e-9 for count, size in zip(counts, sizes, strict=True))


def test_a_budget_that_is_wanted_is_met_as_it_is():
    assert meet_budget([0.4, 0.6], sizes=[10, 10], budget=10, lowest=0.0, highest=1.0) == [4, 6]


def test_both_matrices_are_shifted_by_the_same():
    assert meet_budget([0.4, 0.6], sizes=[10, 20], budget=22, lowest=0.0, highest=1.0) == [6, 16]


def test_what_a_bound_cuts_off_the_others_make_up_for():
    assert meet_budget([0.1, 0.9], sizes=[10, 10], budget=10, lowest=0.0, highest=0.7) == [3, 7]


def test_the_last_weight_goes_to_the_largest_remainder():
    assert meet_budget([0.5, 0.5], sizes=[3, 5], budget=4, lowest=0.0, highest=1.0) == [2, 2]
    assert meet_budget([0.5, 0.5], sizes=[6, 9], budget=7, lowest=0.0, highest=1.0) == [3, 4]


def test_of_equal_remainders_the_first_gets_the_last_weight():
    assert meet_budget([0.5] * 3, sizes=[3] * 3, budget=4, lowest=0.0, highest=1.0) == [2, 1, 1]


def test_any_budget_is_met_to_the_weight_within_the_bounds():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(20, 10 ** draw.randint(2, 9)) for _ in range(draw.randint(1, 12))]
        sparsity = draw.randint(30, 70) / 100
        budget = pruned_count(sum(sizes), sparsity)
        wanted = [draw.gauss(sparsity, 0.3) for _ in sizes]
        counts = meet_budget(wanted, sizes=sizes, budget=budget, lowest=0.2, highest=0.8)
        assert sum(counts) == budget
        assert within(counts, sizes, 0.2, 0.8)


def test_a_count_is_less_than_one_weight_from_the_common_shift():
    draw = random.Random(1)
    sizes = [draw.randint(1000, 9000) for _ in range(20)]
    wanted = [draw.uniform(0.4, 0.6) for _ in sizes]
    budget = pruned_count(sum(sizes), 0.55)
    shift = (budget - sum(w * size for w, size in zip(wanted, sizes, strict=True))) / sum(sizes)
    counts = meet_budget(wanted, sizes=sizes, budget=budget, lowest=0.0, highest=1.0)
    assert all(abs(count - size * (w + shift)) < 1 for count, size, w in zip(counts, sizes, wanted, strict=True))


@pytest.mark.parametrize(("budget", "wanted"), [(4, [2, 2]), (16, [8, 8])])
def test_a_budget_at_the_end_of_the_bounds_is_met(budget, wanted):
    assert meet_budget([0.3, 0.6], sizes=[10, 10], budget=budget, lowest=0.2, highest=0.8) == wanted


@pytest.mark.parametrize("budget", [3, 17, -1])
def test_a_budget_out_of_the_bounds_is_refused(budget):
    with pytest.raises(ValueError, match=rf"budget of {budget} of 20 weights, wanted 4 to 16, .* from 0\.2 to 0\.8"):
        meet_budget([0.5, 0.5], sizes=[10, 10], budget=budget, lowest=0.2, highest=0.8)


def test_bounds_that_leave_no_whole_count_are_refused():
    with pytest.raises(ValueError, match=r"matrix 1: found no whole count from 0\.5 to 0\.5 of 3 weights"):
        meet_budget([0.5, 0.5], sizes=[4, 3], budget=3, lowest=0.5, highest=0.5)


@pytest.mark.parametrize(("lowest", "highest"), [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_bounds_that_are_none_are_refused(lowest, highest):
    with pytest.raises(ValueError, match=f"bounds {lowest} and {highest}, wanted 0 <= lowest <= highest <= 1"):
        meet_budget([0.5], sizes=[4], budget=2, lowest=lowest, highest=highest)


def test_a_bound_is_the_decimal_the_user_wrote():
    assert 100 * 0.29 < 29
    assert meet_budget([0.9, 0.1], sizes=[100, 100], budget=58, lowest=0.29, highest=0.29) == [29, 29]


def test_a_wanted_sparsity_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="found nan as a wanted sparsity, wanted a finite number"):
        meet_budget([0.5, math.nan], sizes=[4, 4], budget=4, lowest=0.0, highest=1.0)


def test_as_many_sizes_as_wanted_sparsities_are_wanted():
    with pytest.raises(ValueError, match="found 1 wanted sparsities for 2 sizes"):
        meet_budget([0.5], sizes=[4, 4], budget=4, lowest=0.0, highest=1.0)


def test_an_outlier_is_above_a_multiple_of_the_mean():
    assert outlier_share(torch.tensor([[1.0, 1.0], [1.0, 9.0]]), 2.0) == 0.25  # the mean is 3


def test_a_score_at_the_multiple_is_no_outlier():
    assert outlier_share(torch.tensor([0.0, 2.0]), 2.0) == 0.0


def test_outlier_share_equals_a_loop():
    torch.manual_seed(0)
    scores = torch.rand(20, 30) ** 8
    mean = sum(scores.flatten().tolist()) / 600
    assert outlier_share(scores, 5.0) == sum(score > 5 * mean for score in scores.flatten().tolist()) / 600


def test_an_outlier_share_of_scores_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="score that is NaN or infinite"):
        outlier_share(torch.tensor([1.0, math.inf]), 5.0)


def test_owl_by_hand():
    assert owl([0.01, 0.02, 0.03], sparsity=0.5, strength=0.1) == pytest.approx([0.6, 0.5, 0.4])


def test_owl_equals_its_definition_in_numpy():
    shares = numpy.random.default_rng(0).random(32)
    densities = (shares - shares.min()) / (shares.max() - shares.min()) * 0.08 * 2
    densities = densities - densities.mean() + (1 - 0.7)
    assert owl(shares.tolist(), sparsity=0.7, strength=0.08) == pytest.approx((1 - densities).tolist())


def test_owl_of_equal_shares_is_uniform():
    assert owl([0.02] * 3, sparsity=0.7, strength=0.08) == [0.7] * 3


def test_an_outlier_share_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="found inf as an outlier share"):
        owl([0.1, math.inf], sparsity=0.7, strength=0.08)


def test_the_hill_exponent_by_hand():
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, math.e, 0.0]])  # eigenvalues 1 and e^2: 1 + 1 / ln(e^2 / 1)
    assert hill_exponent(weight) == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8), (3, 2)])
def test_the_hill_exponent_equals_a_loop(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    eigenvalues = sorted(numpy.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    n, k, total = min(shape), min(shape) // 2, 0.0
    for i in range(1, k + 1):
        total += math.log(eigenvalues[n - i + 1 - 1] / eigenvalues[n - k - 1])  # the paper counts from 1
    assert hill_exponent(weight) == pytest.approx(1 + k / total, rel=1e-9)


@pytest.mark.parametrize("exponent", [1.8, 3.0, 5.0])
def test_the_hill_exponent_recovers_that_of_a_pareto_spectrum(exponent):
    torch.manual_seed(0)
    quantiles = torch.arange(1, 301, dtype=torch.float64) / 301
    rotation = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    weight = rotation * quantiles.pow(-1 / (exponent - 1)).sqrt()
    assert hill_exponent(weight) == pytest.approx(exponent, rel=0.03)


def test_the_hill_exponent_has_no_unit():
    torch.manual_seed(0)
    weight = torch.randn(6, 9)
    assert hill_exponent(weight * 1024) == pytest.approx(hill_exponent(weight), rel=1e-12)


def test_a_matrix_too_small_for_an_exponent_is_refused():
    with pytest.raises(ValueError, match=r"found a matrix of \[1, 5\], wanted 2 rows"):
        hill_exponent(torch.ones(1, 5))


def test_a_matrix_without_a_median_eigenvalue_is_refused():
    with pytest.raises(ValueError, match=r"found a matrix of \[4, 6\] with a rank below 3"):
        hill_exponent(torch.arange(1.0, 5.0).outer(torch.ones(6)))


def test_a_spectrum_without_a_tail_is_refused():
    with pytest.raises(ValueError, match=r"matrix of \[4, 4\] whose 3 highest eigenvalues are equal"):
        hill_exponent(torch.eye(4))


def test_an_exponent_of_weights_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="weight that is NaN or infinite"):
        hill_exponent(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


def test_alphapruning_by_hand():
    assert alphapruning([2.0, 3.0, 4.0], sparsity=0.5, strength=0.2) == pytest.approx([0.4, 0.5, 0.6])


def test_alphapruning_equals_its_definition_in_numpy():
    exponents = numpy.random.default_rng(0).random(32) + 2
    s1, s2 = 1 - 0.3, 1 + 0.3
    ratios = (exponents - exponents.min()) / (exponents.max() - exponents.min()) * (s2 - s1) + s1
    ratios *= 0.7 * len(ratios) / ratios.sum()
    assert alphapruning(exponents.tolist(), sparsity=0.7, strength=0.3) == pytest.approx(ratios.tolist())


def test_alphapruning_of_equal_exponents_is_uniform():
    assert alphapruning([3.0] * 4, sparsity=0.7, strength=0.3) == pytest.approx([0.7] * 4)


def test_an_exponent_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="found nan as an exponent"):
        alphapruning([math.nan, 2.0], sparsity=0.7, strength=0.3)


def test_a_removal_curve_by_hand():
    scores = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    assert removal_curve(scores, grid=[0.0, 0.5, 1.0], comparison_group="matrix") == pytest.approx([0.0, 3.0, 10.0])


def test_rows_that_compete_within_themselves_lose_more():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert removal_curve(scores, grid=[0.5], comparison_group="matrix") == pytest.approx([3.0])
    assert removal_curve(scores, grid=[0.5], comparison_group="row") == pytest.approx([4.0])


@pytest.mark.parametrize("comparison_group", ["row", "matrix"])
def test_a_removal_curve_is_the_output_error_of_uncorrelated_inputs(comparison_group):
    torch.manual_seed(0)
    weight, norm = torch.randn(7, 20), torch.rand(20) + 0.1
    inputs = norm.diag()  # [channels, tokens]
    grid = [0.0, 0.13, 0.5, 0.87]
    errors = []
    for sparsity in grid:
        pruned = weight * Unstructured(sparsity=sparsity, comparison_group=comparison_group).mask(weight.abs() * norm)
        errors.append(float(((weight - pruned) @ inputs).square().sum()))
    assert removal_curve((weight * norm).square(), grid=grid, comparison_group=comparison_group) == pytest.approx(errors, rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "grid", "comparison_group", "message"),
    [
        ([[1.0, math.nan]], [0.0, 0.5], "row", "score that is NaN or infinite"),
        ([[1.0, 2.0]], [0.5, 0.5], "row", r"grid \[0\.5, 0\.5\], wanted sparsities from 0 to 1, each above"),
        ([[1.0, 2.0]], [0.5, 1.5], "row", r"grid \[0\.5, 1\.5\]"),
    ],
)
def test_a_removal_curve_of_nothing_sensible_is_refused(scores, grid, comparison_group, message):
    with pytest.raises(ValueError, match=message):
        removal_curve(torch.tensor(scores), grid=grid, comparison_group=comparison_group)


def test_the_cheapest_errors_are_spent_first():
    cheap, dear = [0.0, 1.0, 2.0, 30.0, 40.0], [0.0, 10.0, 20.0, 50.0, 60.0]
    counts = least_sum([cheap, dear], grid=GRID, sizes=[8, 8], budget=6, lowest=0.0, highest=1.0)
    assert counts == [4, 2]


def test_the_error_of_a_weight_counts_and_not_that_of_a_fraction():
    curve = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert least_sum([curve, curve], grid=GRID, sizes=[8, 16], budget=12, lowest=0.0, highest=1.0) == [0, 12]


@pytest.mark.parametrize("budget", [1, 7, 22, 30, 41, 59])
def test_no_other_counts_have_a_lower_sum_of_errors(budget):
    grid, sizes = [step / 10 for step in range(11)], [10, 20, 30]
    curves = [[3 * s**2 for s in grid], [s**4 for s in grid], [math.exp(3 * s) / 4 for s in grid]]

    def errors(counts):
        return sum(float(numpy.interp(c / size, grid, curve)) for c, size, curve in zip(counts, sizes, curves, strict=True))

    everything = ((a, b, budget - a - b) for a in range(11) for b in range(21) if 0 <= budget - a - b <= 30)
    counts = least_sum(curves, grid=grid, sizes=sizes, budget=budget, lowest=0.0, highest=1.0)
    assert sum(counts) == budget
    assert errors(counts) == pytest.approx(min(map(errors, everything)), rel=1e-9)


@pytest.mark.parametrize("curve", [[0.0, 1.0, 4.0, 9.0, 16.0], [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 2.0, 9.0, 9.5]])
def test_equal_curves_of_equal_matrices_are_pruned_equally(curve):
    counts = least_sum([curve] * 3, grid=GRID, sizes=[40] * 3, budget=72, lowest=0.0, highest=1.0)
    assert counts == [24, 24, 24]


def test_equal_errors_of_a_weight_are_pruned_equally_whatever_the_size():
    sizes = [1000, 333, 70]
    curves = [[size * error for error in (0.0, 0.1, 0.3, 0.7, 1.3)] for size in sizes]
    counts = least_sum(curves, grid=GRID, sizes=sizes, budget=pruned_count(sum(sizes), 0.6), lowest=0.0, highest=1.0)
    assert all(abs(count - 0.6 * size) <= 1 for count, size in zip(counts, sizes, strict=True))


def test_a_dent_outwards_is_pruned_along_its_hull():
    dented, straight = [0.0, 3.0, 3.1, 9.0, 9.5], [0.0, 2.0, 4.0, 6.0, 8.0]  # the hull passes 0 -> 3.1 and 3.1 -> 9.5
    assert least_sum([dented, straight], grid=GRID, sizes=[8, 8], budget=4, lowest=0.0, highest=1.0) == [4, 0]
    assert least_sum([dented, straight], grid=GRID, sizes=[8, 8], budget=10, lowest=0.0, highest=1.0) == [4, 6]


def test_an_error_that_falls_is_spent_first():
    falling, rising = [1.0, 0.9, 0.8, 1.5, 2.0], [0.0, 0.0, 0.1, 0.2, 0.3]
    assert least_sum([falling, rising], grid=GRID, sizes=[8, 8], budget=4, lowest=0.0, highest=1.0) == [4, 0]


def test_the_bounds_and_the_grid_bound_the_counts_found():
    free, dear = [0.0, 0.0, 0.0], [0.0, 10.0, 20.0]
    assert least_sum([free, dear], grid=[0.1, 0.5, 0.9], sizes=[10, 10], budget=10, lowest=0.0, highest=1.0) == [9, 1]
    assert least_sum([free, dear], grid=[0.1, 0.5, 0.9], sizes=[10, 10], budget=10, lowest=0.3, highest=0.8) == [7, 3]


def test_any_budget_is_met_to_the_weight_whatever_the_curves():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(20, 10 ** draw.randint(2, 9)) for _ in range(draw.randint(1, 12))]
        budget = pruned_count(sum(sizes), draw.randint(30, 70) / 100)
        curves = [[draw.random() * size for _ in GRID] for size in sizes]
        counts = least_sum(curves, grid=GRID, sizes=sizes, budget=budget, lowest=0.2, highest=0.8)
        assert sum(counts) == budget
        assert within(counts, sizes, 0.2, 0.8)


def test_a_matrix_smaller_than_the_grid_is_pruned_too():
    grid = [step / 10 for step in range(11)]
    counts = least_sum([[s**2 for s in grid]] * 2, grid=grid, sizes=[2, 3], budget=3, lowest=0.0, highest=1.0)
    assert counts == [1, 2]


def test_a_budget_that_the_grid_does_not_reach_is_refused():
    with pytest.raises(ValueError, match=r"budget of 16 of 20 weights, wanted 0 to 10, .* from 0\.0 to 0\.5"):
        least_sum([[0.0, 1.0]] * 2, grid=[0.0, 0.5], sizes=[10, 10], budget=16, lowest=0.0, highest=0.9)


@pytest.mark.parametrize(
    ("curves", "grid", "message"),
    [
        ([[0.0, 1.0]], [0.0, 1.0], "found 1 curves for 2 sizes"),
        ([[0.0, 1.0], [0.0]], [0.0, 1.0], "found 1 points on the curve of matrix 1, wanted 2"),
        ([[0.0, math.nan], [0.0, 1.0]], [0.0, 1.0], "found nan as an error on the curve of matrix 0"),
        ([[0.0, 1.0]] * 2, [1.0, 0.0], r"grid \[1\.0, 0\.0\], wanted sparsities"),
        ([[0.0]] * 2, [0.5], "grid of 1 points, wanted 2 or more"),
        ([[0.0, 1.0]] * 2, [0.0, 0.1], r"grid from 0\.0 to 0\.1, wanted one that meets the bounds 0\.2 and 0\.9"),
    ],
)
def test_curves_that_do_not_fit_are_refused(curves, grid, message):
    with pytest.raises(ValueError, match=message):
        least_sum(curves, grid=grid, sizes=[10, 10], budget=10, lowest=0.2, highest=0.9)
