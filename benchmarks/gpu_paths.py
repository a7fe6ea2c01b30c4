"""Every path that only a GPU takes, compared with the slow one that it replaces; see benchmarks.gpu --check.

Sums in another order differ in the last bits, and a mask differs where scores are equal up to these; nothing else may.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stages.checkpoint import delta
from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.devices import to_host
from stages.pruning import gpu_sweep, patterns, sequential, statistics
from stages.pruning.block_loop import TeacherStreams, prune_blocks
from stages.pruning.distillation import Distillation, DistilledBlocks, distill
from stages.pruning.method import Method
from stages.pruning.patterns import Nm, Pattern, Unstructured
from stages.pruning.plan import Plan
from stages.pruning.scores.obs import obs
from stages.pruning.section import Propagation
from stages.pruning.statistics import Gram, SquaredNorm
from stages.pruning.updates import sparsegpt
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import HostMemory
from stages.streaming.stream import Stream

TOKENS, COLUMNS, ROWS = 16384, 1024, 1536
BLOCK_SIZE = 128  # columns
LARGEST_ERROR = {"gram": 2e-5, "norm": 1e-5, "sweep": 1e-4, "learning": 1e-3}  # relative
LEAST_AGREEMENT = 0.999  # share of the mask bits


def compare(device: torch.device, say: Callable[[str], None] = print) -> None:
    """Compare them all; each says what it found.

    Raises:
        SystemExit: a fast path gives something else.
    """
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(TOKENS, COLUMNS, device=device, generator=generator)
    inputs[:, ::7] *= 30  # some inputs are far larger than others, and some hang together
    inputs[:, 1::2] += inputs[:, ::2]
    halves = inputs.bfloat16()
    gram = _products(halves, say)
    _norms(halves.view(8, -1, COLUMNS), say)
    _selection(device, generator, say)
    _masks(device, generator, say)
    factor = _factor(gram)
    weight = torch.randn(ROWS, COLUMNS, device=device, generator=generator)
    for pattern in (Unstructured(sparsity=0.5, comparison_group="matrix"), Nm(kept=2, group=4), Nm(kept=4, group=8)):
        _sweep(weight, factor, pattern, say)


def _factor(gram: Gram) -> torch.Tensor:
    gram.finish()
    return gram.inverse_factor(0.01, 1.0)


def _products(halves: torch.Tensor, say: Callable[[str], None]) -> Gram:
    """Gram matrices of halves, by the matrix units and in float32, both against float64."""
    exact, errors = halves.double().T @ halves.double(), dict[str, float]()
    fast, slow = Gram(COLUMNS, halves.device), Gram(COLUMNS, halves.device)
    fast.add(halves[None])
    slow.add(halves[None].float())
    for name, gram in (("by the matrix units", fast), ("in float32", slow)):
        lower = gram.value.tril().double()
        errors[name] = float((lower - exact.tril()).norm() / exact.tril().norm())
    say("Gram matrices of halves, relative error: " + ", ".join(f"{error:.1e} {name}" for name, error in errors.items()))
    _require("Gram matrix", max(errors.values()), LARGEST_ERROR["gram"])
    return fast


def _norms(halves: torch.Tensor, say: Callable[[str], None]) -> None:
    statistic = SquaredNorm(COLUMNS, halves.device)
    statistic.add(halves)
    exact = halves.double().square().sum(dim=1).mean(dim=0)
    error = float((statistic.squared_norm.double() - exact).norm() / exact.norm())
    say(f"squared norms, relative error: {error:.1e}")
    _require("squared norm", error, LARGEST_ERROR["norm"])


def _selection(device: torch.device, generator: torch.Generator, say: Callable[[str], None]) -> None:
    """The nth lowest of each row, with ties, on the device and on the CPU."""
    for rows, columns, nth in ((256, 4097, 2048), (3, 100_001, 50_000), (100, 14336, 14336), (100, 64, 1)):
        scores = torch.randint(0, 3 * columns, (rows, columns), device=device, generator=generator).float()
        mask = patterns.keep_highest(scores, nth)
        if not torch.equal(mask.cpu(), patterns.keep_highest(scores.cpu(), nth)):
            raise SystemExit(f"selection of {nth} of {columns}: found other masks than on the CPU, wanted the same")
    say("selection: the masks are those of the CPU")


def _masks(device: torch.device, generator: torch.Generator, say: Callable[[str], None]) -> None:
    for shape in ((64, 128), (5, 7), (3, 33, 5)):
        mask = torch.randint(0, 2, shape, device=device, generator=generator).bool()
        packed = delta.pack(mask).cpu()
        if not torch.equal(packed, delta.pack(mask.cpu())) or not torch.equal(delta.unpack(packed.to(device), shape), mask):
            raise SystemExit(f"packed mask of {list(shape)}: found other bits than on the CPU, wanted the same")
    values = torch.randn(1001, device=device, generator=generator).bfloat16()
    if not torch.equal(to_host(values), values.cpu()):
        raise SystemExit("values copied through page-locked memory: found others, wanted the same")
    say("packed masks and copied values: the same bits as on the CPU")


def _sweep(weight: torch.Tensor, factor: torch.Tensor, pattern: Unstructured | Nm, say: Callable[[str], None]) -> None:
    """SparseGPT's sweep by the kernel, if there is one, and by the loop."""
    nm = pattern if isinstance(pattern, Nm) else None

    def choose(columns: torch.Tensor, diagonal: torch.Tensor, first: int) -> torch.Tensor:
        return pattern.mask(obs(columns, diagonal), first)

    def sweep() -> tuple[torch.Tensor, torch.Tensor]:
        return sparsegpt.sparsegpt(weight, factor, choose, pattern.decision_columns(BLOCK_SIZE), BLOCK_SIZE, nm)

    mask, values = sweep()
    with loop_alone():
        slow_mask, slow_values = sweep()
    share = float((mask == slow_mask).double().mean())
    error = float((values - slow_values).mul(mask & slow_mask).norm() / slow_values.norm())
    label, way = f"{nm.kept}:{nm.group}" if nm else "50%", "the kernel" if weight.is_cuda and find_spec("triton") else "the loop"
    say(f"SparseGPT's sweep, {label}, by {way} and by the loop: {share:.6f} of the mask bits the same, weights apart by {error:.1e}")
    _require(f"sweep, {label}: share of other mask bits", 1 - share, 1 - LEAST_AGREEMENT)
    _require(f"sweep, {label}: weights", error, LARGEST_ERROR["sweep"] if share == 1 else 1)


@contextmanager
def loop_alone() -> Iterator[None]:
    """Without the kernel of the sweep."""
    kept, gpu_sweep.OLDEST_GPU = gpu_sweep.OLDEST_GPU, (99, 0)
    try:
        yield
    finally:
        gpu_sweep.OLDEST_GPU = kept


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Without the matrix units in Gram matrices."""
    kept, statistics.HALVES = statistics.HALVES, ()
    try:
        yield
    finally:
        statistics.HALVES = kept


def plan_of(decoder: Decoder, method: Method, pattern: Pattern, propagate: Propagation) -> Plan:
    """The same pattern for every matrix, nothing trained."""
    names = [matrix.name for block in decoder.matrices for matrix in block]
    return Plan(method=method, patterns=dict.fromkeys(names, pattern), propagate=propagate, error_tokens=512, expert_tokens=64)


class LearnersOnHost(Stream):
    """What learning changes is in page-locked host memory, as where a GPU's memory does not suffice."""

    def learner_buffer(self, shape: tuple[int, ...], dtype: torch.dtype, spare: int) -> torch.Tensor:
        return self.memory.buffer(shape, dtype, pinned=self.decoder.device.type == "cuda")[0]


def compare_reading(directory: Path, device: torch.device, say: Callable[[str], None] = print) -> None:
    """The tensors of a block, read for the device and one by one.

    Raises:
        SystemExit: they differ.
    """
    decoder = Decoder(Checkpoint(directory), torch.float32, device)
    for name, tensor in decoder.read(0).items():
        if not torch.equal(tensor, decoder.checkpoint.tensor(name)):
            raise SystemExit(f"{name}: found other values than those stored, wanted the same")
    say("a block read for the device: the values stored")


def compare_waiting(
    directory: Path, windows: torch.Tensor, method: Method, device: torch.device, say: Callable[[str], None] = print
) -> None:
    """Sequential passes whose waiting activations stay on the device, go to the host's memory and to files.

    Raises:
        SystemExit: masks, values or hidden states differ in a bit.
    """
    with TemporaryDirectory() as scratch:
        memories = {
            "on the device": (math.inf, HostMemory(math.inf, Path(scratch))),
            "on the host": (0, HostMemory(math.inf, Path(scratch))),
            "in files": (0, HostMemory(0, Path(scratch))),
        }
        outcomes = {where: _sequential(directory, windows, method, device, *memory) for where, memory in memories.items()}
    (changes, hidden), *others = outcomes.values()
    for where, (other_changes, other_hidden) in zip(list(outcomes)[1:], others, strict=True):
        same = torch.equal(hidden, other_hidden) and all(_same(change, other_changes[name]) for name, change in changes.items())
        if not same:
            raise SystemExit(f"sequential, {method.name}, what waits {where}: found other bits than on the device, wanted the same")
    say(f"sequential, {method.name}: the same bits whether what waits is {', '.join(outcomes)}")


def _sequential(
    directory: Path, windows: torch.Tensor, method: Method, device: torch.device, budget: float, memory: HostMemory
) -> tuple[dict[str, Change], torch.Tensor]:
    """The changes of all blocks, and the hidden states before the last one. budget: bytes that may wait on the device."""
    decoder = Decoder(Checkpoint(directory), torch.float32, device)
    plan = plan_of(decoder, method, Unstructured(sparsity=0.5, comparison_group=method.compared_within), Propagation.SEQUENTIAL)
    with decoder.before_blocks():
        stream = Stream(decoder, windows, batch=2, memory=memory)
    kept, sequential.waiting_budget = sequential.waiting_budget, lambda *_: budget
    try:
        blocks = list(prune_blocks(stream, plan))
    finally:
        sequential.waiting_budget = kept
    return {name: change for block in blocks for name, change in block.changes.items()}, stream.hidden.cpu()


def _same(change: Change, other: Change) -> bool:
    same_values = change.values is None or (other.values is not None and torch.equal(change.values, other.values))
    return torch.equal(change.packed, other.packed) and same_values


def compare_learning(
    directory: Path, windows: torch.Tensor, method: Method, device: torch.device, say: Callable[[str], None] = print
) -> None:
    """Distil the last blocks of a small model on the device, with its state there and on the host, and on the CPU, in float32.

    Args:
        directory: of the checkpoint. windows: [windows, tokens], int64; the last two are held out.

    Raises:
        SystemExit: the divergences differ.
    """
    by_device = {
        "on the device": divergences(directory, windows, method, device, Stream),
        "with its state on the host": divergences(directory, windows, method, device, LearnersOnHost),
        "on the CPU": divergences(directory, windows, method, torch.device("cpu"), Stream),
    }
    expected = torch.tensor(by_device.pop("on the CPU"))
    for name, numbers in by_device.items():
        error = float((torch.tensor(numbers) - expected).norm() / expected.norm())
        say(f"distillation {name}: relative difference of the divergences from the CPU's {error:.1e}")
        _require(f"distillation {name}", error, LARGEST_ERROR["learning"])


def divergences(directory: Path, windows: torch.Tensor, method: Method, device: torch.device, kind: type[Stream]) -> list[float]:
    """The divergence before each step, then those on the windows held out before and after."""
    decoder = Decoder(Checkpoint(directory), torch.float32, device)
    distilled = pruned_and_distilled(decoder, windows, method, kind)
    return [*distilled.divergences, distilled.outcome.before, distilled.outcome.after]


def pruned_and_distilled(
    decoder: Decoder,
    windows: torch.Tensor,
    method: Method,
    kind: type[Stream],
    progress: Callable[[list[tuple[int, float]]], Iterator[tuple[int, float]]] = iter,
) -> DistilledBlocks:
    """Prune a model, and distil the second half of its blocks."""
    pattern = Unstructured(sparsity=0.5, comparison_group="row")
    distillation = Distillation(first=len(decoder.blocks) // 2, epochs=1, learning_rate=0.0025)
    plan = replace(plan_of(decoder, method, pattern, Propagation.PRUNED), distillation=distillation)
    with decoder.before_blocks():
        stream = kind(decoder, windows, batch=2, held_out=2)
    teachers = TeacherStreams.of(stream, plan)
    assert teachers is not None
    assert teachers.student_inputs is not None
    changes = {block.index: block.changes for block in prune_blocks(stream, plan, teachers=teachers)}
    return distill(teachers.student_inputs, teachers.teacher.hidden, distillation, lambda index: changes[index], progress)


def _require(name: str, error: float, largest: float) -> None:
    if not error <= largest:
        raise SystemExit(f"{name}: found {error:.1e}, wanted at most {largest:.0e}")
