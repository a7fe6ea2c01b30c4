"""Reconstruction: the kept weights of a block are trained to give the dense model's hidden states, for a few passes.

    min E_t ||y_t - y'_t||² / max(||h_t||², ||y_t||²)  over the kept weights, by Adam      # after Wagner et al. 2025, arXiv:2510.14444

y': the block's output for the pruned model's hidden states. y: the dense model's hidden states after the same block, so that a block
also corrects the errors of the blocks before it. h: the block's input. The error of a token is divided by the size of its hidden
states, because a few tokens of huge activations would dominate the loss otherwise.
"""

from dataclasses import dataclass

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import distributed
from stages.streaming.calls import run_block
from stages.streaming.stream import Stream

BETAS = (0.9, 0.99)  # of Adam; there are tens of steps, not thousands


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How long and how fast.

    epochs: passes over the calibration windows, one window a step. learning_rate: of the first step; falls to 0.
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
    how: Reconstruction,
) -> None:
    """Train the kept weights of a block; pruned ones stay exactly zero.

    Several processes each take a window of their own a step and average the gradients: N of them take N times fewer steps.

    Args:
        stream: what the pruned blocks before this one give.
        block: loaded; the pruned matrices follow the training, rounded to the compute dtype, its other weights stay.
        masks: by the name of a parameter inside the block, in its shape, bool, True = kept.
        values: likewise, float32, where the training starts; changed in place.
        targets: [windows, tokens, width], the dense model's hidden states after the block.

    Raises:
        PruningError: the weights found are not finite.
    """
    parameters, kept = [block.get_parameter(name).requires_grad_() for name in masks], list(masks.values())
    masters = [values[name] for name in masks]
    optimiser = torch.optim.Adam(masters, lr=how.learning_rate, betas=BETAS, fused=True)
    for window, rate in schedule(stream, how.epochs, how.learning_rate):
        hidden, call = stream.window(index, window)
        with torch.enable_grad():
            output = run_block(block, hidden, call)
            target = targets[window : window + 1].to(hidden.device)
            gradients = torch.autograd.grad(relative_errors(output.view_as(hidden), target, hidden).mean(), parameters)
        for master, gradient, mask in zip(masters, gradients, kept, strict=True):
            master.grad = distributed.all_reduce_mean(gradient.float().mul_(mask))
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master)
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.requires_grad_(False)
        master.grad = None
    if not all(torch.isfinite(master).all() for master in masters):
        name = next(iter(masks))
        raise PruningError(
            f"block {index}: found NaN or infinity in the reconstruction of {name} and what goes with it, wanted finite weights"
        )


def relative_errors(output: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """||y - y'||² / max(||h||², ||y||²) of each token, times the width.

    Args:
        output: y', target: y, hidden: h, [windows, tokens, width], on one device, any float dtype; the first may need gradients.

    Returns:
        [windows, tokens], float32.
    """
    target = target.float()
    size = torch.maximum(hidden.float().square().mean(dim=-1), target.square().mean(dim=-1))
    lost = (output.float() - target).square().sum(dim=-1)
    return lost / size.clamp_min(torch.finfo(torch.float32).tiny)


def schedule(stream: Stream, epochs: float, learning_rate: float) -> list[tuple[int, float]]:
    """This process's window of each step and the learning rate, which falls to 0; as many steps as every other process makes.

    All windows come in turn, in every pass in another order; where the processes do not divide them, a pass leaves some out.
    """
    generator = torch.Generator().manual_seed(0)
    steps = max(1, round(epochs * (stream.all_windows // distributed.world_size())))
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(len(stream.hidden), generator=generator).tolist()
    return [(window, learning_rate * (1 - step / steps)) for step, window in enumerate(order[:steps])]
