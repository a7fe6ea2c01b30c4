"""The block loop: one decoder block in memory at a time.

Read a block's tensors, run the windows through it collecting statistics of every layer's input, prune all its matrices, run
the windows again through the pruned block for the next one's inputs: the order of the published Wanda and SparseGPT. Or hand
the dense block's outputs on, in the same pass that collects the statistics: one pass instead of two, and every block is
pruned for inputs that the pruned model will not give it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from stages.checkpoint.delta import Change
from stages.errors import PruningError
from stages.pruning import distributed
from stages.pruning.distillation import Distillation
from stages.pruning.method import Method, Pruned
from stages.pruning.observer import Inputs, Observer, watch
from stages.pruning.patterns import Pattern
from stages.pruning.permutation_groups import PermutationGroup
from stages.pruning.reconstruction import Reconstruction, reconstruct
from stages.pruning.reordering import STAYS, Order, find_orders, proven_permutation_groups
from stages.streaming.architecture import Matrix
from stages.streaming.calls import run_block
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream, read_ahead

ROWS_AT_ONCE = 2048  # of a matrix whose error is measured
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}


@dataclass(kw_only=True, slots=True)
class Finished:
    """One matrix's outcome.

    relative_error: ||(W - W') X||_F / ||W X||_F on a sample of the calibration tokens, before any distillation.
    damping: see method.Pruned.
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
    reconstruction: how the kept weights of each block are trained in the end, or None.
    distillation: what the survivors of the last blocks learn together when all blocks are pruned, or None; those blocks are
        not reconstructed.
    permutation_rounds: how often a column is tried in other groups of N:M, see permutations; None: columns stay in place.
    rows: matrix name -> what a squared error of each of its outputs costs, [rows], float32, above 0; for a matrix that is
        not named they cost the same. It tells when the rows of a matrix compete.
    """

    method: Method
    patterns: dict[str, Pattern]
    propagate: str
    error_tokens: int
    expert_tokens: int
    reconstruction: Reconstruction | None = None
    distillation: Distillation | None = None
    permutation_rounds: int | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.learns and self.propagate != "pruned":
            raise ValueError("survivors that learn want blocks that are run pruned")

    @property
    def learns(self) -> bool:
        """Whether survivors are trained."""
        return self.reconstruction is not None or self.distillation is not None

    @property
    def moves(self) -> bool:
        """Whether survivors change."""
        return self.method.moves or self.learns

    def reconstruction_in(self, index: int) -> Reconstruction | None:
        """What a block learns alone."""
        return self.reconstruction if self.distillation is None or index < self.distillation.first else None


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What goes through the blocks beside the pruned stream.

    dense: the same windows through the dense blocks, where survivors learn from it. entering: what enters the first block that
    a distillation trains, once the loop has come there.
    """

    dense: Stream | None
    entering: Stream | None

    @classmethod
    def of(cls, stream: Stream, plan: Plan) -> "Companions":
        """Those that a plan wants; made before the first block.

        Raises:
            SparsesweepError: no disk space for a file of hidden states.
        """
        return cls(dense=stream.clone() if plan.learns else None, entering=stream.clone() if plan.distillation else None)


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
def prune_blocks(
    stream: Stream, plan: Plan, done: Callable[[int], dict[str, Change] | None] = lambda _: None, beside: Companions | None = None
) -> Iterator[PrunedBlock]:
    """Prune block after block.

    Args:
        stream: the calibration windows, or this process's share of them.
        done: gives the changes of a block that an earlier run finished, or None. The windows run through such a block
            again, and it is not yielded.
        beside: what goes along; by default what the plan wants.

    Yields:
        One PrunedBlock for each block, as soon as it is done.

    Raises:
        PruningError: naming the layer: scores that are not finite, a Gram matrix that does not factor, no tokens.
    """
    decoder, count = stream.decoder, len(stream.decoder.blocks)
    beside = beside or Companions.of(stream, plan)
    with read_ahead(decoder, range(count)) as blocks:
        for index, tensors in enumerate(blocks):
            changes, is_last = done(index), index == count - 1
            if beside.entering is not None and plan.distillation and index == plan.distillation.first:
                beside.entering.hidden.copy_(stream.hidden)
            if changes is not None and beside.dense is not None and (plan.distillation or not is_last):
                with decoder.loaded(index, dict(tensors)) as block:
                    beside.dense.advance(index, block)
            if changes is not None and plan.propagate == "pruned":
                for name, change in changes.items():
                    tensors[name] = change.apply(tensors[name])
            with decoder.loaded(index, tensors) as block:
                if changes is None:
                    if beside.dense is not None:
                        beside.dense.advance(index, block)
                    yield _prune_block(stream, plan, index, block, beside.dense)
                if not is_last and (changes is not None or plan.propagate == "pruned"):
                    stream.advance(index, block)


def _prune_block(stream: Stream, plan: Plan, index: int, block: nn.Module, dense: Stream | None) -> PrunedBlock:
    """dense: the dense model's hidden states, up to and with this block."""
    decoder = stream.decoder
    groups = _permutation_groups(stream, plan, index, block)
    observer = _observe(stream, plan, index, block)
    reconstruction = plan.reconstruction_in(index)
    orders = _orders(decoder, plan, block, observer, groups)
    found = _prune_matrices(decoder, plan, index, block, observer, orders, follows=reconstruction is not None)
    if reconstruction and dense is not None:
        masks, values = _parameters(block, found)
        reconstruct(stream, index, block, masks, values, dense.hidden, reconstruction)
        for one in found:
            _take_over(decoder, block, one, values)
    settled = {one.finished.matrix.name: one for one in found}
    changes: dict[str, list[tuple[int | None, Change]]] = {}
    for matrix in decoder.matrices[index]:
        changes.setdefault(matrix.tensor, []).append((matrix.expert, settled[matrix.name].change))
    return PrunedBlock(
        index=index,
        changes={tensor: _joined(parts) for tensor, parts in changes.items()},
        matrices=[settled[matrix.name].finished for matrix in decoder.matrices[index]],
    )


@dataclass(kw_only=True, slots=True)
class _Settled:
    """What became of one matrix; where a reconstruction follows, also what its error is measured by.

    mask: [rows, columns], bool. values: the survivors', [rows, columns], float32. sample: [tokens, columns], float32.
    expected: [tokens, rows], float32, the dense outputs of the sample.
    """

    finished: Finished
    change: Change
    mask: torch.Tensor
    order: Order
    values: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    expected: torch.Tensor | None = None


def _observe(stream: Stream, plan: Plan, index: int, block: nn.Module) -> Observer:
    """All windows through a block up to the inputs of its last layer; in dense propagation the block's outputs go on."""
    observer = watch(stream, block, stream.decoder.layers(index), plan.method.statistic, plan.error_tokens)
    passing_on = plan.propagate == "dense" and index < len(stream.decoder.blocks) - 1
    for where, hidden, call in stream.parts(index):
        output = observer.run(hidden, partial(run_block, block, call=call), stop=not passing_on)
        if output is not None and passing_on:
            stream.put(where, output)
    stream.require_finite(index)
    observer.finish(plan.expert_tokens)
    return observer


def _parameters(block: nn.Module, found: list[_Settled]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The masks and the survivors' values of all matrices of a block, in the shape of the block's parameters, by their names."""
    masks: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for one in found:
        matrix, parameter = one.finished.matrix, block.get_parameter(one.finished.matrix.parameter_slice.name)
        for whole, part in ((masks, one.mask), (values, one.values)):
            assert part is not None
            empty = torch.zeros(parameter.shape, dtype=part.dtype, device=parameter.device)
            matrix.part_of(whole.setdefault(matrix.parameter_slice.name, empty)).copy_(part)
    return masks, values


def _take_over(decoder: Decoder, block: nn.Module, one: _Settled, found: dict[str, torch.Tensor]) -> None:
    """Make what reconstruction found the matrix's outcome, rounded to the checkpoint's dtype in the block and in the change."""
    assert one.sample is not None and one.expected is not None
    matrix, stored = one.finished.matrix, decoder.checkpoint.dtype(one.finished.matrix.tensor)
    values = matrix.part_of(found[matrix.parameter_slice.name]).to(stored).float().masked_fill(~one.mask, 0)
    if not torch.isfinite(values).all():
        raise PruningError(f"layer {matrix.name}: found NaN or infinity after its reconstruction in {stored}, wanted finite weights")
    matrix.of(block).copy_(values)
    one.change = _change(matrix, Pruned(mask=one.mask, values=values), one.order, stored)
    lost = torch.linalg.vector_norm(one.sample @ values.T - one.expected).double().square().cpu()
    total = torch.linalg.vector_norm(one.expected).double().square().cpu()
    one.finished.relative_error = relative_error(*distributed.all_reduce(torch.stack([lost, total])).tolist())


def _permutation_groups(stream: Stream, plan: Plan, index: int, block: nn.Module) -> list[PermutationGroup]:
    if plan.permutation_rounds is None:
        return []
    _, part, call = next(stream.parts(index))
    return proven_permutation_groups(stream.decoder, index, block, part, call)


def _orders(
    decoder: Decoder, plan: Plan, block: nn.Module, observer: Observer, permutation_groups: list[PermutationGroup]
) -> dict[str, Order]:
    """By matrix name; the consumers' inputs are reordered."""
    if plan.permutation_rounds is None:
        return {}
    readers = Counter(observer.leader.values())  # of each distinct input
    alone = [group for group in permutation_groups if (layer := group.consumer.layer) in observer.inputs and readers[layer] == 1]
    inputs = {group.consumer.name: observer.inputs[group.consumer.layer] for group in alone}
    weights = {group.consumer.name: decoder.stored(group.consumer, block) for group in alone}
    return find_orders(alone, weights, inputs, plan.patterns, plan.method.score, plan.permutation_rounds)


def _prune_matrices(
    decoder: Decoder, plan: Plan, index: int, block: nn.Module, observer: Observer, orders: dict[str, Order], follows: bool
) -> list[_Settled]:
    """Choose and update, matrix by matrix; follows: whether a reconstruction does, which wants to know where to start from."""
    by_layer: dict[Any, list[Matrix]] = {}
    for matrix in decoder.matrices[index]:
        by_layer.setdefault(matrix.layer, []).append(matrix)
    unseen = [matrices[0].name for layer, matrices in by_layer.items() if layer not in observer.leader]
    if unseen:
        raise PruningError(f"layer {unseen[0]}: no calibration token reached it")
    settled: list[_Settled] = []
    groups = ((inputs, [matrix for layer in layers for matrix in by_layer[layer]]) for inputs, layers in observer.groups())
    for solved in _outcomes(decoder, plan, block, groups, orders):
        settled += _settle(decoder, plan, block, solved, orders, follows)
        del solved  # with its statistic, before the next group's is factored
    return settled


def _settle(
    decoder: Decoder, plan: Plan, block: nn.Module, solved: "Solved", orders: dict[str, Order], follows: bool
) -> Iterator[_Settled]:
    """Put what the method made of a group into the block, unless the dense matrices stay there, and measure its errors."""
    inputs, matrices, weights, outcomes = solved
    sample = inputs.sampled()
    for matrix, weight, outcome in zip(matrices, weights, outcomes, strict=True):
        order, stored = orders.get(matrix.name, STAYS), decoder.checkpoint.dtype(matrix.tensor)
        expected = sample @ weight.T if follows else None
        target = matrix.of(block) if plan.propagate == "pruned" else None
        lost, total = distributed.all_reduce(_replace(weight, outcome, stored, target, sample)).tolist()
        if not math.isfinite(lost + total):
            raise PruningError(f"layer {matrix.name}: found NaN or infinity in its outputs, wanted finite activations")
        finished = Finished(
            matrix=matrix,
            relative_error=relative_error(lost, total),
            damping=outcome.damping,
            tokens=inputs.tokens,
            calibrated_on="its tokens" if inputs.routed else "all tokens",
        )
        one = _Settled(finished=finished, change=_change(matrix, outcome, order, stored), mask=outcome.mask, order=order)
        if follows:
            one.values = weight * outcome.mask if outcome.values is None else outcome.values
            one.sample, one.expected = sample, expected
        yield one


Group = tuple[Inputs, list[Matrix]]  # the matrices that read one input
Solved = tuple[Inputs, list[Matrix], list[torch.Tensor], list[Pruned]]  # with their weights and what became of them


def _outcomes(decoder: Decoder, plan: Plan, block: nn.Module, groups: Iterator[Group], orders: dict[str, Order]) -> Iterator[Solved]:
    """What the method makes of each group, with its weights. Several processes first work out their own, then share them."""

    def weights_of(matrices: list[Matrix]) -> list[torch.Tensor]:
        return [orders.get(matrix.name, STAYS).of(decoder.stored(matrix, block)) for matrix in matrices]

    if distributed.world_size() == 1:  # one after another: a group's statistic goes before the next is factored
        for inputs, matrices in groups:
            weights = weights_of(matrices)
            yield inputs, matrices, weights, _solve(plan, inputs, matrices, weights)
        return
    everyones = list(enumerate(groups))
    own = {
        number: _solve(plan, inputs, matrices, weights_of(matrices))
        for number, (inputs, matrices) in everyones
        if number % distributed.world_size() == distributed.rank()
    }
    for number, (inputs, matrices) in everyones:
        weights, owner = weights_of(matrices), number % distributed.world_size()
        yield inputs, matrices, weights, [_shared(own.get(number, [])[i:], weight, plan, owner) for i, weight in enumerate(weights)]


def _solve(plan: Plan, inputs: Inputs, matrices: list[Matrix], weights: list[torch.Tensor]) -> list[Pruned]:
    names = ", ".join(matrix.name for matrix in matrices)
    if not all(torch.isfinite(part).all() for part in inputs.sample):
        reason = "; float16 overflows above 65504, bfloat16 does not" if inputs.sample[0].dtype == torch.float16 else ""
        raise PruningError(f"layer {names}: found NaN or infinity in its inputs, wanted finite activations{reason}")
    scales = [_row_scale(plan.rows.get(matrix.name), weight) for matrix, weight in zip(matrices, weights, strict=True)]
    weights = [weight if scale is None else weight * scale for weight, scale in zip(weights, scales, strict=True)]
    with PruningError.naming(f"layer {names}"):
        outcomes = plan.method(weights, inputs.statistic, [plan.patterns[matrix.name] for matrix in matrices])
    return [
        outcome if scale is None or outcome.values is None else replace(outcome, values=outcome.values / scale)
        for outcome, scale in zip(outcomes, scales, strict=True)
    ]


def _row_scale(costs: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """[rows, 1], 1 on average: scaled by the root of what its squared error costs, each row's error counts alike."""
    if costs is None:
        return None
    scale = costs.to(weight.device).sqrt()
    return (scale / scale.mean())[:, None]


def _shared(own: list[Pruned], weight: torch.Tensor, plan: Plan, owner: int) -> Pruned:
    """A matrix's outcome from the process that worked it out; `own` begins with it there, and is empty elsewhere."""
    shape, device = weight.shape, weight.device
    mask = own[0].mask.to(torch.uint8).contiguous() if own else torch.empty(shape, dtype=torch.uint8, device=device)
    damping = torch.tensor((own[0].damping if own else None) or 0.0, dtype=torch.float64)
    values = own[0].values if own else torch.empty(shape, dtype=torch.float32, device=device) if plan.method.moves else None
    if values is not None:
        values = values.contiguous()
        distributed.broadcast(values, owner)
    return Pruned(
        mask=distributed.broadcast(mask, owner).bool(), values=values, damping=distributed.broadcast(damping, owner).item() or None
    )


def _change(matrix: Matrix, outcome: Pruned, order: Order, stored: torch.dtype) -> Change:
    """The outcome on the CPU, in the checkpoint's orientation and dtype."""
    mask, values, places = outcome.mask, outcome.values, [order.rows, order.columns]
    if matrix.transposed:
        mask, values, places = mask.T, None if values is None else values.T, places[::-1]
    rows, columns = (None if place is None else place.int().cpu() for place in places)
    moved = None if values is None else values[mask].to(stored).cpu()
    return Change(mask=mask.cpu().contiguous(), values=moved, rows=rows, columns=columns)


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
