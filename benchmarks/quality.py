"""The leaderboard: every method at every sparsity and pattern, under one protocol, through the pipeline itself.

python -m benchmarks.quality                 measure what is missing, most telling points first
python -m benchmarks.quality --minutes 60    stop before a point that is begun later than that
python -m benchmarks.quality --pattern 2:4   measure what is missing at one pattern
python -m benchmarks.quality --tables        measure nothing, write the tables

Each point is one `dvc exp run` on the embedded model. What was measured is kept in benchmarks/quality.json, which is
committed, so that a later run goes on where an earlier one stopped; a point whose cell the code prunes otherwise since (see
benchmarks.behaviour) is measured again with --stale. That sees the pruning code and its settings alone: after a change of the base,
the calibration or the evaluation, remove the file. Writes the table between the markers in README.md and every number to
benchmarks/QUALITY.md, and leaves the default in the workspace.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import behaviour
from benchmarks.contenders import CONTENDERS, PATTERNS, PUBLISHED, SEEDS, Contender, Point, points
from benchmarks.markers import write_between
from benchmarks.table import MODEL, the_default_afterwards
from stages.bos import words
from stages.files import DENSE_RESULTS, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE_RESULTS, read_json, remove, write_json
from stages.prune import code_sha256

README, FULL, RESULTS = Path("README.md"), Path("benchmarks/QUALITY.md"), Path("benchmarks/quality.json")
START, END = "<!-- quality: python -m benchmarks.quality -->", "<!-- end of quality -->"
STALE = " †"
BEST = 4  # so many contenders of a pattern are measured with every seed, beside the published ones

Rows = dict[Point, dict[str, Any]]


def measured(point: Point) -> dict[str, Any]:
    """Run one point, from its beginning, and read what the workspace holds then.

    Raises:
        SystemExit: the pruning code is not that of benchmarks.behaviour; before the run.
    """
    print("$", point.command, flush=True)
    remove(PRUNE_JOURNAL)  # of a run that was killed: its peak memory would not be known
    with behaviour.project():
        figures = behaviour.measured(point)
    if not behaviour.same(figures, behaviour.load().get(point.cell)):
        raise SystemExit(f"{point.cell} is pruned otherwise than {behaviour.FILE} says; run python -m benchmarks.behaviour first")
    subprocess.run(point.command.split() + ["--quiet"], check=True, stdout=sys.stderr)
    pruned, prune = read_json(PRUNE_RESULTS / "metrics.json"), read_json(PRUNE_RESULTS / "provenance.json")
    return {
        **asdict(point),
        "perplexity": read_json(SPARSE_RESULTS / "metrics.json")["perplexity"],
        "relative_error": pruned["relative_error"],
        "sparsity": pruned["sparsity"],
        "seconds": prune["seconds"],
        "peak_memory_gib": prune["peak_memory_gib"],
        "device": prune["device"],
        "code": prune["code"],
        "calibration": prune["calibration"],
        "dense_perplexity": read_json(DENSE_RESULTS / "metrics.json")["perplexity"],
        "protocol": read_json(SPARSE_RESULTS / "details/protocol.json"),
        "behaviour": figures,
    }


def stale(row: dict[str, Any], now: Mapping[str, behaviour.Figures]) -> bool:
    """Whether the code has come to prune otherwise since, by what it makes of a small model."""
    return not behaviour.same(row["behaviour"], now.get(of_row(row).cell))


def of_row(row: dict[str, Any]) -> Point:
    return Point(**{key: row[key] for key in Point.__dataclass_fields__})


def load() -> Rows:
    rows = read_json(RESULTS) if RESULTS.is_file() else []
    return {of_row(row): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point later than that")
    parser.add_argument("--pattern", choices=PATTERNS, help="measure points at this one alone")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--stale", action="store_true", help="measure again what the code prunes otherwise now")
    arguments = parser.parse_args()
    rows = load()
    patterns = [arguments.pattern] if arguments.pattern else list(PATTERNS)
    if not arguments.tables and wanted(rows, patterns, arguments.stale):
        with the_default_afterwards():
            measure(rows, patterns, arguments.stale, arguments.minutes)
    FULL.write_text(full_table(rows), encoding="utf8")
    text = table(rows)
    print(text)
    write_between(README, START, END, text)


def due(rows: Rows) -> list[Point]:
    """The points that the leaderboard asks for, most telling first.

    The first seed of every contender; all seeds of the published ones, of those that lead, and, once the first seed of every
    contender at a pattern is measured, of the best there.
    """
    repeated = {(contender.name, pattern) for contender in CONTENDERS for pattern in contender.leads}
    repeated |= {(name, pattern) for pattern in PATTERNS for name in (*PUBLISHED, *best_at(rows, pattern))}
    return [point for point in points() if point.seed == SEEDS[0] or (point.contender, point.pattern) in repeated]


def best_at(rows: Rows, pattern: str) -> list[str]:
    """The names of the best contenders at a pattern, by their first seeds; none as long as one of these is missing."""
    first = [point for point in points() if point.pattern == pattern and point.seed == SEEDS[0]]
    if any(point not in rows for point in first):
        return []
    return [point.contender for point in sorted(first, key=lambda point: rows[point]["perplexity"])[:BEST]]


def missing(rows: Rows) -> list[Point]:
    """What is due and not measured."""
    return [point for point in due(rows) if point not in rows]


def wanted(rows: Rows, patterns: Collection[str], again: bool) -> list[Point]:
    """What is due at these patterns and not measured, or, if it is to be measured again, stale."""
    now = behaviour.load()
    return [point for point in due(rows) if point.pattern in patterns and (point not in rows or (again and stale(rows[point], now)))]


def measure(rows: Rows, patterns: Collection[str], again: bool, minutes: float) -> None:
    """Measure what is wanted into the rows and the file, one point after another.

    Raises:
        SystemExit: the pruning code is no longer that which was imported, so that its behaviour is not known; and see `measured`.
    """
    started, code = time.monotonic(), code_sha256()
    while (left := wanted(rows, patterns, again)) and time.monotonic() - started <= 60 * minutes:
        point = left[0]
        found = measured(point)
        if code_sha256() != code:
            raise SystemExit("stages/ has changed since the measurement began; start it again")
        rows[point] = found
        scratch = RESULTS.with_suffix(".new")
        write_json(scratch, [rows[known] for known in points() if known in rows])
        scratch.replace(RESULTS)


def of(rows: Rows, contender: Contender, pattern: str) -> list[dict[str, Any]]:
    """What was measured of a cell, seed after seed."""
    return [
        row
        for point, row in rows.items()
        if (point.contender, point.overrides, point.pattern) == (contender.name, contender.overrides, pattern)
    ]


def perplexity(cells: list[dict[str, Any]]) -> str:
    """The mean and, of several, the sample standard deviation; with a sign if one is stale."""
    values, now = [row["perplexity"] for row in cells], behaviour.load()
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}{STALE if any(stale(row, now) for row in cells) else ''}"


def table(rows: Rows) -> str:
    """Markdown: how much damage the best leaves, perplexity of every contender at every pattern, and what the numbers are."""
    if not rows:
        return "Nothing is measured yet."
    lines = ["| method | " + " | ".join(PATTERNS) + " | composed by |", "|---" * (len(PATTERNS) + 2) + "|"]
    best = {pattern: found[0][0] for pattern in PATTERNS if (found := ranked(rows, pattern))}

    def cell(contender: Contender, pattern: str) -> str:
        found = of(rows, contender, pattern)
        if not found:
            return "" if pattern in contender.patterns else "–"
        return f"**{perplexity(found)}**" if contender == best[pattern] else perplexity(found)

    for contender in dict.fromkeys(contender for pattern in PATTERNS for contender, _ in ranked(rows, pattern)):
        cells = " | ".join(cell(contender, pattern) for pattern in PATTERNS)
        lines.append(f"| {contender.name} | {cells} | `{contender.overrides}` |")
    return "\n".join([*summary(rows), "", *lines, "", _notes(rows)])


def _notes(rows: Rows) -> str:
    row = next(iter(rows.values()))
    protocol, devices = row["protocol"], sorted({found["device"] for found in rows.values()})
    left = f" {len(absent)} of {len(due(rows))} points are not measured yet." if (absent := missing(rows)) else ""
    now, have = behaviour.load(), "are to have" if absent else "have"
    count = sum(stale(found, now) for found in rows.values())
    old = f"{STALE}: includes points ({count} in all) measured before a change of the code that altered their result." if count else ""
    return (
        f"{MODEL}, dense perplexity {row['dense_perplexity']:.2f}; calibration of 32 windows of 512 C4 tokens, the same for every method; "
        f"perplexity on {protocol['tokens']} tokens of {protocol['corpus'].title()} in windows of {protocol['window_length']}"
        f"{words(protocol.get('bos'))}, on "
        f"{' and '.join(devices)}. Damage left: the rise of perplexity over the dense model's, as a share of the rise by the better of "
        "Wanda and SparseGPT on the same seeds; of the loss: the same of the logarithm of perplexity. Seconds: as a "
        "multiple of SparseGPT's. ± is the standard deviation over calibration seeds, not over text: "
        f"{', '.join(PUBLISHED)} and, by their first seeds, the {BEST} best at a pattern {have} {len(SEEDS)}, others the first alone. Rows "
        "stand in the order of the damage left, not of means, since these may be over other seeds: at 50%, and those for N:M alone at 2:4. "
        "–: does not apply."
        f"{left}{old} Layer errors, seconds, memory, every seed and the command of every cell: "
        "[benchmarks/QUALITY.md](benchmarks/QUALITY.md)."
    )


def averaged(cells: list[dict[str, Any]], key: str) -> float:
    return mean(row[key] for row in cells)


def rise(cells: list[dict[str, Any]]) -> float:
    """Perplexity over the dense model's, the difference."""
    return averaged(cells, "perplexity") - averaged(cells, "dense_perplexity")


def rise_in_nats(cells: list[dict[str, Any]]) -> float:
    """The same of the loss, nats per token."""
    return mean(math.log(row["perplexity"] / row["dense_perplexity"]) for row in cells)


def peak(cells: list[dict[str, Any]]) -> float:
    """GiB."""
    return max(row["peak_memory_gib"] for row in cells)


def ranked(rows: Rows, pattern: str) -> list[tuple[Contender, list[dict[str, Any]]]]:
    """The contenders measured at a pattern, the best first, with their cells: by damage, since seeds may differ."""
    found = [(contender, cells) for contender in CONTENDERS if (cells := of(rows, contender, pattern))]
    known = published(rows, pattern)
    return sorted(found, key=lambda one: damage(one[1], known)[0] if known else averaged(one[1], "perplexity"))


def published(rows: Rows, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """What was measured of Wanda and SparseGPT at a pattern, by their names."""
    return {one.name: cells for one in CONTENDERS if one.name in PUBLISHED and (cells := of(rows, one, pattern))}


def named_seeds(cells: list[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in cells)


def against(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The better of the published methods and the cells, with the seeds that both have; the better on the seeds that all have."""

    def common(*measured: list[dict[str, Any]]) -> set[int]:
        return set.intersection(*({row["seed"] for row in one} for one in measured))

    def of_seeds(measured: list[dict[str, Any]], seeds: set[int]) -> list[dict[str, Any]]:
        return [row for row in measured if row["seed"] in seeds]

    all_have = common(cells, *known.values())
    better = min(known.values(), key=lambda others: rise(of_seeds(others, all_have) or others))
    both_have = common(cells, better)
    return of_seeds(better, both_have), of_seeds(cells, both_have)


def damage(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """The rise of perplexity, and of its logarithm, as a share of that by the better of the published methods, on the same seeds."""
    better, own = against(cells, known)
    return rise(own) / rise(better), rise_in_nats(own) / rise_in_nats(better)


def pace(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> float:
    """How many times SparseGPT's seconds, on average: which seed it is makes no work, but every measurement makes the mean steadier."""
    return averaged(cells, "seconds") / averaged(known["SparseGPT"], "seconds")


def summary(rows: Rows) -> list[str]:
    """Markdown: at every pattern at which SparseGPT is measured, it or Wanda against the best of all, on the same seeds."""
    titles = ("", "seeds", "better of Wanda and SparseGPT", "best", "damage left", "of the loss", "seconds", "peak memory", "which is best")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for pattern in PATTERNS:
        known = published(rows, pattern)
        if "SparseGPT" not in known:
            continue
        winner, best = ranked(rows, pattern)[0]
        both = against(best, known)
        numbers = " | ".join(map(perplexity, both))
        shares = " | ".join(f"{share:.2f}" for share in damage(best, known))
        cost = f"{pace(best, known):.1f} × | {peak(best):.1f} GiB (SparseGPT {peak(known['SparseGPT']):.1f})"
        lines.append(f"| {pattern} | {named_seeds(both[0])} | {numbers} | {shares} | {cost} | {winner.name} |")
    return lines


EXPLAINED = (
    "Damage: the rise of perplexity over the dense model's, as a share of the rise by the better of Wanda and SparseGPT at the same "
    "pattern; of the loss: the same of the logarithm of perplexity. Seconds and peak memory are those of pruning; in brackets seconds "
    "as a multiple of SparseGPT's mean. Perplexities are compared on the seeds that both have, so where one has fewer damage is not "
    "that of the means shown, and rows stand in the order of the damage, not of the means. The relative layer error is measured before "
    "the last blocks learn together. The command is that of the first seed shown; another adds `-S calibration.seed=N`."
)
COLUMNS = (
    "method",
    "seeds",
    "perplexity",
    "seed by seed",
    "over dense",
    "damage",
    "of the loss",
    "relative layer error",
    "seconds",
    "peak memory",
    "command",
)


def full_table(rows: Rows) -> str:
    """Markdown: every cell with all its numbers and its command."""
    explained = f"{EXPLAINED} {unsteadiness(rows)}".strip()
    lines = ["# Every cell of the leaderboard", "", "Written by `python -m benchmarks.quality`.", "", explained, ""]
    for pattern in PATTERNS:
        lines += [f"## {pattern}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        known = published(rows, pattern)
        lines += [full_row(contender, pattern, cells, known) for contender, cells in ranked(rows, pattern)]
        lines.append("")
    if absent := missing(rows):
        lines += ["## Not measured yet", "", *(f"- {point.contender}, {point.pattern}, seed {point.seed}" for point in absent), ""]
    return "\n".join(lines)


def unsteadiness(rows: Rows) -> str:
    """How far seconds are to be trusted, by cells that were measured more than once; nothing where none was."""
    by_cell: dict[str, list[float]] = {}
    for point, row in rows.items():
        by_cell.setdefault(point.cell, []).append(row["seconds"])
    most = max((max(seconds) / min(seconds) for seconds in by_cell.values() if len(seconds) > 1), default=None)
    if most is None:
        return ""
    return (
        f"The slowest seed of a cell took up to {most:.2f} times the seconds of the fastest, on another day or with another state of the "
        "code: smaller differences between rows tell nothing."
    )


def full_row(contender: Contender, pattern: str, cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: a cell's numbers, beside those of the published methods at its pattern as far as they are measured."""
    point = of_row(cells[0])
    shares = [f"{share:.2f}" for share in damage(cells, known)] if known else ["", ""]
    numbers = [
        named_seeds(cells),
        perplexity(cells),
        ", ".join(f"{row['perplexity']:.2f}" for row in cells),
        f"{mean(row['perplexity'] / row['dense_perplexity'] for row in cells):.2f}",
        *shares,
        f"{averaged(cells, 'relative_error'):.4f}",
        f"{averaged(cells, 'seconds'):.0f}" + (f" ({pace(cells, known):.1f})" if "SparseGPT" in known else ""),
        f"{peak(cells):.2f} GiB",
    ]
    return f"| {contender.name} | {' | '.join(numbers)} | `{point.command}` |"


if __name__ == "__main__":
    main()
