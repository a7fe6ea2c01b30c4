"""The block loop: one decoder block in memory at a time.

Read a block's tensors, run the windows through it collecting statistics of every layer's input, prune all its matrices, run
the windows again through the pruned block for the next one's inputs: the order of the published Wanda and SparseGPT. Or hand
the dense block's outputs on, in the same pass that collects the statistics: one pass instead of two, and every block is
pruned for inputs that the pruned model will not give it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from stages.checkpoint.delta import Change
from stages.errors import PruningError
from stages.pruning import ranks
from stages.pruning.method import Pruned, PruneMatrices
from stages.pruning.observer import Inputs, Observer
from stages.pruning.patterns import Pattern
from stages.streaming.architecture import Decoder, Matrix, run_block
from stages.streaming.stream import Stream, read_ahead

ROWS_AT_ONCE = 2048  # of a matrix whose error is measured
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}


@dataclass(kw_only=True, slots=True)
class Finished:
    """One matrix's outcome.

    relative_error: ||(W - W') X||_F / ||W X||_F on a sample of the calibration tokens.
    damping: share of the Gram matrix's mean diagonal that it took to factor it, or None.
    tokens: how many the layer saw; calibrated_on: "its tokens", or "all tokens" for an expert that too few chose.
    """

    matrix: Matrix
    relative_error: float
    damping: float | None
    tokens: int
    calibrated_on: str


@dataclass(kw_only=True, slots=True)
class PrunedBlock:
    """One block's outcome.

    changes: tensor name -> what happened to it, on the CPU, in the shape of the checkpoint.
    """

    index: int
    changes: dict[str, Change]
    matrices: list[Finished]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to every block.

    patterns: matrix name -> the pattern that its mask must have.
    propagate: "pruned" or "dense", whose outputs the next block's statistics are collected on.
    error_tokens: about how many calibration tokens the relative error is measured on, evenly spread; for an
        expert the first eighth of that number that chose it.
    expert_tokens: an expert that fewer tokens chose is calibrated on the sample of all tokens.
    """

    method: PruneMatrices
    patterns: dict[str, Pattern]
    propagate: str
    error_tokens: int
    expert_tokens: int


def micro_batch(tokens: int, device: torch.device, asked: int | None) -> int:
    """Windows of `tokens` tokens per forward pass: as asked, or by the kind of device, so that one kind always computes the same."""
    return asked or max(1, TOKENS_PER_PASS[device.type] // tokens)


def lost_and_total(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """||(W - W') X||_F² and ||W X||_F², [2], float64.

    Args:
        weight, pruned: [rows, columns], float32.
        inputs: [tokens, columns], float32.
    """
    norms = [torch.linalg.vector_norm(inputs @ matrix.T) for matrix in (weight - pruned, weight)]
    return torch.stack(norms).double().square().cpu()


def relative_error(lost: float, total: float) -> float:
    """The root of lost / total; 0 where both are 0."""
    return (lost / total) ** 0.5 if total > 0 else float(lost > 0)


@torch.no_grad()
def prune_blocks(stream: Stream, plan: Plan, done: Callable[[int], dict[str, Change] | None] = lambda _: None) -> Iterator[PrunedBlock]:
    """Prune block after block.

    Args:
        stream: the calibration windows, or this process's share of them.
        done: gives the changes of a block that an earlier run finished, or None. The windows run through such a block
            again, and it is not yielded.

    Yields:
        One PrunedBlock for each block, as soon as it is done.

    Raises:
        PruningError: naming the layer: scores that are not finite, a Gram matrix that does not factor, no tokens.
    """
    decoder, count = stream.decoder, len(stream.decoder.blocks)
    with read_ahead(decoder, range(count)) as blocks:
        for index, tensors in enumerate(blocks):
            changes, is_last = done(index), index == count - 1
            if changes is not None and plan.propagate == "pruned":
                for name, change in changes.items():
                    tensors[name] = change.apply(tensors[name])
            with decoder.loaded(index, tensors) as block:
                if changes is None:
                    observer = _observe(stream, plan, index, block)
                    yield _prune_block(decoder, plan, index, block, observer)
                if not is_last and (changes is not None or plan.propagate == "pruned"):
                    stream.advance(index, block)


def _observe(stream: Stream, plan: Plan, index: int, block: nn.Module) -> Observer:
    """All windows through a block; in dense propagation its outputs go on."""
    layers = list(dict.fromkeys(matrix.layer for matrix in stream.decoder.matrices[index]))
    tokens = stream.all_windows * stream.shape[1]
    observer = Observer(block, layers, plan.method.statistic, tokens, plan.error_tokens, stream.first_window * stream.shape[1])
    passing_on = plan.propagate == "dense" and index < len(stream.decoder.blocks) - 1
    for where, part, call in stream.parts(index):
        output = observer.run(part, partial(run_block, block, call=call), stop=not passing_on)
        if output is not None and passing_on:
            stream.put(where, output)
    stream.require_finite(index)
    observer.finish(plan.expert_tokens)
    return observer


def _prune_block(decoder: Decoder, plan: Plan, index: int, block: nn.Module, observer: Observer) -> PrunedBlock:
    by_layer: dict[Any, list[Matrix]] = {}
    for matrix in decoder.matrices[index]:
        by_layer.setdefault(matrix.layer, []).append(matrix)
    unseen = [matrices[0].name for layer, matrices in by_layer.items() if layer not in observer.leader]
    if unseen:
        raise PruningError(f"layer {unseen[0]}: no calibration token reached it")
    finished: dict[str, Finished] = {}
    parts: dict[str, list[tuple[int | None, Change]]] = {matrix.tensor: [] for matrix in decoder.matrices[index]}
    groups = ((inputs, [matrix for layer in layers for matrix in by_layer[layer]]) for inputs, layers in observer.groups())
    for inputs, matrices, weights, outcomes in _outcomes(decoder, plan, block, groups):
        sample = inputs.sampled()
        for matrix, weight, outcome in zip(matrices, weights, outcomes, strict=True):
            change = _change(matrix, outcome, decoder.checkpoint.dtype(matrix.tensor))
            target = matrix.of(block) if plan.propagate == "pruned" else None
            lost, total = ranks.all_sum(_replace(weight, outcome, decoder.checkpoint.dtype(matrix.tensor), target, sample)).tolist()
            if not math.isfinite(lost + total):
                raise PruningError(f"layer {matrix.name}: found NaN or infinity in its outputs, wanted finite activations")
            parts[matrix.tensor].append((matrix.expert, change))
            finished[matrix.name] = Finished(
                matrix=matrix,
                relative_error=relative_error(lost, total),
                damping=outcome.damping,
                tokens=inputs.tokens,
                calibrated_on="its tokens" if inputs.routed else "all tokens",
            )
    return PrunedBlock(
        index=index,
        changes={tensor: _joined(changes) for tensor, changes in parts.items()},
        matrices=[finished[matrix.name] for matrix in decoder.matrices[index]],
    )


Group = tuple[Inputs, list[Matrix]]  # the matrices that read one input


def _outcomes(
    decoder: Decoder, plan: Plan, block: nn.Module, groups: Iterator[Group]
) -> Iterator[tuple[Inputs, list[Matrix], list[torch.Tensor], list[Pruned]]]:
    """What the method makes of each group, with its weights. Several processes first work out their own, then share them."""

    def weights_of(matrices: list[Matrix]) -> list[torch.Tensor]:
        return [decoder.stored(matrix, block) for matrix in matrices]

    if ranks.count() == 1:  # one after another: a group's statistic goes before the next is factored
        for inputs, matrices in groups:
            weights = weights_of(matrices)
            yield inputs, matrices, weights, _solve(plan, inputs, matrices, weights)
        return
    everyones = list(enumerate(groups))
    own = {
        number: _solve(plan, inputs, matrices, weights_of(matrices))
        for number, (inputs, matrices) in everyones
        if number % ranks.count() == ranks.rank()
    }
    for number, (inputs, matrices) in everyones:
        weights, owner = weights_of(matrices), number % ranks.count()
        yield inputs, matrices, weights, [_shared(own.get(number, [])[i:], weight, plan, owner) for i, weight in enumerate(weights)]


def _solve(plan: Plan, inputs: Inputs, matrices: list[Matrix], weights: list[torch.Tensor]) -> list[Pruned]:
    names = ", ".join(matrix.name for matrix in matrices)
    if not all(torch.isfinite(part).all() for part in inputs.sample):
        reason = "; float16 overflows above 65504, bfloat16 does not" if inputs.sample[0].dtype == torch.float16 else ""
        raise PruningError(f"layer {names}: found NaN or infinity in its inputs, wanted finite activations{reason}")
    try:
        return plan.method(weights, inputs.statistic, [plan.patterns[matrix.name] for matrix in matrices])
    except (ArithmeticError, ValueError) as error:
        raise PruningError(f"layer {names}: {error}") from error


def _shared(own: list[Pruned], weight: torch.Tensor, plan: Plan, owner: int) -> Pruned:
    """A matrix's outcome from the process that worked it out; `own` begins with it there, and is empty elsewhere."""
    shape, device = weight.shape, weight.device
    mask = own[0].mask.to(torch.uint8) if own else torch.empty(shape, dtype=torch.uint8, device=device)
    damping = torch.tensor((own[0].damping if own else None) or 0.0, dtype=torch.float64)
    values = own[0].values if own else torch.empty(shape, dtype=torch.float32, device=device) if plan.method.moves else None
    if values is not None:
        ranks.share(values, owner)
    return Pruned(mask=ranks.share(mask, owner).bool(), values=values, damping=ranks.share(damping, owner).item() or None)


def _change(matrix: Matrix, outcome: Pruned, stored: torch.dtype) -> Change:
    """The outcome on the CPU, in the checkpoint's orientation and dtype."""
    mask, values = outcome.mask, outcome.values
    if matrix.transposed:
        mask, values = mask.T, None if values is None else values.T
    return Change(mask=mask.cpu().contiguous(), values=None if values is None else values[mask].to(stored).cpu())


def _replace(weight: torch.Tensor, outcome: Pruned, stored: torch.dtype, target: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
    """Put the matrix as base + delta will have it, rounded to the checkpoint's dtype, into the block; some rows at a time.

    Args:
        weight: [rows, columns], float32; may be the target itself.
        target: the block's parameter, [rows, columns], or None where the dense one stays.

    Returns:
        See lost_and_total.
    """
    found = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        kept = outcome.mask[rows]
        values = weight[rows] if outcome.values is None else outcome.values[rows].to(stored).to(weight.dtype)
        pruned = values.masked_fill(~kept, 0)
        found += lost_and_total(weight[rows], pruned, sample)
        if target is not None:
            target[rows] = pruned
    return found


def _joined(parts: list[tuple[int | None, Change]]) -> Change:
    """The change of a tensor: that of its one matrix, or those of the experts that it holds."""
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    changes = [change for _, change in sorted(parts, key=lambda part: part[0] or 0)]
    moved = [change.values for change in changes if change.values is not None]
    return Change(mask=torch.stack([change.mask for change in changes]), values=torch.cat(moved) if moved else None)
