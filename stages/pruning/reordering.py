"""Input channels of a block change places where that leaves its function as it was, for N:M groups that lose less."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.method import Score
from stages.pruning.observer import Inputs
from stages.pruning.patterns import Nm, Pattern
from stages.pruning.permutation_groups import PermutationGroup, candidates, permutation_groups
from stages.pruning.permutations import channel_permutation
from stages.streaming.calls import Call, run_block
from stages.streaming.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Order:
    """Where a matrix's rows and columns come from, int64, or None where they stay."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """[rows, columns] in their new places."""
        weight = weight if self.rows is None else weight[self.rows]
        return weight if self.columns is None else weight[:, self.columns]


STAYS = Order()


def require_candidates(decoder: Decoder) -> None:
    """Refuse, before a weight is read, what names, shapes and biases alone rule out.

    Raises:
        PruningError: a block without any channels that may change places; names it.
    """
    for index, block in enumerate(decoder.blocks):
        if not candidates(block, decoder.matrices[index]):
            raise _nothing_moves(index)


def proven_permutation_groups(decoder: Decoder, index: int, block: nn.Module, hidden: torch.Tensor, call: Call) -> list[PermutationGroup]:
    """The permutation_groups of a loaded dense block, proven in float32 on some windows' hidden states.

    Raises:
        PruningError: there are none.
    """
    if decoder.dtype != torch.float32:
        block, call, hidden = deepcopy(block).float(), _in_float32(call), hidden.float()
    options = candidates(block, decoder.matrices[index])
    proven = [] if distributed.rank() else permutation_groups(block, options, partial(run_block, block, call=call), hidden)
    flags = distributed.broadcast(
        torch.tensor([option in proven for option in options], dtype=torch.uint8), 0
    )  # one trial for all processes
    found = [option for option, flag in zip(options, flags.tolist(), strict=True) if flag]
    if not found:
        raise _nothing_moves(index)
    return found


def _nothing_moves(index: int) -> PruningError:
    wanted = "a layer whose inputs other layers without bias make channel by channel, as a gated MLP's"
    advice = "set pattern.permutation_rounds to null"
    return PruningError(f"block {index}: found no input channels that may change places, wanted {wanted}; {advice}")


def find_orders(
    found: list[PermutationGroup],
    weights: dict[str, torch.Tensor],
    inputs: dict[str, Inputs],
    patterns: dict[str, Pattern],
    score: Score,
    rounds: int,
) -> dict[str, Order]:
    """An order for the channels of every group, and what it does to each of its matrices.

    Args:
        found: the permutation_groups. weights: consumer's name -> [rows, columns], float32. inputs: consumer's name -> what it reads;
            reordered in place.
        patterns: by name, N:M. score: what the masks will be chosen by. rounds: see channel_permutation.

    Returns:
        By matrix; those that stay in place are not named.

    Raises:
        PruningError: scores that are not finite, a Gram matrix that does not factor; names the layer.
    """
    orders: dict[str, Order] = {}
    for group in found:
        name, pattern = group.consumer.name, patterns[group.consumer.name]
        assert isinstance(pattern, Nm)
        with PruningError.naming(f"layer {name}"):
            scores = score.of(weights[name], inputs[name].statistic)
            order = channel_permutation(scores, pattern.kept, pattern.group, rounds=rounds)
        distributed.broadcast(order, 0)
        inputs[name].reorder(order)
        orders[name] = replace(orders.get(name, STAYS), columns=order)
        for producer in group.producers:
            orders[producer.name] = replace(orders.get(producer.name, STAYS), rows=order)
    return orders


def _in_float32(call: Call) -> Call:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(cast, value))
        return value

    return Call(hidden=call.hidden, arguments=cast(call.arguments), keywords={key: cast(value) for key, value in call.keywords.items()})
