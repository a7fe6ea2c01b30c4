"""Find the blocks of a model whose channels can be permuted, by the trial of permutation_groups.py, before a weight is read.

Random numbers stand in for the weights of a block, and a few tokens run. Experts of a mixture have the same, so that one is like all.
"""

from functools import partial
from typing import Any

import torch

from stages.errors import PruningError
from stages.pruning.permutation_groups import PermutationGroup, candidates, permutation_groups
from stages.pruning.reordering import ADVICE, WANTED, in_float32
from stages.streaming.architecture import Matrix, kind_of_block
from stages.streaming.calls import Call, run_block
from stages.streaming.decoder import Decoder
from stages.streaming.products import values_in


def permutable_blocks(decoder: Decoder) -> frozenset[int]:
    """Find the blocks that have channels which can be permuted; no weight is read.

    Raises:
        PruningError: there are none; names the model, and a matrix that holds gate and up, which are then not permuted.
    """
    known: dict[Any, bool] = {}
    permutable = set[int]()
    for index, call in enumerate(decoder.examples()):
        kind = kind_of_block(decoder.blocks[index]), tuple(decoder.layers(index))
        if kind not in known:
            known[kind] = bool(_proven(decoder, index, call, candidates(decoder.blocks[index], decoder.matrices[index])))
        if known[kind]:
            permutable.add(index)
    if not permutable:
        found = f"found no input channels that can be permuted{_joined(decoder)}"
        raise PruningError(f"{decoder.name}: {found}, wanted {WANTED}; {ADVICE}")
    return frozenset(permutable)


@torch.no_grad()
def _proven(decoder: Decoder, index: int, call: Call, options: list[PermutationGroup]) -> list[PermutationGroup]:
    """The first of some permutation groups of a block that a trial proves; none: it proves none.

    Args:
        call: of a few tokens, on the CPU.
    """
    block, generator = decoder.blocks[index], torch.Generator().manual_seed(0)
    experts = {matrix.parameter_slice.name for matrix in decoder.matrices[index] if matrix.parameter_slice.expert is not None}
    hidden = torch.randn(call.hidden.shape, generator=generator)
    with values_in(block, partial(_random, experts, generator)):
        run = partial(run_block, block, call=in_float32(call))
        of_one_expert = (group for group in options if not group.consumer.parameter_slice.expert)
        return next(filter(None, (permutation_groups(block, [group], run, hidden) for group in of_one_expert)), [])


def _random(experts: set[str], generator: torch.Generator, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Random numbers of the size that weights, [..., rows, columns], have, and biases and gains, in float32.

    Args:
        experts: names of parameters of which all entries of the first dimension are one.
    """
    if not parameter.is_floating_point():
        return torch.zeros_like(parameter, device="cpu")
    random = torch.randn(parameter.shape[1:] if name in experts else parameter.shape, generator=generator)
    random = random / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * random
    return random.expand(parameter.shape)


def _joined(decoder: Decoder) -> str:
    """What to say of a matrix that a trial proves to hold gate and up."""
    for index, call in enumerate(decoder.examples()):
        for group in _proven(decoder, index, call, _possibly_joined(decoder.matrices[index])):
            return f" ({group.producers[0].name} is gate and up in one matrix)"
    return ""


def _possibly_joined(matrices: list[Matrix]) -> list[PermutationGroup]:
    """Each matrix with another one of its module that has two rows for each of its columns."""
    separate = [(matrix.layer.module.rpartition(".")[0], matrix) for matrix in matrices if matrix.expert is None]
    return [
        PermutationGroup(consumer=consumer, producers=[matrix])
        for parent, consumer in separate
        for other, matrix in separate
        if other == parent and matrix.shape[0] == 2 * consumer.shape[1]
    ]
