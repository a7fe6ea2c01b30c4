"""MACKO: kept values, and for each the zeros before it in four bits. Vladimír Macko and Vladimír Boža, arXiv:2511.13061, section 3.

The layout is that of the package macko_spmv 0.2.0 (MIT), whose kernel for CUDA multiplies a matrix in it with one vector. A row's values
are stored one after the other, each with the number of zeros since the one before, 0 to 15; after 15 zeros a sixteenth is stored as a
value.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from stages.release.kernels.layer import ConvertedLinear

PACKAGE = "macko_spmv"
DTYPE = torch.float16
LONGEST = 16  # elements that one stored value stands for: itself and up to 15 zeros before it
MULTIPLE = 8  # the arrays are filled up to this many values


class Macko(ConvertedLinear):
    """A linear layer whose weight is kept in the layout.

    With the package and on CUDA a single token is multiplied by its kernel; else the weight is restored for the product and dropped.

    Attributes:
        values: [stored], float16. deltas: [stored / 2], uint8, the first of two values in the low four bits.
        row_indices: [rows + 1], int32, into values.
    """

    values: torch.Tensor
    deltas: torch.Tensor
    row_indices: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Args: weight: [rows, columns], float16. bias: [rows]."""
        values, deltas, row_indices = encode(weight)
        super().__init__(bias, values=values, deltas=deltas, row_indices=row_indices)
        self.rows, self.columns = weight.shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., rows]."""
        if inputs.numel() == self.columns and inputs.is_cuda and find_spec(PACKAGE):
            outputs = self._by_kernel(inputs.reshape(-1)).reshape(*inputs.shape[:-1], self.rows)
            return outputs if self.bias is None else outputs + self.bias
        return super().forward(inputs)

    def _by_kernel(self, vector: torch.Tensor) -> torch.Tensor:
        parts = (self.values, self.deltas, self.row_indices, self.rows, self.columns)
        multiply = import_module(PACKAGE).multiply  # the first import compiles its kernels, for which it needs CUDA
        outputs: torch.Tensor = multiply(parts, vector.contiguous())
        return outputs

    def dense(self) -> torch.Tensor:
        """[rows, columns]."""
        return decode(self.values, self.deltas, self.row_indices, self.columns)


def encode(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        matrix: [rows, columns], float16.

    Returns:
        values, deltas and row_indices as in `Macko`.

    Raises:
        ValueError: of another dtype.
    """
    if matrix.dtype != DTYPE:
        raise ValueError(f"MACKO: found {matrix.dtype}, wanted {DTYPE}")
    rows, columns = matrix.nonzero(as_tuple=True)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    before = torch.where(first, -1, columns.roll(1))
    gaps = columns - before - 1
    places = torch.arange(len(rows), device=matrix.device) + (gaps // LONGEST).cumsum(0)
    stored = int(places[-1]) + 1 if len(places) else 0
    size = -(-stored // MULTIPLE) * MULTIPLE
    deltas = torch.zeros(size, dtype=torch.uint8, device=matrix.device)
    deltas[:stored] = LONGEST - 1
    deltas[places] = (gaps % LONGEST).to(torch.uint8)
    values = torch.zeros(size, dtype=DTYPE, device=matrix.device)
    values[places] = matrix[rows, columns]
    ends = torch.zeros(len(matrix) + 1, dtype=torch.int64, device=matrix.device)
    last = torch.ones_like(first)
    last[:-1] = first[1:]
    ends[rows[last] + 1] = places[last] + 1
    return values, deltas[0::2] | (deltas[1::2] << 4), ends.cummax(0).values.to(torch.int32)


def decode(values: torch.Tensor, deltas: torch.Tensor, row_indices: torch.Tensor, columns: int) -> torch.Tensor:
    """The matrix, [rows, columns], float16, of what `encode` gives."""
    rows = len(row_indices) - 1
    stored = int(row_indices[-1])
    steps = torch.stack((deltas & 15, deltas >> 4), dim=1).reshape(-1)[:stored].long() + 1
    ends = torch.cat((steps.new_zeros(1), steps.cumsum(0)))
    starts = row_indices.long()
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), starts.diff())
    column = ends[1:] - ends[starts[:-1]][row] - 1
    matrix = values.new_zeros(rows, columns)
    matrix[row, column] = values[:stored]
    return matrix
