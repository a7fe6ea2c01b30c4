"""Find matrices of a block whose channels can be permuted together without changing the block's function; no model family is named.

    W2[:, p] f(W1[p] x) = W2 f(W1 x)       # f elementwise with the same form for every channel, p any order of the channels

The consumer W2 reads the channels that the producers W1 compute. Names, shapes and biases only give candidates. For each candidate the
block is run with all matrices of the group reordered, which must not change the output, and with each of them reordered alone, which
must change it. A producer with a bias is no candidate, since the bias would have to be reordered too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from stages.streaming.architecture import Matrix

TOLERANCE = 1e-5  # see largest_change: what another order of summation changes in float32
CONTRAST = 100  # times the tolerance: least change by a matrix that is reordered alone; with less the trial proves nothing

Reordering = tuple[Matrix, int]  # a matrix and its dimension, of [rows, columns], that is reordered


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationGroup:
    """Matrices whose channels can be permuted together.

    consumer: its columns are the channels. producers: their rows are the channels.
    """

    consumer: Matrix
    producers: list[Matrix]


def candidates(block: nn.Module, matrices: list[Matrix]) -> list[PermutationGroup]:
    """The permutation groups that names, shapes and biases allow; the same in every process.

    Args:
        block: may be without weights. matrices: of the block.
    """
    separate = [matrix for matrix in matrices if matrix.expert is None]  # no slices of a tensor that holds all experts
    groups = [PermutationGroup(consumer=matrix, producers=_possible_producers(block, matrix, separate)) for matrix in separate]
    return [group for group in groups if group.producers]


@torch.no_grad()
def permutation_groups(
    block: nn.Module, options: list[PermutationGroup], run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> list[PermutationGroup]:
    """Find the permutation groups of a block by trial.

    Args:
        block: loaded, in float32; its weights change during the trials and have the same bits afterwards.
        options: see candidates.
        run: runs the block on hidden states; deterministic.
        hidden: [windows, tokens, width], float32. An expert that none of these tokens chooses is not found.

    Returns:
        The options that the trials prove, in the order of `options`.

    Raises:
        ValueError: hidden states of another dtype, whose rounding would hide the changes that a trial measures.
    """
    if hidden.dtype != torch.float32:
        raise ValueError(f"found {hidden.dtype} hidden states, wanted torch.float32: coarser rounding hides what a reordering changes")
    expected = run(hidden.clone())

    def change(reorderings: list[Reordering], order: torch.Tensor) -> float:
        with _reordered(block, reorderings, order):
            return largest_change(run(hidden.clone()), expected, hidden)

    return [group for group in options if _is_proven(group, change)]


def largest_change(output: torch.Tensor, expected: torch.Tensor, hidden: torch.Tensor) -> float:
    """The largest ||y - y'|| / max(||y||, ||x||) of all tokens; NaN where both of these are zero or an output is not finite.

    A block may cancel its input nearly: so end the massive activations of a first token (arXiv:2402.17762). Rounding is then of the
    input's size and exceeds what is left of the output.
    """
    scale = torch.maximum(torch.linalg.vector_norm(expected, dim=-1), torch.linalg.vector_norm(hidden, dim=-1))
    return (torch.linalg.vector_norm(output - expected, dim=-1) / scale).max().item()


def _possible_producers(block: nn.Module, consumer: Matrix, matrices: list[Matrix]) -> list[Matrix]:
    """The other matrices in the consumer's parent module, of the same expert, with a row for each of its columns.

    None if one of them has a bias.
    """
    parent = _parent(consumer)
    producers = [
        matrix
        for matrix in matrices
        if matrix != consumer
        and matrix.parameter_slice.name.startswith(parent)
        and matrix.parameter_slice.expert == consumer.parameter_slice.expert
        and matrix.shape[0] == consumer.shape[1]
    ]
    return [] if any(_has_bias(block, matrix) for matrix in producers) else producers


def _parent(matrix: Matrix) -> str:
    """The prefix of the parameter names in its parent module: "mlp." for mlp.down_proj.weight, "" at the top of the block."""
    *path, _ = matrix.parameter_slice.name.split(".")
    if matrix.parameter_slice.expert is None:
        path = path[:-1]  # without the linear layer; an expert's matrices are parameters of one module
    return "".join(f"{module}." for module in path)


def _has_bias(block: nn.Module, matrix: Matrix) -> bool:
    module = block.get_submodule(matrix.layer.module)
    return any("bias" in name for name, _ in module.named_parameters(recurse=False))


def _is_proven(group: PermutationGroup, change: Callable[[list[Reordering], torch.Tensor], float]) -> bool:
    """Whether reordering all matrices changes nothing and reordering each one alone changes the output; NaN proves nothing."""
    order = torch.randperm(group.consumer.shape[1], generator=torch.Generator().manual_seed(0))
    group_reorderings = [(group.consumer, 1), *((producer, 0) for producer in group.producers)]
    if not change(group_reorderings, order) <= TOLERANCE:
        return False
    return all(change([reordering], order) >= CONTRAST * TOLERANCE for reordering in group_reorderings)


def _repeated(order: torch.Tensor, size: int) -> torch.Tensor:
    """The order for each of the parts, of a channel each, that a matrix's rows are in; two where gate and up are one matrix."""
    return torch.cat([start + order for start in range(0, size, len(order))])


@contextmanager
def _reordered(block: nn.Module, reorderings: list[Reordering], order: torch.Tensor) -> Iterator[None]:
    """Reorder weights, and copy the original ones back at the end."""
    weights = [matrix.of(block) for matrix, _ in reorderings]
    originals = [weight.clone() for weight in weights]
    try:
        for weight, original, (_, dimension) in zip(weights, originals, reorderings, strict=True):
            weight.copy_(original.index_select(dimension, _repeated(order, original.shape[dimension]).to(original.device)))
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
