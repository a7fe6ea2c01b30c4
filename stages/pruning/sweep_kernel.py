"""SparseGPT's sweep of a block of columns as one kernel of a GPU, where the loop launches several for each column.

Each program of the kernel has some rows of the matrix, with all columns of the block in registers. Import it where `triton` is, which
comes with torch's builds for NVIDIA GPUs; it builds kernels with the machine's C compiler and Python's headers.
"""

import logging
from functools import cache

import torch
import triton
import triton.language as tl

log = logging.getLogger(__name__)

ROWS = 16  # of a program
WIDEST = 256  # columns of a block: more would not fit into the registers
LARGEST_GROUP = 16  # columns of a group: in a larger one each weight would be compared with too many


def sweep(weight: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, *, kept: int = 0, group: int = 0) -> torch.Tensor:
    """Sweep a block, as the loop in updates/sparsegpt.py does, up to rounding.

    Args:
        weight: [columns, rows], float32, contiguous; changed in place: what the columns to the left make of each. Pruned weights are
            not set to zero.
        mask: [columns, rows], bool, contiguous, True = kept: given; with groups it is an output.
        factor: [columns, columns], float32, the block's part of U.
        kept, group: N and M, where the sweep itself chooses N of every M columns by the score `obs`; a group of 0: the mask is given.

    Returns:
        The errors that the columns to the right of the block take over, [columns, rows], float32.
    """
    columns, rows = weight.shape
    errors = torch.empty_like(weight)
    _sweep[(triton.cdiv(rows, ROWS),)](
        weight,
        mask.view(torch.uint8),
        factor,
        errors,
        rows,
        factor.stride(0),
        factor.stride(1),
        COLUMNS=columns,
        WIDTH=triton.next_power_of_2(columns),
        ROWS=ROWS,
        KEPT=kept,
        GROUP=group,
        num_warps=1,
    )
    return errors


@cache
def is_built(device: torch.device) -> bool:
    """Whether triton can build the kernel here; says so where it cannot."""
    columns, mask = torch.ones(2, ROWS, device=device), torch.ones(2, ROWS, dtype=torch.bool, device=device)
    try:
        with torch.cuda.device(device):
            sweep(columns, mask, torch.eye(2, device=device))
    except Exception as error:  # noqa: BLE001  of a compiler, of the system or of triton, which says what is missing
        log.warning("no kernel for SparseGPT's sweep, columns are swept one by one: triton cannot build it (%s)", str(error).split("\n")[0])
        return False
    return True


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    weight,
    mask,
    factor,
    errors,
    rows,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # COLUMNS or the next power of two
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row, is_column = row < rows, column < COLUMNS
    offsets = column[:, None] * rows + row[None, :]
    inside = is_column[:, None] & is_row[None, :]
    tile = tl.load(weight + offsets, mask=inside, other=0.0)
    diagonal = tl.load(factor + column * (row_stride + column_stride), mask=is_column, other=1.0)
    above = tl.zeros([WIDTH, ROWS], tl.int32)  # weights of the same group that are kept before it
    for j in range(COLUMNS):
        of_column = column[:, None] == j
        if GROUP > 0:
            if j % GROUP == 0:
                scores = tl.div_rn(tile * tile, (diagonal * diagonal)[:, None] + tl.zeros([WIDTH, ROWS], tl.float32))
                above = tl.zeros([WIDTH, ROWS], tl.int32)
                for other in range(j, j + GROUP):
                    score = tl.sum(tl.where(column[:, None] == other, scores, 0.0), axis=0)[None, :]
                    later_and_equal = (score == scores) & (column[:, None] < other)
                    above += ((score > scores) | later_and_equal).to(tl.int32)
            is_kept = tl.sum(tl.where(of_column, above, 0), axis=0) < KEPT
            tl.store(mask + j * rows + row, is_kept.to(tl.uint8), mask=is_row)
        else:
            is_kept = tl.load(mask + j * rows + row, mask=is_row, other=1) != 0
        weights = tl.sum(tl.where(of_column, tile, 0.0), axis=0)
        divisor = tl.load(factor + j * (row_stride + column_stride))
        error = tl.div_rn(tl.where(is_kept, 0.0, weights), divisor + tl.zeros([ROWS], tl.float32))
        tl.store(errors + j * rows + row, error, mask=is_row)
        to_the_right = tl.load(factor + j * row_stride + column * column_stride, mask=is_column & (column > j), other=0.0)
        tile -= to_the_right[:, None] * error[None, :]
    tl.store(weight + offsets, tile, mask=inside)
