"""The highest of each group of few scores: N of M."""

import torch

FEW_COLUMNS = 16  # within which all pairs are compared


def keep_highest_of_few(scores: torch.Tensor, pruned: int) -> torch.Tensor:
    """Prune the lowest scores of each short row, of equals the leftmost first: every score is compared with every other of its row.

    Args:
        scores: [rows, columns], finite. pruned: how many of each row, 0 to columns.

    Returns:
        [rows, columns], bool, exactly `pruned` False in each row.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("found a score that is NaN or infinite, wanted finite scores")
    columns = scores.T.contiguous()
    above = torch.zeros_like(columns, dtype=torch.int8)  # scores of the row that are kept before this one
    for left in range(len(columns)):
        for right in range(left + 1, len(columns)):
            right_first = columns[right] >= columns[left]
            above[left] += right_first
            above[right] += ~right_first
    return (above < len(columns) - pruned).T.contiguous()
