"""What a sweep costs beside its stages: seconds of every point, of planning, and of looking at what is there.

python -m benchmarks.sweep_overhead                       200 points in each way of running
python -m benchmarks.sweep_overhead --points 5 --ways one-by-one,ray

Runs points whose stages only wait (stand_in.py), for 0 seconds, and writes a row for each way into benchmarks/sweep_overhead.json: wall
seconds of the first call and of a second one, which finds everything there; processor seconds of both; files and bytes of the cache. Rows
of other ways, numbers of points and machines stay. The table of docs/sweeps.md is written anew.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import stand_in
from benchmarks.markers import write_between
from benchmarks.unconfigured import ENVIRONMENT
from stages.devices import device_name
from stages.files import read_json, write_json

FILE = Path("benchmarks/sweep_overhead.json")
WAYS = {"one-by-one": [], "two-at-once": ["--jobs", "2"], "ray": ["--ray"]}
KEY = ("way", "points", "machine")
DOCUMENT = Path("docs/sweeps.md")
MARKERS = ("<!-- overhead: python -m benchmarks.sweep_overhead -->", "<!-- end of overhead -->")
HEADERS = ("way", "points", "seconds a point", "processor seconds a point", "second call, seconds", "files in the cache", "machine, load")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_overhead")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    arguments = parser.parse_args()
    for way in arguments.ways.split(","):
        row = measured(way, arguments.points)
        print(row, flush=True)
        rows = read_json(FILE) if FILE.is_file() else []
        write_json(FILE, [*(old for old in rows if any(old[key] != row[key] for key in KEY)), row])
    write_between(DOCUMENT, *MARKERS, table(read_json(FILE)))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    cells = [
        [
            row["way"],
            row["points"],
            row["seconds_a_point"],
            row["processor_seconds_a_point"] or "not counted",
            f"{row['second_call_seconds']} ({row['second_call_processor_seconds']} of a processor)",
            row["cache_files"],
            f"{row['machine']}, {row['load_before']}",
        ]
        for row in rows
    ]
    return tabulate(cells, HEADERS, tablefmt="github", disable_numparse=True)


def measured(way: str, points: int) -> dict[str, Any]:
    """One way of running that many points, in a new project."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        root = stand_in.make(Path(directory))
        values = [round(0.9 * (index + 1) / (points + 1), 6) for index in range(points)]
        file = root.parent / "many.yaml"
        file.write_text(f"overrides: [evaluation=sweep]\ngrid: {{pattern.sparsity: {values}}}\n", encoding="utf8")
        command = [sys.executable, "-m", "stages.sweep", str(file), *WAYS[way]]
        first, second = _run(command, root), _run(command, root)
        cache = [path.stat().st_size for path in (root / ".dvc/cache").rglob("*") if path.is_file()]
    return {
        "way": way,
        "points": points,
        "machine": f"{device_name(torch.device('cpu'))} of {os.cpu_count()} processors",
        "load_before": round(load, 1),
        "seconds": round(first[0], 1),
        "seconds_a_point": round(first[0] / points, 2),
        "processor_seconds_a_point": None if way == "ray" else round(first[1] / points, 2),  # Ray's workers are not our children
        "second_call_seconds": round(second[0], 1),
        "second_call_processor_seconds": round(second[1], 1),
        "cache_files": len(cache),
        "cache_bytes": sum(cache),
    }


def _run(command: list[str], root: Path) -> tuple[float, float]:
    """Wall and processor seconds of a command and of the children that it waited for."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=root, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
