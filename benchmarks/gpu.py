"""Pruning a 7B model on one GPU, disk to disk: seconds, device memory, and how far that is from the floor.

python -m benchmarks.gpu            correctness, then the tables
python -m benchmarks.gpu --check    correctness alone, on whatever device there is: the masks, and every path that only a GPU takes
python -m benchmarks.gpu --only sparsegpt,learning    only the rows whose label has one of these words
python -m benchmarks.gpu --table    measure nothing, write the tables into README.md

What is measured is kept in benchmarks/gpu.json row by row, so that a run that is cut off goes on; another card, other versions or another
commit begin anew, but that with --only rows of an earlier commit or another card stay, and the table says which are of which.

Needs torch, transformers and safetensors alone. Makes its own checkpoints: random weights with zephyr-7b-beta's configuration
(14.5 GB in --scratch, and one of four blocks), and 128 windows of 2048 random tokens. Device memory is capped at 15 GiB, a T4's.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu_paths, random_checkpoint
from benchmarks.markers import write_between
from benchmarks.peers import plain
from stages.checkpoint.delta import write_block
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.devices import choose_device
from stages.files import write_json
from stages.pruning.allocations.loss import LossSection
from stages.pruning.block_loop import PrunedBlock, TeacherStreams, prune_blocks
from stages.pruning.distillation import Distillation, distill
from stages.pruning.entries import NoParameters
from stages.pruning.journal import WriteBehind, opened
from stages.pruning.method import Damping, Method
from stages.pruning.patterns import Nm, Pattern, Unstructured, UnstructuredSection
from stages.pruning.planning import allocate
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.section import Propagation
from stages.pruning.updates.admm import AdmmParameters
from stages.pruning.updates.sparsegpt import SparseGptParameters
from stages.pruning.windows import micro_batch
from stages.streaming.decoder import READERS, Decoder
from stages.streaming.stream import GPU_SHARE, Stream

README, RESULTS = Path("README.md"), Path("benchmarks/gpu.json")
START, END = "<!-- gpu: python -m benchmarks.gpu -->", "<!-- end of gpu -->"
WINDOWS, LENGTH, BLOCKS, HELD_OUT = 128, 2048, 32, 8
FEW_BLOCKS = 4  # of the checkpoint for what is given by block: the plain order, learning
PLAIN_BLOCKS = 2
CAP = 15 * 2**30  # bytes of device memory
PUBLISHED = Damping(share=0.01, limit=1.0, shrinkage=False)
NONE = NoParameters(name="none")
WANDA = Method(name="wanda", score=NoParameters(name="wanda"), comparison_group="row", update=NONE, damping=PUBLISHED)
SWEEP = SparseGptParameters(name="sparsegpt", block_size=128)
SPARSEGPT = Method(name="sparsegpt", score=NoParameters(name="obs"), comparison_group="matrix", update=SWEEP, damping=PUBLISHED)
SHORT = AdmmParameters(name="admm", steps=10, penalty=0.3, growth=1.2, hold=5, refit_steps=2)
ADMM = Method(name="admm_short", score=NoParameters(name="wanda"), comparison_group="matrix", update=SHORT, damping=PUBLISHED)
LOSS_50 = LossSection(name="loss", windows=8, gradient_weights=[0.5, 1.0], row_strength=1.0, row_floor=0.1, lowest=0.0, highest=0.95)
NM = Nm(kept=2, group=4)
ORDERS = {Propagation.PRUNED: "exact", Propagation.DENSE: "one_pass", Propagation.SEQUENTIAL: "sequential"}
AGREEMENT = {"wanda": 0.999, "sparsegpt": 0.98}  # share of mask bits; sums in another order decide near-ties otherwise
HALVES_AGREEMENT = 0.97  # the same where Gram matrices of halves are added up in two ways


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: what is pruned disk to disk."""

    method: Method
    pattern: Pattern
    propagate: Propagation

    @property
    def label(self) -> str:
        pattern = f"{self.pattern.kept}:{self.pattern.group}" if isinstance(self.pattern, Nm) else f"{self.pattern.sparsity:.0%}"
        return f"{self.method.name} | {pattern} | {ORDERS[self.propagate]}"


def rows() -> Iterator[Row]:
    """Of the whole checkpoint; the others are measured by block."""
    for propagate, method in product(ORDERS, (WANDA, SPARSEGPT)):
        half = Unstructured(sparsity=0.5, comparison_group=method.compared_within)
        yield Row(method=method, pattern=half, propagate=propagate)


def labels() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What is measured by block: a label, a method of Machine and its arguments."""
    for propagate, method in product(ORDERS, (WANDA, SPARSEGPT, ADMM)):
        half = Unstructured(sparsity=0.5, comparison_group=method.compared_within)
        yield f"{method.name}, {ORDERS[propagate]}", ("ours", method, half, propagate)
    for method in (WANDA, SPARSEGPT):
        yield f"{method.name} at 2:4, exact", ("ours", method, NM, Propagation.PRUNED)
    for name in plain.METHODS:
        yield f"{name}, the plain order (benchmarks/peers/plain.py, in bfloat16, in memory)", ("plain", name)
    for kind, where in ((Stream, "GPU"), (gpu_paths.LearnersOnHost, "host")):
        yield f"a step of joint learning, its state on the {where}", ("step", kind)
    yield "experiment=best_50, all of it", ("best",)


LABELS = dict(labels())


def blocks_of(base: Checkpoint) -> int:
    return len([name for name in base if name.endswith("down_proj.weight")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--no-check", action="store_true", help="the tables alone")
    parser.add_argument("--only", default="", help="words, split by commas: rows whose label has one of them")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/gpu"), help="for the checkpoint and the deltas")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer make a shorter run, not comparable")
    arguments = parser.parse_args()
    if arguments.table:
        show(Results.read())
        return
    device = choose_device("device", "auto")
    if device.type != "cuda" and not arguments.check:
        raise SystemExit("torch finds no GPU here; --check runs the correctness part alone")
    if not arguments.no_check:
        check(device)
    if arguments.check:
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(device).total_memory))
    bases = {count: arguments.scratch / f"base-{count}" for count in (arguments.blocks, FEW_BLOCKS)}
    for count, directory in bases.items():
        files = random_checkpoint.write(directory, count, "cuda")
        write_json(directory / PROVENANCE, {"name": "random/zephyr-7b-beta", "files": files})
        print(f"{len(files)} shards written", file=sys.stderr, flush=True)
    windows = torch.randint(3, 32000, (WINDOWS + HELD_OUT, LENGTH), generator=torch.Generator().manual_seed(0))
    words = [word for word in arguments.only.split(",") if word]
    machine = Machine(Checkpoint(bases[arguments.blocks]), Checkpoint(bases[FEW_BLOCKS]), windows, device, arguments.scratch, words)
    results = Results.of(machine)
    machine.measure_by_block(results)
    machine.measure_whole(results)
    show(results)


def show(results: "Results") -> None:
    """Print the tables and, of the whole checkpoint, write them into README.md."""
    text = f"{results.table()}\n\n{results.by_block_table()}\n\n{results.remarks()}"
    print(text)
    if README.is_file() and results.facts["blocks"] == BLOCKS:
        write_between(README, START, END, text)


@dataclass(frozen=True)
class Results:
    """What is measured so far.

    facts: of the machine and the code. rows: label -> seconds, floor [s] and memory [GiB], or None for what needs more than the cap.
    by_block: label -> seconds a block, or None likewise.
    other_runs: label -> commit and card, of what was measured with others than `facts` says.
    """

    facts: dict[str, Any]
    rows: dict[str, dict[str, float] | None]
    by_block: dict[str, float | None]
    other_runs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Results":
        return cls(**json.loads(RESULTS.read_text(encoding="utf8")))

    @classmethod
    def of(cls, machine: "Machine") -> "Results":
        """Those of this machine and code that an earlier run left, else none; where some rows alone are asked for, those of another card
        or commit, which stay until they are measured again."""
        facts = machine.facts()
        earlier = cls.read() if RESULTS.is_file() else None
        if earlier is None:
            return cls(facts, {}, {})
        same = facts | {key: earlier.facts[key] for key in ("commit", "device")} if machine.words else facts
        return earlier if earlier.facts == same else cls(facts, {}, {})

    def has(self, label: str, run: str) -> bool:
        """Whether a row was measured by a run, see _run."""
        return label in self.rows.keys() | self.by_block.keys() and self.other_runs.get(label, _run(self.facts)) == run

    def measured(self, label: str, run: str) -> None:
        """Write, after a run has put a row in."""
        self.other_runs.pop(label, None)
        if run != _run(self.facts):
            self.other_runs[label] = run
        self.write()

    def write(self) -> None:
        RESULTS.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf8")

    def table(self) -> str:
        """Markdown: a line for each row, with its floor."""
        lines = ["| method | pattern | order | seconds | floor | times the floor | device memory |", "|---|---|---|---|---|---|---|"]
        for label in (row.label for row in rows()):
            if label not in self.rows:
                lines.append(f"| {label} | not measured | | | |")
            elif (row := self.rows[label]) is None:
                lines.append(f"| {label} | needs more than the cap | | | |")
            else:
                ratio = row["seconds"] / row["floor"]
                lines.append(f"| {label} | {row['seconds']:.1f} | {row['floor']:.1f} | {ratio:.2f} | {row['memory']:.1f} GiB |")
        return "\n".join(lines)

    def by_block_table(self) -> str:
        """Markdown: what is measured on few blocks."""
        lines = [f"| on a checkpoint of {FEW_BLOCKS} blocks | seconds a block |", "|---|---|"]
        for label in LABELS:
            seconds = self.by_block.get(label)
            missing = "needs more than the cap" if label in self.by_block else "not measured"
            lines.append(f"| {label} | {missing if seconds is None else format(seconds, '.3f')} |")
        return "\n".join(lines)

    def remarks(self) -> str:
        """What the tables were measured on."""
        facts = self.facts
        of_run = {
            run: [label.replace(" | ", ", ") for label, other in self.other_runs.items() if other == run]
            for run in self.other_runs.values()
        }
        others = "".join(f"; {run}: {'; '.join(labels)}" for run, labels in of_run.items())
        return (
            f"A random checkpoint with zephyr-7b-beta's configuration, {WINDOWS} windows of {LENGTH} tokens (a step of joint learning: "
            f"one), disk to disk (without the journal's hashes; by block: disk to memory), in bfloat16, device memory capped at "
            f"{CAP / 2**30:.0f} GiB, torch {facts['torch']}, transformers {facts['transformers']}, one run each: {_run(facts)}{others}. "
            f"The floor is the longer of reading cached files by {READERS} threads and "
            "arithmetic: products and Gram matrices in bfloat16, factors and what solving multiplies in float32, each at the rate that "
            "the machine showed, all else free."
        )


def _run(facts: dict[str, Any]) -> str:
    """What tells one run's figures from another's."""
    return f"commit {facts['commit']} on {facts['device']}"


def check(device: torch.device) -> None:
    """Compare the engine's masks with those of the published procedure on a whole small model, and every path that only a GPU takes with
    the slow one that it replaces.

    Raises:
        SystemExit: they agree in fewer bits than they should.
    """
    config = random_checkpoint.zephyr(3)
    config.update({"vocab_size": 512, "hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 1})
    windows = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(scratch, max_shard_size="100KB")
        for name, method, comparison_group in (("wanda", WANDA, "row"), ("sparsegpt", SPARSEGPT, "matrix")):
            model = AutoModelForCausalLM.from_pretrained(
                scratch, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            ).eval()
            plain.prune(model, windows, plain.METHODS[name])
            decoder = Decoder(Checkpoint(Path(scratch)), torch.float32, device)
            pattern = Unstructured(sparsity=0.5, comparison_group=comparison_group)
            blocks = list(run(decoder, windows, method, pattern, "pruned", batch=2))
            masks = _masks(blocks)
            share = _agreement(masks, {tensor: model.get_parameter(tensor).detach() != 0 for tensor in masks})
            print(f"{name} on {device.type}: {share:.5f} of the mask bits are those of the published procedure", flush=True)
            if share < AGREEMENT[name]:
                raise SystemExit(f"{name}: found {share:.5f} of the mask bits the same, wanted {AGREEMENT[name]}")
        gpu_paths.compare(device)
        _compare_halves(Path(scratch), windows, device)
        gpu_paths.compare_reading(Path(scratch), device)
        for method in (WANDA, SPARSEGPT):
            gpu_paths.compare_waiting(Path(scratch), windows, method, device)
        gpu_paths.compare_learning(Path(scratch), windows, WANDA, device)


def _masks(blocks: list[PrunedBlock]) -> dict[str, torch.Tensor]:
    return {name: change.mask for block in blocks for name, change in block.changes.items()}


def _agreement(masks: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The share of the bits that are the same."""
    same = sum(int((mask == others[name]).sum()) for name, mask in masks.items())
    return same / sum(mask.numel() for mask in masks.values())


def _compare_halves(directory: Path, windows: torch.Tensor, device: torch.device) -> None:
    """SparseGPT computed in bfloat16, with Gram matrices by the matrix units and in float32."""
    masks = []
    for products in (nullcontext(), gpu_paths.products_in_float32()):
        with products:
            decoder = Decoder(Checkpoint(directory), torch.bfloat16, device)
            pattern = Unstructured(sparsity=0.5, comparison_group="matrix")
            masks.append(_masks(list(run(decoder, windows, SPARSEGPT, pattern, Propagation.PRUNED, batch=2))))
    share = _agreement(*masks)
    print(f"sparsegpt in bfloat16: {share:.5f} of the mask bits are those with Gram matrices added up in float32", flush=True)
    if share < HALVES_AGREEMENT:
        raise SystemExit(f"sparsegpt in bfloat16: found {share:.5f} of the mask bits the same, wanted {HALVES_AGREEMENT}")


def run(decoder: Decoder, windows: torch.Tensor, method: Method, pattern: Pattern, propagate: str, batch: int) -> Iterator[PrunedBlock]:
    """The engine, as the prune stage runs it."""
    return prune_blocks(_stream(decoder, windows, batch), gpu_paths.plan_of(decoder, method, pattern, Propagation(propagate)))


def _stream(decoder: Decoder, windows: torch.Tensor, batch: int, held_out: int = 0, streams: int = 1) -> Stream:
    """Hidden states may take a share of what the cap leaves of a GPU's memory. Args: see windows.stream_of."""
    share = GPU_SHARE
    if decoder.device.type == "cuda":
        share *= torch.cuda.get_per_process_memory_fraction()
    with decoder.before_blocks():
        return Stream(decoder, windows, batch=batch, held_out=held_out, gpu_share=share / streams)


@dataclass(frozen=True)
class Machine:
    """A GPU and what is measured on it.

    base: the whole checkpoint. few: that of few blocks. windows: those to calibrate on, then those held out.
    scratch: directory for deltas. words: of the rows that are measured; none: all are.
    """

    base: Checkpoint
    few: Checkpoint
    windows: torch.Tensor
    device: torch.device
    scratch: Path
    words: list[str]

    @cached_property
    def rates(self) -> "Rates":
        return Rates(self.base, self.device)

    def wanted(self, label: str) -> bool:
        return not self.words or any(word in label for word in self.words)

    def facts(self) -> dict[str, Any]:
        """What a figure holds for."""
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        return {
            "device": torch.cuda.get_device_name(self.device),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "commit": revision.stdout.strip() or "not known",
            "blocks": blocks_of(self.base),
        }

    def measure_whole(self, results: Results) -> None:
        """The rows that prune the whole checkpoint."""
        this_run = _run(self.facts())
        for row in rows():
            if results.has(row.label, this_run) or not self.wanted(row.label):
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds = timed(partial(self.disk_to_disk, row))
                peak = torch.cuda.max_memory_reserved() / 2**30
                figures = {"seconds": seconds, "floor": self.rates.floor(self.base, row), "memory": peak}
                results.rows[row.label] = {key: round(figure, 1) for key, figure in figures.items()}
            except torch.OutOfMemoryError:
                traceback.print_exc()
                results.rows[row.label] = None
            results.measured(row.label, this_run)
            print(row.label, results.rows[row.label], file=sys.stderr, flush=True)

    def disk_to_disk(self, row: Row) -> None:
        """Prune the whole checkpoint, and write its delta."""
        out = self.scratch / "delta"
        out.mkdir(exist_ok=True)
        decoder = Decoder(self.base, torch.bfloat16, self.device)
        batch = micro_batch(LENGTH, self.device, None)
        with WriteBehind() as behind:
            for block in run(decoder, self.windows[:WINDOWS], row.method, row.pattern, row.propagate, batch):
                behind(write_block, out / f"block-{block.index:05d}.safetensors", block.changes, "random")
        torch.cuda.synchronize()

    def measure_by_block(self, results: Results) -> None:
        """The rows in seconds a block."""
        this_run = _run(self.facts())
        for label, (name, *arguments) in LABELS.items():
            if results.has(label, this_run) or not self.wanted(label):
                continue
            torch.cuda.empty_cache()
            try:
                results.by_block[label] = round(getattr(self, name)(*arguments), 3)
            except torch.OutOfMemoryError:
                traceback.print_exc()
                results.by_block[label] = None
            results.measured(label, this_run)
            print(label, results.by_block[label], file=sys.stderr, flush=True)

    def ours(self, method: Method, pattern: Pattern, propagate: Propagation) -> float:
        """Disk to memory: the median of the blocks after the first."""
        decoder = Decoder(self.few, torch.bfloat16, self.device)
        ends = []
        for _ in run(decoder, self.windows[:WINDOWS], method, pattern, propagate, micro_batch(LENGTH, self.device, None)):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
        return median(later - earlier for earlier, later in zip(ends, ends[1:], strict=False))

    def plain(self, name: str) -> float:
        """Memory to memory: the mean of the first blocks."""
        model = AutoModelForCausalLM.from_pretrained(
            self.few.directory, dtype=torch.bfloat16, trust_remote_code=False, local_files_only=True
        )
        model.eval().to(self.device)
        model.model.layers = model.model.layers[:PLAIN_BLOCKS]

        def action() -> None:
            plain.prune(model, self.windows[:WINDOWS], plain.METHODS[name])
            torch.cuda.synchronize()

        return timed(action) / PLAIN_BLOCKS

    def step(self, kind: type[Stream]) -> float:
        """Of two blocks that learn together, forward and backward, by block: the lower quartile of the steps but the first, since the
        windows held out judge after some."""
        starts: list[float] = []

        def noted(steps: list[tuple[int, float]]) -> Iterator[tuple[int, float]]:
            for step in steps:
                torch.cuda.synchronize()
                starts.append(time.perf_counter())
                yield step

        decoder = Decoder(self.few, torch.bfloat16, self.device)
        gpu_paths.pruned_and_distilled(decoder, self.windows[:10], WANDA, kind, noted)
        lengths = [later - earlier for earlier, later in zip(starts[1:], starts[2:], strict=False)]
        return sorted(lengths)[len(lengths) // 4] / (FEW_BLOCKS - FEW_BLOCKS // 2)

    def best(self) -> float:
        """All of experiment=best_50, with the rates and windows of conf/, disk to memory."""
        return timed(self._best) / FEW_BLOCKS

    def _best(self) -> None:
        decoder = Decoder(self.few, torch.bfloat16, self.device)
        pattern = UnstructuredSection(name="unstructured", sparsity=0.5)
        batch = micro_batch(LENGTH, self.device, None)
        plan = gpu_paths.plan_of(decoder, ADMM, pattern.pattern("matrix"), Propagation.PRUNED)
        plan = replace(
            plan,
            reconstruction=Reconstruction(epochs=1, learning_rate=0.01, search=True),
            distillation=Distillation(first=FEW_BLOCKS // 2, epochs=1, learning_rate=0.0025),
        )
        fitted, held_out = self.windows[:WINDOWS], self.windows[WINDOWS:]
        spent = Stopwatch()

        def stream(windows: torch.Tensor, held_out: torch.Tensor | None = None, streams: int = 1) -> Stream:
            others = windows[:0] if held_out is None else held_out
            return _stream(decoder, torch.cat([windows, others]), batch, len(others), streams * plan.streams)

        with opened(self.scratch / "journal", {"run": time.time()}, self.few) as journal:
            plan, _ = allocate(plan, decoder, LOSS_50, pattern, fitted, held_out, stream, journal)
            spent.lap("allocation")
            source = stream(fitted, held_out)
            teachers = TeacherStreams.of(source, plan)
            assert teachers is not None
            assert teachers.student_inputs is not None
            assert plan.distillation is not None
            for block in prune_blocks(source, plan, teachers=teachers):
                journal.write(block.index, block.changes, {"seconds": 0.0})
            spent.lap("pruning, and each of the first blocks alone")
            del source
            distilled = distill(teachers.student_inputs, teachers.teacher.hidden, plan.distillation, journal.written)
            for _ in distilled.changes():
                pass
            spent.lap(f"the last blocks together, {len(distilled.outcome.tried)} rates")


class Stopwatch:
    """Says how long each part took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def lap(self, part: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        print(f"  {part}: {now - self.started:.1f} s", file=sys.stderr, flush=True)
        self.started = now


def timed(action: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Rates:
    """What this machine does at best, measured: bytes/s from disk, FLOP/s of products in bfloat16 and float32."""

    def __init__(self, base: Checkpoint, device: torch.device) -> None:
        names = list(base)[: len(base.shard_of) // 4]
        size = sum(torch.Size(base.shape(name)).numel() * base.dtype(name).itemsize for name in names)
        with ThreadPoolExecutor(READERS) as readers:
            self.disk = size / timed(lambda: list(readers.map(base.tensor, names)))
        self.bfloat16 = self._products(torch.bfloat16, device)
        self.float32 = self._products(torch.float32, device)

    def _products(self, dtype: torch.dtype, device: torch.device, size: int = 8192, times: int = 10) -> float:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        left @ right
        torch.cuda.synchronize()

        def several() -> None:
            for _ in range(times):
                left @ right
            torch.cuda.synchronize()

        return times * 2 * size**3 / timed(several)

    def floor(self, base: Checkpoint, row: Row) -> float:
        """Seconds that no implementation of this order on this machine can beat: reading, or arithmetic, all else free."""
        config = random_checkpoint.zephyr(1)
        width, between, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 4
        attention, up, down = 2 * width * (width + kv), 2 * width * between, width * between
        passes = (2 * (attention + up) + down) if row.propagate == Propagation.PRUNED else attention + up + down
        blocks, tokens = blocks_of(base), WINDOWS * LENGTH
        solved = [(width + 2 * kv, width), (width, width), (2 * between, width), (width, between)]  # outputs of all that read one input
        in_halves, in_float32 = 2 * passes * tokens, 0
        if row.method.changes_weights:
            in_halves += sum(count**2 for _, count in solved) * tokens  # half of 2 operations each: the matrix is symmetric
            in_float32 += sum(solve_operations(row.method, outputs, count) for outputs, count in solved)
        size = sum(torch.Size(base.shape(name)).numel() * base.dtype(name).itemsize for name in base)
        return max(size / self.disk, blocks * (in_halves / self.bfloat16 + in_float32 / self.float32))


def solve_operations(method: Method, outputs: int, columns: int) -> float:
    """Operations in float32 that solve one input's matrices: factorisations and products, all else free."""
    update = method.update
    if isinstance(update, AdmmParameters):
        inverses = -(-update.steps // update.hold)
        return inverses * columns**3 + 2 * outputs * columns**2 * (1 + update.steps + update.refit_steps)
    return 2 / 3 * columns**3 + outputs * columns**2  # a factor and its inverse; the columns to the right take over errors


if __name__ == "__main__":
    main()
