"""The points of the leaderboard and of the orders on a GPU, several at once, by the functions of the stages: no DVC and no network there.

python -m benchmarks.on_gpu inputs DIR            bring both models, their text and calibration windows (needs the network, no GPU)
python -m benchmarks.on_gpu measure DIR ROWS      measure what is missing, or stale on the leaderboard (needs a GPU and what stages import)
python -m benchmarks.on_gpu take ROWS             add what was measured to benchmarks/quality.json and benchmarks/orders.json

All in float32, as on a CPU. Several processes share the GPU, so neither seconds nor memory are kept. ROWS is written after every point; a
later run goes on where an earlier one stopped, but for rows of other code, which it drops and `take` refuses.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import chdir
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import behaviour, orders, quality
from benchmarks.contenders import MODELS, SEEDS, Model, Point
from stages import evaluate, fetch, observe, prune, sample
from stages.config.compose import read
from stages.files import BASE, CALIBRATION, DENSE_RESULTS, PRUNE_JOURNAL, TEXT, read_json, remove

FLOAT32 = ("prune.dtype=float32", "evaluation.dtype=float32")
TABLES = ("orders", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("inputs").add_argument("directory", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("directory", type=Path)
    measuring.add_argument("rows", type=Path)
    measuring.add_argument("--workers", type=int, default=8)
    measuring.add_argument("--seconds", type=float, default=float("inf"), help="begin no point later than that")
    commands.add_parser("take").add_argument("rows", type=Path)
    arguments = parser.parse_args()
    match arguments.command:
        case "inputs":
            bring(arguments.directory)
        case "measure":
            measure(arguments.directory, arguments.rows, arguments.workers, arguments.seconds)
        case _:
            take(arguments.rows)


def bring(directory: Path) -> None:
    """Write what stages before pruning write, of every model in a directory of its own, and windows of every seed."""
    for model in MODELS:
        project = directory / model.base
        project.mkdir(parents=True, exist_ok=True)
        with chdir(project):
            bring_model(model)


def bring_model(model: Model) -> None:
    """Write what bring writes of one model, in the current directory, but for what is there."""
    sections = read(f"base={model.base}", "evaluation=perplexity")
    if not BASE.is_dir():
        fetch.main.function(part="base", base=sections["base"])
    if not TEXT.is_dir():
        fetch.main.function(part="text", text=sections["text"])
        named = {"evaluation_tasks": sections["evaluation"].tasks, "text_evaluation": sections["text"].evaluation}
        fetch.main.function(part="tasks", **named)
        observe.main.function(prune=sections["prune"])
    for seed in SEEDS:
        if not windows_of(seed).is_dir():
            sample.main.function(calibration=read(f"base={model.base}", f"calibration.seed={seed}")["calibration"])
            CALIBRATION.rename(windows_of(seed))


def windows_of(seed: int) -> Path:
    return CALIBRATION.with_name(f"{CALIBRATION.name}-{seed}")


def due(known: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, Point]]:
    """What is missing, or stale on the leaderboard, by the name of its table: the larger model first, then the orders, then the rest."""
    rows, ordered = quality.load(), orders.load()
    measured = {(table, quality.of_row(row)) for table, found in known.items() for row in found}
    of_model = {model.base: quality.wanted(rows, [model], list(quality.PATTERNS), again=True) for model in MODELS}
    small, large = (of_model[model.base] for model in MODELS)
    compared = [point for point in orders.points() if point not in ordered]
    for table, points in (("quality", large), ("orders", compared), ("quality", small)):
        yield from ((table, point) for point in points if (table, point) not in measured)


def measure(directory: Path, path: Path, workers: int, seconds: float) -> None:
    """Measure what is due into a file, table -> rows.

    Raises:
        SystemExit: some points failed; says how many.
    """
    started, code, failed = time.monotonic(), prune.code_sha256(), 0
    rows = kept(path, code)
    left = list(due(rows))
    print(f"{len(left)} points are due", flush=True)
    remove(directory / "workers")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(directory.resolve(),)) as pool:
        for dense in [pool.submit(_evaluate_dense, directory.resolve() / model.base, model.base) for model in MODELS]:
            dense.result()
        jobs = {pool.submit(_measured, point, started + seconds): (table, point) for table, point in left}
        for job in as_completed(jobs):
            table, point = jobs[job]
            if (error := job.exception()) is not None:
                failed += 1
                print(f"{point}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            elif (row := job.result()) is not None:
                rows[table].append({**row, "workers": workers, "code_sha256": code})
                quality.write_whole(path, rows)
                print(f"{time.monotonic() - started:.0f} s", table, point.base, point.cell, point.seed, flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(left)} points failed")


def kept(path: Path, code: str) -> dict[str, list[dict[str, Any]]]:
    """What an earlier run of this code measured into a file, by table."""
    rows = read_json(path) if path.is_file() else {}
    return {table: [row for row in rows.get(table, []) if row["code_sha256"] == code] for table in TABLES}


def _begin(directory: Path) -> None:
    """Make a worker's own projects, which share what earlier stages wrote."""
    own = directory / "workers" / str(os.getpid())
    for model in MODELS:
        artifacts = own / model.base / BASE.parent
        artifacts.mkdir(parents=True)
        for path in (directory / model.base / BASE.parent).iterdir():
            (artifacts / path.name).symlink_to(path)
        (own / model.base / DENSE_RESULTS).parent.mkdir(parents=True)
        (own / model.base / DENSE_RESULTS).symlink_to(directory / model.base / DENSE_RESULTS)
    os.chdir(own)


def _evaluate_dense(project: Path, base: str) -> None:
    """Evaluate a dense model, for all workers."""
    with chdir(project):
        if not DENSE_RESULTS.is_dir():
            evaluate.main.function(part="dense", evaluation=read(f"base={base}", "evaluation=perplexity", *FLOAT32)["evaluation"])


def _measured(point: Point, end: float) -> dict[str, Any] | None:
    """A point's row, or None where its time is over."""
    if time.monotonic() > end:
        return None
    with chdir(point.base):
        remove(PRUNE_JOURNAL)
        CALIBRATION.unlink(missing_ok=True)
        CALIBRATION.symlink_to(windows_of(point.seed).resolve())
        sections = read("evaluation=perplexity", *point.arguments, *FLOAT32)
        behaviour.run_prune(sections)
        evaluate.main.function(part="sparse", evaluation=sections["evaluation"])
        row = quality.outcome(point)
    return {key: value for key, value in row.items() if key not in quality.COSTS}


def take(path: Path) -> None:
    """Add rows to those of each table.

    Raises:
        SystemExit: they were measured with other code than this.
    """
    found, code = read_json(path), prune.code_sha256()
    if others := {row["code_sha256"] for rows in found.values() for row in rows} - {code}:
        raise SystemExit(f"{path}: found rows of the code {sorted(others)}, wanted {code}")
    of_quality, of_orders = quality.load(), orders.load()
    for row in found["quality"]:
        point = quality.of_row(row)
        of_quality[point] = {**row, "behaviour": quality.behaviour_of(point)}
    quality.write(of_quality)
    orders.write(of_orders | {quality.of_row(row): row for row in found["orders"]})


if __name__ == "__main__":
    main()
