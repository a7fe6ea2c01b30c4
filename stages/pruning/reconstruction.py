"""Sub-block reconstruction: the survivors of a part of a block learn to give the dense part's outputs, for a few passes.

    min E_t ||y_t - y'_t||² / ||h_t||²  over the kept weights of the part, by Adam      # after Kim et al. 2025, arXiv:2510.14444

y: the part's output with dense weights, y': with pruned ones, both for the inputs that the pruned model gives it. h: what enters
the block, by whose size the norm before the next layer divides, so that a few tokens of huge activations do not own the loss.
"""

from dataclasses import dataclass

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import ranks
from stages.streaming.architecture import Call, run_block
from stages.streaming.stream import Stream

BETAS = (0.9, 0.99)  # of Adam; there are tens of steps, not thousands


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How long and how fast: passes over the calibration windows, one window a step; the rate of the first step falls to 0."""

    epochs: int
    learning_rate: float


class _Reached(Exception):
    """Raised when a part has given its output: nobody needs what comes after it."""


def part_output(block: nn.Module, path: str, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """What a part of a block puts out.

    Args:
        path: the module's name inside the block; "" for the block itself.
        hidden: [windows, tokens, width], what the block is given.

    Returns:
        The part's output, its first where it has several.
    """
    if not path:
        return run_block(block, hidden, call)
    outputs: list[torch.Tensor] = []

    def reached(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)
        raise _Reached

    hook = block.get_submodule(path).register_forward_hook(reached)
    try:
        run_block(block, hidden, call)
    except _Reached:
        pass
    finally:
        hook.remove()
    return outputs[0]


def reconstruct(
    stream: Stream,
    index: int,
    block: nn.Module,
    path: str,
    masks: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    targets: torch.Tensor,
    how: Reconstruction,
) -> None:
    """Train the kept weights of a part; dropped ones stay exactly zero.

    Several processes each take a window of their own a step and average the gradients: N of them take N times fewer steps.

    Args:
        stream: what the pruned blocks before this one give.
        block: loaded; the part's matrices follow the training, rounded to the compute dtype, its other weights stay.
        path: of the part, see part_output.
        masks: by the name of a parameter inside the block, in its shape, bool, True = kept.
        values: likewise, float32, where the training starts; changed in place.
        targets: [windows, tokens, width], the part's dense outputs.

    Raises:
        PruningError: the weights found are not finite.
    """
    parameters, kept = [block.get_parameter(name).requires_grad_() for name in masks], list(masks.values())
    masters = [values[name] for name in masks]
    optimiser = torch.optim.Adam(masters, lr=how.learning_rate, betas=BETAS)
    order = _order(len(stream.hidden), how.epochs * (stream.all_windows // ranks.count()))
    for step, window in enumerate(order):
        hidden, call = stream.window(index, window)
        with torch.enable_grad():
            output = part_output(block, path, hidden, call)
            weight = 1 / hidden.float().square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            lost = (output.float().view_as(hidden) - targets[window].to(hidden.device)).square().sum(dim=-1)
            gradients = torch.autograd.grad((lost * weight).mean(), parameters)
        for master, gradient, mask in zip(masters, gradients, kept, strict=True):
            master.grad = ranks.all_sum(gradient.float().mul_(mask).div_(ranks.count()))
        optimiser.param_groups[0]["lr"] = how.learning_rate * (1 - step / len(order))
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


def _order(windows: int, steps: int) -> list[int]:
    """The window of each step: all in turn, every pass in another order."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(windows, generator=generator).tolist()
    return order[:steps]
