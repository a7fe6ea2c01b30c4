"""Which matrices make another's input channel by channel, so that the channels may change places; no model family is named.

Where nothing but elementwise functions f of equal form lies between, an order p of the channels cancels out:

    W2[:, p] f(W1[p] x) = W2 f(W1 x)

Nothing is concluded from names or shapes alone: the matrices are reordered, the block is run, its output must stay as it was,
and must not when any one of them is reordered alone. A producer with a bias is left out: it would have to be reordered too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from stages.streaming.architecture import Matrix

TOLERANCE = 1e-5  # of a token's norm: what another order of summation changes in float32
CONTRAST = 100  # times the tolerance: what a matrix reordered alone must change, or the trial proves nothing

Reordering = tuple[Matrix, int]  # and the dimension of [rows, columns] that is reordered


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationGroup:
    """Matrices whose channels may change places together.

    consumer: its columns are the channels. producers: their rows are.
    """

    consumer: Matrix
    producers: list[Matrix]


def candidates(block: nn.Module, matrices: list[Matrix]) -> list[PermutationGroup]:
    """What may be coupled by names, shapes and biases alone; the same in every process."""
    separate = [matrix for matrix in matrices if matrix.expert is None]  # not a slice of one tensor for all experts
    found = [PermutationGroup(consumer=matrix, producers=_beside(block, matrix, separate)) for matrix in separate]
    return [group for group in found if group.producers]


@torch.no_grad()
def permutation_groups(
    block: nn.Module, options: list[PermutationGroup], run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> list[PermutationGroup]:
    """Find the permutation_groups of a block by trial.

    Args:
        block: loaded, in float32; its weights are changed on the way and are the same bits afterwards.
        options: see candidates.
        run: puts hidden states through the block, the same every time.
        hidden: [windows, tokens, width], float32. An expert that none of these tokens chooses is not found.

    Returns:
        One for each consumer whose producers are proven, in the order of the options.

    Raises:
        ValueError: hidden states of another dtype, whose rounding would hide what the trial looks for.
    """
    if hidden.dtype != torch.float32:
        raise ValueError(f"found {hidden.dtype} hidden states, wanted torch.float32: coarser rounding hides what a reordering changes")
    expected = run(hidden.clone())

    def change(reorderings: list[Reordering], order: torch.Tensor) -> float:
        with _reordered(block, reorderings, order):
            return largest_change(run(hidden.clone()), expected)

    return [group for group in options if _proven(group, change)]


def largest_change(output: torch.Tensor, expected: torch.Tensor) -> float:
    """||y - y'|| / ||y|| of the token where it is largest; NaN where a token's outputs are all zero or not finite."""
    return (torch.linalg.vector_norm(output - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)).max().item()


def _beside(block: nn.Module, consumer: Matrix, matrices: list[Matrix]) -> list[Matrix]:
    """All under the consumer's parent module, of its expert, with a row for each of its columns; none if one has a bias."""
    parent = _parent(consumer)
    found = [
        matrix
        for matrix in matrices
        if matrix.parameter_slice.name.startswith(parent)
        and matrix.parameter_slice.expert == consumer.parameter_slice.expert
        and matrix.shape[0] == consumer.shape[1]
    ]
    found = [matrix for matrix in found if matrix != consumer]
    return [] if any(_has_bias(block, matrix) for matrix in found) else found


def _parent(matrix: Matrix) -> str:
    """What the names of all parameters beside it begin with: "mlp." for mlp.down_proj.weight, "" at the top of the block."""
    *path, _ = matrix.parameter_slice.name.split(".")
    if matrix.parameter_slice.expert is None:
        path = path[:-1]  # out of the linear layer; an expert's matrices are parameters of one module
    return "".join(f"{module}." for module in path)


def _has_bias(block: nn.Module, matrix: Matrix) -> bool:
    module = block.get_submodule(matrix.layer.module)
    return any("bias" in name for name, _ in module.named_parameters(recurse=False))


def _proven(group: PermutationGroup, change: Callable[[list[Reordering], torch.Tensor], float]) -> bool:
    """Whether reordering all of them changes nothing and each alone something; NaN proves nothing."""
    order = torch.randperm(group.consumer.shape[1], generator=torch.Generator().manual_seed(0))
    together = [(group.consumer, 1), *((producer, 0) for producer in group.producers)]
    if not change(together, order) <= TOLERANCE:
        return False
    return all(change([alone], order) >= CONTRAST * TOLERANCE for alone in together)


@contextmanager
def _reordered(block: nn.Module, reorderings: list[Reordering], order: torch.Tensor) -> Iterator[None]:
    """The weights in another order, then copied back."""
    weights = [matrix.of(block) for matrix, _ in reorderings]
    originals = [weight.clone() for weight in weights]
    try:
        for weight, original, (_, dimension) in zip(weights, originals, reorderings, strict=True):
            weight.copy_(original.index_select(dimension, order.to(original.device)))
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
