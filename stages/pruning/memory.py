"""How much room pruning needs, counted before it begins: host memory beside the hidden states, and the disk that the delta takes."""

import math

import torch

from stages.pruning.block_loop import Plan
from stages.pruning.statistics import Gram, Moments
from stages.streaming.architecture import Matrix
from stages.streaming.decoder import TOKENS_AT_ONCE, Decoder

LIBRARIES = 5 * 2**27  # bytes that torch and transformers take, with what the allocator keeps between
COPIES_TRAINED = 7  # of a block's weights in float32: values as found and as trained, gradients, Adam's moments, masks, activations
COPIES_DISTILLED = 10  # likewise: weights, gradients, both of the block before, the survivors' gradients and places
COPIES_OF_ACTIVATIONS = 3  # in float32: what a block's matrices read and give for the tokens of a pass, where gradients are taken
EXPERTS_CHOSEN = 8  # for a token, by few mixtures more
COPIES_OF_LOGITS = 4  # in float32: the dense model's, the pruned one's, their logarithms, and what is between
COPIES_SCORED = 4  # of a block's weights in float32: scores, matrix by matrix and all together, these in float64 for their mean
COPIES_FACTORED = 7  # of a Gram matrix in float32: in float64 itself, its factor, the inverse; and that in float32
COPIES_CUT, COPIES_SWEPT = 8, 12  # of a layer's weights in float32, while it is scored, and while it is swept with its neighbours


def host_bytes(decoder: Decoder, plan: Plan, tokens: int, *, scores_blocks: bool, feels_loss: bool) -> int:
    """About how many bytes of host memory pruning needs beside the hidden states, rather too many than too few.

    The libraries, and the largest block as stored, twice (this one's last tensors, the next one's first); on a CPU also what the
    block loop works on, or what comes before or after it if that is more. A distillation needs copies of a block on the host
    whatever the device.

    Args:
        tokens: of a pass.
        scores_blocks: whether an allocation holds the scores of a block's matrices, of all or of a part's.
        feels_loss: whether an allocation takes gradients of the loss.
    """
    blocks = range(len(decoder.blocks))
    largest = max(_block_weights(decoder, index) for index in blocks)
    host = LIBRARIES + 2 * max(_stored_bytes(decoder, index) for index in blocks)
    if plan.distillation:
        host += COPIES_DISTILLED * 4 * largest
    if decoder.device.type != "cpu":
        return host
    work = max(_loop_bytes(decoder, plan, index) for index in blocks)
    if scores_blocks:
        work = max(work, largest * (decoder.dtype.itemsize + COPIES_SCORED * 4))
    if plan.distillation or feels_loss:
        work = max(work, _gradient_bytes(decoder, tokens))
    return host + work


def delta_bytes(decoder: Decoder, plan: Plan, first: int = 0) -> int:
    """About how many bytes the delta takes from a block on: a bit a weight, and the survivors' values where they move."""
    total = 0.0
    for matrix in (matrix for block in decoder.matrices[first:] for matrix in block):
        count, kept = matrix.size, 1 - plan.patterns[matrix.name].sparsity
        total += count / 8 + (count * kept * decoder.checkpoint.dtype(matrix.tensor).itemsize if plan.moves else 0)
    return int(total)


def _loop_bytes(decoder: Decoder, plan: Plan, index: int) -> int:
    """A block in the compute dtype and as it is trained, a Gram matrix for every layer, what it takes to factor the widest, and the
    float32 copies of the largest layer that the method works on."""
    matrices, weights = decoder.matrices[index], _block_weights(decoder, index)
    solved = plan.method.statistic is Gram
    copies = COPIES_SWEPT if solved or plan.method.statistic is Moments else COPIES_CUT
    total = weights * decoder.dtype.itemsize + copies * 4 * max(matrix.size for matrix in matrices)
    if plan.reconstruction:
        total += COPIES_TRAINED * 4 * weights
    if solved:
        grams = {matrix.layer: 4 * matrix.shape[1] ** 2 for matrix in matrices}
        total += sum(grams.values()) + COPIES_FACTORED * max(grams.values())
    return total


def _gradient_bytes(decoder: Decoder, tokens: int) -> int:
    """A block's weights and gradients, its activations, what comes before and after the blocks, and some tokens' logits."""
    counts = [_block_weights(decoder, index) for index in range(len(decoder.blocks))]
    outside = sum(_weights(decoder, name) for name in decoder.layout) - sum(counts)
    activations = COPIES_OF_ACTIVATIONS * 4 * tokens * max(map(_channels, decoder.matrices))
    logits = COPIES_OF_LOGITS * 4 * decoder.model.config.get_text_config().vocab_size * TOKENS_AT_ONCE
    return (2 * max(counts) + outside) * decoder.dtype.itemsize + activations + logits


def _channels(matrices: list[Matrix]) -> int:
    """How many numbers a block's matrices read and give for a token, of a mixture's experts those that it chooses."""
    experts = {matrix.parameter_slice.expert for matrix in matrices} - {None}
    chosen = min(1.0, EXPERTS_CHOSEN / max(1, len(experts)))
    return math.ceil(sum(sum(matrix.shape) * (1 if matrix.parameter_slice.expert is None else chosen) for matrix in matrices))


def _block_weights(decoder: Decoder, index: int) -> int:
    return sum(_weights(decoder, name) for name in decoder.tensors(index))


def _stored_bytes(decoder: Decoder, index: int) -> int:
    return sum(_weights(decoder, name) * decoder.checkpoint.dtype(name).itemsize for name in decoder.tensors(index))


def _weights(decoder: Decoder, name: str) -> int:
    """How many a tensor of the checkpoint has."""
    return torch.Size(decoder.checkpoint.shape(name)).numel()
