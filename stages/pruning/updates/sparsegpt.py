"""SparseGPT: sweep over the columns; what a dropped weight did, the columns to its right take over.

    E_j = (W_j - W'_j) / U_jj,   W_k -= E_j U_jk  for all k > j     # Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1

with U the upper Cholesky factor of the inverse Gram matrix.
"""

from collections.abc import Callable

import torch

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
    weight, mask = weight.clone(), torch.empty_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if (j - start) % decision_columns == 0:
                stop = min(j + decision_columns, end)
                mask[:, j:stop] = choose(weight[:, j:stop], diagonal[j:stop], j)
            error = weight[:, j].masked_fill(mask[:, j], 0) / diagonal[j]
            weight[:, j:end].addr_(error, factor[j, j:end], alpha=-1)
            weight[:, j].masked_fill_(~mask[:, j], 0)
            errors[:, j - start] = error
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return mask, weight
