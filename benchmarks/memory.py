"""Peak memory of pruning a model that is larger than what it is given: one block, not the model.

python -m benchmarks.memory

Writes a random checkpoint with zephyr-7b-beta's configuration (14.5 GB; --scratch says where), and runs `python -m stages.prune`
on 4 windows of 128 tokens, on the CPU in float32, watching its memory. Prints the table and writes it between the markers in
README.md. A finished measurement is kept in the scratch directory (after a change of code, remove it); the checkpoint is not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from benchmarks import random_checkpoint
from benchmarks.markers import show_between
from benchmarks.measure import measure
from benchmarks.speed import ENVIRONMENT
from stages.config.compose import composed
from stages.devices import cpu_name
from stages.files import BASE, CALIBRATION, PRUNE_JOURNAL, PRUNE_RESULTS, read_json, remove, sha256, write_json

README = Path("README.md")
START, END = "<!-- memory: python -m benchmarks.memory -->", "<!-- end of memory -->"
POINTS = (("wanda", 32), ("wanda", 2), ("sparsegpt", 2))  # method, blocks
WINDOWS, LENGTH = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/memory"), help="keeps finished measurements; needs 16 GB")
    arguments = parser.parse_args()
    project, rows = arguments.scratch / "project", []
    for method, blocks in POINTS:
        done = arguments.scratch / f"{method}-{blocks}.json"
        machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        if not done.is_file() or read_json(done)["machine"] != machine:
            print(f"{method}, {blocks} blocks", file=sys.stderr, flush=True)
            make_base(project, blocks)
            write_json(done, {"machine": machine, **measurement(project, method)})
        rows.append({"method": method, "blocks": blocks, **read_json(done)})
    remove(project)
    show_between(README, START, END, table(rows))


def make_base(project: Path, blocks: int) -> None:
    """What the fetch and sample stages would leave; the checkpoint stays where it is the right one already."""
    provenance = project / BASE / "provenance.json"
    if not provenance.is_file() or read_json(provenance)["blocks"] != blocks:
        remove(project)
        files = random_checkpoint.write(project / BASE, blocks)
        write_json(provenance, {"name": "random/zephyr-7b-beta", "blocks": blocks, "files": files})
    write_windows(project, torch.randint(3, 32000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0)))


def write_windows(project: Path, windows: torch.Tensor) -> None:
    """Windows, [windows, tokens], int64, as the sample stage leaves those that it draws for the project's base."""
    directory, tokenizer = project / CALIBRATION, project / BASE / "tokenizer.json"
    directory.mkdir(parents=True, exist_ok=True)
    held_out = windows[:2].roll(7, dims=1)  # other tokens in every position
    save_file({"windows": windows, "held_out": held_out}, directory / "windows.safetensors")
    facts = {"windows_sha256": sha256(directory / "windows.safetensors")}
    write_json(directory / "provenance.json", {**facts, "tokenizer_sha256": sha256(tokenizer) if tokenizer.is_file() else None})


def measurement(project: Path, method: str) -> dict[str, Any]:
    """Prune at 50%.

    Raises:
        SystemExit: it failed; names its log.
    """
    remove(project / PRUNE_JOURNAL)  # of a measurement that was interrupted
    params = composed(f"method={method}", "pattern.sparsity=0.5", "prune.device=cpu", "prune.dtype=float32")
    OmegaConf.save(params, project / "params.yaml")
    log = project / "log.txt"
    cost = measure([sys.executable, "-m", "stages.prune"], directory=project, environment=ENVIRONMENT, log=log)
    if cost.exit_code:
        raise SystemExit(f"{method}: exit code {cost.exit_code}; see {log}")
    run = read_json(project / PRUNE_RESULTS / "provenance.json")
    return {
        "peak_anonymous": cost.peak_anonymous,
        "peak_resident": cost.peak_resident,
        "seconds": run["seconds"],
        "sparsity": read_json(project / PRUNE_RESULTS / "metrics.json")["sparsity"],
        "checkpoint": sum(path.stat().st_size for path in (project / BASE).glob("*.safetensors")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method and depth."""
    lines = [
        "| method | blocks | checkpoint | peak anonymous memory | peak resident memory | sparsity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['blocks']} | {row['checkpoint'] / 1e9:.2f} GB | {row['peak_anonymous'] / 1e9:.2f} GB "
            f"| {row['peak_resident'] / 1e9:.2f} GB | {row['sparsity']:.4f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + (
        f"\n\nA random checkpoint with zephyr-7b-beta's configuration, in bfloat16; {WINDOWS} windows of {LENGTH} random tokens; 50% "
        f"unstructured; computed in float32 on {cpu_name()}, {torch.get_num_threads()} threads, with torch {rows[0]['machine']['torch']}. "
        "Anonymous memory is what no file backs; importing the libraries is in it."
    )


if __name__ == "__main__":
    main()
