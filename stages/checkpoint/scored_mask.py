"""A mask that need not be stored, since it follows from the base: which of the scores |W| * scale are the highest.

    S_ij = |W_ij| * scale_j                      # Wanda: the norm of input j (Sun et al. 2024, arXiv:2306.11695); magnitude: 1
    kept_ij = S_ij > threshold_i                 # unstructured
    kept_ij = S_ij among the N highest of its M  # N:M

Each score is one product of two numbers in float32, which every device rounds alike, so that a matrix's scales and thresholds give its mask
anywhere, bit for bit. They are as many as its columns and rows, where a mask of bits is as large as their product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stages.devices import to_host
from stages.groups import FEW_COLUMNS, keep_highest_of_few

WEIGHTS_AT_ONCE = 2**20  # whose scores are in memory
ALL = -1  # of a row's scores that are the threshold


@dataclass(frozen=True, kw_only=True)
class ScoredMask:
    """The mask of a matrix, or of the experts in one tensor, by its scores.

    scales: [columns] or [experts, columns], float32, of the inputs, on the CPU.
    thresholds: [rows] or [experts, rows], float32: scores above are kept, those below are not; None with groups.
    ties: likewise, int32: of the scores that are the threshold, so many are pruned, the leftmost first, or ALL; None: all in every row.
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
            weight: [rows, columns], float32, with the base's values; not changed. scales: [columns], float32, 0 or more; copied.
            mask: as weight, bool, True = kept.
            group: (N, M) of a pattern of groups. transposed: whether the tensor holds the matrix as [columns, rows].
        """
        made = cls(scales=to_host(scales).clone(), group=group, transposed=transposed)
        if group is None:
            thresholds, ties = (
                torch.cat(parts) for parts in zip(*(_threshold(*part, scales) for part in _parts(weight, mask)), strict=True)
            )
            made = replace(made, thresholds=to_host(thresholds), ties=to_host(ties) if (ties != ALL).any() else None)
        elif group[1] > FEW_COLUMNS:
            return None
        return made if torch.equal(made.mask(weight.mT if transposed else weight), mask.mT if transposed else mask) else None

    @classmethod
    def stacked(cls, masks: "list[ScoredMask | None]") -> "ScoredMask | None":
        """Stack those of the experts in one tensor, in order; None where one is stored otherwise."""
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks):
            return None
        thresholds = [mask.thresholds for mask in known if mask.thresholds is not None]
        ties = None
        if any(mask.ties is not None for mask in known):
            all_of_them = torch.full_like(thresholds[0], ALL, dtype=torch.int32)
            ties = torch.stack([all_of_them if mask.ties is None else mask.ties for mask in known])
        return cls(
            scales=torch.stack([mask.scales for mask in known]),
            thresholds=torch.stack(thresholds) if thresholds else None,
            ties=ties,
            group=known[0].group,
            transposed=known[0].transposed,
        )

    @property
    def experts(self) -> int | None:
        """How many, or None of a matrix alone."""
        return len(self.scales) if self.scales.dim() == 2 else None

    def expert(self, index: int) -> "ScoredMask":
        """That of one of the experts."""
        thresholds, ties = (None if part is None else part[index] for part in (self.thresholds, self.ties))
        return replace(self, scales=self.scales[index], thresholds=thresholds, ties=ties)

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """The mask of a tensor of the base, in its shape and on its device, bool, True = kept.

        Args:
            weight: as many weights as those of all experts, in any shape; not changed.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        columns = self.scales.shape[-1]
        stored = weight.reshape(self.experts or 1, *((columns, -1) if self.transposed else (-1, columns)))
        mask = torch.empty(stored.shape, dtype=torch.bool, device=weight.device)
        for index, pair in enumerate(zip(stored, mask, strict=True)):
            own = self if self.experts is None else self.expert(index)
            own._fill(*(matrix.mT if self.transposed else matrix for matrix in pair))
        return mask.view(weight.shape)

    def _fill(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        """Write the mask of a matrix, [rows, columns], some rows at a time."""
        scales = self.scales.to(weight.device)
        thresholds, ties = (None if part is None else part.to(weight.device) for part in (self.thresholds, self.ties))
        first = 0
        for rows, into in _parts(weight, mask):
            chunk = slice(first, first := first + len(rows))
            scores = (rows.float() * scales).abs_()
            if thresholds is None:
                kept, columns = self.group or (0, 0)
                into.copy_(keep_highest_of_few(scores.reshape(-1, columns), columns - kept).view(scores.shape))
                continue
            into.copy_(scores > thresholds[chunk, None])
            if ties is not None and len(some := (ties[chunk] != ALL).nonzero()[:, 0]):
                equal = scores[some] == thresholds[chunk][some, None]
                into[some] |= equal & (equal.cumsum(dim=1) > ties[chunk][some, None])


def _parts(weight: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of both at a time."""
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    return zip(weight.split(rows), mask.split(rows), strict=True)


def _threshold(weight: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the highest score that is pruned, -1 where none is; and how many of that score are pruned, ALL where none is kept."""
    scores = (weight * scales).abs_()
    thresholds = scores.masked_fill(mask, -1).amax(dim=1)
    equal = scores == thresholds[:, None]
    ties = torch.full_like(thresholds, ALL, dtype=torch.int32)
    some = (equal & mask).any(dim=1)
    ties[some] = (equal[some] & ~mask[some]).sum(dim=1, dtype=torch.int32)
    return thresholds, ties
