"""What a further point of a sweep costs where statistics of the dense model are kept (`prune=one_pass_kept`).

python -m benchmarks.kept_statistics                                    the calibration that `dvc repro sample` left
python -m benchmarks.kept_statistics --separately 1                     ten separate points take hours: measure one of them
python -m benchmarks.kept_statistics calibration=embedded_packed calibration.windows=128 calibration.window_length=2048
python -m benchmarks.kept_statistics --table                            measure nothing, write the table

Runs the stages as processes of their own, as DVC does, in a scratch directory with this project's base: `stages.sample` where overrides
choose another calibration; `stages.prune` with Wanda, `prune=one_pass`, at ten sparsities; `stages.observe` once and `stages.prune`
at the same sparsities, `prune=one_pass_kept`. Refuses to go on where the bytes differ. Each calibration is a row of
benchmarks/kept_statistics.json. The table of docs/sweeps.md is written anew.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from benchmarks.markers import show_between
from benchmarks.measure import imports, measure
from benchmarks.speed import ENVIRONMENT
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import composed
from stages.devices import device_name
from stages.files import (
    BASE,
    CALIBRATION,
    PRUNE_JOURNAL,
    PRUNE_RESULTS,
    SPARSE,
    STATISTICS,
    TEXT,
    bytes_in,
    read_json,
    remove,
    sha256,
    write_json,
)

DOCUMENT, RESULTS = Path("docs/sweeps.md"), Path("benchmarks/kept_statistics.json")
START, END = "<!-- kept statistics: python -m benchmarks.kept_statistics -->", "<!-- end of kept statistics -->"
SPARSITIES = [round(0.3 + 0.05 * step, 2) for step in range(10)]
FIXED = ("method=wanda", "prune.device=cpu", "prune.dtype=float32")
KEY = ("base", "windows", "length", "machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/kept_statistics"), help="is emptied; holds the statistics meanwhile")
    parser.add_argument("--separately", type=int, default=len(SPARSITIES), help="how many points to prune without kept statistics, too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("overrides", nargs="*", help="of the calibration; none: as it was drawn")
    arguments = parser.parse_args()
    rows = read_json(RESULTS) if RESULTS.is_file() else []
    if not arguments.table:
        row = measurement(arguments.scratch, arguments.overrides, SPARSITIES[: max(1, arguments.separately)])
        rows = [*(old for old in rows if any(old[key] != row[key] for key in KEY)), row]
        write_json(RESULTS, rows)
    show_between(DOCUMENT, START, END, table(rows))


def measurement(project: Path, overrides: list[str], separately: list[float]) -> dict[str, Any]:
    """One calibration: a row of the results.

    Args:
        separately: the sparsities that are pruned without kept statistics, too.

    Raises:
        SystemExit: a stage failed, or the bytes of a point differ; names the log or the file.
    """
    remove(project)
    linked = (BASE, TEXT) if overrides else (BASE, CALIBRATION)
    for artifact in linked:
        (project / artifact).parent.mkdir(parents=True, exist_ok=True)
        (project / artifact).symlink_to(artifact.absolute())
    if overrides:
        run(project, "sample", overrides)
    windows = load_file(project / CALIBRATION / "windows.safetensors")["windows"]
    alone = [pruned(project, sparsity, "one_pass", overrides) for sparsity in separately]
    observing = run(project, "observe", [*overrides, *FIXED, "prune=one_pass_kept"])
    kept = [pruned(project, sparsity, "one_pass_kept", overrides) for sparsity in SPARSITIES]
    for sparsity, one, other in zip(separately, alone, kept, strict=False):
        if one["files"] != other["files"]:
            raise SystemExit(f"sparsity {sparsity}: the bytes of the delta from kept statistics are not those of prune=one_pass")
    if any(point["kept"] != "norms" for point in kept):
        raise SystemExit("a point was pruned without the kept statistics; see its provenance")
    return {
        "base": Path(Checkpoint(BASE).provenance.get("file", Checkpoint(BASE).provenance["name"])).name,
        "windows": len(windows),
        "length": windows.shape[1],
        "machine": device_name(torch.device("cpu")),
        "alone": [{key: point[key] for key in ("process", "stage")} for point in alone],
        "observing": observing,
        "kept": [{key: point[key] for key in ("process", "stage")} for point in kept],
        "imports": imports(environment=ENVIRONMENT).seconds,
        "bytes": bytes_in(project / STATISTICS),
        "deltas": sum(point["bytes"] for point in kept),
        "base_bytes": bytes_in(BASE),
    }


def pruned(project: Path, sparsity: float, option: str, overrides: list[str]) -> dict[str, Any]:
    """Prune a point: seconds of the process and of the stage in it, hashes of what a later stage reads, bytes of the delta, and the
    statistics that were read."""
    remove(project / PRUNE_JOURNAL)
    seconds = run(project, "prune", [*overrides, *FIXED, f"prune={option}", f"pattern.sparsity={sparsity}"])
    facts = read_json(project / PRUNE_RESULTS / "provenance.json")
    files = [*(project / SPARSE).iterdir(), project / PRUNE_RESULTS / "sparsity.json"]
    hashes = {path.name: sha256(path) for path in files}
    facts = {"stage": facts["seconds"], "kept": facts["kept_statistics"], "bytes": bytes_in(project / SPARSE)}
    return {"process": seconds, "files": hashes, **facts}


def run(project: Path, stage: str, overrides: list[str], *arguments: str) -> float:
    """Run a stage in a process of its own, as params.yaml of these overrides says; returns wall seconds.

    Raises:
        SystemExit: it failed; names its log.
    """
    OmegaConf.save(composed(*overrides), project / "params.yaml")
    seconds = run_module(project, f"stages.{stage}", *arguments)
    print(f"{stage} {' '.join([*arguments, *overrides])}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def run_module(project: Path, module: str, *arguments: str) -> float:
    """Run a module in a process of its own; returns wall seconds.

    Raises:
        SystemExit: it failed; names its log.
    """
    log = project / "log.txt"
    cost = measure([sys.executable, "-m", module, *arguments], directory=project, environment=ENVIRONMENT, log=log)
    if cost.exit_code:
        raise SystemExit(f"{' '.join([module, *arguments])}: exit code {cost.exit_code}; see {log}")
    return cost.seconds


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each calibration."""
    if not rows:
        return "Not measured yet."
    titles = ("calibration", "one point", "ten, each alone", "observe", "ten from kept statistics", "in all", "over one", "a further point")
    titles = (*titles, "statistics on disk", "ten deltas")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        one, further = median(point["process"] for point in row["alone"]), sum(point["process"] for point in row["kept"])
        whole = len(row["alone"]) == len(SPARSITIES)
        alone = f"{sum(point['process'] for point in row['alone']):.0f} s" if whole else "not measured"
        in_all = row["observing"] + further
        of_stage = mean(point["stage"] for point in row["kept"])
        deltas = "not measured"
        if "deltas" in row:
            deltas = f"{row['deltas'] / 1e6:.1f} MB, {row['deltas'] / row['base_bytes']:.1%} of the base"
        each = f"{further / len(row['kept']):.1f} s, {of_stage:.1f} of them in the stage"
        lines.append(
            f"| {row['windows']} x {row['length']} tokens, {row['base']}, {row['machine']} | {one:.0f} s | {alone} "
            f"| {row['observing']:.0f} s | {further:.0f} s | {in_all:.0f} s | {in_all / one:.2f} | {each} "
            f"| {row['bytes'] / 1e6:.0f} MB | {deltas} |"
        )
    shown = ", ".join(f"{row['imports']:.1f} s" for row in rows)
    return "\n".join(lines) + (
        f"\n\nWanda at the sparsities {', '.join(map(str, SPARSITIES))}, in float32 on a CPU, each stage a process of its own as under "
        "DVC; the bytes of every point that was pruned both ways are the same. One point: the median of those pruned alone. Seconds of "
        f"the stage are those without imports. To import torch and transformers alone takes a process {shown}."
    )


if __name__ == "__main__":
    main()
