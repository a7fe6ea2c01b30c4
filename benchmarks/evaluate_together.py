"""What it takes to evaluate several pruned models side by side (`python -m stages.sweep --together`), and each alone.

python -m benchmarks.evaluate_together [OVERRIDE …]     the base and the text that `dvc repro` left; overrides: of the evaluation
python -m benchmarks.evaluate_together --table          measure nothing, write the table

Prunes the base by Wanda at several sparsities in scratch directories, evaluates the dense model once, then every point in a process of
its own, then all side by side, which each point's evaluation takes over; both with whole models and with one block in memory. Refuses to
go on where the results differ. The table of docs/sweeps.md is written anew. Takes about twenty minutes.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept_statistics import FIXED, run, run_module
from benchmarks.markers import show_between
from stages.checkpoint.reader import Checkpoint
from stages.devices import device_name
from stages.files import (
    BASE,
    BENCHMARKS,
    CALIBRATION,
    DENSE_RESULTS,
    DENSE_STATES,
    SPARSE_RESULTS,
    TEXT,
    read_json,
    remove,
    sha256,
    write_json,
)

DOCUMENT, RESULTS = Path("docs/sweeps.md"), Path("benchmarks/evaluate_together.json")
START, END = "<!-- evaluated together: python -m benchmarks.evaluate_together -->", "<!-- end of evaluated together -->"
SPARSITIES = (0.4, 0.5, 0.6, 0.7, 0.8)
EVALUATION = "evaluation=sweep"
RUN = "run.json"  # differs from run to run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/evaluate_together"), help="is emptied")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("overrides", nargs="*", default=[EVALUATION], help=f"of the evaluation; default: {EVALUATION}")
    arguments = parser.parse_args()
    if not arguments.table:
        write_json(RESULTS, measurement(arguments.scratch, arguments.overrides))
    show_between(DOCUMENT, START, END, table(read_json(RESULTS) if RESULTS.is_file() else None))


def measurement(scratch: Path, overrides: list[str]) -> dict[str, Any]:
    """All points, whole and streamed.

    Raises:
        SystemExit: a command failed, or the results of a point differ; names the log or the file.
    """
    remove(scratch)
    points = [scratch / str(sparsity) for sparsity in SPARSITIES]
    for point, sparsity in zip(points, SPARSITIES, strict=True):
        for path in (BASE, TEXT, BENCHMARKS, CALIBRATION):
            (point / path).parent.mkdir(parents=True, exist_ok=True)
            (point / path).symlink_to(path.absolute())
        run(point, "prune", [*overrides, *FIXED, "prune=one_pass", f"pattern.sparsity={sparsity}"])
    rows = [_measured(points, [*overrides, *FIXED, f"evaluation.streamed={streamed}"]) for streamed in ("false", "true")]
    name = Path(Checkpoint(BASE).provenance.get("file", Checkpoint(BASE).provenance["name"])).name
    return {"base": name, "machine": device_name(torch.device("cpu")), "overrides": overrides, "rows": rows}


def _measured(points: list[Path], overrides: list[str]) -> dict[str, Any]:
    """One way to hold the models. Returns: seconds of the processes."""
    first, *others = points
    for path in (DENSE_RESULTS, DENSE_STATES):
        for point in points:
            remove(point / path)
    dense = run(first, "evaluate", overrides, "part=dense")
    for point in others:
        for path in (DENSE_RESULTS, DENSE_STATES):
            (point / path).parent.mkdir(parents=True, exist_ok=True)
            (point / path).symlink_to((first / path).absolute())
    alone = [run(point, "evaluate", overrides, "part=sparse") for point in points]
    expected = [_hashes(point) for point in points]
    together = run_module(first, "stages.evaluate_together", *(str(point.absolute()) for point in points))
    completing = [run(point, "evaluate", overrides, "part=sparse") for point in points]
    for point, hashes in zip(points, expected, strict=True):
        if _hashes(point) != hashes:
            raise SystemExit(f"{point}: the results differ from those of the same point alone")
    return {"overrides": overrides, "dense": dense, "alone": alone, "together": together, "completing": completing}


def _hashes(point: Path) -> dict[str, str]:
    """Of the results of a point, but for what differs from run to run; they are removed."""
    results = point / SPARSE_RESULTS
    found = {str(path.relative_to(results)): sha256(path) for path in results.rglob("*") if path.is_file() and path.name != RUN}
    shutil.rmtree(results)
    return found


def table(found: dict[str, Any] | None) -> str:
    """Markdown: a line for each way to hold the models."""
    if found is None:
        return "Not measured yet."
    points = len(SPARSITIES)
    lines = [f"| {points} models | each alone | side by side | then each completed | in all over each alone |", "|---|---|---|---|---|"]
    for words, row in zip(
        ("whole, one after the other", "one block of each in memory (`evaluation.streamed=true`)"), found["rows"], strict=True
    ):
        alone, completing = sum(row["alone"]), sum(row["completing"])
        share = (row["together"] + completing) / alone
        lines.append(f"| {words} | {alone:.0f} s | {row['together']:.0f} s | {completing:.0f} s | {share:.2f} |")
    return "\n".join(lines) + (
        f"\n\n{found['base']}, Wanda at the sparsities {', '.join(map(str, SPARSITIES))}, `{' '.join(found['overrides'])}`, on "
        f"{found['machine']}, each command a process of its own, its imports included. The results of a point are the same, byte for byte."
    )


if __name__ == "__main__":
    main()
