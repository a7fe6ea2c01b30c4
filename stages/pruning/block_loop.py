"""The block loop: prune a model one decoder block at a time, as published for Wanda and SparseGPT.

    for each decoder block:                                         # Sun et al. 2024, arXiv:2306.11695, algorithm 1
        read      its weights
        collect   run the windows through it; a statistic of every layer's inputs X
        solve     choose the masks, and new weights W', of the matrices that read the same inputs
        write     put W' into the block, rounded to the checkpoint's dtype
        measure   ||(W - W') X||_F / ||W X||_F on sampled tokens
        propagate run the windows through the pruned block; its outputs are the next block's inputs

With dense propagation the outputs of the dense block, from the pass that collects, are the next block's inputs: one pass instead of
two, but every block is then pruned for inputs that the pruned model does not give it. With sequential propagation one pass does all of
this layer after layer, each pruned for what the pruned layers before it give; see sequential. Of matrices that several blocks multiply by
see shared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.checkpoint.delta import Change
from stages.checkpoint.scored_mask import ScoredMask
from stages.devices import to_host
from stages.errors import PruningError
from stages.pruning import distributed, parallel
from stages.pruning.entries import Pruned
from stages.pruning.guard import without_harm
from stages.pruning.inputs import CalibratedOn, Inputs
from stages.pruning.learning import Outcome
from stages.pruning.method import prune_matrices
from stages.pruning.observer import Observer, collect, observe, observe_held_out, samples_of
from stages.pruning.patterns import Nm, Pattern
from stages.pruning.permutation_groups import PermutationGroup
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import BlockTraining, reconstruct
from stages.pruning.reordering import UNCHANGED, Order, find_orders, proven_permutation_groups
from stages.pruning.scores import SCORES
from stages.pruning.section import Propagation
from stages.pruning.selection import select
from stages.pruning.sequential import SequentialPass
from stages.pruning.shared import SharedInputs, observe_shared, owners
from stages.pruning.shrinkage import with_shrinkage
from stages.streaming.architecture import Layer, Matrix
from stages.streaming.calls import block_outputs
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.mixture import Routing, loaded_in_turn, replay
from stages.streaming.mixture import advance as advance_by_expert
from stages.streaming.stream import Stream, read_ahead

if TYPE_CHECKING:  # the loop runs without what only keeping and reading statistics needs
    from stages.pruning.kept import KeptInputs

ROWS_AT_ONCE = 2048  # of a matrix that is written back


@dataclass(kw_only=True, slots=True)
class MatrixResult:
    """How pruning one matrix went.

    relative_error: ||(W - W') X||_F / ||W X||_F on a sample of the calibration tokens, before any distillation; 0 or more.
    held_out_error: the same on tokens of the windows held out; None if none of them reached the layer.
    damping, refined: see entries.Pruned.
    tokens: how many the layer read, in all processes.
    kept: number of kept weights.
    """

    matrix: Matrix
    relative_error: float
    held_out_error: float | None
    damping: float | None
    refined: bool | None
    tokens: int
    calibrated_on: CalibratedOn
    kept: int


@dataclass(kw_only=True, slots=True)
class PrunedBlock:
    """A pruned block.

    changes: tensor name -> what changed in it, on the CPU, in the shape of the checkpoint.
    matrices: in the order of the decoder's.
    training: how its reconstruction went; None without one.
    """

    index: int
    changes: dict[str, Change]
    matrices: list[MatrixResult]
    training: Outcome | None


@dataclass(frozen=True, kw_only=True)
class TeacherStreams:
    """The hidden states that training needs in addition to those of the pruned model.

    teacher: of the dense model, from block to block. student_inputs: of the pruned model before the first block that a distillation
    trains, once the loop has reached that block; None without a distillation.
    """

    teacher: Stream
    student_inputs: Stream | None

    @classmethod
    def of(cls, stream: Stream, plan: Plan) -> "TeacherStreams | None":
        """Clones of a stream before the first block, or None where the plan trains nothing.

        Raises:
            SparsesweepError: no disk space for a file of hidden states.
        """
        if not plan.trains:
            return None
        return cls(teacher=stream.clone(), student_inputs=stream.clone() if plan.distillation else None)

    @property
    def locations(self) -> list[str]:
        """Where the hidden states are, see Stream."""
        return [stream.location for stream in (self.teacher, self.student_inputs) if stream is not None]


@torch.no_grad()
def prune_blocks(
    source: "Stream | KeptInputs",
    plan: Plan,
    done: Callable[[int], dict[str, Change] | None] = lambda _: None,
    teachers: TeacherStreams | None = None,
    trained: Sequence[Outcome] = (),
) -> Iterator[PrunedBlock]:
    """Prune block after block.

    Args:
        source: the calibration windows of this process, before the first block; or, with dense propagation and no training or
            permutation, what an earlier pass of them kept, of the kind `plan.method.statistic`.
        done: gives the changes of a block that an earlier run finished, or None. The windows run through such a block again, and it
            is not yielded.
        teachers: by default those that the plan needs.
        trained: how the reconstructions of the blocks went that an earlier run finished, in order.

    Yields:
        Each block as soon as it is pruned.

    Raises:
        PruningError: scores that are not finite, a Gram matrix that does not factor, a layer that no token reached; names the layer.
    """
    decoder = source.decoder
    steps = _FromWindows(source, plan, teachers, trained) if isinstance(source, Stream) else _FromKept(source, plan)
    reused, earlier = {matrix.tensor for matrices in decoder.reused for matrix in matrices}, dict[str, Change]()
    with read_ahead(decoder, range(len(decoder.blocks))) as blocks:
        for index, tensors in enumerate(blocks):
            steps.begin(index)
            if plan.propagate != Propagation.DENSE:
                for name in tensors.keys() & earlier.keys():
                    tensors[name] = earlier[name].apply(tensors[name])
            changes = done(index)
            if changes is not None:
                steps.repeat(index, tensors, changes)
            else:
                steps.prepare(index)
                with decoder.loaded(index, tensors) as block:
                    pruned = steps.prune(index, block)
                    yield pruned
                    changes = pruned.changes
                    steps.go_on(index, block, changes)
            earlier |= {name: change for name, change in changes.items() if name in reused}


class _FromWindows:
    """Blocks are pruned for what the windows give while they run through them; for the arguments see prune_blocks."""

    def __init__(self, stream: Stream, plan: Plan, teachers: TeacherStreams | None, trained: Sequence[Outcome]) -> None:
        self.stream, self.plan, self.outcomes = stream, plan, list(trained)
        self.teachers = teachers or TeacherStreams.of(stream, plan)
        self.routing = Routing(stream)
        if plan.propagate == Propagation.SEQUENTIAL:
            stream.decoder.require_reading_orders()
        self.shared: dict[int, SharedInputs] = {}
        self.dense = stream.clone() if any(stream.decoder.reused) else None  # until a block that later ones share is pruned

    def begin(self, index: int) -> None:
        """Keep what enters the first block that a distillation trains."""
        teachers, distillation = self.teachers, self.plan.distillation
        if teachers and teachers.student_inputs and distillation and index == distillation.first:
            teachers.student_inputs.copy_from(self.stream)

    def prepare(self, index: int) -> None:
        """Before a dense block is loaded: run the dense model, if this is the first to be pruned of which later blocks have matrices."""
        if self.dense is not None and index in owners(self.stream.decoder):
            tokens = {"error_tokens": self.plan.error_tokens, "expert_tokens": self.plan.expert_tokens}
            self.shared, self.dense = observe_shared(self.dense, self.plan.method.statistic, **tokens), None

    def repeat(self, index: int, tensors: dict[str, torch.Tensor], changes: dict[str, Change]) -> None:
        """Run all windows through a block that an earlier run pruned, as far as anything needs its outputs."""
        self.shared.pop(index, None)
        _repeat_block(self.stream, self.plan, index, tensors, changes, self.teachers, self.routing)

    def prune(self, index: int, block: nn.Module) -> PrunedBlock:
        """Prune a loaded dense block."""
        if self.teachers:
            self.teachers.teacher.advance(index, block)
        if index in self.stream.decoder.apart:
            return _prune_by_expert(self.stream, self.plan, index, block, self.routing)
        pruned = _prune_block(self.stream, self.plan, index, block, self.teachers, self.outcomes, self.shared.pop(index, SharedInputs()))
        self.outcomes += [pruned.training] if pruned.training else []
        return pruned

    def go_on(self, index: int, block: nn.Module, changes: dict[str, Change]) -> None:
        """Run all windows through the pruned block, where the next one needs that."""
        if index < len(self.stream.decoder.blocks) - 1 and not self.plan.propagates_while_pruning(index):
            _advance(self.stream, index, block, self.routing, changes)


class _FromKept:
    """Blocks are pruned for kept statistics; no window runs through them."""

    def __init__(self, kept: "KeptInputs", plan: Plan) -> None:
        self.kept, self.plan = kept, plan

    def begin(self, index: int) -> None: ...

    def prepare(self, index: int) -> None: ...

    def repeat(self, index: int, tensors: dict[str, torch.Tensor], changes: dict[str, Change]) -> None: ...

    def prune(self, index: int, block: nn.Module) -> PrunedBlock:
        """Prune a loaded dense block."""
        decoder = self.kept.decoder
        pruner = _BlockPruner(decoder, self.plan, index, block, [], None)
        inputs, held_out = self.kept.of_block(index)
        pruner.require_reached(inputs, decoder.layers(index))
        pruner.prune(inputs, held_out)
        return pruner.pruned_block()

    def go_on(self, index: int, block: nn.Module, changes: dict[str, Change]) -> None: ...


def _advance(stream: Stream, index: int, block: nn.Module, routing: Routing, changes: dict[str, Change]) -> None:
    """Run all windows through a loaded block. changes: with which its experts are loaded, where these are not."""
    if index in stream.decoder.apart:
        advance_by_expert(stream, index, block, routing, changes)
    else:
        stream.advance(index, block)


def _repeat_block(
    stream: Stream,
    plan: Plan,
    index: int,
    tensors: dict[str, torch.Tensor],
    changes: dict[str, Change],
    teachers: TeacherStreams | None,
    routing: Routing,
) -> None:
    """Run all windows through a block that an earlier run pruned, as far as a later block or a distillation needs its outputs."""
    decoder, is_last = stream.decoder, index == len(stream.decoder.blocks) - 1
    if teachers and (plan.distillation or not is_last):
        with decoder.loaded(index, dict(tensors)) as block:
            teachers.teacher.advance(index, block)
    if is_last:
        return
    changes = {} if plan.propagate == Propagation.DENSE else changes
    for name in changes.keys() & tensors.keys():
        tensors[name] = changes[name].apply(tensors[name])
    with decoder.loaded(index, tensors) as block:
        _advance(stream, index, block, routing, changes)


def _prune_block(
    stream: Stream,
    plan: Plan,
    index: int,
    block: nn.Module,
    teachers: TeacherStreams | None,
    trained: list[Outcome],
    shared: SharedInputs,
) -> PrunedBlock:
    """Prune a loaded dense block; the teacher's hidden states are those after it.

    Args:
        trained: how reconstructions before it went. shared: of its layers whose matrices later blocks multiply by, too.
    """
    permutation_groups = _permutation_groups(stream, plan, index, block)
    reconstruction = plan.reconstruction_of(index)
    training = BlockTraining(reconstruction, block, teachers.teacher.hidden) if teachers and reconstruction else None
    pruner = _BlockPruner(stream.decoder, plan, index, block, permutation_groups, training)
    if plan.propagate == Propagation.SEQUENTIAL:
        _prune_in_one_pass(stream, plan, index, block, pruner)
    else:
        inputs, held_out = collect(
            stream,
            index,
            block,
            plan.method.statistic,
            error_tokens=plan.error_tokens,
            expert_tokens=plan.expert_tokens,
            propagates=plan.propagate == Propagation.DENSE and index < len(stream.decoder.blocks) - 1,
            layers=[layer for layer in stream.decoder.layers(index) if layer not in shared.layers],
        )
        inputs, held_out = inputs + shared.inputs, held_out | shared.held_out
        pruner.require_reached(inputs, stream.decoder.layers(index))
        pruner.prune(inputs, held_out)
    pruner.finish()
    if training is not None:
        pruner.reconstruct(stream, training, trained)
    return pruner.pruned_block()


def _prune_in_one_pass(stream: Stream, plan: Plan, index: int, block: nn.Module, pruner: "_BlockPruner") -> None:
    """Run all windows through a block whose layers are pruned one after another meanwhile; see sequential."""
    SequentialPass(
        stream,
        index,
        block,
        pruner.prune,
        statistic=plan.method.statistic,
        error_tokens=plan.error_tokens,
        expert_tokens=plan.expert_tokens,
        propagates=index < len(stream.decoder.blocks) - 1 and plan.propagates_while_pruning(index),
    ).run()


def _prune_by_expert(stream: Stream, plan: Plan, index: int, block: nn.Module, routing: Routing) -> PrunedBlock:
    """Prune a dense block that is loaded without its experts: one after another is loaded, observed and pruned."""
    decoder, mixture, layers = stream.decoder, stream.decoder.apart[index], stream.decoder.layers(index)
    propagates = plan.propagate == Propagation.DENSE and index < len(decoder.blocks) - 1
    others = [layer for layer in layers if layer.module != mixture.path]

    def observed(observer: Observer[Any], windows: range, minimum: int | None) -> list[Inputs]:
        with routing.recording(block, mixture):
            for members, hidden, call in stream.parts(index, windows):
                routing.running(members)
                observer.run(hidden, partial(block_outputs, block, call=call))
        return observer.finish(minimum, others)

    observer = observe(stream, block, layers, plan.method.statistic, plan.error_tokens)
    inputs = observed(observer, stream.fitted, plan.expert_tokens)
    held_out = observe_held_out(stream, block, layers, plan.error_tokens)
    samples, files = samples_of(observed(held_out, stream.held_out, None)), HostMemory(0, stream.memory.scratch)
    pruner = _BlockPruner(decoder, plan, index, block, [], None, files)
    pruner.require_reached(inputs, others)
    pruner.prune(inputs, samples)
    observers: list[tuple[Observer[Any], range]] = [(observer, stream.fitted), (held_out, stream.held_out)]
    module = block.get_submodule(mixture.path)
    for expert in loaded_in_turn(decoder, index, range(mixture.count)):
        for observing, windows in observers:
            for members in stream.micro_batches(windows):
                observing.run_expert(expert, partial(routing.run_expert, module, expert, members, add=propagates))
        of_expert = [layer for layer in layers if layer.module == mixture.path and layer.expert == expert]
        inputs = observer.finish(plan.expert_tokens, of_expert)
        pruner.require_reached(inputs, of_expert)
        pruner.prune(inputs, samples_of(held_out.finish(None, of_expert)))
        for observing, _ in observers:
            observing.forget(of_expert)
    if propagates:
        replay(stream, index, block, routing)
    return pruner.pruned_block()


def _permutation_groups(stream: Stream, plan: Plan, index: int, block: nn.Module) -> list[PermutationGroup]:
    if plan.permutation_rounds is None or (plan.permutable is not None and index not in plan.permutable):
        return []
    _, hidden, call = next(stream.parts(index))
    return proven_permutation_groups(stream.decoder, index, block, hidden, call)


def _find_orders(
    decoder: Decoder, plan: Plan, block: nn.Module, permutation_groups: list[PermutationGroup], inputs: list[Inputs]
) -> dict[str, Order]:
    """By matrix name. The inputs of consumers are reordered; where other layers read them too, nothing is permuted."""
    if plan.permutation_rounds is None:
        return {}
    of_one_layer = {distinct.layers[0]: distinct for distinct in inputs if len(distinct.layers) == 1}
    groups = [group for group in permutation_groups if group.consumer.layer in of_one_layer]
    read = {group.consumer.name: of_one_layer[group.consumer.layer] for group in groups}
    weights = {group.consumer.name: decoder.stored(group.consumer, block) for group in groups}
    return find_orders(groups, weights, read, plan.patterns, plan.method, plan.permutation_rounds)


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """A matrix that is pruned, with its rows as stored.

    weight: the dense one, [rows, columns], float32. samples: of its inputs.
    """

    matrix: Matrix
    weight: torch.Tensor
    pruned: Pruned
    samples: Sequence[torch.Tensor]


class _BlockPruner:
    """Prunes the matrices of one loaded block, those that read the same inputs together.

    Args:
        permutation_groups: whose channels are permuted.
        training: gathers what a reconstruction starts from, or None where none follows.
        files: holds the new values of kept weights, where they may be more than the memory; None: they are in memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        index: int,
        block: nn.Module,
        permutation_groups: list[PermutationGroup],
        training: BlockTraining | None,
        files: HostMemory | None = None,
    ) -> None:
        self.decoder, self.plan, self.index, self.block = decoder, plan, index, block
        self.permutation_groups, self.training, self.files = permutation_groups, training, files
        self.orders: dict[str, Order] = {}  # matrix name -> the order of its rows and columns
        self.held_out: dict[Layer, torch.Tensor] = {}
        self.solved: list[_Solved] = []  # in a sequential pass, matrices whose rows a later input may permute
        self.outcome: Outcome | None = None
        self.results: dict[str, MatrixResult] = {}
        self.changes: dict[str, Change] = {}
        self.matrices_of: dict[Layer, list[Matrix]] = {}
        for matrix in decoder.matrices[index]:
            self.matrices_of.setdefault(matrix.layer, []).append(matrix)

    def require_reached(self, inputs: list[Inputs], layers: list[Layer]) -> None:
        """Raise PruningError if one of the layers read none of the inputs."""
        reached = {layer for distinct in inputs for layer in distinct.layers}
        for layer in layers:
            if layer not in reached:
                raise PruningError(f"layer {self.matrices_of[layer][0].name}: no calibration token reached it")

    def prune(self, inputs: list[Inputs], held_out: dict[Layer, torch.Tensor]) -> None:
        """Prune the matrices that read some inputs; each is taken out of the list, so that its statistic is freed before the next is
        factored.

        Args:
            held_out: layer -> some of its inputs in the windows held out, in the order of the checkpoint; see observer.collect.
        """
        self.held_out = held_out
        for name, order in _find_orders(self.decoder, self.plan, self.block, self.permutation_groups, inputs).items():
            known = self.orders.get(name, UNCHANGED)
            rows, columns = (known.rows if order.rows is None else order.rows, known.columns if order.columns is None else order.columns)
            self.orders[name] = Order(rows=rows, columns=columns)
        solved = parallel.solve_own(inputs, lambda distinct: self.solve(distinct, self._weights(distinct)))
        for number in range(len(inputs)):
            self._prune_group(inputs.pop(0), solved.pop(number, None), parallel.source_of(number))

    def _prune_group(self, inputs: Inputs, outcomes: list[Pruned] | None, source: int) -> None:
        """Solve, write back and measure the matrices that read the same inputs; see parallel.broadcast_group."""
        weights = self._weights(inputs)
        if distributed.world_size() == 1:
            solved = self.solve(inputs, weights)
        else:
            solved = parallel.broadcast_group(outcomes, weights, source, changes_weights=self.plan.method.changes_weights)
        samples = [inputs.sampled(), self._held_out(inputs)]
        if self.plan.method.refines:
            masks, scales = self._masks_of_scores(inputs, weights, solved), self._row_scales(inputs, weights)
            solved = without_harm(weights, solved, masks, scales, samples[1])
        for matrix, weight, pruned in zip(self._matrices(inputs), weights, solved, strict=True):
            dtype = self.decoder.checkpoint.dtype(matrix.tensor)
            if self.permutation_groups and self.plan.propagate == Propagation.SEQUENTIAL:
                squared_errors = self._write_back_in_old_order(matrix, weight, pruned, samples)
            else:
                self._keep(matrix, weight, pruned, samples, self._scored(inputs, matrix, weight, pruned))
                target = None if self.plan.propagate == Propagation.DENSE else matrix.of(self.block)
                squared_errors = write_back(weight, pruned, dtype, target, samples)
            relative_error, held_out_error = measure(matrix, squared_errors)
            self.results[matrix.name] = MatrixResult(
                matrix=matrix,
                relative_error=relative_error or 0.0,
                held_out_error=held_out_error,
                damping=pruned.damping,
                refined=pruned.refined,
                tokens=inputs.tokens,
                calibrated_on=inputs.calibrated_on,
                kept=int(pruned.mask.count_nonzero()),
            )

    def _scored(self, inputs: Inputs, matrix: Matrix, weight: torch.Tensor, pruned: Pruned) -> ScoredMask | None:
        """What gives the mask of a matrix that is neither reordered nor changed, where the method's scores are of the kind that can."""
        scales, pattern = SCORES.of(self.plan.method.score).scales, self.plan.patterns[matrix.name]
        if scales is None or pruned.values is not None or pruned.refined or matrix.name in self.orders or distributed.rank() > 0:
            return None
        group = (pattern.kept, pattern.group) if isinstance(pattern, Nm) else None
        return ScoredMask.of(weight, scales(weight, inputs.statistic), pruned.mask, group=group, transposed=matrix.transposed)

    def _keep(
        self,
        matrix: Matrix,
        weight: torch.Tensor,
        pruned: Pruned,
        samples: Sequence[torch.Tensor],
        scored: ScoredMask | None = None,
    ) -> None:
        """Keep the change of a matrix, and what its training starts from. weight: before it is pruned, see write_back."""
        dtype = self.decoder.checkpoint.dtype(matrix.tensor)
        if self.training is not None:
            self.training.add(matrix, weight, pruned, samples, dtype)
        change = self.changes[matrix.name] = _change(matrix, pruned, self.orders.get(matrix.name, UNCHANGED), dtype, scored)
        if self.files is not None and change.values is not None:
            change.values = self.files.buffer(tuple(change.values.shape), dtype)[0].copy_(change.values)

    def _write_back_in_old_order(
        self, matrix: Matrix, weight: torch.Tensor, pruned: Pruned, samples: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Put a matrix whose columns are reordered into the block as the layers before it expect it, which are not; see finish.

        Returns:
            See write_back.
        """
        columns = self.orders.get(matrix.name, UNCHANGED).columns
        columns = torch.arange(weight.shape[1], device=weight.device) if columns is None else columns
        values, dense = torch.empty_like(weight), weight.clone()
        squared_errors = write_back(weight, pruned, self.decoder.checkpoint.dtype(matrix.tensor), values, samples)
        matrix.of(self.block)[:, columns] = values.to(self.decoder.dtype)
        self.solved.append(_Solved(matrix=matrix, weight=dense, pruned=pruned, samples=samples))
        return squared_errors

    def finish(self) -> None:
        """After all inputs: reorder what a sequential pass left in the old order, since the order of a layer's rows comes of later ones."""
        for solved in self.solved:
            order, pruned = self.orders.get(solved.matrix.name, UNCHANGED), solved.pruned
            rows = Order(rows=order.rows)
            pruned = replace(pruned, mask=rows.of(pruned.mask), values=None if pruned.values is None else rows.of(pruned.values))
            self._keep(solved.matrix, rows.of(solved.weight), pruned, solved.samples)
            in_block = solved.matrix.of(self.block)
            in_block.copy_(order.of(in_block))
        self.solved.clear()

    def _held_out(self, inputs: Inputs) -> torch.Tensor:
        """Some of these inputs in the windows held out, reordered likewise, [tokens, columns], float32; perhaps none of an expert's."""
        sample = self.held_out.get(inputs.layers[0])
        if sample is None:
            return inputs.sampled()[:0]
        order = self.orders.get(self._matrices(inputs)[0].name, UNCHANGED)
        return (sample if order.columns is None else sample[:, order.columns]).float()

    def _matrices(self, inputs: Inputs) -> list[Matrix]:
        return [matrix for layer in inputs.layers for matrix in self.matrices_of[layer]]

    def _weights(self, inputs: Inputs) -> list[torch.Tensor]:
        """The dense matrices that read some inputs, reordered, each [rows, columns], float32."""
        return [self.orders.get(matrix.name, UNCHANGED).of(self.decoder.stored(matrix, self.block)) for matrix in self._matrices(inputs)]

    def solve(self, inputs: Inputs, weights: list[torch.Tensor]) -> list[Pruned]:
        """Apply the method to the matrices that read the same inputs.

        Raises:
            PruningError: inputs or scores that are not finite, a Gram matrix that does not factor; names the layers.
        """
        plan, matrices = self.plan, self._matrices(inputs)
        names = ", ".join(matrix.name for matrix in matrices)
        norms = getattr(inputs.statistic, "squared_norm", None)  # of all tokens; that of weights alone has none
        if not all(torch.isfinite(tokens).all() for tokens in (*inputs.sample, *([] if norms is None else [norms]))):
            reason = "; float16 overflows above 65504, bfloat16 does not" if self.decoder.dtype == torch.float16 else ""
            raise PruningError(f"layer {names}: found NaN or infinity in its inputs, wanted finite activations{reason}")
        scales = self._row_scales(inputs, weights)
        scaled = [weight if scale is None else weight * scale for weight, scale in zip(weights, scales, strict=True)]
        method, patterns = plan.method, self._patterns(inputs)
        with PruningError.naming(f"layer {names}"):
            if method.shrinks:
                method = with_shrinkage(scaled, inputs.statistic, method, patterns, self._held_out(inputs))
            solved = prune_matrices(scaled, inputs.statistic, method, patterns)
        return [
            pruned if scale is None or pruned.values is None else replace(pruned, values=pruned.values / scale)
            for pruned, scale in zip(solved, scales, strict=True)
        ]

    def _row_scales(self, inputs: Inputs, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        matrices = zip(self._matrices(inputs), weights, strict=True)
        return [_row_scale(self.plan.row_costs.get(matrix.name), weight) for matrix, weight in matrices]

    def _patterns(self, inputs: Inputs) -> list[Pattern]:
        return [self.plan.patterns[matrix.name] for matrix in self._matrices(inputs)]

    def _masks_of_scores(self, inputs: Inputs, weights: list[torch.Tensor], solved: list[Pruned]) -> list[torch.Tensor]:
        """The masks by the method's score alone, with the damping by which the matrices were solved."""
        scales = zip(weights, self._row_scales(inputs, weights), strict=True)
        scaled = [weight if scale is None else weight * scale for weight, scale in scales]
        method, share = self.plan.method, solved[0].damping
        if share is not None:
            method = replace(method, damping=replace(method.damping, share=share))
        return select(scaled, inputs.statistic, self._patterns(inputs), method)

    def reconstruct(self, stream: Stream, training: BlockTraining, trained: list[Outcome]) -> None:
        """Train the kept weights and, if that lowered the error on the windows held out, write them back and measure them again.

        Raises:
            PruningError: a trained weight is not finite in the checkpoint's dtype; names the layer.
        """
        self.outcome = reconstruct(stream, self.index, training, trained)
        for matrix in self.decoder.matrices[self.index]:
            dtype = self.decoder.checkpoint.dtype(matrix.tensor)
            mask = matrix.part_of(training.masks[matrix.parameter_slice.name])
            values = matrix.part_of(training.values[matrix.parameter_slice.name]).to(dtype).float().masked_fill(~mask, 0)
            if not torch.isfinite(values).all():
                raise PruningError(f"layer {matrix.name}: found NaN or infinity after its reconstruction in {dtype}, wanted finite weights")
            matrix.of(self.block).copy_(values)
            if self.outcome.rate is None:  # as the method left it
                continue
            order = self.orders.get(matrix.name, UNCHANGED)
            self.changes[matrix.name] = _change(matrix, Pruned(mask=mask, values=values), order, dtype)
            relative_error, self.results[matrix.name].held_out_error = measure(matrix, training.squared_errors(matrix, values))
            self.results[matrix.name].relative_error = relative_error or 0.0

    def pruned_block(self) -> PrunedBlock:
        """The outcome, the matrices of one tensor of the checkpoint joined."""
        matrices = self.decoder.matrices[self.index]
        of_tensor: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            of_tensor.setdefault(matrix.tensor, []).append(matrix)
        changes = {tensor: self._joined(stored) for tensor, stored in of_tensor.items()}
        results = [self.results[matrix.name] for matrix in matrices]
        return PrunedBlock(index=self.index, changes=changes, matrices=results, training=self.outcome)

    def _joined(self, matrices: list[Matrix]) -> Change:
        """The change of a tensor: that of its one matrix, or those of the experts that it holds."""
        if matrices[0].expert is None:
            return self.changes[matrices[0].name]
        ordered = sorted(matrices, key=lambda matrix: matrix.expert or 0)
        stacked = Change.stacked([self.changes[matrix.name] for matrix in ordered], self.files)
        return stacked.of_shape(self.decoder.checkpoint.shape(matrices[0].tensor))


def write_back(
    weight: torch.Tensor, pruned: Pruned, dtype: torch.dtype, target: torch.Tensor | None, samples: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Put a pruned matrix into its block as base + delta will have it, rounded to the checkpoint's dtype.

    Some rows at a time, so that a large matrix is not copied as a whole. The weight may be the target itself: the errors of its rows
    are summed before they are replaced.

    Args:
        weight: the dense matrix, [rows, columns], float32.
        dtype: of the checkpoint.
        target: the block's parameter, [rows, columns], or None where the dense matrix stays in the block.
        samples: of the matrix's inputs, [tokens, columns], float32 each.

    Returns:
        The squared errors on each sample, [samples, 2], see squared_errors.
    """
    total = torch.zeros(len(samples), 2, dtype=torch.float64)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        values = weight[rows] if pruned.values is None else pruned.values[rows].to(dtype).to(weight.dtype)
        values = values.masked_fill(~pruned.mask[rows], 0)
        total += torch.stack([squared_errors(weight[rows], values, sample) for sample in samples])
        if target is not None:
            target[rows] = values
    return total


def squared_errors(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """||(W - W') X||_F² and ||W X||_F², [2], float64, on the CPU.

    Args:
        weight, pruned: [rows, columns], float32.
        inputs: [tokens, columns], float32.
    """
    norms = [torch.linalg.vector_norm(inputs @ matrix.T) for matrix in (weight - pruned, weight)]
    return torch.stack(norms).double().square().cpu()


def measure(matrix: Matrix, squared_errors: torch.Tensor) -> list[float | None]:
    """The relative errors of a matrix on the samples of all processes; None for a sample on which all outputs and errors are 0.

    Args:
        squared_errors: of this process, [samples, 2], see write_back; changed in place.

    Raises:
        PruningError: one is not finite; names the layer.
    """
    pairs = distributed.all_reduce(squared_errors).tolist()
    if not all(math.isfinite(number) for pair in pairs for number in pair):
        raise PruningError(f"layer {matrix.name}: found NaN or infinity in its outputs, wanted finite activations")
    return [relative_error(*pair) if any(pair) else None for pair in pairs]


def relative_error(squared_error: float, squared_norm: float) -> float:
    """The root of their ratio; 0 where both are 0."""
    return (squared_error / squared_norm) ** 0.5 if squared_norm > 0 else float(squared_error > 0)


def _row_scale(costs: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """[rows, 1], 1 on average: rows multiplied by the root of their cost compete by their squared errors alone."""
    if costs is None:
        return None
    scale = costs.to(weight.device).sqrt()
    return (scale / scale.mean())[:, None]


def _change(matrix: Matrix, pruned: Pruned, order: Order, dtype: torch.dtype, scored: ScoredMask | None = None) -> Change:
    """A pruned matrix on the CPU, in the checkpoint's orientation and dtype."""
    mask, values, orders = pruned.mask, pruned.values, [order.rows, order.columns]
    if matrix.transposed:
        mask, values, orders = mask.T, None if values is None else values.T, orders[::-1]
    rows, columns = (None if indices is None else indices.int().cpu() for indices in orders)
    kept = None if values is None else to_host(values[mask].to(dtype))
    return Change(mask=mask.contiguous(), values=kept, rows=rows, columns=columns, scored=scored)
