"""Distillation: train the kept weights of the last blocks together so that the pruned model predicts what the dense model predicts.

    min mean_t KL(p_t || p'_t)  over the kept weights, by Adam      # Hinton et al. 2015, arXiv:1503.02531, at temperature 1

For token t, p is the dense model's distribution of the next token and p' is the pruned model's. A reconstruction also matches hidden
states in directions that do not change the predictions; a distillation does not.

One block at a time is loaded. Each step runs one window forward block by block and stores the input of each block, then goes backward
block by block and runs each block again for its gradients. Kept weights, the best of them so far, their indices and Adam's moments
are in a GPU's memory as far as they fit, else in host memory, or in files once the memory budget is used up; a step computes on the
device.

Weights are learned in balanced coordinates, and the windows held out judge, see learning.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import log_softmax

from stages.checkpoint.delta import Change
from stages.devices import to_host
from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.learning import Balance, Outcome, checks, next_rate
from stages.pruning.reconstruction import BETAS, mean_over_processes, schedule
from stages.streaming.architecture import Matrix
from stages.streaming.calls import run_block
from stages.streaming.decoder import TOKENS_AT_ONCE, Decoder
from stages.streaming.stream import Stream, read_ahead

SPARE = 8  # a step's temporary tensors: of a block's weights in float32 so many times


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of a distillation.

    first: index of the first trained block; all later blocks are trained, too.
    epochs: passes over the calibration windows, one window a step, above 0; at least one step is made.
    learning_rate: that of the first step, above 0, as a fraction of the size of the balanced weights, see learning; it falls linearly
        to 0.
    """

    first: int
    epochs: float
    learning_rate: float


class DistilledBlocks:
    """The outcome of a distillation.

    first: index of the first trained block. outcome: how it went on the windows held out, nats per token.
    divergences: the divergence before each step of the last rate that was tried, on that step's window, nats per token;
        None where it was no number.
    """

    def __init__(
        self,
        trained: list["_TrainedBlock"],
        changes_of: Callable[[int], dict[str, Change]],
        outcome: Outcome,
        divergences: list[float | None],
    ) -> None:
        self._trained, self._changes_of, self.outcome, self.divergences = trained, changes_of, outcome, divergences
        self.first = trained[0].index

    def changes(self) -> Iterator[tuple[int, dict[str, Change]]]:
        """Yield the index and the changes of each trained block, in order; only the values of kept weights are new.

        Where no rate lowered the divergence on the windows held out, they are the changes that the distillation started from.

        Raises:
            PruningError: a weight is not finite; names the block.
        """
        for block in self._trained:
            initial = self._changes_of(block.index)
            yield block.index, initial if self.outcome.rate is None else block.changes(initial)


def distill(
    stream: Stream,
    targets: torch.Tensor,
    settings: Distillation,
    changes_of: Callable[[int], dict[str, Change]],
    progress: Callable[[list[tuple[int, float]]], Iterable[tuple[int, float]]] = iter,
) -> DistilledBlocks:
    """Train the kept weights of all blocks from `settings.first` on; pruned weights stay exactly zero.

    After every quarter of the steps the windows held out judge, as in reconstruction.reconstruct.

    With N processes, each process takes another window in every step and the gradients are averaged; there are N times fewer steps.

    Args:
        stream: hidden states of the pruned model before the first trained block; not changed.
        targets: [windows, tokens, width], the dense model's output of the last block.
        changes_of: returns the changes of a pruned block, given its index.
        progress: wraps the iteration over the steps, for a progress bar.

    Raises:
        PruningError: the divergence of the pruned model is not finite before anything is learned.
    """
    trained = _trained_blocks(stream, settings, changes_of)
    with torch.no_grad(), stream.decoder.after_blocks():
        before = held_out_divergence(stream, targets, trained)
        if not math.isfinite(before):
            raise PruningError("distillation: found NaN or infinity as the loss of the pruned model, wanted finite logits")
        best, tried, divergences = before, dict[float, float](), list[float]()
        while (rate := next_rate(settings.learning_rate, before, tried)) is not None:
            if tried:
                for block in trained:
                    block.restart(changes_of(block.index))
            tried[rate], divergences, steps = math.inf, [], schedule(stream, settings.epochs, rate)
            for step, (window, step_rate) in enumerate(progress(steps), start=1):
                divergences.append(_step(stream, window, targets[window], trained, step_rate))
                if step not in checks(len(steps)) and math.isfinite(divergences[-1]):
                    continue
                loss = held_out_divergence(stream, targets, trained)
                tried[rate] = min(tried[rate], loss if math.isfinite(loss) else math.inf)
                if loss < best:
                    best = loss
                    for block in trained:
                        block.keep()
                if not loss < before:
                    break
    known = [divergence if math.isfinite(divergence) else None for divergence in divergences]
    return DistilledBlocks(trained, changes_of, Outcome(before=before, tried=tried), known)


class _TrainedBlock:
    """The kept weights of one block, concatenated over its pruned tensors in the order of the checkpoint.

    Args:
        stream: allocates buffers. changes: those of the pruned block. tensors: the block's tensors as stored in the base.
    """

    def __init__(self, stream: Stream, index: int, changes: dict[str, Change], tensors: dict[str, torch.Tensor]) -> None:
        self.decoder, self.index = stream.decoder, index
        self.shapes = {name: change.shape for name, change in changes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.counts = [int(change.mask.sum()) for change in changes.values()]
        self.untrained = {name: tensor for name, tensor in tensors.items() if name not in changes}
        kept, weights, device = sum(self.counts), sum(self.sizes), self.decoder.device
        spare = SPARE * weights * torch.float32.itemsize + self.decoder.head_bytes
        self.indices = stream.learner_buffer((kept,), torch.int32 if weights < 2**31 else torch.int64, spare)
        self.kept_weights, self.best, *self.moments = (stream.learner_buffer((kept,), torch.float32, spare) for _ in range(4))
        for indices, start, change in zip(self.indices.split(self.counts), self._starts(), changes.values(), strict=True):
            indices.copy_(change.mask_on(device).flatten().nonzero()[:, 0] + start)
        self.balance = Balance()
        for name, change in changes.items():
            dense = change.reorder(tensors[name].to(device))
            for matrix in (matrix for matrix in self.matrices if matrix.tensor == name):
                self.balance.add(matrix, matrix.stored_in(dense).float())
        self._start(changes, tensors)

    @property
    def matrices(self) -> list[Matrix]:
        return self.decoder.matrices[self.index]

    def restart(self, changes: dict[str, Change]) -> None:
        """Begin again with the weights that pruning left, as if no step had been made."""
        self._start(changes, self.decoder.read(self.index))

    def _start(self, changes: dict[str, Change], tensors: dict[str, torch.Tensor]) -> None:
        device = self.decoder.device
        weights = {name: change.apply(tensors[name].to(device)).float() for name, change in changes.items()}
        self.balance.divide(self._views(weights))
        for kept_weights, (name, change) in zip(self.kept_weights.split(self.counts), changes.items(), strict=True):
            kept_weights.copy_(weights[name][change.mask_on(device)])
        for moment in self.moments:
            moment.zero_()
        self.steps = torch.zeros((), device=device)

    def keep(self) -> None:
        """Remember the current weights: they are the best so far."""
        self.best.copy_(self.kept_weights)

    def _views(self, tensors: dict[str, torch.Tensor]) -> list[tuple[Matrix, torch.Tensor]]:
        """Every matrix with its view, [rows, columns], of tensors that are laid out like the checkpoint's, by their names."""
        return [(matrix, matrix.stored_in(tensors[matrix.tensor])) for matrix in self.matrices]

    def _starts(self) -> list[int]:
        """Index of each tensor's first weight in the concatenation of all weights."""
        return list(accumulate(self.sizes[:-1], initial=0))

    def _by_tensor(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a flat tensor of all weights into views: name in the checkpoint -> tensor."""
        pieces = zip(weights.split(self.sizes), self.shapes.items(), strict=True)
        return {name: piece.view(shape) for piece, (name, shape) in pieces}

    def loaded(self, *, rounded: bool = False) -> AbstractContextManager[nn.Module]:
        """Load the block with the current kept weights, pruned weights exactly zero, and untrained tensors as stored.

        Args:
            rounded: to the checkpoint's dtype, as the delta will have them.
        """
        tensors = self._by_tensor(self._weights(self.kept_weights))
        if rounded:
            tensors = {name: tensor.to(self.decoder.checkpoint.dtype(name)) for name, tensor in tensors.items()}
        return self.decoder.loaded(self.index, self.untrained | tensors)

    def _weights(self, balanced: torch.Tensor) -> torch.Tensor:
        """All weights of the block's pruned tensors, flat, on the device, from balanced kept weights."""
        device = self.decoder.device
        indices, balanced = (tensor.to(device, non_blocking=True) for tensor in (self.indices, balanced))
        weights = torch.zeros(sum(self.sizes), device=device).index_copy_(0, indices.long(), balanced)
        self.balance.multiply(self._views(self._by_tensor(weights)))
        return weights

    def step(self, gradients: dict[str, torch.Tensor], rate: float) -> None:
        """Make a step of Adam.

        Args:
            gradients: name of the parameter in the block -> gradient on this process's window, in the parameter's shape; emptied, so that
                their memory is free as soon as they are copied.
            rate: the learning rate.
        """
        device = self.decoder.device
        flat = torch.empty(sum(self.sizes), device=device)
        by_tensor = self._by_tensor(flat)
        for matrix in self.matrices:
            matrix.stored_in(by_tensor[matrix.tensor]).copy_(matrix.part_of(gradients[matrix.parameter_slice.name]))
        gradients.clear()
        self.balance.multiply(self._views(by_tensor))
        stored = (self.kept_weights, *self.moments)
        kept_weights, first_moment, second_moment = (tensor.to(device, non_blocking=True) for tensor in stored)
        kept_weights.grad = distributed.all_reduce_mean(flat.index_select(0, self.indices.to(device, non_blocking=True)))
        optimiser = torch.optim.Adam([kept_weights], lr=rate, betas=BETAS, fused=True)
        optimiser.state[kept_weights] = {"step": self.steps, "exp_avg": first_moment, "exp_avg_sq": second_moment}
        optimiser.step()
        kept_weights.grad = None
        for tensor, changed in zip(stored, (kept_weights, first_moment, second_moment), strict=True):
            if tensor is not changed:
                tensor.copy_(changed)

    def changes(self, initial: dict[str, Change]) -> dict[str, Change]:
        """The block's changes with the best kept weights, in the checkpoint's dtype.

        Raises:
            PruningError: a weight is not finite; names the block.
        """
        kept_weights = self._weights(self.best).index_select(0, self.indices.to(self.decoder.device).long())
        pieces = zip(self.shapes, kept_weights.split(self.counts), strict=True)
        values = {name: to_host(piece.to(self.decoder.checkpoint.dtype(name))) for name, piece in pieces}
        if not all(torch.isfinite(kept).all() for kept in values.values()):
            raise PruningError(f"block {self.index}: found NaN or infinity in its distillation, wanted finite weights")
        return {name: initial[name].with_values(kept) for name, kept in values.items()}


def _trained_blocks(stream: Stream, settings: Distillation, changes_of: Callable[[int], dict[str, Change]]) -> list[_TrainedBlock]:
    """Make all trained blocks; for where their buffers are, see Stream.learner_buffer."""
    indices = range(settings.first, len(stream.decoder.blocks))
    with read_ahead(stream.decoder, indices) as blocks:
        return [_TrainedBlock(stream, index, changes_of(index), tensors) for index, tensors in zip(indices, blocks, strict=True)]


def _step(stream: Stream, window: int, target: torch.Tensor, trained: list[_TrainedBlock], rate: float) -> float:
    """Run one window forward and backward. Returns the divergence before the step, nats per token, the mean over all processes."""
    hidden, _ = stream.window(trained[0].index, window)
    block_inputs, gradient, divergence = [hidden], None, torch.zeros((), dtype=torch.float64)
    for current in trained[:-1]:
        with current.loaded() as block:
            block_inputs.append(run_block(block, block_inputs[-1], stream.call(current.index, slice(window, window + 1))))
    for current in reversed(trained):
        with current.loaded() as block:
            names = list(dict.fromkeys(matrix.parameter_slice.name for matrix in stream.decoder.matrices[current.index]))
            parameters = [block.get_parameter(name).requires_grad_() for name in names]
            hidden = block_inputs.pop().detach().requires_grad_()
            with torch.enable_grad():
                output = run_block(block, hidden, stream.call(current.index, slice(window, window + 1)))
            if gradient is None:
                divergence, gradient = divergence_and_gradient(stream.decoder, output.detach(), target)
            gradient, *by_parameter = torch.autograd.grad(output, [hidden, *parameters], gradient, materialize_grads=True)
            gradients = dict(zip(names, by_parameter, strict=True))
            del by_parameter
            current.step(gradients, rate)
    return float(distributed.all_reduce_mean(divergence))


@torch.no_grad()
def held_out_divergence(stream: Stream, targets: torch.Tensor, trained: list[_TrainedBlock]) -> float:
    """The divergence on the windows held out of all processes, with the current weights, nats per token.

    Raises:
        ValueError: no window is held out.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for window in stream.held_out:
        hidden, _ = stream.window(trained[0].index, window)
        for current in trained:
            with current.loaded(rounded=True) as block:
                hidden = run_block(block, hidden, stream.call(current.index, slice(window, window + 1)))
        total += torch.tensor([divergence(stream.decoder, hidden, targets[window]), 1], dtype=torch.float64)
    return mean_over_processes(total)


def divergence(decoder: Decoder, hidden: torch.Tensor, target: torch.Tensor) -> float:
    """KL(p || p'), its mean over tokens, nats. Args: see divergence_and_gradient."""
    total = 0.0
    for start in range(0, hidden.shape[1], TOKENS_AT_ONCE):
        tokens = slice(start, start + TOKENS_AT_ONCE)
        dense_logs = log_softmax(decoder.logits(target[None, tokens].to(hidden.device)).float(), dim=-1)
        pruned_logs = log_softmax(decoder.logits(hidden[:, tokens]).float(), dim=-1)
        total += pruned_logs.neg_().add_(dense_logs).mul_(dense_logs.exp_()).sum().item()
    return total / hidden.shape[1]


def divergence_and_gradient(decoder: Decoder, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || p'), its mean over tokens, and the gradient of its sum over tokens with respect to the last block's output.

    The gradient is of the sum: Adam is not changed by a common factor, and float16 would round the small gradients of a mean to 0.

    Args:
        decoder: with weights after the blocks.
        hidden: [1, tokens, width], the last block's output. target: [tokens, width], the dense model's.

    Returns:
        Nats, [], float64; and [1, tokens, width], in the dtype of `hidden`.
    """
    divergence, gradient = torch.zeros((), dtype=torch.float64), torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], TOKENS_AT_ONCE):
        tokens = slice(start, start + TOKENS_AT_ONCE)
        dense_logs = log_softmax(decoder.logits(target[None, tokens].to(hidden.device)).float(), dim=-1)
        with torch.enable_grad():
            leaf = hidden[:, tokens].detach().requires_grad_()
            logits = decoder.logits(leaf)
        pruned_logs = log_softmax(logits.detach().float(), dim=-1)
        difference = dense_logs - pruned_logs
        dense = dense_logs.exp_()
        divergence += difference.mul_(dense).sum().double().cpu()
        by_logits = pruned_logs.exp_().sub_(dense)
        (gradient[:, tokens],) = torch.autograd.grad(logits, leaf, by_logits.to(logits))
    return divergence / hidden.shape[1], gradient
