"""Bounds on host memory and on the delta's size in bytes, computed before pruning begins."""

import math
from typing import TYPE_CHECKING

import psutil
import torch

from stages.pruning.section import Propagation
from stages.pruning.statistics import Gram, Moments
from stages.streaming.architecture import Matrix
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import page_locked_bytes

if TYPE_CHECKING:
    from stages.pruning.plan import Plan

LIBRARIES = 5 * 2**27  # bytes of torch and transformers, with what the allocator keeps
COPIES_TRAINED = 10  # of a block's weights in float32: initial, current, best, as written, gradients twice, Adam's moments, activations
COPIES_DISTILLED = 10  # likewise: weights and gradients of a block and of the one before it, gradients and indices of kept weights
COPIES_OF_ACTIVATIONS = 3  # in float32: inputs and outputs of a block's matrices for the tokens of a pass, where gradients are taken
EXPERTS_CHOSEN = 8  # for a token; few mixtures choose more
COPIES_OF_MASKS = 2  # a bit of each weight of a block: of the block that is pruned and of the one that is written
COPIES_SCORED = 4  # of a block's weights in float32: scores of each matrix and of all together, these in float64 for their mean
COPIES_FACTORED = 7  # of a Gram matrix in float32: in float64 the matrix, its factor and the inverse; the inverse in float32
COPIES_MASKED, COPIES_UPDATED = 8, 12  # of a layer's weights in float32: while it is scored, and while a method updates it


def memory_budget(asked: float | None) -> int:
    """Bytes of host memory to work in: GiB as asked, or what is free."""
    return int(asked * 2**30) if asked else psutil.virtual_memory().available


def observing_bytes(decoder: Decoder, kept: list[int]) -> int:
    """An upper bound on host memory in bytes while statistics are collected to be kept, without hidden states.

    Args:
        kept: bytes that each block leaves.
    """
    blocks = range(len(decoder.blocks))
    host = LIBRARIES + 2 * max(_stored_bytes(decoder, index) for index in blocks) + max(kept)
    if decoder.device.type == "cpu":
        host += max(_loaded_weights(decoder, index) * decoder.dtype.itemsize + kept[index] for index in blocks)
    return host


def host_bytes(decoder: Decoder, plan: "Plan", tokens: int, *, scores_blocks: bool, takes_gradients: bool, judges: bool = False) -> int:
    """An upper bound on host memory in bytes, without hidden states.

    It counts the libraries, masks, the Gram matrices of layers that several blocks have, and two copies of the largest block as stored,
    for the current block and the one read ahead, of experts that are loaded one at a time those of three; on a CPU also the memory in
    which the block loop computes, or an allocation or a distillation if that is more.

    Args:
        tokens: number of tokens in a forward pass.
        scores_blocks: whether an allocation holds the scores of all matrices of a block.
        takes_gradients: whether an allocation takes gradients of the loss. judges: whether an allocation is judged.
    """
    blocks = range(len(decoder.blocks))
    largest = max(_loaded_weights(decoder, index) for index in blocks)
    host = LIBRARIES + 2 * max(_stored_bytes(decoder, index) for index in blocks)
    host += COPIES_OF_MASKS * max(map(_size, decoder.matrices)) // 8
    if decoder.device.type != "cpu":
        return host
    if plan.distillation:
        host += COPIES_DISTILLED * 4 * largest
    computed = max(_loop_bytes(decoder, plan, index) for index in blocks) + _shared_bytes(decoder, plan)
    if scores_blocks:
        computed = max(computed, largest * (decoder.dtype.itemsize + COPIES_SCORED * 4))
    if judges:
        scored = COPIES_MASKED * 4 * max(matrix.size for block in decoder.matrices for matrix in block)
        computed = max(computed, 2 * largest * decoder.dtype.itemsize + scored, decoder.head_bytes)
    if plan.distillation or takes_gradients:
        computed = max(computed, _gradient_bytes(decoder, tokens))
    return host + computed


def delta_bytes(decoder: Decoder, plan: "Plan", first: int = 0) -> int:
    """An estimate of the delta's size in bytes from block `first` on: one bit per weight, and the values of kept weights if they change."""
    total = 0.0
    for matrix in (matrix for block in decoder.matrices[first:] for matrix in block):
        kept = matrix.size * (1 - plan.patterns[matrix.name].sparsity)
        total += matrix.size / 8 + (kept * decoder.checkpoint.dtype(matrix.tensor).itemsize if plan.changes_weights else 0)
    return int(total)


def _loop_bytes(decoder: Decoder, plan: "Plan", index: int) -> int:
    """A block in the compute dtype and its copies for training, float32 copies of the largest layer for the method, a Gram matrix of
    every layer, and the copies for factoring the widest; of experts that are loaded one at a time those of one."""
    matrices, weights = decoder.matrices[index], _loaded_weights(decoder, index)
    needs_gram = plan.method.statistic is Gram
    copies = COPIES_UPDATED if needs_gram or plan.method.statistic is Moments else COPIES_MASKED
    total = weights * decoder.dtype.itemsize + copies * 4 * max((matrix.size for matrix in matrices), default=0)
    if plan.reconstruction:
        total += COPIES_TRAINED * 4 * weights
    if needs_gram:
        apart = decoder.apart[index].parameters if index in decoder.apart else ()
        at_once = [matrix for matrix in matrices if not matrix.parameter_slice.expert or matrix.parameter_slice.name not in apart]
        grams = {matrix.layer: 4 * matrix.shape[1] ** 2 for matrix in at_once}
        together = max if plan.propagate == Propagation.SEQUENTIAL else sum  # one at a time
        if grams:
            total += together(grams.values()) + COPIES_FACTORED * max(grams.values())
    return total


def _shared_bytes(decoder: Decoder, plan: "Plan") -> int:
    """Gram matrices of all layers whose matrices several blocks have: those of all uses together, and of one use more."""
    if plan.method.statistic is not Gram:
        return 0
    grams = {matrix.name: 4 * matrix.shape[1] ** 2 for matrices in decoder.reused for matrix in matrices}
    return 2 * sum(grams.values())


def _gradient_bytes(decoder: Decoder, tokens: int) -> int:
    """A block's weights, gradients and activations, the parameters outside the blocks, and the logits of some tokens."""
    largest = max(_loaded_weights(decoder, index) for index in range(len(decoder.blocks)))
    activations = COPIES_OF_ACTIVATIONS * 4 * tokens * max(map(_channels, decoder.matrices))
    return 2 * largest * decoder.dtype.itemsize + activations + decoder.head_bytes


def _channels(matrices: list[Matrix]) -> int:
    """Inputs and outputs of a block's matrices for one token; of a mixture's experts, those of the experts that it chooses."""
    experts = {matrix.parameter_slice.expert for matrix in matrices} - {None}
    chosen = min(1.0, EXPERTS_CHOSEN / max(1, len(experts)))
    return math.ceil(sum(sum(matrix.shape) * (1 if matrix.parameter_slice.expert is None else chosen) for matrix in matrices))


def _block_weights(decoder: Decoder, index: int) -> int:
    """Weights of all tensors of a block."""
    return sum(_weights(decoder, name) for name in decoder.tensors(index))


def _loaded_weights(decoder: Decoder, index: int) -> int:
    """Weights of a block that are loaded at once; of experts that are loaded one at a time those of three."""
    return sum(_weights(decoder, name) for name in decoder.tensors_loaded(index)) + 3 * _expert_weights(decoder, index)


def _expert_weights(decoder: Decoder, index: int) -> int:
    """Weights of an expert of those that are loaded one at a time."""
    if index not in decoder.apart:
        return 0
    experts = set(decoder.tensors(index)) - set(decoder.tensors_loaded(index))
    return sum(_weights(decoder, name) for name in experts) // decoder.apart[index].count


def _size(matrices: list[Matrix]) -> int:
    return sum(matrix.size for matrix in matrices)


def _stored_bytes(decoder: Decoder, index: int) -> int:
    """Bytes of a block's tensors in host memory; for a GPU they are page-locked."""
    sizes = [_weights(decoder, name) * decoder.checkpoint.dtype(name).itemsize for name in decoder.tensors_loaded(index)]
    return sum(sizes if decoder.device.type == "cpu" else map(page_locked_bytes, sizes))


def _weights(decoder: Decoder, name: str) -> int:
    """Weights of one tensor of the checkpoint."""
    return torch.Size(decoder.checkpoint.shape(name)).numel()
