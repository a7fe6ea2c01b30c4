"""Damping that grows where the tokens are too few to tell how inputs go together.

    rho = ((1 - 2/p) tr(C²) + p²) / ((n + 1 - 2/p) (tr(C²) - p)), at most 1        # OAS: Chen et al. 2010, arXiv:0907.4698, eq. 23

for the Gram matrix C of n tokens, scaled to a unit diagonal, and its p columns. The estimate (1 - rho) C + rho I is, up to a factor, C
with the share rho / (1 - rho) of each entry added to the diagonal: no input's scale matters, however enormous it is. The estimate takes
tokens as independent draws from a normal distribution. They are neither, so that the best share is often larger; which is best, the
windows held out tell, for a sample of rows.
"""

from dataclasses import replace

import torch

from stages.pruning.method import Method, prune_matrices
from stages.pruning.patterns import Pattern
from stages.pruning.statistics import Gram

MULTIPLES = (1, 4)  # of the estimated share, which are tried
ROWS = 64  # of each matrix, by which shares are judged
COLUMNS_AT_ONCE = 256  # of the Gram matrix, in float64


def oas_share(gram: torch.Tensor, tokens: int) -> float:
    """The share of each diagonal entry that the estimator adds, above 0, perhaps infinite.

    Args:
        gram: [columns, columns], float32, finite, with some entry of the diagonal above 0; inputs that are zero throughout do not count.
        tokens: whose products it sums, at least 1.
    """
    diagonal = gram.diagonal().double()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    columns = int((diagonal > 0).sum())
    pieces = zip(gram.split(COLUMNS_AT_ONCE), inverse.split(COLUMNS_AT_ONCE), strict=True)
    squared = sum((of_piece @ (piece.double().square() @ inverse)).item() for piece, of_piece in pieces)  # tr(C²)
    spread = (tokens + 1 - 2 / columns) * (squared - columns)
    rho = ((1 - 2 / columns) * squared + columns**2) / spread if spread > 0 else 1.0
    return rho / (1 - rho) if rho < 1 else float("inf")


def shares(statistic: Gram, method: Method) -> list[float]:
    """The shares that come into question, ascending: the method's own, and larger ones by the estimate, up to its limit."""
    estimate, damping = estimated_share(statistic, method), method.damping
    larger = {min(multiple * estimate, damping.limit) for multiple in MULTIPLES} if statistic.value.any() else set()
    return sorted({damping.share, *larger})


def estimated_share(statistic: Gram, method: Method) -> float:
    """The share by the estimate, within the bounds that the method sets; its own where all inputs are zero."""
    share, limit = method.damping.share, method.damping.limit
    return min(max(share, oas_share(statistic.value, statistic.tokens)), limit) if statistic.finite().any() else share


def with_shrinkage(weights: list[torch.Tensor], statistic: Gram, method: Method, patterns: list[Pattern], held_out: torch.Tensor) -> Method:
    """The method with the damping that leaves the least error on inputs held out, for some rows of each matrix.

    Args:
        weights, statistic, patterns: see prune_matrices.
        held_out: inputs in the windows held out, of several processes in those of the one that solves, [tokens, columns], float32; without
            any the estimate is taken as it is.

    Raises:
        ArithmeticError: the statistic has NaN or infinity, or does not factor.
    """

    def damped_by(share: float) -> Method:
        return replace(method, damping=replace(method.damping, share=share))

    if not len(held_out):
        return damped_by(estimated_share(statistic, method))
    rows = [weight[:: -(-len(weight) // ROWS)] for weight in weights]
    sizes = [size if size > 0 else 1.0 for size in (squared_norm(held_out @ weight.T) for weight in rows)]

    def error(candidate: Method) -> float:
        """Of all matrices, each relative to its own outputs, so that the scale of none decides."""
        outcomes = zip(rows, prune_matrices(rows, statistic, candidate, patterns), strict=True)
        kept = (weight - (weight * pruned.mask if pruned.values is None else pruned.values) for weight, pruned in outcomes)
        return sum(squared_norm(held_out @ lost.T) / size for lost, size in zip(kept, sizes, strict=True))

    return min(map(damped_by, shares(statistic, method)), key=error)


def squared_norm(outputs: torch.Tensor) -> float:
    return outputs.double().square().sum().item()
