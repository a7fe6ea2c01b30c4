"""Reconstruction: train the kept weights of a pruned block so that its outputs match the dense model's hidden states.

    min E_t ||y_t - y'_t||² / max(||h_t||², ||y_t||²)  over the kept weights, by Adam      # after Wagner et al. 2025, arXiv:2510.14444

For token t, y' is the output of the pruned block on the pruned model's hidden states, y is the dense model's hidden state after the
same block, and h is the pruned block's input. Matching the dense model rather than the dense block also corrects errors of earlier
blocks. Each token's error is divided by the size of its hidden state; otherwise a few tokens with very large activations dominate
the loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.entries import Pruned
from stages.pruning.learning import Balance, Outcome, checks, factors, first_rate, next_rate
from stages.streaming.architecture import Matrix
from stages.streaming.calls import run_block
from stages.streaming.stream import Stream

BETAS = (0.9, 0.99)  # of Adam; there are tens of steps, not thousands


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Settings of a reconstruction.

    epochs: passes over the calibration windows, one window a step, 1 or more.
    learning_rate: that of the first step, above 0, as a fraction of the size of the balanced weights, see learning; it falls linearly
        to 0.
    search: whether each block searches for a better rate, see learning.factors, and begins with what blocks before it took, see
        learning.first_rate; the first begins with `learning_rate`.
    """

    epochs: int
    learning_rate: float
    search: bool


class BlockTraining:
    """The masks, weights and samples for the reconstruction of a block, collected while its matrices are pruned.

    Args:
        settings: of the reconstruction. block: loaded.
        targets: [windows, tokens, width], the dense model's hidden states after the block.

    Attributes:
        masks: name of the parameter in the block -> bool, in the parameter's shape, True = kept.
        values: name of the parameter in the block -> weights, float32, in the parameter's shape.
        balance: the scales of the matrices.
    """

    def __init__(self, settings: Reconstruction, block: nn.Module, targets: torch.Tensor) -> None:
        self.settings, self.block, self.targets = settings, block, targets
        self.masks: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.balance = Balance()
        self._matrices: list[Matrix] = []
        self._dtypes: dict[str, torch.dtype] = {}  # of the checkpoint, by the parameter's name
        self._samples: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # of each matrix: sampled inputs, the dense outputs

    def add(self, matrix: Matrix, weight: torch.Tensor, pruned: Pruned, samples: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Add a matrix before its pruned weights are written into the block.

        Args:
            weight: the dense matrix, [rows, columns], float32. samples: inputs for measuring its error, [tokens, columns], float32 each.
            dtype: of the checkpoint.
        """
        name = matrix.parameter_slice.name
        self._dtypes[name] = dtype
        if name not in self.masks:
            parameter = self.block.get_parameter(name)
            self.masks[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            self.values[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        matrix.part_of(self.masks[name]).copy_(pruned.mask)
        kept = weight if pruned.values is None else pruned.values
        matrix.part_of(self.values[name]).copy_(kept.masked_fill(~pruned.mask, 0))
        self._samples[matrix.name] = [(sample, sample @ weight.T) for sample in samples]
        self._matrices.append(matrix)
        self.balance.add(matrix, weight)

    def views(self, tensors: dict[str, torch.Tensor]) -> list[tuple[Matrix, torch.Tensor]]:
        """Every matrix with its view, [rows, columns], of tensors in the shapes of the block's parameters, by their names."""
        return [(matrix, matrix.part_of(tensors[matrix.parameter_slice.name])) for matrix in self._matrices]

    def rounded(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights as the delta will have them, rounded to the checkpoint's dtype, float32."""
        return {name: weights.to(self._dtypes[name]).float() for name, weights in values.items()}

    def write(self, values: dict[str, torch.Tensor]) -> None:
        """Set the block's parameters to weights, in the compute dtype; pruned weights are zero in them."""
        for name, weights in values.items():
            self.block.get_parameter(name).data.copy_(weights)

    def squared_errors(self, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
        """||(W - W') X||_F² and ||W X||_F² of a matrix on each of its samples, [samples, 2], float64, on the CPU.

        Args:
            values: W' after the training, [rows, columns], float32.
        """
        pairs = [(inputs @ values.T - outputs, outputs) for inputs, outputs in self._samples[matrix.name]]
        norms = [torch.stack([torch.linalg.vector_norm(difference) for difference in pair]) for pair in pairs]
        return torch.stack(norms).double().square().cpu()


def reconstruct(stream: Stream, index: int, training: BlockTraining, earlier: Sequence[Outcome] = ()) -> Outcome:
    """Train the kept weights of a block; pruned weights stay exactly zero.

    After every quarter of the steps the windows held out judge: the weights that left the least error on them are taken. A rate that
    has not lowered it at such a time is given up; which rate starts again is said by learning.next_rate. If no rate lowers the error,
    the weights stay what they were, to the last bit.

    With N processes, each process takes another window in every step and the gradients are averaged; there are N times fewer steps.

    Args:
        stream: hidden states of the pruned model before the block.
        training: `values` are the initial weights, and the trained ones afterwards; the block's pruned parameters are set to them, in
            the compute dtype. Its other parameters do not change.
        earlier: how the blocks went that were trained before, from the first on.

    Raises:
        PruningError: the error before it is not finite; names the block.
    """
    before = held_out_error(stream, index, training)
    if not math.isfinite(before):
        raise PruningError(f"block {index}: found NaN or infinity in its outputs on the windows held out, wanted finite activations")
    settings, tried = training.settings, dict[float, float]()
    best, least = None, before
    first, ways = settings.learning_rate, tuple[float, ...]()
    if settings.search:
        first, ways = first_rate(first, earlier), factors(earlier)
    while (rate := next_rate(first, before, tried, ways)) is not None:
        tried[rate] = math.inf
        for loss, masters in _trained(stream, index, training, rate):
            tried[rate] = min(tried[rate], loss if math.isfinite(loss) else math.inf)
            if loss < least:
                least, best = loss, {name: master.clone() for name, master in masters.items()}
            if not loss < before:
                break
        del masters  # and their gradients, before the next rate has its own
    if best is not None:
        training.balance.multiply(training.views(best))
        for name, weights in best.items():
            training.values[name].copy_(weights)
    training.write(training.values)
    return Outcome(before=before, tried=tried)


def _trained(stream: Stream, index: int, training: BlockTraining, rate: float) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Train by one rate; yields, as often as `checks` says, the error on the windows held out and the balanced weights so far."""
    masters = {name: weights.clone() for name, weights in training.values.items()}
    training.balance.divide(training.views(masters))
    training.write(training.values)
    parameters = {name: training.block.get_parameter(name).requires_grad_() for name in masters}
    optimiser = torch.optim.Adam(masters.values(), betas=BETAS, fused=True)
    steps = schedule(stream, training.settings.epochs, rate)
    try:
        for step, (window, step_rate) in enumerate(steps, start=1):
            gradients = _gradients(stream, index, training, parameters, window)
            for name, master in masters.items():
                master.grad = gradients[name]
            optimiser.param_groups[0]["lr"] = step_rate
            optimiser.step()
            weights = {name: master.clone() for name, master in masters.items()}
            training.balance.multiply(training.views(weights))
            training.write(weights)
            if step in checks(len(steps)):
                training.write(training.rounded(weights))
                yield held_out_error(stream, index, training), masters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def _gradients(
    stream: Stream, index: int, training: BlockTraining, parameters: dict[str, torch.Tensor], window: int
) -> dict[str, torch.Tensor]:
    """Gradients of one window's error by the balanced kept weights, float32, the mean over all processes; 0 for pruned weights.

    In float16 the sum over tokens is differentiated, and divided in float32: small gradients of a mean would be rounded to 0.
    """
    hidden, call = stream.window(index, window)
    with torch.enable_grad():
        output = run_block(training.block, hidden, call)
        target = training.targets[window : window + 1].to(hidden.device)
        errors = relative_errors(output.view_as(hidden), target, hidden)
        scale = errors.numel() if output.dtype == torch.float16 else 1
        # zeros of what only chooses tokens
        computed = torch.autograd.grad(scale * errors.mean(), list(parameters.values()), materialize_grads=True)
    gradients = {name: gradient.float() / scale for name, gradient in zip(parameters, computed, strict=True)}
    training.balance.multiply(training.views(gradients))
    return {name: distributed.all_reduce_mean(gradient.mul_(training.masks[name])) for name, gradient in gradients.items()}


@torch.no_grad()
def held_out_error(stream: Stream, index: int, training: BlockTraining) -> float:
    """The mean of relative_errors over the windows held out of all processes, with the block's current weights.

    Raises:
        ValueError: no window is held out.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for window in stream.held_out:
        hidden, call = stream.window(index, window)
        target = training.targets[window : window + 1].to(hidden.device)
        errors = relative_errors(run_block(training.block, hidden, call).view_as(hidden), target, hidden)
        total += torch.tensor([errors.sum().item(), errors.numel()], dtype=torch.float64)
    return mean_over_processes(total)


def mean_over_processes(total: torch.Tensor) -> float:
    """The mean over the windows held out of all processes.

    Args:
        total: of this process, the sum and the count, [2], float64; changed in place.

    Raises:
        ValueError: no window is held out.
    """
    amount, count = distributed.all_reduce(total).tolist()
    if not count:
        raise ValueError("found no windows held out, wanted at least one: they judge what is learned")
    return amount / count


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
        order += torch.randperm(len(stream.fitted), generator=generator).tolist()
    return [(window, learning_rate * (1 - step / steps)) for step, window in enumerate(order[:steps])]
