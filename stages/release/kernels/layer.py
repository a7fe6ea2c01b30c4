"""A linear layer whose weight is kept in the layout of a kernel."""

from abc import ABC, abstractmethod

import torch


class ConvertedLinear(torch.nn.Module, ABC):
    """The weight's parts are buffers; for a product the weight is restored from them and dropped.

    Args:
        bias: [rows], or None. parts: name of a buffer -> the part.
    """

    def __init__(self, bias: torch.Tensor | None, **parts: torch.Tensor) -> None:
        super().__init__()
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        for name, part in parts.items():
            self.register_buffer(name, part)

    @property
    def nbytes(self) -> int:
        """Of the weight's parts."""
        return sum(part.nbytes for part in self.buffers())

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The weight, [rows, columns]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., rows]."""
        return torch.nn.functional.linear(inputs, self.dense(), self.bias)
