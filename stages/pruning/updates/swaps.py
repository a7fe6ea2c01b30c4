"""Swaps: exchange a kept weight p for a pruned weight q of the same row while that lowers the row's output error.

    error = e^T G e,   e = w * (1 - m),   c = G e                                    # Zimmer et al. 2025 (SparseSwaps), arXiv:2512.10922
    change = (2 w_p c_p + w_p^2 G_pp) + (w_q^2 G_qq - 2 w_q c_q) - 2 w_p w_q G_pq    # of the error, when p is pruned and q kept

with G the Gram matrix of the inputs. The weights do not change, and the number of kept weights of each row (or group) stays the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stages.pruning.entries import Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.selection import select
from stages.pruning.statistics import Gram
from stages.pruning.updates.least_squares import least_squares
from stages.schema import Citation, number

if TYPE_CHECKING:
    from stages.pruning.method import Method

PAIRS_AT_ONCE = 2**22  # a search takes some times their memory
LEAST_GAIN = 1e-5  # of the row's error; below it a gain may be rounding


@dataclass(kw_only=True, slots=True)
class SwapsParameters:
    """cycles, candidates: see swaps. refit_steps: steps of least squares on the refined mask; 0: kept weights do not change."""

    name: str
    cycles: int = number(minimum=1)
    candidates: int = number(minimum=1)
    refit_steps: int = number(minimum=0)


Swap = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # change of the error, p, q: each [rows]


def swaps(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, *, cycles: int, candidates: int, group: int | None) -> torch.Tensor:
    """Refine a mask by the best swap of each row and cycle.

    The change of the error is computed exactly. In groups all pairs are tried; in whole rows, the pairs of the `candidates` kept
    weights and the `candidates` pruned weights whose single moves change the error most favourably.

    Args:
        weight: [rows, columns], float32; not changed.
        gram: [columns, columns], float32, symmetric.
        mask: [rows, columns], bool, True = kept; not changed.
        cycles: upper bound of swaps per row; a row stops earlier when no swap lowers its error. 0: the mask does not change.
        candidates: number of kept and of pruned weights whose pairs are tried; all pairs if it is the number of columns or more.
        group: number of consecutive columns within which p and q must lie, a divisor of columns; None for the whole row.

    Returns:
        [rows, columns], bool, True = kept, with as many kept weights as `mask` in every row and group.
    """
    columns = weight.shape[1]
    pairs = columns * group if group else max(columns, min(candidates, columns) ** 2)
    slab_rows = max(1, PAIRS_AT_ONCE // pairs)
    mask = mask.clone()
    if not cycles:
        return mask
    for slab_weight, slab_mask in zip(weight.split(slab_rows), mask.split(slab_rows), strict=True):
        _refine(slab_weight, gram, slab_mask, cycles, candidates, group)
    return mask


def _refine(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, cycles: int, candidates: int, group: int | None) -> None:
    """Refine `mask` in place; the other tensors shrink to the rows that still improve."""
    rows = torch.arange(len(weight), device=weight.device)
    pruned = weight * ~mask
    c = pruned @ gram
    error = (pruned * c).sum(dim=1)
    for _ in range(cycles):
        leave, enter = _costs(weight, gram, mask[rows], c)
        change, p, q = _best_in_groups(weight, gram, leave, enter, group) if group else _best(weight, gram, leave, enter, candidates)
        improves = change < -LEAST_GAIN * error.clamp(min=0)
        rows, weight, c, error, change, p, q = (per_row[improves] for per_row in (rows, weight, c, error, change, p, q))
        if not len(rows):
            return
        mask[rows, p], mask[rows, q] = False, True
        c += weight.gather(1, p[:, None]) * gram[p] - weight.gather(1, q[:, None]) * gram[q]
        error += change


def _costs(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of the error when one kept weight is pruned, and when one pruned weight returns; infinite for the other weights."""
    quadratic, linear = weight.square() * gram.diagonal(), 2 * weight * c
    return (quadratic + linear).where(mask, torch.inf), (quadratic - linear).where(~mask, torch.inf)


def _best(weight: torch.Tensor, gram: torch.Tensor, leave: torch.Tensor, enter: torch.Tensor, candidates: int) -> Swap:
    count = min(candidates, weight.shape[1])
    leave, p = leave.topk(count, largest=False)
    enter, q = enter.topk(count, largest=False)
    w_p, w_q = weight.gather(1, p)[:, :, None], weight.gather(1, q)[:, None, :]
    change = leave[:, :, None] + enter[:, None, :] - 2 * w_p * w_q * gram[p[:, :, None], q[:, None, :]]
    lowest, pair = change.flatten(1).min(dim=1)
    return lowest, p.gather(1, pair[:, None] // count)[:, 0], q.gather(1, pair[:, None] % count)[:, 0]


def _best_in_groups(weight: torch.Tensor, gram: torch.Tensor, leave: torch.Tensor, enter: torch.Tensor, group: int) -> Swap:
    leave, enter, grouped_weight = (per_column.unflatten(1, (-1, group)) for per_column in (leave, enter, weight))
    blocks = gram.unflatten(0, (-1, group)).unflatten(2, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    w_p, w_q = grouped_weight[..., :, None], grouped_weight[..., None, :]
    change = leave[..., :, None] + enter[..., None, :] - 2 * w_p * w_q * blocks
    lowest, pair = change.flatten(1).min(dim=1)
    first = pair // group**2 * group  # column of the group
    return lowest, first + pair % group**2 // group, first + pair % group


def prune(weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Refine the masks of the score by swaps, and refit the kept weights if refit_steps is above 0; see entries.Update."""
    parameters, gram = method.update, statistic.finite()
    damped = statistic.damped(method.damping.share) if parameters.refit_steps else None
    masks = select(weights, statistic, patterns, method)
    damping = statistic.damping if damped is None else max(method.damping.share, statistic.damping or 0)
    outcomes = []
    for weight, mask, pattern in zip(weights, masks, patterns, strict=True):
        refined = swaps(weight, gram, mask, cycles=parameters.cycles, candidates=parameters.candidates, group=pattern.group)
        values = None if damped is None else least_squares(weight, damped, refined, weight, parameters.refit_steps)
        outcomes.append(Pruned(mask=refined, values=values, damping=damping))
    return outcomes


SWAPS = Update(
    name="swaps",
    prune=prune,
    statistic=Gram,
    refines=True,
    changes_weights=lambda section: section.refit_steps > 0,
    parameters=SwapsParameters,
    summary="the mask refined by exact one-for-one swaps on the Gram matrix",
    citation=Citation(text="Zimmer et al. 2025", url="https://arxiv.org/abs/2512.10922"),
)
