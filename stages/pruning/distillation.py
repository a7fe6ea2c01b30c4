"""Distillation: the survivors of the last blocks learn together to predict what the dense model predicts.

    min E_t KL(p_t || p'_t)  over the kept weights, by Adam      # Hinton et al. 2015, arXiv:1503.02531, at temperature 1

p_t: the dense model's distribution of the token after t, p'_t: the pruned model's. The hidden states of a late block may differ
much where the loss does not, and little where it does; this asks of all of them only what the model is for. In memory are one
block at a time and what comes after the blocks: a window goes forward block by block, what enters each is kept, and then backward
block by block, each run again for its gradients. The survivors, their places and Adam's moments lie in memory or in files.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import log_softmax

from stages.checkpoint.delta import Change
from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.reconstruction import BETAS, schedule
from stages.streaming.calls import run_block
from stages.streaming.decoder import TOKENS_AT_ONCE, Decoder
from stages.streaming.stream import Stream, read_ahead


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Which blocks, how long, how fast.

    first: the block from which on all learn. epochs: passes over the calibration windows, one window a step, at least one step.
    learning_rate: of the first step; falls to 0.
    """

    first: int
    epochs: float
    learning_rate: float


class DistilledBlocks:
    """The outcome. first: the block from which on all learned. divergences: of every step before it was made, nats per token."""

    def __init__(self, learners: list["_Learner"], changes_of: Callable[[int], dict[str, Change]], divergences: list[float]) -> None:
        self._learners, self._changes_of, self.divergences = learners, changes_of, divergences
        self.first = learners[0].index

    def changes(self) -> Iterator[tuple[int, dict[str, Change]]]:
        """Each block that learned, in order: its changes the same but for the survivors' values, in the checkpoint's dtype.

        Raises:
            PruningError: a weight is not finite; names the block.
        """
        for learner in self._learners:
            yield learner.index, learner.changes(self._changes_of(learner.index))


def distill(
    stream: Stream,
    targets: torch.Tensor,
    how: Distillation,
    changes_of: Callable[[int], dict[str, Change]],
    show: Callable[[list[tuple[int, float]]], Iterable[tuple[int, float]]] = iter,
) -> DistilledBlocks:
    """Train the kept weights of all blocks from `how.first` on; dropped ones stay exactly zero.

    Several processes each take a window of their own a step and average the gradients: N of them take N times fewer steps.

    Args:
        stream: what enters the first block that learns; does not move on.
        targets: [windows, tokens, width], what the dense model's last block puts out.
        changes_of: gives what pruning did to a block.
        show: passes the steps through, for a progress bar.

    Raises:
        PruningError: the loss is not finite; names the step.
    """
    learners = _learners(stream, how, changes_of)
    divergences: list[float] = []
    with torch.no_grad(), stream.decoder.after_blocks():
        for step, (window, rate) in enumerate(show(schedule(stream, how.epochs, how.learning_rate))):
            divergences.append(_step(stream, window, targets[window], learners, rate))
            if not math.isfinite(divergences[-1]):
                raise PruningError(f"distillation, step {step}: found NaN or infinity as the loss, wanted finite logits")
    return DistilledBlocks(learners, changes_of, divergences)


class _Learner:
    """What is trained of one block: the survivors of its pruned tensors, one tensor after the other, each as the checkpoint has it.

    Args:
        stream: what goes through the blocks; gives room. changes: what pruning did to the block. tensors: its own, as stored in the base.
    """

    def __init__(self, stream: Stream, index: int, changes: dict[str, Change], tensors: dict[str, torch.Tensor]) -> None:
        self.decoder, self.index = stream.decoder, index
        self.shapes = {name: change.mask.shape for name, change in changes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.counts = [int(change.mask.sum()) for change in changes.values()]
        self.others = {name: tensor for name, tensor in tensors.items() if name not in changes}
        self.places = stream.host_buffer((sum(self.counts),), torch.int32 if sum(self.sizes) < 2**31 else torch.int64)
        self.survivors, first_moment, second_moment = stream.host_buffer((3, sum(self.counts)), torch.float32).zero_()
        parts = zip(self.places.split(self.counts), self.survivors.split(self.counts), self._starts(), changes.items(), strict=True)
        for places, survivors, start, (name, change) in parts:
            places.copy_(change.mask.flatten().nonzero()[:, 0] + start)
            survivors.copy_(change.apply(tensors[name])[change.mask])
        self.optimiser = torch.optim.Adam([self.survivors], betas=BETAS, fused=True)
        self.optimiser.state[self.survivors] = {"step": torch.zeros(()), "exp_avg": first_moment, "exp_avg_sq": second_moment}

    def _starts(self) -> list[int]:
        """Where each tensor begins when one follows the other."""
        return list(accumulate(self.sizes[:-1], initial=0))

    def _by_tensor(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = zip(whole.split(self.sizes), self.shapes.items(), strict=True)
        return {name: part.view(shape) for part, (name, shape) in parts}

    def loaded(self) -> AbstractContextManager[nn.Module]:
        """The block with the survivors as they are now, exact zeros beside them, and all that is not trained as stored."""
        weights = torch.zeros(sum(self.sizes)).index_copy_(0, self.places.long(), self.survivors)
        return self.decoder.loaded(self.index, self.others | self._by_tensor(weights))

    def learn(self, by_parameter: dict[str, torch.Tensor], rate: float) -> None:
        """A step of Adam.

        Args:
            by_parameter: the gradients, by the parameter's name inside the block. rate: the learning rate.
        """
        whole = torch.empty(sum(self.sizes))
        gradients = self._by_tensor(whole)
        for matrix in self.decoder.matrices[self.index]:
            matrix.stored_in(gradients[matrix.tensor]).copy_(matrix.part_of(by_parameter[matrix.parameter_slice.name]))
        self.survivors.grad = distributed.all_reduce_mean(whole.index_select(0, self.places))
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.survivors.grad = None

    def changes(self, before: dict[str, Change]) -> dict[str, Change]:
        """The block's changes with the survivors as they are now, in the dtype of the checkpoint.

        Raises:
            PruningError: a weight is not finite.
        """
        parts = zip(self.shapes, self.survivors.split(self.counts), strict=True)
        found = {name: part.to(self.decoder.checkpoint.dtype(name)) for name, part in parts}
        if not all(torch.isfinite(part).all() for part in found.values()):
            raise PruningError(f"block {self.index}: found NaN or infinity in its distillation, wanted finite weights")
        return {name: replace(before[name], values=part) for name, part in found.items()}


def _learners(stream: Stream, how: Distillation, changes_of: Callable[[int], dict[str, Change]]) -> list[_Learner]:
    """One for every block that learns; together they take as much room as the hidden states leave, and a file beyond that."""
    learning = range(how.first, len(stream.decoder.blocks))
    with read_ahead(stream.decoder, learning) as blocks:
        return [_Learner(stream, index, changes_of(index), tensors) for index, tensors in zip(learning, blocks, strict=True)]


def _step(stream: Stream, window: int, target: torch.Tensor, learners: list[_Learner], rate: float) -> float:
    """One window there and back. Returns the divergence before the step, nats per token, of all processes' windows."""
    hidden, _ = stream.window(learners[0].index, window)
    entered, gradient, divergence = [hidden], None, torch.zeros((), dtype=torch.float64)
    for learner in learners[:-1]:
        with learner.loaded() as block:
            entered.append(run_block(block, entered[-1], stream.calls[1][learner.index]))
    for learner in reversed(learners):
        with learner.loaded() as block:
            names = list(dict.fromkeys(matrix.parameter_slice.name for matrix in stream.decoder.matrices[learner.index]))
            parameters = [block.get_parameter(name).requires_grad_() for name in names]
            hidden = entered.pop().detach().requires_grad_()
            with torch.enable_grad():
                output = run_block(block, hidden, stream.calls[1][learner.index])
            if gradient is None:
                divergence, gradient = divergence_and_gradient(stream.decoder, output.detach(), target)
            gradient, *found = torch.autograd.grad(output, [hidden, *parameters], gradient, materialize_grads=True)
            learner.learn(dict(zip(names, found, strict=True)), rate)
    return float(distributed.all_reduce_mean(divergence))


def divergence_and_gradient(decoder: Decoder, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || p'), the mean over tokens, and the gradient of the sum over tokens by what the last block puts out.

    Adam does not care for a common factor, and float16 would lose a mean's small ones.

    Args:
        decoder: with weights after the blocks.
        hidden: [1, tokens, width], what the last block puts out. target: [tokens, width], what the dense model's does.

    Returns:
        Nats, [], float64; and [1, tokens, width], in the dtype of `hidden`.
    """
    divergence, gradient = torch.zeros((), dtype=torch.float64), torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], TOKENS_AT_ONCE):
        tokens = slice(start, start + TOKENS_AT_ONCE)
        wanted = log_softmax(decoder.logits(target[None, tokens].to(hidden.device)).float(), dim=-1)
        with torch.enable_grad():
            part = hidden[:, tokens].detach().requires_grad_()
            logits = decoder.logits(part)
        found = log_softmax(logits.detach().float(), dim=-1)
        difference = wanted - found
        likely = wanted.exp_()
        divergence += difference.mul_(likely).sum().double().cpu()
        by_logits = found.exp_().sub_(likely)
        (gradient[:, tokens],) = torch.autograd.grad(logits, part, by_logits.to(logits))
    return divergence / hidden.shape[1], gradient
