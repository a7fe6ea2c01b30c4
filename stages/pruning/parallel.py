"""Solve groups of matrices in several processes: rank k mod world_size solves group k and broadcasts the outcome."""

from collections.abc import Callable
from typing import TypeVar

import torch

from stages.pruning import distributed
from stages.pruning.entries import Pruned

Group = TypeVar("Group")


def source_of(number: int) -> int:
    """The rank that solves a group."""
    return number % distributed.world_size()


def solve_own(groups: list[Group], solve: Callable[[Group], list[Pruned]]) -> dict[int, list[Pruned]]:
    """Solve this process's groups while the other processes solve theirs.

    A single process returns no outcomes: the caller solves each group in turn, so that one group's statistic is freed before the
    next group's is factored.

    Returns:
        The number of the group -> the outcome of each of its matrices.
    """
    if distributed.world_size() == 1:
        return {}
    return {number: solve(group) for number, group in enumerate(groups) if source_of(number) == distributed.rank()}


def broadcast_group(outcomes: list[Pruned] | None, weights: list[torch.Tensor], source: int, *, changes_weights: bool) -> list[Pruned]:
    """Broadcast the outcome of each matrix of a group to every process.

    Args:
        outcomes: those of the process that solved the group, None in the others.
        weights: of the matrices, [rows, columns]. source: the rank that solved the group.
        changes_weights: whether the method changes kept weights.
    """
    solved: list[Pruned | None] = [None] * len(weights) if outcomes is None else [*outcomes]
    return [_broadcast(pruned, weight, source, changes_weights) for pruned, weight in zip(solved, weights, strict=True)]


def _broadcast(outcome: Pruned | None, weight: torch.Tensor, source: int, changes_weights: bool) -> Pruned:
    if outcome is None:
        values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if changes_weights else None
        outcome = Pruned(mask=torch.empty(weight.shape, dtype=torch.bool, device=weight.device), values=values)
    bits = distributed.broadcast(outcome.mask.to(torch.uint8).contiguous(), source)
    values = None if outcome.values is None else distributed.broadcast(outcome.values.contiguous(), source)
    damping = distributed.broadcast(torch.tensor(outcome.damping or 0.0, dtype=torch.float64), source).item()
    return Pruned(mask=bits.bool(), values=values, damping=damping or None)
