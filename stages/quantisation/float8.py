"""Round matrices to floats of 8 bits, E4M3, with a scale for each output channel.

    s_i = max_j |W_ij| / 448     rounded to the dtype of W; 448 is the largest E4M3
    Q_ij = round(W_ij / s_i)     W_ij ~ s_i Q_ij, and 0 stays exactly 0

The inputs of a layer stay as they are. Micikevicius et al. 2022, arxiv.org/abs/2209.05433.
"""

import torch

from stages.checkpoint.delta import SparseDelta
from stages.errors import ArchitectureError

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix.

    Args:
        weight: [rows, columns], finite floats; a row is an output channel.

    Returns:
        [rows, columns], float8 E4M3, and scales, [rows, 1], dtype of `weight`, above 0.
    """
    limits = torch.finfo(weight.dtype)
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    scales = (largest / LARGEST).clamp(min=limits.tiny).to(weight.dtype)
    return (weight.float() / scales.float()).clamp(-LARGEST, LARGEST).to(DTYPE), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values that codes and scales stand for, [rows, columns], float32."""
    return codes.float() * scales.float()


def require_linear(delta: SparseDelta) -> None:
    """Refuse a model whose matrices in scope are not those of linear layers, each in a tensor of its own.

    Raises:
        ArchitectureError: names the first that is not.
    """
    for row in delta.matrices:
        if row["transposed"] or row["expert"] is not None or not row["tensor"].endswith(".weight"):
            found = f"found {row['matrix']}, which is transposed or one of several experts in a tensor"
            raise ArchitectureError(f"publish.dtype=float8: {found}, wanted weights of linear layers; set publish.dtype=base")


class Float8:
    """The pruned model's tensors with the matrices in scope rounded, an Apply of stages.checkpoint.model.

    Raises:
        ArchitectureError: see require_linear.
    """

    def __init__(self, delta: SparseDelta) -> None:
        require_linear(delta)
        self._delta = delta

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Args: name: of the tensor in the checkpoint. tensor: the base's. Returns: float32 where it is rounded."""
        changed = self._delta.apply(name, tensor)
        return dequantise(*quantise(changed)) if name in self._delta else changed
