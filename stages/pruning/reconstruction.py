"""Reconstruction: train the kept weights of a pruned block so that its outputs match the dense model's hidden states.

    min E_t ||y_t - y'_t||² / max(||h_t||², ||y_t||²)  over the kept weights, by Adam      # after Wagner et al. 2025, arXiv:2510.14444

For token t, y' is the output of the pruned block on the pruned model's hidden states, y is the dense model's hidden state after the
same block, and h is the pruned block's input. Matching the dense model rather than the dense block also corrects errors of earlier
blocks. Each token's error is divided by the size of its hidden state; otherwise a few tokens with very large activations dominate
the loss.
"""

from dataclasses import dataclass

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.entries import Pruned
from stages.streaming.architecture import Matrix
from stages.streaming.calls import run_block
from stages.streaming.stream import Stream

BETAS = (0.9, 0.99)  # of Adam; there are tens of steps, not thousands


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Settings of a reconstruction.

    epochs: passes over the calibration windows, one window a step, 1 or more.
    learning_rate: that of the first step, above 0; it falls linearly to 0.
    """

    epochs: int
    learning_rate: float


def reconstruct(
    stream: Stream,
    index: int,
    block: nn.Module,
    masks: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    targets: torch.Tensor,
    settings: Reconstruction,
) -> None:
    """Train the kept weights of a block; pruned weights stay exactly zero.

    With N processes, each process takes another window in every step and the gradients are averaged; there are N times fewer steps.

    Args:
        stream: hidden states of the pruned model before the block.
        block: loaded. Its pruned parameters are set to the trained values, in the compute dtype; its other parameters do not change.
        masks: name of the parameter in the block -> bool, in the parameter's shape, True = kept.
        values: name of the parameter in the block -> initial weights, float32, in the parameter's shape; trained in place.
        targets: [windows, tokens, width], the dense model's hidden states after the block.

    Raises:
        PruningError: a trained weight is not finite; names the block and the parameter.
    """
    parameters = [block.get_parameter(name).requires_grad_() for name in masks]
    masters = [values[name] for name in masks]
    optimiser = torch.optim.Adam(masters, lr=settings.learning_rate, betas=BETAS, fused=True)
    for window, rate in schedule(stream, settings.epochs, settings.learning_rate):
        hidden, call = stream.window(index, window)
        with torch.enable_grad():
            output = run_block(block, hidden, call)
            target = targets[window : window + 1].to(hidden.device)
            gradients = torch.autograd.grad(relative_errors(output.view_as(hidden), target, hidden).mean(), parameters)
        for master, gradient, mask in zip(masters, gradients, masks.values(), strict=True):
            master.grad = distributed.all_reduce_mean(gradient.float().mul_(mask))
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master)
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.requires_grad_(False)
        master.grad = None
    for name, master in zip(masks, masters, strict=True):
        if not torch.isfinite(master).all():
            raise PruningError(f"block {index}: found NaN or infinity in the reconstruction of {name}, wanted finite weights")


class BlockTraining:
    """The masks, weights and samples for the reconstruction of a block, collected while its matrices are pruned.

    Args:
        how: the settings. targets: see reconstruct.

    Attributes:
        masks, values: see reconstruct.
    """

    def __init__(self, settings: Reconstruction, targets: torch.Tensor) -> None:
        self.settings, self.targets = settings, targets
        self.masks: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of each matrix: sampled inputs and the dense outputs for them

    def add(self, block: nn.Module, matrix: Matrix, weight: torch.Tensor, pruned: Pruned, sample: torch.Tensor) -> None:
        """Add a matrix before its pruned weights are written into the block.

        Args:
            weight: the dense matrix, [rows, columns], float32. sample: inputs for measuring its error, [tokens, columns], float32.
        """
        name = matrix.parameter_slice.name
        if name not in self.masks:
            parameter = block.get_parameter(name)
            self.masks[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            self.values[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        matrix.part_of(self.masks[name]).copy_(pruned.mask)
        matrix.part_of(self.values[name]).copy_(weight.masked_fill(~pruned.mask, 0) if pruned.values is None else pruned.values)
        self._samples[matrix.name] = sample, sample @ weight.T

    def squared_errors(self, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
        """||(W - W') X||_F² and ||W X||_F² of a matrix on its sample, [2], float64, on the CPU.

        Args:
            values: W' after the training, [rows, columns], float32.
        """
        inputs, outputs = self._samples[matrix.name]
        norms = [torch.linalg.vector_norm(difference) for difference in (inputs @ values.T - outputs, outputs)]
        return torch.stack(norms).double().square().cpu()


def relative_errors(output: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """||y - y'||² / max(||h||², ||y||²) of each token, times the width.

    Args:
        output: y', target: y, hidden: h, [windows, tokens, width], on one device, any float dtype; the first may need gradients.

    Returns:
        [windows, tokens], float32, 0 or more.
    """
    target = target.float()
    size = torch.maximum(hidden.float().square().mean(dim=-1), target.square().mean(dim=-1))
    squared_error = (output.float() - target).square().sum(dim=-1)
    return squared_error / size.clamp_min(torch.finfo(torch.float32).tiny)


def schedule(stream: Stream, epochs: float, learning_rate: float) -> list[tuple[int, float]]:
    """Compute this process's window and the learning rate of each step.

    Every pass takes the windows in another random order. Every process makes the same number of steps: if the number of processes does
    not divide that of the windows, a pass leaves some windows out. The learning rate falls linearly from the first step's to 0.
    """
    generator = torch.Generator().manual_seed(0)
    steps = max(1, round(epochs * (stream.all_windows // distributed.world_size())))
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(len(stream.hidden), generator=generator).tolist()
    return [(window, learning_rate * (1 - step / steps)) for step, window in enumerate(order[:steps])]
