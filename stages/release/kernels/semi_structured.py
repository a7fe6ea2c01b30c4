"""torch's semi-structured tensors: two of four consecutive inputs, and two bits for the place of each; multiplied by sparse tensor cores.

On CUDA the weight becomes a tensor of torch.sparse.to_sparse_semi_structured, and the layer stays a torch.nn.Linear. Elsewhere no kernel
exists: the parts of the layout of CUTLASS are kept, made by the same code of torch, and the weight is restored from them for the product.
"""

import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from stages.release.kernels.layer import ConvertedLinear

KEPT, GROUP = 2, 4
DTYPES = (torch.float16, torch.bfloat16)  # in float32 the hardware keeps one of two


class SemiStructured(ConvertedLinear):
    """A linear layer whose weight is kept in the layout of CUTLASS.

    Attributes:
        values: [rows, columns / 2], the weight's dtype. places: [rows, columns / 16], int16.
    """

    values: torch.Tensor
    places: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Args: weight: [rows, columns]. bias: [rows]."""
        values, places = sparse_semi_structured_from_dense_cutlass(weight.detach())
        super().__init__(bias, values=values, places=places)

    def dense(self) -> torch.Tensor:
        """[rows, columns]."""
        weight: torch.Tensor = sparse_semi_structured_to_dense_cutlass(self.values, self.places)
        return weight


def on_cuda(linear: torch.nn.Linear) -> torch.nn.Linear:
    """The same layer, its weight a semi-structured tensor."""
    linear.weight = torch.nn.Parameter(to_sparse_semi_structured(linear.weight.detach()), requires_grad=False)
    return linear


def reason_against(weight: torch.Tensor) -> str | None:
    """Why torch's kernels do not take a weight, [rows, columns]; None: they do."""
    if weight.dtype not in DTYPES:
        return f"weights of {weight.dtype}"
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = weight.shape
    if rows % limits.sparse_min_rows or columns % limits.sparse_min_cols:
        return f"a shape of {rows} x {columns}, wanted multiples of {limits.sparse_min_rows} x {limits.sparse_min_cols}"
    if ((weight != 0).reshape(rows, -1, GROUP).sum(-1) > KEPT).any():
        return f"more than {KEPT} of {GROUP} consecutive inputs kept somewhere"
    return None
