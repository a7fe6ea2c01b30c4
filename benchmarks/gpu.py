"""Pruning a 7B model on one GPU, disk to disk: seconds, device memory, and how far that is from the floor.

python -m benchmarks.gpu            correctness, then the table
python -m benchmarks.gpu --check    correctness alone, on whatever device there is

Needs torch, transformers and safetensors alone. Makes its own checkpoint: random weights with zephyr-7b-beta's configuration
(14.5 GB in --scratch), and 128 windows of 2048 random tokens. Device memory is capped at 15 GiB, a T4's.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from benchmarks import random_checkpoint
from benchmarks.markers import write_between
from benchmarks.peers import plain
from stages.checkpoint.delta import write_block
from stages.checkpoint.reader import Checkpoint
from stages.errors import SparsesweepError
from stages.pruning.block_loop import Plan, PrunedBlock, prune_blocks
from stages.pruning.entries import NoParameters
from stages.pruning.journal import WriteBehind
from stages.pruning.method import Damping, Method
from stages.pruning.patterns import Nm, Pattern, Unstructured
from stages.pruning.updates.sparsegpt import SparseGptParameters
from stages.pruning.windows import micro_batch
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream

README = Path("README.md")
START, END = "<!-- gpu: python -m benchmarks.gpu -->", "<!-- end of gpu -->"
WINDOWS, LENGTH, BLOCKS = 128, 2048, 32
CAP = 15 * 2**30  # bytes of device memory
PUBLISHED = Damping(share=0.01, limit=1.0, shrinkage=False)
NONE = NoParameters(name="none")
WANDA = Method(name="wanda", score=NoParameters(name="wanda"), comparison_group="row", update=NONE, damping=PUBLISHED)
SWEEP = SparseGptParameters(name="sparsegpt", block_size=128)
SPARSEGPT = Method(name="sparsegpt", score=NoParameters(name="obs"), comparison_group="matrix", update=SWEEP, damping=PUBLISHED)
POINTS: tuple[tuple[str, Method, Pattern, str], ...] = (
    ("wanda", WANDA, Unstructured(sparsity=0.5, comparison_group="row"), "pruned"),
    ("wanda", WANDA, Unstructured(sparsity=0.5, comparison_group="row"), "dense"),
    ("wanda", WANDA, Nm(kept=2, group=4), "pruned"),
    ("sparsegpt", SPARSEGPT, Unstructured(sparsity=0.5, comparison_group="matrix"), "pruned"),
    ("sparsegpt", SPARSEGPT, Unstructured(sparsity=0.5, comparison_group="matrix"), "dense"),
)
AGREEMENT = {"wanda": 0.999, "sparsegpt": 0.98}  # share of mask bits; sums in another order decide near-ties otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/gpu"), help="for the checkpoint and the deltas")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer make a shorter run, not comparable")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(device)
    if arguments.check:
        return
    if device.type != "cuda":
        raise SystemExit("torch finds no GPU here; --check runs the correctness part alone")
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(device).total_memory))
    made = random_checkpoint.write(arguments.scratch / f"base-{arguments.blocks}", arguments.blocks, "cuda")
    print(f"{len(made)} shards written", file=sys.stderr, flush=True)
    text = table(arguments.scratch, arguments.blocks, device)
    print(text)
    if README.is_file():
        write_between(README, START, END, text)


def check(device: torch.device) -> None:
    """Compare the engine's masks with those of the published procedure on a whole small model.

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
            masks = {name: change.mask for block in blocks for name, change in block.changes.items()}
            same = sum(int((mask == (model.get_parameter(tensor).detach() != 0)).sum()) for tensor, mask in masks.items())
            share = same / sum(mask.numel() for mask in masks.values())
            print(f"{name} on {device.type}: {share:.5f} of the mask bits are those of the published procedure", flush=True)
            if share < AGREEMENT[name]:
                raise SystemExit(f"{name}: found {share:.5f} of the mask bits the same, wanted {AGREEMENT[name]}")


def run(decoder: Decoder, windows: torch.Tensor, method: Method, pattern: Pattern, propagate: str, batch: int) -> Iterator[PrunedBlock]:
    """The engine, as the prune stage runs it."""
    names = [matrix.name for block in decoder.matrices for matrix in block]
    plan = Plan(method=method, patterns=dict.fromkeys(names, pattern), propagate=propagate, error_tokens=512, expert_tokens=64)
    with decoder.before_blocks():
        stream = Stream(decoder, windows, batch=batch)
    return prune_blocks(stream, plan)


def table(scratch: Path, blocks: int, device: torch.device) -> str:
    """Markdown: a line for each point, with its floor."""
    base = Checkpoint(scratch / f"base-{blocks}")
    windows = torch.randint(3, 32000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rates = Rates(base, device)
    lines = ["| method | pattern | inputs | seconds | floor | device memory |", "|---|---|---|---|---|---|"]
    for name, method, pattern, propagate in POINTS:
        out = scratch / "delta"
        out.mkdir(exist_ok=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = timed(lambda: disk_to_disk(base, windows, method, pattern, propagate, out, device))  # noqa: B023  called at once
        except torch.OutOfMemoryError:
            raise SparsesweepError(f"{name}, {propagate}: needs more than {CAP / 2**30:.0f} GiB of device memory") from None
        label = f"{pattern.kept}:{pattern.group}" if isinstance(pattern, Nm) else f"{pattern.sparsity:.0%}"
        floor = rates.floor(base, method, propagate)
        peak = torch.cuda.max_memory_reserved() / 2**30
        lines.append(f"| {name} | {label} | of {propagate} blocks | {seconds:.0f} | {floor:.0f} | {peak:.1f} GiB |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + (
        f"\n\nA random checkpoint with zephyr-7b-beta's configuration ({blocks} blocks), {WINDOWS} windows of {LENGTH} tokens, disk to "
        f"disk (without the journal's hashes), in bfloat16 on {torch.cuda.get_device_name(device)}, device memory capped at "
        f"{CAP / 2**30:.0f} GiB, torch {torch.__version__}. The floor is the larger of reading ({rates.disk / 1e9:.1f} GB/s measured, of "
        f"files lately written) and of products in bfloat16 ({rates.bfloat16 / 1e12:.0f} TFLOP/s) and, for the Gram matrices, float32 "
        f"({rates.float32 / 1e12:.0f} TFLOP/s), all else free."
    )


def disk_to_disk(
    base: Checkpoint, windows: torch.Tensor, method: Method, pattern: Pattern, propagate: str, out: Path, device: torch.device
) -> None:
    decoder = Decoder(base, torch.bfloat16, device)
    with WriteBehind() as behind:
        for block in run(decoder, windows, method, pattern, propagate, micro_batch(LENGTH, device, None)):
            behind(write_block, out / f"block-{block.index:05d}.safetensors", block.changes, "random")
    torch.cuda.synchronize()


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
        self.disk = size / timed(lambda: [base.tensor(name) for name in names])
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

    def floor(self, base: Checkpoint, method: Method, propagate: str) -> float:
        """Seconds that no implementation of this order on this machine can beat."""
        config = random_checkpoint.zephyr(1)
        width, between, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 4
        attention, up, down = 2 * width * (width + kv), 2 * width * between, width * between
        passes = (2 * (attention + up) + down) if propagate == "pruned" else attention + up + down
        blocks, tokens = len([name for name in base if name.endswith("down_proj.weight")]), WINDOWS * LENGTH
        gram = (3 * width**2 + between**2) if method.changes_weights else 0  # half of 2 FLOP each: the matrix is symmetric
        arithmetic = 2 * passes * tokens / self.bfloat16 + gram * tokens / self.float32
        size = sum(torch.Size(base.shape(name)).numel() * base.dtype(name).itemsize for name in base)
        return max(size / self.disk, blocks * arithmetic)


if __name__ == "__main__":
    main()
