"""Memory and seconds of writing, verifying, packing and unpacking a release, and its sizes.

python -m benchmarks.release                        the base in artifacts/base (`dvc repro fetch_base`)
python -m benchmarks.release --blocks 32            a random checkpoint with zephyr-7b-beta's configuration and so many blocks
python -m benchmarks.release --blocks 32 --checks   writing and verifying alone

Prunes every matrix by magnitude at 50%, which changes no kept weight, without windows or statistics; then each step runs in a process of
its own, whose memory is watched. --scratch says where the files lie meanwhile: a base of 14.5 GB needs 31 GB. A base that is left there is
used again. Keeps what it measures in benchmarks/release.json, and writes the tables between the markers in docs/.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import random_checkpoint
from benchmarks.markers import write_between
from benchmarks.measure import imports, measure
from stages.checkpoint.delta import Change, SparseDelta, write_block, write_manifest
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.config.compose import read
from stages.devices import cpu_name
from stages.files import BASE, read_json, remove, sha256, write_json
from stages.pruning.patterns import Unstructured
from stages.recipe import Recipe
from stages.release.packed import FOLDER, pack_release, unpack_release
from stages.release.packing import pack, write_sums
from stages.release.verification import verify
from stages.release.zeros import write_zeros
from stages.streaming.decoder import Decoder

FILE, CHECKS, SIZES = Path("benchmarks/release.json"), Path("docs/release.md"), Path("docs/packed.md")
MARKERS = "<!-- {}: python -m benchmarks.release -->", "<!-- end of {} -->"
SPARSITY = 0.5
SIZES_SO_FAR = "sizes.json"
CHECKS_ALONE = ("write", "verify streamed")
STEPS = (*CHECKS_ALONE, "pack values", "unpack values", "pack masks", "unpack masks", "verify")
PLENTY = 2**50  # bytes of memory, where a model is to be loaded whole


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.step is not None:
        _step(arguments.step, arguments.base, arguments.scratch)
        return
    model = f"random, {arguments.blocks} blocks of zephyr-7b-beta" if arguments.blocks else read_json(BASE / PROVENANCE)["name"]
    base = arguments.scratch / f"base-{arguments.blocks}" if arguments.blocks else BASE
    rows = read_json(FILE) if FILE.is_file() else {}
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__}
    prepare(base, arguments.scratch, arguments.blocks)
    rows[model] = {"machine": machine, "imports": asdict(imports()), "steps": {}, "sizes": {"base": _size(base)}}
    for step in CHECKS_ALONE if arguments.checks else STEPS:
        if step == "verify" and arguments.blocks:
            continue  # loads the model whole, which is the embedded model's check
        print(step, file=sys.stderr, flush=True)
        rows[model]["steps"][step] = cost_of(step, base, arguments.scratch)
        rows[model]["sizes"] |= read_json(arguments.scratch / SIZES_SO_FAR)
        write_json(FILE, rows)
    remove(arguments.scratch / "plain")
    for document, name, text in ((CHECKS, "checks", checks_table(rows)), (SIZES, "sizes", sizes_table(rows))):
        print(text)
        write_between(document, *(marker.format(name) for marker in MARKERS), text)


def prepare(base: Path, scratch: Path, blocks: int | None) -> None:
    """The base, unless it is there, and the delta."""
    scratch.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "values", "masks"):  # of a run that was interrupted
        remove(scratch / name)
    write_json(scratch / SIZES_SO_FAR, {})
    if blocks and not (base / PROVENANCE).is_file():
        random_checkpoint.write(base, blocks)
        files = {path.name: sha256(path) for path in sorted(base.iterdir())}
        write_json(base / PROVENANCE, {"source": "local", "name": "random", "files": files})
    make_delta(Checkpoint(base), scratch / "delta")


def cost_of(step: str, base: Path, scratch: Path) -> dict[str, Any]:
    """Run a step in a process of its own.

    Raises:
        SystemExit: it failed; names its log.
    """
    command = [sys.executable, "-m", "benchmarks.release", "--step", step, "--base", str(base), "--scratch", str(scratch)]
    cost = measure(command, log=scratch / "log.txt")
    if cost.exit_code:
        raise SystemExit(f"{step}: exit code {cost.exit_code}; see {scratch / 'log.txt'}")
    return asdict(cost)


def make_delta(base: Checkpoint, directory: Path, fraction: float = SPARSITY) -> SparseDelta:
    """Prune every matrix by magnitude, each row alike, one block in memory at a time."""
    remove(directory)
    directory.mkdir(parents=True)
    decoder, rows = Decoder(base, torch.float32, torch.device("cpu")), []
    pattern = Unstructured(sparsity=fraction, comparison_group="row")
    for index, matrices in enumerate(decoder.matrices):
        changes = {matrix.tensor: Change(mask=torch.ones(base.shape(matrix.tensor), dtype=torch.bool)) for matrix in matrices}
        for matrix in matrices:
            mask = matrix.stored_in(changes[matrix.tensor].mask)
            mask.copy_(pattern.mask(matrix.stored_in(base.tensor(matrix.tensor)).float().abs()))
            facts = {"shape": list(matrix.shape), "transposed": matrix.transposed, "weights": matrix.size, "zeros": int((~mask).sum())}
            rows.append({"matrix": matrix.name, "tensor": matrix.tensor, "expert": matrix.expert, **facts})
        write_block(directory / f"block-{index:05d}.safetensors", changes, base.fingerprint)
    sparsity = sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows)
    write_manifest(directory, recipe=_recipe(base, fraction), summary={"sparsity": sparsity, "relative_error": 0.0}, matrices=rows)
    return SparseDelta(directory, base.fingerprint)


def _recipe(base: Checkpoint, fraction: float) -> Recipe:
    composed = read("method=magnitude", f"pattern.sparsity={fraction}")
    sections = {name: asdict(composed[name]) for name in ("method", "pattern", "allocation", "reconstruction", "prune")}
    return Recipe(**sections, base=base.fingerprint, calibration="none", label="magnitude", pattern_label="unstructured")


def _step(step: str, directory: Path, scratch: Path) -> None:
    """Run one step; what it leaves is what the next starts from."""
    base, plain = Checkpoint(directory), scratch / "plain"
    delta = SparseDelta(scratch / "delta", base.fingerprint)
    action, _, form = step.partition(" ")
    theirs = base if form == "masks" else None
    match action:
        case "write":
            remove(plain)
            plain.mkdir()
            pack(base, delta, plain)
            write_zeros(plain, delta)
            write_sums(plain)
        case "verify":
            verify(plain, base, delta, 0 if form == "streamed" else PLENTY)
        case "pack":
            packed = scratch / form
            plain.rename(packed)
            pack_release(packed, theirs)
            write_json(scratch / SIZES_SO_FAR, read_json(scratch / SIZES_SO_FAR) | {form: _size(packed / FOLDER)})
        case "unpack":
            remove(plain)
            unpack_release(scratch / form, plain, directory)
            remove(scratch / form)


def _size(directory: Path) -> int:
    """Bytes of the shards."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def checks_table(rows: dict[str, Any]) -> str:
    """Markdown: a line for each model and step of writing and checking."""
    lines = ["| model | checkpoint | step | peak anonymous memory | peak resident memory | seconds |", "|---|---|---|---|---|---|"]
    for model, row in rows.items():
        for step in (*CHECKS_ALONE, "verify"):
            if cost := row["steps"].get(step):
                memory = f"{cost['peak_anonymous'] / 1e9:.2f} GB | {cost['peak_resident'] / 1e9:.2f} GB"
                lines.append(f"| {model} | {row['sizes']['base'] / 1e9:.2f} GB | {step} | {memory} | {cost['seconds']:.0f} |")
    floor = min(row["imports"]["peak_anonymous"] for row in rows.values())
    return "\n".join(lines) + f"\n\n{_made(rows)} Importing the libraries alone takes {floor / 1e9:.2f} GB of anonymous memory."


def sizes_table(rows: dict[str, Any]) -> str:
    """Markdown: a line for each model and form."""
    lines = ["| model | form | bytes of the shards | of dense | seconds to pack | to unpack | peak anonymous memory |"]
    lines.append("|---|---|---|---|---|---|---|")
    for model, row in rows.items():
        dense = row["sizes"]["base"]
        lines.append(f"| {model} | dense | {dense:,} | 1 | | | |")
        for form in ("values", "masks"):
            if f"unpack {form}" not in row["steps"]:
                continue
            costs = [row["steps"][f"{action} {form}"] for action in ("pack", "unpack")]
            seconds = " | ".join(f"{cost['seconds']:.0f}" for cost in costs)
            peak = max(cost["peak_anonymous"] for cost in costs) / 1e9
            size = row["sizes"][form]
            lines.append(f"| {model} | {form} | {size:,} | {size / dense:.3f} | {seconds} | {peak:.2f} GB |")
    return "\n".join(lines) + f"\n\n{_made(rows)} Packing unpacks each shard once to compare it; seconds and memory include the imports."


def _made(rows: dict[str, Any]) -> str:
    machines = dict.fromkeys(f"{row['machine']['cpu']}, {row['machine']['threads']} threads" for row in rows.values())
    versions = dict.fromkeys(
        f"torch {one['torch']}, transformers {one['transformers']}" for one in (row["machine"] for row in rows.values())
    )
    pruned = f"Every matrix of the decoder blocks pruned by magnitude at {SPARSITY:.0%}, each row alike."
    return f"{pruned} On {' and '.join(machines)}; {' and '.join(versions)}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, metavar="N", help="of a random checkpoint; default: artifacts/base")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/release"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--checks", action="store_true", help="leave packing out")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
