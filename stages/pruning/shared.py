"""Matrices that several blocks multiply by, as in Zamba: pruned once, for what all of these blocks read.

    X = [X_1 X_2 ...]       # of one matrix, the inputs in every block that multiplies by it

Before the block loop the dense model runs up to the last block that uses one. In the loop such a matrix is pruned in the first of its
blocks, for the dense model's inputs in all of them; later blocks run with it pruned.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Generic

import torch

from stages.pruning.inputs import Inputs, S
from stages.pruning.observer import collect
from stages.streaming.architecture import Layer
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream, read_ahead

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SharedInputs(Generic[S]):
    """What is read by layers of one block whose matrices later blocks multiply by, too; the layers as this block holds them.

    inputs: every distinct input, in all of the blocks together. held_out: of each layer some inputs in the windows held out,
        [tokens, columns], compute dtype.
    """

    inputs: list[Inputs[S]] = field(default_factory=list)
    held_out: dict[Layer, torch.Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> set[Layer]:
        """All that read one of the inputs."""
        return {layer for distinct in self.inputs for layer in distinct.layers}

    def include(self, inputs: list[Inputs[S]], held_out: dict[Layer, torch.Tensor]) -> None:
        """Add what these layers read in one of the blocks."""
        for use in inputs:
            self._include(use)
        for layer, sample in held_out.items():
            self.held_out[layer] = torch.cat([self.held_out[layer], sample]) if layer in self.held_out else sample

    def _include(self, use: Inputs[S]) -> None:
        """Layers that read the same in one block may read apart in another: then each has a statistic of its own from there on."""
        left = list(use.layers)
        for known in list(self.inputs):
            both = [layer for layer in known.layers if layer in left]
            if not both:
                continue
            if apart := [layer for layer in known.layers if layer not in both]:
                self.inputs.append(replace(known, layers=apart, statistic=deepcopy(known.statistic), sample=list(known.sample)))
            known.layers = both
            known.statistic.include(use.statistic)
            known.sample += use.sample
            known.tokens += use.tokens
            left = [layer for layer in left if layer not in both]
        if left:
            self.inputs.append(replace(use, layers=left, statistic=deepcopy(use.statistic), sample=list(use.sample)))


@torch.no_grad()
def observe_shared(
    stream: Stream, statistic: Callable[[int, torch.device], S], *, error_tokens: int, expert_tokens: int
) -> dict[int, SharedInputs[S]]:
    """Run all windows through the dense blocks, up to the last that multiplies by a matrix of an earlier one.

    Args:
        stream: before the first block; of no more use afterwards. statistic, error_tokens, expert_tokens: see observer.collect.

    Returns:
        Index of a block -> what is read by those of its layers whose matrices later blocks multiply by, too.
    """
    decoder = stream.decoder
    uses = _uses(decoder)
    shared_inputs = {index: SharedInputs[S]() for index in owners(decoder)}
    last = max(uses, default=-1)
    log.info("running the windows through %d dense blocks for the matrices that several of them have", last + 1)
    with read_ahead(decoder, range(last + 1)) as blocks:
        for index, tensors in enumerate(blocks):
            with decoder.loaded(index, tensors) as block:
                if index not in uses:
                    stream.advance(index, block)
                    continue
                inputs, held_out = collect(
                    stream,
                    index,
                    block,
                    statistic,
                    error_tokens=error_tokens,
                    expert_tokens=expert_tokens,
                    propagates=index < last,
                    layers=list(uses[index]),
                )
            for first in {first for first, _ in uses[index].values()}:
                names = {layer: other for layer, (owner, other) in uses[index].items() if owner == first}
                renamed = [replace(use, layers=[names[layer] for layer in use.layers if layer in names]) for use in inputs]
                of_first = {names[layer]: sample for layer, sample in held_out.items() if layer in names}
                shared_inputs[first].include([use for use in renamed if use.layers], of_first)
    return shared_inputs


def owners(decoder: Decoder) -> set[int]:
    """The blocks whose matrices later blocks have, too."""
    return {index for of_block in _uses(decoder).values() for index, _ in of_block.values()}


def _uses(decoder: Decoder) -> dict[int, dict[Layer, tuple[int, Layer]]]:
    """Index of a block -> its layer with a matrix that several blocks have -> the first of these blocks, and the layer there."""
    shared = {matrix.name for matrices in decoder.reused for matrix in matrices}
    owners = {matrix.name: (index, matrix.layer) for index, matrices in enumerate(decoder.matrices) for matrix in matrices}
    uses: dict[int, dict[Layer, tuple[int, Layer]]] = {}
    for index, (own, reused) in enumerate(zip(decoder.matrices, decoder.reused, strict=True)):
        for matrix in (*own, *reused):
            if matrix.name in shared:
                uses.setdefault(index, {})[matrix.layer] = owners[matrix.name]
    return uses
