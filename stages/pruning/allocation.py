"""Compute how many weights of every matrix are pruned; the counts add up to the budget exactly.

A rule gives a target sparsity for each block or matrix, which meet_budget turns into counts, or it gives counts directly.

s_l = s + mean(d) - d_l,  d_l = 2 lambda (D_l - min D) / (max D - min D)        # OWL: Yin et al. 2024, arXiv:2310.05175
s_l = s r_l / mean(r),  r_l = 1 - e + 2 e (a_l - min a) / (max a - min a)       # AlphaPruning: Lu et al. 2024, arXiv:2410.10912
a = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k})                      # its exponent: Hill 1975
min_s sum_l E_l(s_l)  with  sum_l size_l s_l = budget                           # least_sum: ours, after the dynamic programme
                                                                                # of Frantar & Alistarh 2022, arXiv:2201.13096
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import torch

from stages.pruning.patterns import ComparisonGroup, pruned_count
from stages.schema import require

BISECTIONS = 100  # more than a float has bits
SAME_SLOPE = 1e-9  # relative: slopes that differ by less differ by rounding


@dataclass(kw_only=True, slots=True)
class BoundedSection:
    """The section of an allocation. lowest, highest: lower and upper bound of each matrix's sparsity, fractions of zeros, 0 to 1."""

    name: str
    lowest: float
    highest: float

    def check(self, key: str) -> None:
        bounds = (self.lowest, self.highest)
        require(0 <= self.lowest <= self.highest <= 1, f"{key}.lowest, highest", bounds, "0 <= lowest <= highest <= 1")

    def check_sparsity(self, sparsity: float, key: str) -> None:
        """Raise ConfigError where the bounds do not allow the pattern's sparsity."""
        wanted = f"between {key}.lowest = {self.lowest:g} and {key}.highest = {self.highest:g}"
        require(self.lowest <= sparsity <= self.highest, "pattern.sparsity", sparsity, wanted)


def counts_by_block(block_sparsities: list[float], sizes: list[list[int]], sparsity: float | Fraction, bounds: BoundedSection) -> list[int]:
    """Compute the zeros of every matrix from the target sparsity of its block.

    Args:
        block_sparsities: target fraction of zeros of each block. sizes: for each block, the number of weights of each matrix.
        sparsity: fraction of zeros of all matrices together, 0 to 1.

    Returns:
        Zeros of each matrix, block after block.

    Raises:
        ValueError: see meet_budget.
    """
    by_matrix = [sparsity_of_block for sparsity_of_block, block in zip(block_sparsities, sizes, strict=True) for _ in block]
    flat = [size for block in sizes for size in block]
    budget = pruned_count(sum(flat), sparsity)
    return meet_budget(by_matrix, sizes=flat, budget=budget, lowest=bounds.lowest, highest=bounds.highest)


def counts_by_curves(
    curves: list[list[float]], grid: list[float], sizes: list[int], sparsity: float | Fraction, bounds: BoundedSection
) -> list[int]:
    """Compute the zeros of every matrix that minimise the sum of their curves; a matrix with an empty curve gets `sparsity`.

    Args:
        curves: the curve of each matrix, see least_sum, or an empty list. grid: see least_sum.
        sizes: number of weights of each matrix. sparsity: fraction of zeros of all matrices together, 0 to 1.

    Returns:
        Zeros of each matrix.

    Raises:
        ValueError: see least_sum.
    """
    counts = [pruned_count(size, sparsity) for size in sizes]
    measured = [number for number, curve in enumerate(curves) if curve]
    budget = pruned_count(sum(sizes), sparsity) - sum(count for count, curve in zip(counts, curves, strict=True) if not curve)
    measured_counts = least_sum(
        [curves[number] for number in measured],
        grid=grid,
        sizes=[sizes[number] for number in measured],
        budget=budget,
        lowest=bounds.lowest,
        highest=bounds.highest,
    )
    for number, count in zip(measured, measured_counts, strict=True):
        counts[number] = count
    return counts


def meet_budget(sparsities: list[float], *, sizes: list[int], budget: int, lowest: float, highest: float) -> list[int]:
    """Turn target sparsities into counts that add up to the budget.

    count_l = clamp(size_l * (sparsity_l + shift), lowest * size_l, highest * size_l), with one shift for all matrices, found by
    bisection. Counts are rounded up at the largest remainders; among equal remainders, at the first.

    Args:
        sparsities: target fraction of zeros of each matrix; finite, may lie out of bounds.
        sizes: number of weights of each matrix, 1 or more.
        budget: zeros in all matrices together, weights.
        lowest: fraction of zeros that each matrix has at least, 0 to 1.
        highest: fraction of zeros that each matrix has at most, lowest to 1.

    Returns:
        Zeros of each matrix, weights, within the bounds; their sum is the budget.

    Raises:
        ValueError: the bounds do not allow the budget, allow a matrix no whole count, or are not ordered within 0 to 1; a target
            sparsity is not finite; the numbers of sparsities and sizes differ.
    """
    _require_same_length("wanted sparsities", len(sparsities), len(sizes))
    _require_finite("a wanted sparsity", sparsities)
    least, most = bounds_of_counts(sizes, budget, lowest, highest)

    def shifted(shift: float) -> list[float]:
        shifted_counts = (size * (sparsity + shift) for size, sparsity in zip(sizes, sparsities, strict=True))
        return [min(max(count, low), high) for count, low, high in zip(shifted_counts, least, most, strict=True)]

    below, above = lowest - max(sparsities), highest - min(sparsities)
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        if math.fsum(shifted(middle)) < budget:
            below = middle
        else:
            above = middle
    return _rounded(shifted(above), budget)


def outlier_share(scores: torch.Tensor, multiple: float) -> float:
    """Compute the fraction of scores that are outliers.

    D = |{ij: S_ij > M mean(S)}| / |{ij}|       # Yin et al. 2024, arXiv:2310.05175

    Args:
        scores: any shape, float32, finite, 0 or more; the Wanda scores of all matrices of a block together.
        multiple: M, above 0; a score is an outlier above this many times the mean.

    Returns:
        Fraction of the scores, 0 to 1.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    mean = float(scores.mean(dtype=torch.float64))
    if not math.isfinite(mean):
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    return int((scores > multiple * mean).sum()) / scores.numel()


def owl(shares: list[float], *, sparsity: float, strength: float) -> list[float]:
    """Compute OWL's block sparsities: blocks with many outliers are pruned less.

    s_l = s + mean(d) - d_l,  d_l = 2 lambda (D_l - min D) / (max D - min D)       # Yin et al. 2024, arXiv:2310.05175

    The densities 1 - s_l are the d_l shifted to the mean 1 - s: the sparsities of the densest and the sparsest block differ by 2 lambda.

    Args:
        shares: D of each block, see outlier_share; finite, any unit.
        sparsity: s, fraction of zeros, 0 to 1.
        strength: lambda, a sparsity, 0 or more; 0 is uniform.

    Returns:
        Target fraction of zeros of each block, s on average; may lie outside 0 to 1; s for all blocks if all shares are equal.

    Raises:
        ValueError: a share is not finite.
    """
    _require_finite("an outlier share", shares)
    densities = [2 * strength * position for position in _positions(shares)]
    mean = math.fsum(densities) / len(densities)
    return [sparsity + mean - density for density in densities]


def hill_exponent(weight: torch.Tensor) -> float:
    """Estimate the power-law exponent of the tail of a matrix's spectrum: low for heavy tails, which training produces.

    a = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k}),  k = floor(n / 2)     # Lu et al. 2024, arXiv:2410.10912

    lambda_1 <= ... <= lambda_n are the eigenvalues of W W^T or W^T W, whichever is smaller. The threshold lambda_{n-k} is the
    median (alpha_mid in the authors' code); their default, alpha_peak, fits k at the peak of the spectrum's histogram.

    Args:
        weight: [rows, columns], 2 or more of both, float, finite.

    Returns:
        a, above 1, no unit; a common factor of the weights does not change it.

    Raises:
        ValueError: a weight is NaN or infinite; the matrix is too small, or half its eigenvalues are zero, or the upper half are equal.
    """
    shape = list(weight.shape)
    if min(shape) < 2:
        raise ValueError(f"found a matrix of {shape}, wanted 2 rows and 2 columns or more")
    wide = weight.double() if shape[0] <= shape[1] else weight.double().T
    gram = wide @ wide.T
    if not gram.isfinite().all():
        raise ValueError("found a weight that is NaN or infinite, wanted finite weights")
    eigenvalues = torch.linalg.eigvalsh(gram)
    n, k = len(eigenvalues), len(eigenvalues) // 2
    rounding = n * torch.finfo(torch.float64).eps
    threshold, tail = eigenvalues[n - k - 1], eigenvalues[n - k :]
    if threshold <= rounding * eigenvalues[-1]:
        raise ValueError(f"found a matrix of {shape} with a rank below {k + 1}, wanted a median eigenvalue above zero")
    logarithms = float((tail / threshold).log().sum())
    if logarithms <= k * rounding:
        raise ValueError(f"found a matrix of {shape} whose {k + 1} highest eigenvalues are equal, wanted a spectrum with a tail")
    return 1 + k / logarithms


def alphapruning(exponents: list[float], *, sparsity: float, strength: float) -> list[float]:
    """Compute AlphaPruning's sparsities: blocks or matrices whose spectra have light tails are pruned more.

    s_l = s r_l / mean(r),  r_l = 1 - e + 2 e (a_l - min a) / (max a - min a)       # Lu et al. 2024, arXiv:2410.10912

    The spread is relative: the highest sparsity is (1 + e) / (1 - e) times the lowest. The mean weighs all entries equally.

    Args:
        exponents: a of each block (the mean over its matrices) or of each matrix, see hill_exponent; finite.
        sparsity: s, fraction of zeros, 0 to 1.
        strength: e, a fraction of s, 0 to below 1; 0 is uniform.

    Returns:
        Target fraction of zeros of each block or matrix, s on average; may lie above 1; s for all if all exponents are equal.

    Raises:
        ValueError: an exponent is not finite.
    """
    _require_finite("an exponent", exponents)
    ratios = [1 - strength + 2 * strength * position for position in _positions(exponents)]
    mean = math.fsum(ratios) / len(ratios)
    return [sparsity * ratio / mean for ratio in ratios]


def removal_curve(squared_scores: torch.Tensor, *, grid: list[float], comparison_group: ComparisonGroup) -> list[float]:
    """Predict the squared output error of pruning a matrix from its scores.

    E(s) = sum_{ij pruned} S_ij^2 = ||(W - W') X||^2     # the latter if the inputs are uncorrelated

    Args:
        squared_scores: [rows, columns], float32, finite, 0 or more: S_ij^2 = W_ij^2 ||X_j||^2, see scores.wanda.
        grid: fractions of zeros, ascending, 0 to 1.
        comparison_group: see patterns.ComparisonGroup.

    Returns:
        E at each point of the grid, ascending, in the unit of the squared scores.

    Raises:
        ValueError: a score is NaN or infinite; the grid does not ascend.
    """
    _require_ascending(grid)
    if not math.isfinite(squared_scores.sum(dtype=torch.float64)):
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    competing = squared_scores if comparison_group == "row" else squared_scores.reshape(1, -1)
    boundaries = [pruned_count(competing.shape[1], sparsity) for sparsity in grid]
    chunks = _ascending_rows(competing).tensor_split(boundaries, dim=1)[:-1]
    return list(accumulate(float(chunk.sum(dtype=torch.float64)) for chunk in chunks))


def _ascending_rows(values: torch.Tensor) -> torch.Tensor:
    """Sort each row; on a CPU by NumPy, which is several times faster."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    ordered = values.clone()
    ordered.numpy().sort(axis=1)
    return ordered


def least_sum(curves: list[list[float]], *, grid: list[float], sizes: list[int], budget: int, lowest: float, highest: float) -> list[int]:
    """Find the counts that minimise the sum of errors.

    min_s sum_l E_l(s_l)  with  sum_l size_l s_l = budget

    E_l is the lower convex hull of the measured curve, linear between its points. Segments are pruned in the order of their slopes,
    error per pruned weight, lowest first. All segments of the last slope, the Lagrange multiplier, are pruned to the same fraction.

    Args:
        curves: the error of each matrix at every point of the grid, finite, in the same unit for all matrices.
        grid: 2 or more fractions of zeros, ascending, 0 to 1.
        sizes: number of weights of each matrix, 1 or more.
        budget: zeros in all matrices together, weights.
        lowest: fraction of zeros that each matrix has at least, 0 to 1; the grid's first if that is higher.
        highest: fraction of zeros that each matrix has at most, lowest to 1; the grid's last if that is lower.

    Returns:
        Zeros of each matrix, weights, within the bounds; their sum is the budget.

    Raises:
        ValueError: see meet_budget; a curve and the grid differ in length; an error is not finite; the grid does not ascend, has
            fewer than 2 points, or lies out of bounds.
    """
    _require_same_length("curves", len(curves), len(sizes))
    _require_ascending(grid)
    if len(grid) < 2:
        raise ValueError(f"found a grid of {len(grid)} points, wanted 2 or more")
    if grid[0] > highest or grid[-1] < lowest:
        raise ValueError(f"found a grid from {grid[0]} to {grid[-1]}, wanted one that meets the bounds {lowest} and {highest}")
    least, most = bounds_of_counts(sizes, budget, max(lowest, grid[0]), min(highest, grid[-1]))

    segments: list[tuple[float, float, int]] = []  # slope, error per weight; length, weights; matrix
    for matrix, curve in enumerate(curves):
        if len(curve) != len(grid):
            raise ValueError(f"found {len(curve)} points on the curve of matrix {matrix}, wanted {len(grid)}, as on the grid")
        _require_finite(f"an error on the curve of matrix {matrix}", curve)
        measured = [(sizes[matrix] * sparsity, error) for sparsity, error in zip(grid, curve, strict=True)]
        for (start, start_error), (end, end_error) in pairwise(_lower_hull(_between(measured, least[matrix], most[matrix]))):
            segments.append(((end_error - start_error) / (end - start), end - start, matrix))
    segments.sort()

    counts, remaining, first = [float(count) for count in least], float(budget - sum(least)), 0
    while remaining > 0 and first < len(segments):
        last = first
        while last < len(segments) and math.isclose(segments[last][0], segments[first][0], rel_tol=SAME_SLOPE):
            last += 1
        tied = segments[first:last]
        available = math.fsum(length for _, length, _ in tied)
        fraction = min(1.0, remaining / available)
        for _, length, matrix in tied:
            counts[matrix] = min(counts[matrix] + fraction * length, most[matrix])
        remaining, first = remaining - fraction * available, last
    return _rounded(counts, budget)


def bounds_of_counts(sizes: list[int], budget: int, lowest: float, highest: float) -> tuple[list[int], list[int]]:
    """Compute the fewest and the most zeros of each matrix and check that they allow the budget; see meet_budget."""
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(f"found the bounds {lowest} and {highest}, wanted 0 <= lowest <= highest <= 1")
    least = [math.ceil(size * Fraction(str(lowest))) for size in sizes]
    most = [pruned_count(size, highest) for size in sizes]
    for matrix, size in enumerate(sizes):
        if least[matrix] > most[matrix]:
            raise ValueError(f"matrix {matrix}: found no whole count from {lowest} to {highest} of {size} weights, wanted wider bounds")
    if not sum(least) <= budget <= sum(most):
        raise ValueError(
            f"found a budget of {budget} of {sum(sizes)} weights, wanted {sum(least)} to {sum(most)}, "
            f"which is what pruning each matrix from {lowest} to {highest} allows"
        )
    return least, most


def _rounded(counts: list[float], budget: int) -> list[int]:
    """Round counts, whose sum is the budget up to rounding errors far below 1, to whole numbers whose sum is the budget."""
    rounded = [math.floor(count) for count in counts]
    largest_remainder_first = sorted(range(len(counts)), key=lambda matrix: rounded[matrix] - counts[matrix])
    for matrix in largest_remainder_first[: budget - sum(rounded)]:
        rounded[matrix] += 1
    return rounded


def _positions(values: list[float]) -> list[float]:
    """Scale the values so that the lowest is 0 and the highest is 1; all 0 if all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _between(points: list[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Restrict a curve, linear between its points, to low <= x <= high."""
    if low == high:
        return [(low, _interpolated(points, low))]
    inner = [point for point in points if low < point[0] < high]
    return [(low, _interpolated(points, low)), *inner, (high, _interpolated(points, high))]


def _interpolated(points: list[tuple[float, float]], x: float) -> float:
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x1, y1), (x2, y2) = points[right - 1], points[right]
    return y1 + (y2 - y1) * (x - x1) / (x2 - x1)


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Select the points of the lower convex hull; x ascends. A point on a chord between two others is left out."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x2) < (y - y2) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _require_same_length(name: str, count: int, sizes: int) -> None:
    if count != sizes:
        raise ValueError(f"found {count} {name} for {sizes} sizes, wanted one for each")


def _require_finite(name: str, values: list[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"found {value} as {name}, wanted a finite number")


def _require_ascending(grid: list[float]) -> None:
    if any(left >= right for left, right in pairwise(grid)) or not all(0 <= sparsity <= 1 for sparsity in grid):
        raise ValueError(f"found the grid {grid}, wanted sparsities from 0 to 1, each above the one before")
