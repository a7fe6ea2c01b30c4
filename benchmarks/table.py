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

from benchmarks import arguments
from benchmarks.markers import show_between
from stages import limits
from stages.bos import words
from stages.evaluation.measurement import from_rows
from stages.files import DENSE_RESULTS, PRUNE_RESULTS, SPARSE_RESULTS, read_json

README, MEASUREMENTS = Path("README.md"), "details/measurements.json"
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
    show_between(README, START, END, table(rows))


@contextmanager
def the_default_afterwards() -> Iterator[None]:
    """Leave params.yaml, its lock file and the workspace as the default has them, whatever was run meanwhile."""
    try:
        yield
    finally:
        subprocess.run([*command(""), "--quiet"], check=True, stdout=sys.stderr)


def row(point: str) -> dict[str, Any]:
    """What the workspace holds after a point was run."""
    frontier, *_ = read_json(SPARSE_RESULTS / "frontier.json")
    return {
        **frontier,
        "command": " ".join(command(point)),
        "measured": [one for one in read_json(SPARSE_RESULTS / MEASUREMENTS) if one["name"] in (frontier["corpus"], "tasks")],
        "dense": [one for one in read_json(DENSE_RESULTS / MEASUREMENTS) if one["name"] in (frontier["corpus"], "tasks")],
        "protocol": read_json(SPARSE_RESULTS / "details/protocol.json"),
        "prune": read_json(PRUNE_RESULTS / "provenance.json"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a point, the dense model first, and what the numbers are."""
    protocol, prune = rows[0]["protocol"], rows[0]["prune"]
    dense = {measured.metric: measured for measured in from_rows(rows[0]["dense"])}
    corpus, windows = next(iter(protocol["corpora"].items()))
    some = limits.windows_of(protocol, corpus)
    lines = [
        "| method | pattern | sparsity | perplexity | over dense | KLD | mean accuracy | over dense | seconds | peak memory | command |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| dense | | 0 | {dense['perplexity'].shown(2)} | 1 | 0 | {dense['accuracy'].shown(3)} | 0 | | | |",
    ]
    for point in rows:
        measured, run = {one.metric: one for one in from_rows(point["measured"])}, point["prune"]
        numbers = [measured[metric].shown(digits) for metric, digits in (("perplexity", 2), ("perplexity_ratio", 2), ("mean_kld", 3))]
        accuracy = measured["accuracy"]
        numbers += [accuracy.shown(3), accuracy.difference.shown(3), f"{run['seconds']:.0f}", f"{run['peak_memory_gib']:.2f} GiB"]
        lines.append(f"| {point['method']} | {point['pattern']} | {point['sparsity']:.3g} | {' | '.join(numbers)} | `{point['command']}` |")
    return "\n".join(lines) + (
        f"\n\n{MODEL}; calibration of 32 windows of 512 C4 tokens, seed 0; perplexity and Kullback-Leibler divergence "
        f"from the dense model (KLD) on {windows['tokens']} tokens of {corpus.title()} in windows of "
        f"{windows['window_length']}{some and ', '}{some}{words(protocol['bos'])}; zero-shot, "
        f"{limits.rows_of_each(list(protocol['tasks'].values()))}; accuracy over dense is the "
        "difference on the same rows. ± is one standard error over windows or rows, clustered by document, not over calibration seeds. "
        f"Seconds and peak memory are those of pruning, on {prune['device']}, in {prune['dtype']}."
    )


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
