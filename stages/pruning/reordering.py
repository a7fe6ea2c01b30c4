"""Permute the hidden channels of a block, which leaves its function unchanged, so that N:M groups keep more of the scores.

permutation_groups proves which matrices can be permuted together; permutations chooses the order of the channels.
"""

from collections.abc import MutableMapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.inputs import Inputs
from stages.pruning.method import Method
from stages.pruning.patterns import Nm, Pattern
from stages.pruning.permutation_groups import PermutationGroup, candidates, permutation_groups
from stages.pruning.permutations import channel_permutation
from stages.pruning.selection import scores as scores_of
from stages.streaming.calls import Call, run_block
from stages.streaming.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a matrix's rows and columns.

    rows: [rows], int64; row i of the reordered matrix is row rows[i] of the stored one. columns: [columns], int64, likewise.
        None: as stored.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The reordered matrix, [rows, columns]."""
        weight = weight if self.rows is None else weight[self.rows]
        return weight if self.columns is None else weight[:, self.columns]


UNCHANGED = Order()
WANTED = "a layer whose inputs are computed channel by channel by layers without bias, each with a row for a channel, as in a gated MLP"
ADVICE = "set pattern.permutation_rounds to null"


def proven_permutation_groups(decoder: Decoder, index: int, block: nn.Module, hidden: torch.Tensor, call: Call) -> list[PermutationGroup]:
    """Find the permutation groups of a loaded dense block by trial in float32; the same in every process.

    Args:
        hidden: [windows, tokens, width], the block's input for some windows. call: the other arguments of the block.

    Raises:
        PruningError: there are none; names the block.
    """
    if decoder.dtype != torch.float32:
        block, call, hidden = deepcopy(block).float(), in_float32(call), hidden.float()
    options = candidates(block, decoder.matrices[index])
    proven = permutation_groups(block, options, partial(run_block, block, call=call), hidden) if distributed.rank() == 0 else []
    flags = distributed.broadcast(torch.tensor([option in proven for option in options], dtype=torch.uint8), 0)
    groups = [option for option, flag in zip(options, flags.tolist(), strict=True) if flag]
    if not groups:
        raise PruningError(f"block {index}: found no input channels that can be permuted, wanted {WANTED}; {ADVICE}")
    return groups


def find_orders(
    groups: list[PermutationGroup],
    weights: dict[str, torch.Tensor],
    inputs: dict[str, Inputs],
    patterns: dict[str, Pattern],
    method: Method,
    rounds: int,
) -> dict[str, Order]:
    """Choose an order for the channels of every permutation group.

    Args:
        weights: consumer's name -> [rows, columns], float32. inputs: consumer's name -> its inputs; reordered in place.
        patterns: consumer's name -> N:M pattern. method: gives the scores. rounds: see channel_permutation.

    Returns:
        Matrix name -> its order; matrices of no group are missing.

    Raises:
        PruningError: scores are not finite, or a Gram matrix does not factor; names the layer.
        ValueError: a pattern is not N:M; names the layer.
    """
    orders: dict[str, Order] = {}
    for group in groups:
        name = group.consumer.name
        pattern = patterns[name]
        if not isinstance(pattern, Nm):
            raise ValueError(f"layer {name}: found {pattern} with permutation rounds, wanted an N:M pattern")
        with PruningError.naming(f"layer {name}"):
            scores = scores_of(weights[name], inputs[name].statistic, method)
            order = channel_permutation(scores, pattern.kept, pattern.group, rounds=rounds)
        distributed.broadcast(order, 0)
        inputs[name].reorder(order)
        orders[name] = replace(orders.get(name, UNCHANGED), columns=order)
        for producer in group.producers:
            orders[producer.name] = replace(orders.get(producer.name, UNCHANGED), rows=order)
    return orders


def in_float32(call: Call) -> Call:
    """Cast all floating-point tensors of a call to float32. What a block then writes into a mapping is written into a copy."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(cast, value))
        if isinstance(value, MutableMapping):
            mapping = copy(value)
            mapping.update({key: cast(item) for key, item in value.items()})
            return mapping
        return value

    return replace(call, arguments=cast(call.arguments), keywords={key: cast(value) for key, value in call.keywords.items()})
