"""How many weights of every matrix are pruned, so that the counts add up to the budget, to the weight.

A rule gives a wanted sparsity for each block or matrix, of which meet_budget makes counts; or it gives counts.

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
    """The section of an allocation. lowest, highest: sparsity that every matrix has at least and at most."""

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


def counts_by_block(wanted: list[float], sizes: list[list[int]], sparsity: float | Fraction, bounds: BoundedSection) -> list[int]:
    """Zeros of every matrix by what is wanted of its block.

    Args:
        wanted: of each block, a fraction of zeros. sizes: of the matrices of each block, weights.
        sparsity: of all matrices together.

    Returns:
        Zeros of each matrix, block after block.

    Raises:
        ValueError: see meet_budget.
    """
    by_matrix = [sparsity_of_block for sparsity_of_block, block in zip(wanted, sizes, strict=True) for _ in block]
    flat = [size for block in sizes for size in block]
    budget = pruned_count(sum(flat), sparsity)
    return meet_budget(by_matrix, sizes=flat, budget=budget, lowest=bounds.lowest, highest=bounds.highest)


def counts_by_curves(
    curves: list[list[float]], grid: list[float], sizes: list[int], sparsity: float | Fraction, bounds: BoundedSection
) -> list[int]:
    """Zeros of every matrix where the sum of their curves is least; a matrix with an empty curve gets the sparsity of all.

    Args:
        curves: of each matrix, see least_sum, or empty. grid: see least_sum. sizes: of each matrix, weights.
        sparsity: of all matrices together.

    Returns:
        Zeros of each matrix.

    Raises:
        ValueError: see least_sum.
    """
    counts = [pruned_count(size, sparsity) for size in sizes]
    known = [number for number, curve in enumerate(curves) if curve]
    budget = pruned_count(sum(sizes), sparsity) - sum(count for count, curve in zip(counts, curves, strict=True) if not curve)
    least = least_sum(
        [curves[number] for number in known],
        grid=grid,
        sizes=[sizes[number] for number in known],
        budget=budget,
        lowest=bounds.lowest,
        highest=bounds.highest,
    )
    for number, count in zip(known, least, strict=True):
        counts[number] = count
    return counts


def meet_budget(wanted: list[float], *, sizes: list[int], budget: int, lowest: float, highest: float) -> list[int]:
    """Turn wanted sparsities into counts that add up to the budget.

    count_l = clamp(size_l * (wanted_l + shift), lowest * size_l, highest * size_l), one shift for all, found by bisection; the
    fractions of a weight go to the largest remainders, of equals to the first.

    Args:
        wanted: of each matrix, a fraction of zeros; finite, may lie out of bounds.
        sizes: of each matrix, weights, 1 or more.
        budget: zeros in all matrices together, weights.
        lowest: fraction of zeros that each matrix has at least, 0 to 1.
        highest: fraction of zeros that each matrix has at most, lowest to 1.

    Returns:
        Zeros of each matrix, weights, within the bounds; their sum is the budget.

    Raises:
        ValueError: the bounds do not allow the budget, or leave a matrix no whole count, or are no bounds; a wanted sparsity is not
            finite; there are not as many as sizes.
    """
    _one_for_each_size("wanted sparsities", len(wanted), len(sizes))
    _finite("a wanted sparsity", wanted)
    least, most = bounds_of_counts(sizes, budget, lowest, highest)

    def shifted(shift: float) -> list[float]:
        asked = (size * (sparsity + shift) for size, sparsity in zip(sizes, wanted, strict=True))
        return [min(max(count, low), high) for count, low, high in zip(asked, least, most, strict=True)]

    below, above = lowest - max(wanted), highest - min(wanted)
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        if math.fsum(shifted(middle)) < budget:
            below = middle
        else:
            above = middle
    return _whole(shifted(above), budget)


def outlier_share(scores: torch.Tensor, multiple: float) -> float:
    """Measure how many scores stand out from the others.

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
    """Prune blocks with many outliers less.

    s_l = s + mean(d) - d_l,  d_l = 2 lambda (D_l - min D) / (max D - min D)       # Yin et al. 2024, arXiv:2310.05175

    The density 1 - s_l is d_l, shifted to the mean 1 - s: the densest block has 2 lambda more than the sparsest, absolutely.

    Args:
        shares: D, of each block, see outlier_share; finite, any unit.
        sparsity: s, fraction of zeros, 0 to 1.
        strength: lambda, a sparsity, 0 or more; 0 is uniform.

    Returns:
        Wanted fraction of zeros of each block, s on average, may lie outside 0 to 1; all s if all shares are equal.

    Raises:
        ValueError: a share is not finite.
    """
    _finite("an outlier share", shares)
    densities = [2 * strength * position for position in _positions(shares)]
    mean = math.fsum(densities) / len(densities)
    return [sparsity + mean - density for density in densities]


def hill_exponent(weight: torch.Tensor) -> float:
    """Estimate how fast the tail of a matrix's spectrum falls: low for heavy tails, which training makes.

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
    """Prune blocks or matrices with light tails more.

    s_l = s r_l / mean(r),  r_l = 1 - e + 2 e (a_l - min a) / (max a - min a)       # Lu et al. 2024, arXiv:2410.10912

    The spread is relative: the sparsest has (1 + e) / (1 - e) times the sparsity of the densest. The mean counts each entry once.

    Args:
        exponents: a, of each block (the mean of its matrices) or matrix, see hill_exponent; finite.
        sparsity: s, fraction of zeros, 0 to 1.
        strength: e, a fraction of s, 0 to below 1; 0 is uniform.

    Returns:
        Wanted fraction of zeros of each, s on average, may lie above 1; all s if all exponents are equal.

    Raises:
        ValueError: an exponent is not finite.
    """
    _finite("an exponent", exponents)
    ratios = [1 - strength + 2 * strength * position for position in _positions(exponents)]
    mean = math.fsum(ratios) / len(ratios)
    return [sparsity * ratio / mean for ratio in ratios]


def removal_curve(squared_scores: torch.Tensor, *, grid: list[float], comparison_group: ComparisonGroup) -> list[float]:
    """Foresee the squared output error of pruning a matrix, from its scores alone.

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
    _ascending(grid)
    if not math.isfinite(squared_scores.sum(dtype=torch.float64)):
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    competing = squared_scores if comparison_group == "row" else squared_scores.reshape(1, -1)
    ends = [pruned_count(competing.shape[1], sparsity) for sparsity in grid]
    parts = _ascending_rows(competing).tensor_split(ends, dim=1)[:-1]
    return list(accumulate(float(part.sum(dtype=torch.float64)) for part in parts))


def _ascending_rows(values: torch.Tensor) -> torch.Tensor:
    """Each row sorted; on a CPU by NumPy, which is several times quicker."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    ordered = values.clone()
    ordered.numpy().sort(axis=1)
    return ordered


def least_sum(curves: list[list[float]], *, grid: list[float], sizes: list[int], budget: int, lowest: float, highest: float) -> list[int]:
    """Find the counts with the least sum of errors.

    min_s sum_l E_l(s_l)  with  sum_l size_l s_l = budget

    E_l is the lower convex hull of the measured curve, linear between its points. The budget goes to the cheapest slopes first,
    error per pruned weight; segments of the slope at which it ends, the Lagrange multiplier, are all pruned to the same fraction.

    Args:
        curves: of each matrix, its error at every point of the grid, finite, in a unit that is the same for all matrices.
        grid: fractions of zeros, ascending, 0 to 1, 2 or more.
        sizes: of each matrix, weights, 1 or more.
        budget: zeros in all matrices together, weights.
        lowest: fraction of zeros that each matrix has at least, 0 to 1; the grid's first if that is higher.
        highest: fraction of zeros that each matrix has at most, lowest to 1; the grid's last if that is lower.

    Returns:
        Zeros of each matrix, weights, within the bounds; their sum is the budget.

    Raises:
        ValueError: as meet_budget; a curve has not as many points as the grid, or one that is not finite; the grid does not ascend, has
            fewer than 2 points, or lies out of bounds.
    """
    _one_for_each_size("curves", len(curves), len(sizes))
    _ascending(grid)
    if len(grid) < 2:
        raise ValueError(f"found a grid of {len(grid)} points, wanted 2 or more")
    if grid[0] > highest or grid[-1] < lowest:
        raise ValueError(f"found a grid from {grid[0]} to {grid[-1]}, wanted one that meets the bounds {lowest} and {highest}")
    least, most = bounds_of_counts(sizes, budget, max(lowest, grid[0]), min(highest, grid[-1]))

    segments: list[tuple[float, float, int]] = []  # slope, error per weight; length, weights; matrix
    for matrix, curve in enumerate(curves):
        if len(curve) != len(grid):
            raise ValueError(f"found {len(curve)} points on the curve of matrix {matrix}, wanted {len(grid)}, as on the grid")
        _finite(f"an error on the curve of matrix {matrix}", curve)
        measured = [(sizes[matrix] * sparsity, error) for sparsity, error in zip(grid, curve, strict=True)]
        for (start, before), (end, after) in pairwise(_lower_hull(_between(measured, least[matrix], most[matrix]))):
            segments.append(((after - before) / (end - start), end - start, matrix))
    segments.sort()

    counts, left, first = [float(count) for count in least], float(budget - sum(least)), 0
    while left > 0 and first < len(segments):
        last = first
        while last < len(segments) and math.isclose(segments[last][0], segments[first][0], rel_tol=SAME_SLOPE):
            last += 1
        tied = segments[first:last]
        available = math.fsum(length for _, length, _ in tied)
        taken = min(1.0, left / available)
        for _, length, matrix in tied:
            counts[matrix] = min(counts[matrix] + taken * length, most[matrix])
        left, first = left - taken * available, last
    return _whole(counts, budget)


def bounds_of_counts(sizes: list[int], budget: int, lowest: float, highest: float) -> tuple[list[int], list[int]]:
    """The least and the most zeros of each matrix, found to allow the budget; arguments and errors are those of meet_budget."""
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


def _whole(counts: list[float], budget: int) -> list[int]:
    """Round to whole numbers that add up to the budget, as the counts do but for rounding errors far below 1."""
    whole = [math.floor(count) for count in counts]
    largest_remainder_first = sorted(range(len(counts)), key=lambda matrix: whole[matrix] - counts[matrix])
    for matrix in largest_remainder_first[: budget - sum(whole)]:
        whole[matrix] += 1
    return whole


def _positions(values: list[float]) -> list[float]:
    """Where each lies from the lowest (0) to the highest (1); 0 if all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _between(points: list[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """A curve, linear between its points, from x = low to x = high."""
    if low == high:
        return [(low, _interpolated(points, low))]
    inner = [point for point in points if low < point[0] < high]
    return [(low, _interpolated(points, low)), *inner, (high, _interpolated(points, high))]


def _interpolated(points: list[tuple[float, float]], x: float) -> float:
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (start, before), (end, after) = points[right - 1], points[right]
    return before + (after - before) * (x - start) / (end - start)


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points, x ascending, that no chord between two others passes below or through."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x2) < (y - y2) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _one_for_each_size(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"found {found} {what} for {wanted} sizes, wanted one for each")


def _finite(what: str, values: list[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"found {value} as {what}, wanted a finite number")


def _ascending(grid: list[float]) -> None:
    if any(left >= right for left, right in pairwise(grid)) or not all(0 <= sparsity <= 1 for sparsity in grid):
        raise ValueError(f"found the grid {grid}, wanted sparsities from 0 to 1, each above the one before")
