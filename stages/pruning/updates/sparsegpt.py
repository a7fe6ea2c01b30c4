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
from stages.pruning.gpu_sweep import has_kernel, sweep
from stages.pruning.patterns import Nm, Pattern
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
    weight: torch.Tensor, factor: torch.Tensor, choose: ChooseMask, decision_columns: int, block_size: int, nm: Nm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune the columns from left to right; the columns to the right compensate.

    Args:
        weight: [rows, columns], float32; not changed.
        factor: [columns, columns], float32, U.
        choose: called with the current weights of some columns, [rows, some columns], U's diagonal there and the index of the
            first of them; returns their mask.
        decision_columns: number of columns whose mask is chosen together; divides block_size or equals it.
        block_size: columns swept before the rest of the matrix is updated.
        nm: the pattern by which `choose` chooses from the score `obs`, if it is that of all rows; a GPU's kernel needs no `choose` then.

    Returns:
        mask [rows, columns], bool, True = kept; weights [rows, columns], float32, zero where the mask is False.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    weight = weight.T.contiguous()  # a column of W, which every step works on, is then a run of memory
    blocks = _Blocks(weight, torch.empty_like(weight, dtype=torch.bool), factor, choose, decision_columns, nm)
    sweep_block = blocks.sweep_by_kernel if blocks.have_kernel(block_size) else blocks.sweep_by_columns
    for start in range(0, len(weight), block_size):
        end = min(start + block_size, len(weight))
        weight[end:].addmm_(factor[start:end, end:].T, sweep_block(start, end), alpha=-1)
    return blocks.mask.T.contiguous(), weight.mul_(blocks.mask).T.contiguous()


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A matrix whose blocks of columns are swept one after another; weight and mask are [columns, rows], for the others see sparsegpt.

    A sweep changes the weights and the mask of the columns from start to end, and returns E of these, [columns of the block, rows].
    """

    weight: torch.Tensor
    mask: torch.Tensor
    factor: torch.Tensor
    choose: ChooseMask
    decision_columns: int
    nm: Nm | None

    def sweep_by_columns(self, start: int, end: int) -> torch.Tensor:
        """Sweep column after column."""
        weight, mask, factor, decision = self.weight, self.mask, self.factor, self.decision_columns
        diagonal, errors = factor.diagonal(), torch.empty_like(weight[start:end])
        for first, last in _strips(start, end, decision):
            for j in range(first, last):
                if (j - start) % decision == 0:
                    stop = min(j + decision, end)
                    mask[j:stop] = self.choose(weight[j:stop].T, diagonal[j:stop], j).T
                torch.mul(weight[j], ~mask[j], out=errors[j - start])
                errors[j - start] /= diagonal[j]
                weight[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - start], alpha=-1)
            strip = errors[first - start : last - start]
            weight[last:end].addmm_(factor[first:last, last:end].T, strip, alpha=-1)
        return errors

    def have_kernel(self, block_size: int) -> bool:
        """Whether there is a kernel for this GPU that sweeps such blocks."""
        if self.nm is None and self.decision_columns < block_size:  # masks are chosen one after another, by no pattern that it knows
            return False
        return has_kernel(self.weight.device, block_size, self.nm.group if self.nm else 0)

    def sweep_by_kernel(self, start: int, end: int) -> torch.Tensor:
        """The same by one kernel of a GPU; masks differ where scores are equal up to rounding."""
        weight, mask, factor = self.weight[start:end], self.mask[start:end], self.factor[start:end, start:end]
        if self.nm is None:
            mask.copy_(self.choose(weight.T, factor.diagonal(), start).T)
            return sweep(weight, mask, factor)
        errors = sweep(weight, mask, factor, kept=self.nm.kept, group=self.nm.group)
        if not torch.isfinite(weight).all():
            raise ValueError("found a score that is NaN or infinite, wanted finite scores")
        return errors


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

    block_size = method.update.block_size
    decision = block_size if mask_before is not None else min(pattern.decision_columns(block_size) for pattern in patterns)
    chosen_by, *others = patterns
    nm = chosen_by if in_sweep and isinstance(chosen_by, Nm) and all(pattern == chosen_by for pattern in others) else None
    mask, updated = sparsegpt(live, factor, choose, decision, block_size, nm)
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
