"""Find an order of the input columns in which an N:M mask keeps a higher total score.

Two steps: columns with high totals are distributed over the groups, then columns are exchanged between groups while the score rises. After
Pool & Yu, NeurIPS 2021 (exchanges of two columns), and Zhang et al., ICLR 2024 (RIA: columns distributed by their totals, then one
column of each group reassigned at a time).

Replace column j of a group by a column with score s. The group keeps its N - 1 best other scores and the larger of s and b_j, the Nth
best other score. With max(s, b) = (s + b + |s - b|) / 2, exchanging columns i and j of two groups raises the kept score by

    gain_ij = 1/2 sum_r (|s_ri - b_rj| + |s_rj - b_ri| - |s_ri - b_ri| - |s_rj - b_rj|)

which is exact, and for all pairs at once a matrix of L1 distances.
"""

import torch

from stages.pruning.patterns import Nm

SMALLEST_GAIN = 1e-6  # of the largest distance; smaller gains may be rounding errors of float32


def channel_permutation(scores: torch.Tensor, kept: int, group: int, *, rounds: int) -> torch.Tensor:
    """Find an order of the columns that raises the score kept by the N:M mask.

    Args:
        scores: [rows, columns], float32, finite, 0 or more, of each weight.
        kept: N. group: M.
        rounds: number of times that each column is tried in other groups; 0: columns are only distributed by their totals.

    Returns:
        [columns], int64: column `order[k]` becomes the k-th. Deterministic. The kept score is never lower than without reordering;
        if it does not rise, the order is the identity.

    Raises:
        ValueError: columns not a multiple of the group, or a score that is NaN or infinite.
    """
    pattern, columns = Nm(kept=kept, group=group), scores.shape[1]
    pattern.check(columns)
    if not torch.isfinite(scores).all():
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    unchanged = torch.arange(columns, device=scores.device)
    if not 0 < kept < group:
        return unchanged  # all is kept, or nothing
    start = max((unchanged, _distributed(scores, group)), key=lambda order: kept_score(scores, order, pattern))
    order = _sorted(_refined(scores.T.contiguous(), start.view(-1, group), kept, rounds))
    return order if kept_score(scores, order, pattern) > kept_score(scores, unchanged, pattern) else unchanged


def kept_score(scores: torch.Tensor, order: torch.Tensor, pattern: Nm) -> float:
    """The sum of the N highest scores of every group, with the columns in this order."""
    return scores[:, order].reshape(-1, pattern.group).topk(pattern.kept).values.sum(dtype=torch.float64).item()


def _distributed(scores: torch.Tensor, group: int) -> torch.Tensor:
    """The columns sorted by their totals, highest first, and assigned to the groups in turn."""
    return scores.sum(dim=0).argsort(descending=True, stable=True).view(group, -1).T.reshape(-1)


def _refined(columns: torch.Tensor, groups: torch.Tensor, kept: int, rounds: int) -> torch.Tensor:
    """In every round, for each position in a group: remove one column from every group and reassign these columns for the largest gain.

    Args:
        columns: [columns, rows], the scores, each column contiguous in memory.
        groups: [groups, M], column indices.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        shuffled = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(groups.device)
        groups = groups.gather(1, shuffled)  # so that each round takes out other columns at the same time
        for _ in range(groups.shape[1]):
            removed, others = groups[:, 0], groups[:, 1:]
            nth_best = columns[others].topk(kept, dim=1).values[:, -1]
            assigned = removed[_exchanged(torch.cdist(columns[removed], nth_best, p=1))]
            groups = torch.cat([others, assigned[:, None]], dim=1)
    return groups


def _exchanged(distances: torch.Tensor) -> torch.Tensor:
    """Exchange pairs of columns while an exchange raises the score; pairs that are each other's best choice are exchanged together.

    Args:
        distances: [groups, groups], float32, L1 distance of each removed column from the Nth best other scores of each group.

    Returns:
        [groups], int64: the group whose column each group receives.
    """
    group_indices = torch.arange(len(distances), device=distances.device)
    partners, smallest = group_indices, SMALLEST_GAIN * distances.max()
    while True:
        unchanged = distances.diagonal()
        gain, partner = (distances + distances.T - (unchanged[:, None] + unchanged)).max(dim=1)  # twice gain_ij
        agreed = (partner[partner] == group_indices) & (gain > smallest)
        if not agreed.any():
            return partners
        swap = torch.where(agreed, partner, group_indices)
        distances, partners = distances[swap], partners[swap]


def _sorted(groups: torch.Tensor) -> torch.Tensor:
    """Sort the columns within each group and the groups by their first columns, so that columns move no more than needed."""
    groups = groups.sort(dim=1).values
    return groups[groups[:, 0].argsort()].reshape(-1)
