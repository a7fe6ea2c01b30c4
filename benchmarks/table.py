"""The result table of the README: a few points of the embedded default, run through the pipeline itself.

python -m benchmarks.table

Each point is one `dvc exp run`, so a point that was run before, here or by anyone who shared it, costs seconds. Prints the
table and writes it between the markers in README.md.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.markers import write_between
from stages.bos import words
from stages.files import DENSE_RESULTS, PRUNE_RESULTS, SPARSE_RESULTS, read_json
from stages.release.card import plus_minus

README = Path("README.md")
MODEL = "SmolLM2-135M-Instruct (a 4-bit GGUF file, Q4_1, dequantised to bfloat16)"
START, END = "<!-- results: python -m benchmarks.table -->", "<!-- end of results -->"
POINTS = (
    "",
    "prune=one_pass",
    "method=sparsegpt",
    "pattern.sparsity=0.6",
    "method=sparsegpt pattern.sparsity=0.6",
    "pattern=nm_2_4",
    "experiment=best_50",
    "experiment=best_60",
    "experiment=best_2_4",
)


def command(point: str) -> list[str]:
    overrides = [argument for override in point.split() for argument in ("-S", override)]
    return ["dvc", "exp", "run", *overrides]


def main() -> None:
    rows = []
    with the_default_afterwards():
        for point in POINTS:
            print("$", *command(point), flush=True)
            subprocess.run([*command(point), "--quiet", "evaluate_sparse"], check=True, stdout=sys.stderr)
            rows.append(row(point))
    text = table(rows)
    print(text)
    write_between(README, START, END, text)


@contextmanager
def the_default_afterwards() -> Iterator[None]:
    """Leave params.yaml, its lock file and the workspace as the default has them, whatever was run meanwhile."""
    try:
        yield
    finally:
        subprocess.run([*command(""), "--quiet"], check=True, stdout=sys.stderr)


def row(point: str) -> dict[str, Any]:
    """What the workspace holds after a point was run."""
    (frontier,) = read_json(SPARSE_RESULTS / "frontier.json")
    return {
        **frontier,
        "command": " ".join(command(point)),
        "metrics": read_json(SPARSE_RESULTS / "metrics.json"),
        "dense": read_json(DENSE_RESULTS / "metrics.json"),
        "protocol": read_json(SPARSE_RESULTS / "details/protocol.json"),
        "prune": read_json(PRUNE_RESULTS / "provenance.json"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a point, the dense model first, and what the numbers are."""
    dense, protocol, prune = rows[0]["dense"], rows[0]["protocol"], rows[0]["prune"]
    scored = protocol["evaluation"]["rows"]
    lines = [
        "| method | pattern | sparsity | perplexity | over dense | mean accuracy | seconds | peak memory | command |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| dense | | 0 | {plus_minus(dense, 'perplexity', 2)} | 1 | {plus_minus(dense, 'accuracy_mean', 3)} | | | |",
    ]
    for point in rows:
        metrics, run = point["metrics"], point["prune"]
        lines.append(
            f"| {point['method']} | {point['pattern']} | {point['sparsity']:.3g} | {plus_minus(metrics, 'perplexity', 2)} "
            f"| {plus_minus(metrics, 'perplexity_ratio', 2)} | {plus_minus(metrics, 'accuracy_mean', 3)} | {run['seconds']:.0f} "
            f"| {run['peak_memory_gib']:.2f} GiB | `{point['command']}` |"
        )
    return "\n".join(lines) + (
        f"\n\n{MODEL}; calibration of 32 windows of 512 C4 tokens, seed 0; perplexity on {protocol['tokens']} tokens of "
        f"{protocol['corpus'].title()} in windows of {protocol['window_length']}{words(protocol.get('bos'))}; nine zero-shot "
        f"tasks, {scored} rows "
        "of each, so the accuracies tell little apart. ± is one standard error over windows or rows, not over calibration seeds. "
        f"Seconds and peak memory are those of pruning, on {prune['device']}, in {prune['dtype']}."
    )


if __name__ == "__main__":
    main()
