"""An order of input columns in which N:M groups lose less: strong columns spread out, then exchanged between groups.

Channel permutations: Pool & Yu, NeurIPS 2021 (exchanges of two columns), and Zhang et al., ICLR 2024 (RIA: columns dealt out by
their totals, then one of each group reassigned at a time). A group of which column j is taken out keeps its N - 1 best others
and the better of what comes in and the Nth best, b_j; with max(s, b) = (s + b + |s - b|) / 2, exchanging columns i and j of two
groups raises the kept score by

    gain_ij = 1/2 sum_r (|s_ri - b_rj| + |s_rj - b_ri| - |s_ri - b_ri| - |s_rj - b_rj|)

which is exact, and for all pairs at once a matrix of L1 distances.
"""

import torch

from stages.pruning.patterns import Nm

SMALLEST_GAIN = 1e-6  # of the largest distance: above what float32 rounds away


def channel_permutation(scores: torch.Tensor, kept: int, group: int, *, rounds: int) -> torch.Tensor:
    """Find an order of the columns that raises the score kept by the N:M mask.

    Args:
        scores: [rows, columns], float32, finite, 0 or more; what each weight is worth.
        kept: N. group: M.
        rounds: how often each column is tried in other groups; 0 leaves them as they were dealt.

    Returns:
        [columns], int64: column `order[k]` goes to place k. The same for the same scores; never worse than no reordering,
        which it is where nothing is gained.

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
    order = max((unchanged, _dealt(scores, group)), key=lambda order: kept_score(scores, order, pattern))
    order = _tidy(_refined(scores.T.contiguous(), order.view(-1, group), kept, rounds))
    return order if kept_score(scores, order, pattern) > kept_score(scores, unchanged, pattern) else unchanged


def kept_score(scores: torch.Tensor, order: torch.Tensor, pattern: Nm) -> float:
    """The sum of the N highest scores of every group, the columns in this order."""
    return scores[:, order].reshape(-1, pattern.group).topk(pattern.kept).values.sum(dtype=torch.float64).item()


def _dealt(scores: torch.Tensor, group: int) -> torch.Tensor:
    """The columns sorted by their totals and dealt out to the groups in turn, as cards are."""
    return scores.sum(dim=0).argsort(descending=True, stable=True).view(group, -1).T.reshape(-1)


def _refined(columns: torch.Tensor, groups: torch.Tensor, kept: int, rounds: int) -> torch.Tensor:
    """Take one column out of every group, in turn, and put them back where they add most.

    Args:
        columns: [columns, rows], the scores of each column in a run of memory.
        groups: [groups, M], numbers of columns.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        shuffled = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(groups.device)
        groups = groups.gather(1, shuffled)  # so that other columns meet than in the round before
        for _ in range(groups.shape[1]):
            taken, others = groups[:, 0], groups[:, 1:]
            to_beat = columns[others].topk(kept, dim=1).values[:, -1]
            moved = taken[_exchanged(torch.cdist(columns[taken], to_beat, p=1))]
            groups = torch.cat([others, moved[:, None]], dim=1)
    return groups


def _exchanged(distances: torch.Tensor) -> torch.Tensor:
    """Exchange pairs as long as one gains; pairs that are each other's best choice do so at once.

    Args:
        distances: [groups, groups], of each column that was taken out to what it must beat in each group.

    Returns:
        [groups], int64: which group's column each group now has.
    """
    own = torch.arange(len(distances), device=distances.device)
    partners, smallest = own, SMALLEST_GAIN * distances.max()
    while True:
        stay = distances.diagonal()
        gain, partner = (distances + distances.T - (stay[:, None] + stay)).max(dim=1)  # twice gain_ij
        agreed = (partner[partner] == own) & (gain > smallest)
        if not agreed.any():
            return partners
        swap = torch.where(agreed, partner, own)
        distances, partners = distances[swap], partners[swap]


def _tidy(groups: torch.Tensor) -> torch.Tensor:
    """Groups by their first columns, columns within a group as they were: nothing moves without a reason."""
    groups = groups.sort(dim=1).values
    return groups[groups[:, 0].argsort()].reshape(-1)
