"""The result table of the README: a few points of the embedded default, run through the pipeline itself.

python -m benchmarks.table                               about an hour on two cores
python -m benchmarks.table --point experiment=best_50    measure this point alone; the other rows stay; may be repeated
python -m benchmarks.table --table                       measure nothing, write the table

Each point is one `dvc exp run`, so a point that was run before, here or by anyone who shared it, costs seconds. Writes
benchmarks/table.json, prints the table and writes it between the markers in README.md.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.markers import show_between
from stages import limits
from stages.bos import words
from stages.evaluation.measurement import Measurement, from_rows
from stages.evaluation.metric import Shown
from stages.evaluation.metrics import shown_measurements
from stages.files import DENSE_RESULTS, PRUNE_RESULTS, SPARSE_RESULTS, read_json, write_json

README, RESULTS, MEASUREMENTS = Path("README.md"), Path("benchmarks/table.json"), "details/measurements.json"
PROTOCOL = ("corpora", "bos", "tasks", "evaluation")  # what of it the table says
COSTS = ("seconds", "peak_memory_gib", "device", "dtype", "code")  # of the prune stage's record
MODEL = "SmolLM2-135M-Instruct (a 4-bit GGUF file, Q4_1, dequantised to bfloat16)"
START, END = "<!-- results: python -m benchmarks.table -->", "<!-- end of results -->"
ACCURACY = ("mean accuracy", "over dense")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--point", action="append", choices=POINTS, help="measure this one alone")
    arguments = parser.parse_args()
    if not arguments.table:
        write_json(RESULTS, measured(arguments.point or POINTS))
    show_between(README, START, END, table(read_json(RESULTS)))


def measured(points: Sequence[str]) -> list[dict[str, Any]]:
    """Run some points, and take the others' rows from the file, where there are others."""
    rows = {} if set(points) == set(POINTS) else dict(zip(POINTS, read_json(RESULTS), strict=True))
    with the_default_afterwards():
        for point in points:
            print("$", *command(point), flush=True)
            subprocess.run([*command(point), "--quiet", "evaluate_sparse"], check=True, stdout=sys.stderr)
            rows[point] = row(point)
    return [rows[point] for point in POINTS]


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
    record, protocol = read_json(PRUNE_RESULTS / "provenance.json"), read_json(SPARSE_RESULTS / "details/protocol.json")
    return {
        **frontier,
        "command": " ".join(command(point)),
        "measured": of_columns(read_json(SPARSE_RESULTS / MEASUREMENTS), frontier["corpus"]),
        "dense": of_columns(read_json(DENSE_RESULTS / MEASUREMENTS), frontier["corpus"]),
        "protocol": {key: protocol[key] for key in PROTOCOL},
        "prune": {key: record[key] for key in COSTS},
    }


def of_columns(measurements: list[dict[str, Any]], corpus: str) -> list[dict[str, Any]]:
    """The measurements that have a column."""
    known = shown_measurements()
    return [
        one
        for one in measurements
        if one["style"] == "raw"
        and (
            one["name"] == "tasks"
            and one["metric"] == "accuracy"
            or one["name"] == corpus
            and one["metric"] in known
            and known[one["metric"]].heading
        )
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a point, the dense model first, and what the numbers are."""
    protocol, prune = rows[0]["protocol"], rows[0]["prune"]
    dense = {measured.metric: measured for measured in from_rows(rows[0]["dense"])}
    corpus, windows = next(iter(protocol["corpora"].items()))
    some = limits.windows_of(protocol, corpus)
    known = shown_measurements()
    shown = [known[one["metric"]] for one in rows[0]["measured"] if one["metric"] in known and known[one["metric"]].heading]
    headings = ["method", "pattern", "sparsity", *(one.heading for one in shown), *ACCURACY, "seconds", "peak memory", "command"]
    cells = [of_dense(one, dense) for one in shown]
    lines = [
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        f"| dense | | 0 | {' | '.join(cells)} | {dense['accuracy'].shown(3)} | 0 | | | |",
    ]
    for point in rows:
        measured, run = {one.metric: one for one in from_rows(point["measured"])}, point["prune"]
        accuracy = measured["accuracy"]
        cells = [measured[one.metric].shown(one.digits) for one in shown]
        cells += [accuracy.shown(3), accuracy.difference.shown(3), f"{run['seconds']:.0f}", f"{run['peak_memory_gib']:.2f} GiB"]
        lines.append(f"| {point['method']} | {point['pattern']} | {point['sparsity']:.3g} | {' | '.join(cells)} | `{point['command']}` |")
    return "\n".join(lines) + (
        f"\n\n{MODEL}; calibration of 32 windows of 512 C4 tokens, seed 0; perplexity and Kullback-Leibler divergence "
        f"from the dense model (KLD) on {windows['tokens']} tokens of {corpus.title()} in windows of "
        f"{windows['window_length']}{some and ', '}{some}{words(protocol['bos'])}; zero-shot, "
        f"{limits.rows_of_each(list(protocol['tasks'].values()))}; accuracy over dense is the "
        "difference on the same rows. ± is one standard error over windows or rows, clustered by document, not over calibration seeds. "
        f"Seconds and peak memory are those of pruning, on {prune['device']}, in {prune['dtype']}."
    )


def of_dense(shown: Shown, dense: dict[str, Measurement]) -> str:
    """The dense model's cell: what it scores, or what any model has against itself."""
    if shown.itself is not None:
        return f"{shown.itself:g}"
    return dense[shown.metric].shown(shown.digits) if shown.metric in dense else ""


if __name__ == "__main__":
    main()
