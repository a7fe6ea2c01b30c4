"""A mask that need not be stored, since it follows from the base: which of the scores |W| * scale are the highest.

    S_ij = |W_ij| * scale_j                      # Wanda: the norm of input j (Sun et al. 2024, arXiv:2306.11695); magnitude: 1
    kept_ij = S_ij > threshold_i                 # unstructured
    kept_ij = S_ij among the N highest of its M  # N:M

Each score is one product of two numbers in float32, which every device rounds alike, so that a matrix's scales and thresholds give its mask
anywhere, bit for bit. They are as many as its rows and columns, where a mask of bits is as large as their product.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stages.devices import to_host
from stages.pruning.patterns import FEW_COLUMNS, keep_highest_of_few

WEIGHTS_AT_ONCE = 2**22  # whose scores are in memory


@dataclass(frozen=True, kw_only=True)
class ScoredMask:
    """The mask of a matrix, or of the experts in one tensor, by its scores.

    scales: [columns] or [experts, columns], float32, of the inputs, on the CPU.
    thresholds: [rows] or [experts, rows], float32: scores above are kept, those below are not; None with groups.
    ties: likewise, int32: of the scores that are the threshold, so many are pruned, the leftmost first; None: all of them.
    group: (N, M): the N highest of M consecutive columns are kept, of equals the rightmost first; None: by thresholds.
    transposed: whether the tensor holds each matrix as [columns, rows].
    """

    scales: torch.Tensor
    thresholds: torch.Tensor | None = None
    ties: torch.Tensor | None = None
    group: tuple[int, int] | None = None
    transposed: bool = False

    @classmethod
    def of(
        cls, weight: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor, *, group: tuple[int, int] | None, transposed: bool
    ) -> "ScoredMask | None":
        """Find what gives a mask, or None if the scores do not.

        Args:
            weight: [rows, columns], float32, with the base's values. scales: [columns], float32. mask: as weight, bool, True = kept.
            group: (N, M) of a pattern of groups. transposed: whether the tensor holds the matrix as [columns, rows].
        """
        if group is not None:
            made = cls(scales=to_host(scales), group=group, transposed=transposed)
            return made if group[1] <= FEW_COLUMNS and _gives(made, weight, mask) else None
        thresholds, ties = zip(*(_threshold(*part, scales) for part in _parts(weight, mask)), strict=True)
        counts = torch.cat([count for count, _ in ties])
        needed = any(bool(some_kept) for _, some_kept in ties)
        made = cls(
            scales=to_host(scales),
            thresholds=to_host(torch.cat(thresholds)),
            ties=to_host(counts) if needed else None,
            transposed=transposed,
        )
        return made if _gives(made, weight, mask) else None

    @classmethod
    def stacked(cls, masks: "list[ScoredMask | None]") -> "ScoredMask | None":
        """Stack those of the experts in one tensor, in order; None where one is stored otherwise."""
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks):
            return None
        thresholds = [mask.thresholds for mask in known if mask.thresholds is not None]
        ties = None
        if any(mask.ties is not None for mask in known):
            all_pruned = torch.full_like(thresholds[0], len(known[0].scales), dtype=torch.int32)  # no row has more columns
            ties = torch.stack([all_pruned if mask.ties is None else mask.ties for mask in known])
        return cls(
            scales=torch.stack([mask.scales for mask in known]),
            thresholds=torch.stack(thresholds) if thresholds else None,
            ties=ties,
            group=known[0].group,
            transposed=known[0].transposed,
        )

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """The mask of a tensor of the base, in its shape and on its device, bool, True = kept."""
        experts = len(self.scales) if self.scales.dim() == 2 else 1
        columns = self.scales.shape[-1]
        stored = weight.reshape(experts, *((columns, -1) if self.transposed else (-1, columns)))
        mask = torch.empty_like(stored, dtype=torch.bool)
        for expert in range(experts):
            matrix, into = (tensor[expert].mT if self.transposed else tensor[expert] for tensor in (stored, mask))
            self._fill(matrix, into, expert)
        return mask.view(weight.shape)

    def _fill(self, weight: torch.Tensor, mask: torch.Tensor, expert: int) -> None:
        """Write the mask of a matrix, [rows, columns], some rows at a time."""

        def own(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.view(-1, part.shape[-1])[expert].to(weight.device)

        scales, thresholds, ties = own(self.scales), own(self.thresholds), own(self.ties)
        first = 0
        for rows, into in _parts(weight, mask):
            chunk = slice(first, first := first + len(rows))
            scores = rows.float().abs() * scales
            if thresholds is None:
                kept, columns = self.group or (0, 0)
                into.copy_(keep_highest_of_few(scores.reshape(-1, columns), columns - kept).view(scores.shape))
                continue
            into.copy_(scores > thresholds[chunk, None])
            if ties is not None:
                equal = scores == thresholds[chunk, None]
                into |= equal & (equal.cumsum(dim=1) > ties[chunk, None])


def _parts(weight: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of both at a time."""
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    return zip(weight.split(rows), mask.split(rows), strict=True)


def _threshold(weight: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Of each row the highest score that is pruned, -1 where none is; how many of that score are pruned, and whether any is kept."""
    scores = weight.abs() * scales
    thresholds = scores.masked_fill(mask, -1).amax(dim=1)
    equal = scores == thresholds[:, None]
    return thresholds, ((equal & ~mask).sum(dim=1, dtype=torch.int32), (equal & mask).any())


def _gives(made: ScoredMask, weight: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether it gives this mask."""
    return torch.equal(made.mask(weight.mT if made.transposed else weight), mask.mT if made.transposed else mask)
