"""SparseGPT: sweep over the columns; the columns to the right of a pruned weight compensate for it.

    E_j = (W_j - W'_j) / U_jj,   W_k -= E_j U_jk  for all k > j     # Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1

with U the upper Cholesky factor of the inverse Gram matrix. With the score `obs` the mask is chosen during the sweep, from the weights
as updated so far; with any other score it is chosen before the sweep.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stages.pruning.entries import Pruned, Update
from stages.pruning.patterns import Pattern
from stages.pruning.scores.obs import OBS, obs
from stages.pruning.selection import select
from stages.pruning.statistics import Gram
from stages.schema import Citation, number, require

if TYPE_CHECKING:
    from stages.pruning.method import Method

STRIP = 32  # columns


@dataclass(kw_only=True, slots=True)
class SparseGptParameters:
    """block_size: columns swept before the rest of the matrix is updated."""

    name: str
    block_size: int = number(minimum=1, unit="column")


ChooseMask = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def sparsegpt(
    weight: torch.Tensor, factor: torch.Tensor, choose: ChooseMask, decision_columns: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune the columns from left to right; the columns to the right compensate.

    Args:
        weight: [rows, columns], float32; not changed.
        factor: [columns, columns], float32, U.
        choose: called with the current weights of some columns, [rows, some columns], U's diagonal there and the index of the
            first of them; returns their mask.
        decision_columns: number of columns whose mask is chosen together; divides block_size or equals it.
        block_size: columns swept before the rest of the matrix is updated.

    Returns:
        mask [rows, columns], bool, True = kept; weights [rows, columns], float32, zero where the mask is False.
    """
    columns = weight.shape[1]
    weight = weight.T.contiguous()  # a column of W, which every step works on, is then a run of memory
    mask = torch.empty_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty_like(weight[start:end])
        for first, last in _strips(start, end, decision_columns):
            for j in range(first, last):
                if (j - start) % decision_columns == 0:
                    stop = min(j + decision_columns, end)
                    mask[j:stop] = choose(weight[j:stop].T, diagonal[j:stop], j).T
                torch.mul(weight[j], ~mask[j], out=errors[j - start])
                errors[j - start] /= diagonal[j]
                weight[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - start], alpha=-1)
            strip = errors[first - start : last - start]
            weight[last:end].addmm_(factor[first:last, last:end].T, strip, alpha=-1)
        weight[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return mask.T.contiguous(), weight.mul_(mask).T.contiguous()


def _strips(start: int, end: int, decision_columns: int) -> Iterator[tuple[int, int]]:
    """Cut a block into strips. Within a strip each column's error is propagated at once; to the rest of the block, in one product.

    A strip ends where a decision ends, so that every decision uses weights that are up to date.
    """
    width = max(decision_columns, STRIP // decision_columns * decision_columns) if decision_columns < end - start else STRIP
    for first in range(start, end, width):
        yield first, min(first + width, end)


def prune(weights: list[torch.Tensor], statistic: Gram, patterns: list[Pattern], method: "Method") -> list[Pruned]:
    """Prune all matrices in one sweep; see entries.Update. Kept weights of dead inputs do not change."""
    damping = method.damping
    factor, dead = statistic.inverse_factor(damping.share, damping.limit, damping.shrinkage), statistic.dead
    rows = [len(weight) for weight in weights]
    weight = torch.cat(weights)
    live = weight.masked_fill(dead, 0)
    in_sweep = method.score.name == OBS.name
    mask_before = None if in_sweep else torch.cat(select(list(live.split(rows)), statistic, patterns, method))

    def choose(columns: torch.Tensor, factor_diagonal: torch.Tensor, first: int) -> torch.Tensor:
        if mask_before is not None:
            return mask_before[:, first : first + columns.shape[1]]
        scores = obs(columns, factor_diagonal).split(rows)
        return torch.cat([pattern.mask(matrix, first) for pattern, matrix in zip(patterns, scores, strict=True)])

    decision = min(pattern.decision_columns(method.update.block_size) for pattern in patterns)
    mask, updated = sparsegpt(live, factor, choose, decision, method.update.block_size)
    values = torch.where(mask & dead, weight, updated)
    outcomes = zip(mask.split(rows), values.split(rows), strict=True)
    return [Pruned(mask=matrix_mask, values=matrix, damping=statistic.damping) for matrix_mask, matrix in outcomes]


def check(method: Any, pattern: Any) -> None:
    """Raise ConfigError if the block size is not a multiple of the pattern's group."""
    group, block_size = pattern.group if pattern.grouped else 1, method.update.block_size
    require(block_size % group == 0, "method.update.block_size", block_size, f"a multiple of pattern.group = {group}")


SPARSEGPT = Update(
    name="sparsegpt",
    prune=prune,
    statistic=Gram,
    changes_weights=lambda _: True,
    check=check,
    parameters=SparseGptParameters,
    summary="kept weights compensate, column by column",
    citation=Citation(text="Frantar & Alistarh 2023", url="https://arxiv.org/abs/2301.00774"),
)
