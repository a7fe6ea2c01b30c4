"""SparseGPT: sweep over the columns; what a dropped weight did, the columns to its right take over.

    E_j = (W_j - W'_j) / U_jj,   W_k -= E_j U_jk  for all k > j     # Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1

with U the upper Cholesky factor of the inverse Gram matrix.
"""

from collections.abc import Callable, Iterator

import torch

STRIP = 32  # columns

ChooseMask = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def sparsegpt(
    weight: torch.Tensor, factor: torch.Tensor, choose: ChooseMask, decision_columns: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune and compensate.

    Args:
        weight: [rows, columns], float32; not changed.
        factor: [columns, columns], float32, U.
        choose: called with the current weights of some columns, U's diagonal there and the first column's number; gives
            their mask.
        decision_columns: how many columns are chosen together; divides block_size, or is it.
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
    """Cut a block into strips within which each column's error goes on at once, and after which it goes on in one product.

    A strip ends where a decision does, so that a decision always sees weights that are up to date.
    """
    width = max(decision_columns, STRIP // decision_columns * decision_columns) if decision_columns < end - start else STRIP
    for first in range(start, end, width):
        yield first, min(first + width, end)
