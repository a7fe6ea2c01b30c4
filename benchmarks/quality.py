"""The leaderboard: every method at every sparsity and pattern, on each embedded model, under one protocol, through the pipeline itself.

python -m benchmarks.quality                      measure what is missing, most telling points first, one model after the other
python -m benchmarks.quality --base gemma3_270m   measure what is missing on one model
python -m benchmarks.quality --pattern 2:4        measure what is missing at one pattern
python -m benchmarks.quality --minutes 60         stop before a point that is begun later than that
python -m benchmarks.quality --tables             measure nothing, write the tables

Each point is one `dvc exp run`. What was measured is kept in benchmarks/quality.json, which is committed, so that a later
run goes on where an earlier one stopped; a point whose cell the code prunes otherwise since (see benchmarks.behaviour) is measured again
with --stale. That sees the pruning code and its settings alone, and of these what shows on a small random model; for what does not,
raise behaviour.REVISIONS. Remove the file after a change of the base, the calibration or the evaluation.
Writes the tables between the markers in README.md and every number to benchmarks/QUALITY.md, and leaves the default in the workspace.
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
from benchmarks.contenders import MODELS, PATTERNS, PUBLISHED, SEEDS, TEXTS, Contender, Model, Point, points
from benchmarks.markers import show_between
from benchmarks.table import the_default_afterwards
from stages.bos import words
from stages.files import PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE_RESULTS, read_json, remove, write_json
from stages.limits import counted
from stages.prune import code_sha256

README, FULL, RESULTS = Path("README.md"), Path("benchmarks/QUALITY.md"), Path("benchmarks/quality.json")
START, END = "<!-- quality: python -m benchmarks.quality -->", "<!-- end of quality -->"
STALE = " †"
UNMEASURED = "not measured yet, on both texts or on one"
FIRST = TEXTS[0]  # by which rows are ordered
COSTS = ("seconds", "peak_memory_gib")  # of a row, unless it was measured with others (benchmarks.on_gpu) or other work at once

Rows = dict[Point, dict[str, Any]]


def measured(point: Point) -> dict[str, Any]:
    """Run one point, and add how the code behaves now.

    Raises:
        SystemExit: the pruning code is not that of benchmarks.behaviour; before the run.
    """
    figures = behaviour_of(point)
    return {**run(point), "behaviour": figures}


def behaviour_of(point: Point) -> behaviour.Figures:
    """The figures of benchmarks.behaviour, as it was written: on this processor the code's may be a little apart.

    Raises:
        SystemExit: the pruning code is not that of the file.
    """
    with behaviour.project():
        figures = behaviour.measured(point)
    if not behaviour.as_written(figures, point.cell):
        raise SystemExit(f"{point.cell} is pruned otherwise than {behaviour.FILE} says; run python -m benchmarks.behaviour first")
    return behaviour.load()[point.cell]


def run(point: Point) -> dict[str, Any]:
    """Run one point, from its beginning, and read what the workspace holds then."""
    remove(PRUNE_JOURNAL)  # of a run that was killed: its peak memory would not be known
    print("$", point.command, flush=True)
    subprocess.run([*point.command.split(), "--quiet"], check=True, stdout=sys.stderr)
    return outcome(point)


def outcome(point: Point) -> dict[str, Any]:
    """What the workspace holds of a point that was run."""
    pruned, prune = read_json(PRUNE_RESULTS / "metrics.json"), read_json(PRUNE_RESULTS / "provenance.json")
    return {
        **asdict(point),
        "texts": {text: scores(text) for text in TEXTS},
        "relative_error": pruned["relative_error"],
        "sparsity": pruned["sparsity"],
        "seconds": prune["seconds"],
        "peak_memory_gib": prune["peak_memory_gib"],
        "device": prune["device"],
        "code": prune["code"],
        "calibration": prune["calibration"],
    }


def scores(text: str) -> dict[str, Any]:
    """Perplexity of the pruned model in the workspace and of the dense one on a text, and their protocol."""
    numbers, protocol = read_json(SPARSE_RESULTS / "metrics.json")["corpora"][text], read_json(SPARSE_RESULTS / "details/protocol.json")
    windows = protocol.pop("corpora")[text]
    keys = ("perplexity", "perplexity_stderr", "dense_perplexity")
    return {**{key: numbers[key] for key in keys}, "protocol": {"corpus": text, **windows, **protocol}}


def stale(row: dict[str, Any], now: Mapping[str, behaviour.Figures]) -> bool:
    """Whether the code has come to prune otherwise since, by what it makes of a small model."""
    return not behaviour.same(row["behaviour"], now.get(of_row(row).cell))


def of_row(row: dict[str, Any]) -> Point:
    return Point(**{key: row[key] for key in Point.__dataclass_fields__})


def load() -> Rows:
    rows = read_json(RESULTS) if RESULTS.is_file() else []
    return {of_row(row): row for row in rows}


def of_model(rows: Rows, model: Model) -> Rows:
    return {point: row for point, row in rows.items() if point.base == model.base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point later than that")
    parser.add_argument("--base", choices=[model.base for model in MODELS], help="measure points on this model alone")
    parser.add_argument("--pattern", choices=PATTERNS, help="measure points at this one alone")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--stale", action="store_true", help="measure again what the code prunes otherwise now")
    arguments = parser.parse_args()
    rows = load()
    models = [model for model in MODELS if arguments.base in (None, model.base)]
    patterns = [arguments.pattern] if arguments.pattern else list(PATTERNS)
    if not arguments.tables and wanted(rows, models, patterns, arguments.stale):
        with the_default_afterwards():
            measure(rows, models, patterns, arguments.stale, arguments.minutes)
    FULL.write_text(full_table(rows), encoding="utf8")
    show_between(README, START, END, tables(rows))


def due(rows: Rows, model: Model) -> list[Point]:
    """The points that a model's table asks for, most telling first.

    The first seed of every contender; all seeds of the published ones, of those that lead, and, once the first seed of every
    contender at a pattern is measured, of the best there.
    """
    repeated = {(contender.name, pattern) for contender in model.contenders for pattern in contender.leads}
    repeated |= {(name, pattern) for pattern in PATTERNS for name in (*PUBLISHED, *best_at(rows, model, pattern))}
    return [point for point in points(model) if point.seed == SEEDS[0] or (point.contender, point.pattern) in repeated]


def best_at(rows: Rows, model: Model, pattern: str) -> list[str]:
    """The names of the best contenders at a pattern, by their first seeds; none as long as one of these is missing."""
    first = [point for point in points(model) if point.pattern == pattern and point.seed == SEEDS[0]]
    if any(point not in rows for point in first):
        return []
    return [point.contender for point in sorted(first, key=lambda point: rows[point]["texts"][FIRST]["perplexity"])[: model.best]]


def missing(rows: Rows, model: Model) -> list[Point]:
    """What is due and not measured, on some text; a point of one seed that was measured before a text was added stays without it."""
    points_due = due(rows, model)
    repeated = {(point.contender, point.pattern) for point in points_due if point.seed != SEEDS[0]}

    def is_measured(point: Point) -> bool:
        needed = set(TEXTS) if (point.contender, point.pattern) in repeated else {FIRST}
        return point in rows and needed <= set(rows[point]["texts"])

    return [point for point in points_due if not is_measured(point)]


def wanted(rows: Rows, models: Collection[Model], patterns: Collection[str], again: bool) -> list[Point]:
    """What is missing at these patterns and, if it is to be measured again, what is stale."""
    found = []
    for model in models:
        absent = set(missing(rows, model))
        found += [point for point in due(rows, model) if point in absent or (again and is_stale(rows[point]))]
    return [point for point in found if point.pattern in patterns]


def measure(rows: Rows, models: Collection[Model], patterns: Collection[str], again: bool, minutes: float) -> None:
    """Measure what is wanted into the rows and the file, one point after another.

    Raises:
        SystemExit: the pruning code is no longer that which was imported, so that its behaviour is not known; and see `measured`.
    """
    started, code = time.monotonic(), code_sha256()
    while (left := wanted(rows, models, patterns, again)) and time.monotonic() - started <= 60 * minutes:
        point = left[0]
        found = measured(point)
        if code_sha256() != code:
            raise SystemExit("stages/ has changed since the measurement began; start it again")
        rows[point] = found
        write(rows)


def write(rows: Rows) -> None:
    """Into the file, in the order of the tables."""
    write_whole(RESULTS, [rows[known] for model in MODELS for known in points(model) if known in rows])


def write_whole(path: Path, data: Any) -> None:
    """Write a file of results or, where that is cut off, leave it as it was."""
    scratch = path.with_suffix(".new")
    write_json(scratch, data)
    scratch.replace(path)


def of(rows: Rows, contender: Contender, pattern: str) -> list[dict[str, Any]]:
    """What was measured of a cell, seed after seed."""
    return [
        row
        for point, row in rows.items()
        if (point.contender, point.overrides, point.pattern) == (contender.name, contender.overrides, pattern)
    ]


def on(cells: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """What a cell's points have on a text, as far as it was measured."""
    return [row["texts"][text] for row in cells if text in row["texts"]]


def perplexity_on(cells: list[dict[str, Any]], text: str) -> str:
    """The mean and, of several, the sample standard deviation."""
    values = [figures["perplexity"] for figures in on(cells, text)]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def perplexity(cells: list[dict[str, Any]]) -> str:
    """On each text, with a sign if a point is stale."""
    means = " / ".join(perplexity_on(cells, text) for text in TEXTS if on(cells, text))
    return means + (STALE if any(map(is_stale, cells)) else "")


def is_stale(row: dict[str, Any]) -> bool:
    return stale(row, behaviour.load())


def tables(rows: Rows) -> str:
    """Markdown: the table of every model."""
    parts = [f"**{model.label}**\n\n{table(of_model(rows, model), model)}" for model in MODELS]
    return "\n\n".join(parts)


def table(rows: Rows, model: Model) -> str:
    """Markdown: how much of the rise the best leaves, perplexity of every contender at every pattern, and what the numbers are."""
    if not rows:
        return "Nothing is measured yet."
    lines = ["| method | " + " | ".join(PATTERNS) + " | composed by |", "|---" * (len(PATTERNS) + 2) + "|"]
    best = {pattern: leader(rows, model, pattern)[0] for pattern in PATTERNS if ranked(rows, model, pattern)}

    def cell(contender: Contender, pattern: str) -> str:
        found = of(rows, contender, pattern)
        if not found:
            return "" if pattern in contender.patterns else "–"
        return f"**{perplexity(found)}**" if contender == best[pattern] else perplexity(found)

    for contender in dict.fromkeys(contender for pattern in PATTERNS for contender, _ in ranked(rows, model, pattern)):
        cells = " | ".join(cell(contender, pattern) for pattern in PATTERNS)
        lines.append(f"| {contender.name} | {cells} | `{contender.overrides}` |")
    return "\n".join([*summary(rows, model), "", *lines, "", _notes(rows, model)])


def _on_texts(rows: Rows) -> str:
    """On what text perplexity is measured, and the dense model's there."""
    parts = []
    for text in TEXTS:
        if found := on(list(rows.values()), text):
            protocol, dense = found[-1]["protocol"], found[-1]["dense_perplexity"]
            corpus = f"{protocol['tokens']} tokens of {protocol['corpus']} in windows of {protocol['window_length']}"
            counted_in = next((one["protocol"] for one in found if one["protocol"].get("available")), None)
            corpus += f", {counted_in['windows']} of {counted_in['available']}" if counted_in else ""
            parts.append(f"{corpus}{words(protocol.get('bos'))} (dense {dense:.2f})")
    return " / ".join(parts)


def _notes(rows: Rows, model: Model) -> str:
    """How the tables are read, as a list."""
    absent, old = missing(rows, model), sum(map(is_stale, rows.values()))
    more = f" and the {model.best} best at each pattern by their first seeds" if model.best else " and the leading ones"
    seeds = f"{len(SEEDS)} seeds for {', '.join(PUBLISHED)}{more}, one for others"
    left = f"Planned: {seeds}; {len(absent)} of {len(due(rows, model))} points are {UNMEASURED}" if absent else seeds
    devices = sorted({found["device"] for found in rows.values()})
    notes = [
        f"{model.label}; calibration of 32 windows of 512 C4 tokens, the same for every method; perplexity on {_on_texts(rows)}; on "
        f"{' and '.join(devices)}.",
        "Share of ln: as the share of the rise, of the logarithm of perplexity. Seconds: as a multiple of SparseGPT's, roughly, since "
        "machines with 1 thread did other work meanwhile. –: does not apply.",
        f"±: the standard deviation over calibration seeds, not over text. {left}.",
        "Rows stand in the order of the share, not of means, since these may be over other seeds: at 50%, and those for N:M alone at 2:4. "
        "Bold, and in the upper table: the best of those with the most seeds.",
        *(
            [f"{STALE.strip()}: includes points ({old} in all) measured before a change of the code that altered their result."]
            if old
            else []
        ),
        *([others] if (others := with_others(rows)) else []),
        "Layer errors, seconds, memory, every seed and the command of every cell: [benchmarks/QUALITY.md](benchmarks/QUALITY.md).",
    ]
    return "\n".join(f"- {note}" for note in notes)


def with_others(rows: Rows) -> str:
    """What points are without that were measured with others, or with other work, at once; nothing where none was."""
    count = sum("workers" in row for row in rows.values())
    busy = sum("workers" not in row and not any(key in row for key in COSTS) for row in rows.values())
    aside = f"Without seconds and memory, since the machine did much other work: {counted(busy, 'point')}." if busy else ""
    if not count:
        return aside
    return (
        f"{count} points were measured on a GPU in float32, several at once (`python -m benchmarks.on_gpu`), and have neither seconds nor "
        f"memory; ± is over devices, too, where a cell has seeds of both.{' ' * bool(aside)}{aside}"
    )


def averaged(cells: list[dict[str, Any]], key: str) -> float:
    """Over the points that have it."""
    return mean(row[key] for row in cells if key in row)


def rise(cells: list[dict[str, Any]], text: str) -> float:
    """Perplexity over the dense model's, the difference."""
    return averaged(on(cells, text), "perplexity") - averaged(on(cells, text), "dense_perplexity")


def rise_in_nats(cells: list[dict[str, Any]], text: str) -> float:
    """The same of the loss, nats per token."""
    return mean(math.log(figures["perplexity"] / figures["dense_perplexity"]) for figures in on(cells, text))


def peak(cells: list[dict[str, Any]]) -> float:
    """GiB."""
    return max(row["peak_memory_gib"] for row in cells if "peak_memory_gib" in row)


def ranked(rows: Rows, model: Model, pattern: str) -> list[tuple[Contender, list[dict[str, Any]]]]:
    """The contenders measured at a pattern, the best first, with their cells: by their share of the rise, since seeds may differ."""
    found = [(contender, cells) for contender in model.contenders if (cells := of(rows, contender, pattern))]
    known = published(rows, model, pattern)
    return sorted(found, key=lambda one: share(one[1], known, FIRST)[0] if known else averaged(on(one[1], FIRST), "perplexity"))


def leader(rows: Rows, model: Model, pattern: str) -> tuple[Contender, list[dict[str, Any]]]:
    """The best at a pattern, one that has as many seeds as any but the published: a single lucky seed tells less.

    Raises:
        ValueError: nothing is measured there.
    """
    found = ranked(rows, model, pattern)
    others = [cells for contender, cells in found if contender.name not in PUBLISHED] or [cells for _, cells in found]
    most = max(map(len, others))
    return next(one for one in found if len(one[1]) >= most)


def published(rows: Rows, model: Model, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """What was measured of Wanda and SparseGPT at a pattern, by their names."""
    return {one.name: cells for one in model.contenders if one.name in PUBLISHED and (cells := of(rows, one, pattern))}


def named_seeds(cells: list[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in cells)


def against(
    cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]], text: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The better of the published methods and the cells, with the seeds that both have on a text; the better on the seeds that all have."""

    def common(*measured: list[dict[str, Any]]) -> set[int]:
        return set.intersection(*(seeds_on(one, text) for one in measured))

    def of_seeds(measured: list[dict[str, Any]], seeds: set[int]) -> list[dict[str, Any]]:
        return [row for row in measured if row["seed"] in seeds]

    all_have = common(cells, *known.values())
    better = min(known.values(), key=lambda others: rise(of_seeds(others, all_have) or others, text))
    both_have = common(cells, better)
    return of_seeds(better, both_have), of_seeds(cells, both_have)


def comparable(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """The texts on which the cells and the published methods have a seed in common."""
    return [text for text in TEXTS if known and set.intersection(*(seeds_on(one, text) for one in (cells, *known.values())))]


def seeds_on(cells: list[dict[str, Any]], text: str) -> set[int]:
    """The seeds measured on a text."""
    return {row["seed"] for row in cells if text in row["texts"]}


def share(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]], text: str) -> tuple[float, float]:
    """The rise of perplexity, and of its logarithm, as a share of that by the better of the published methods, on the same seeds."""
    better, own = against(cells, known, text)
    return rise(own, text) / rise(better, text), rise_in_nats(own, text) / rise_in_nats(better, text)


def shares(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Both shares, each on every text on which they can be compared."""
    found = [share(cells, known, text) for text in comparable(cells, known)]
    return [" / ".join(f"{value:.2f}" for value in values) for values in zip(*found, strict=True)] or ["", ""]


def pace(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> float:
    """How many times SparseGPT's seconds, on average: which seed it is makes no work, but every measurement makes the mean steadier."""
    return averaged(cells, "seconds") / averaged(known["SparseGPT"], "seconds")


def has_costs(cells: list[dict[str, Any]]) -> bool:
    """Whether a point has seconds and peak memory; a point has both or neither."""
    return any("seconds" in row for row in cells)


def costs(cells: list[dict[str, Any]], known: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Seconds, with their multiple of SparseGPT's, and peak memory; nothing where no point has them."""
    if not has_costs(cells):
        return ["", ""]
    seconds = f"{averaged(cells, 'seconds'):.0f}" + (f" ({pace(cells, known):.1f})" if "SparseGPT" in known else "")
    return [seconds, f"{peak(cells):.2f} GiB"]


def summary(rows: Rows, model: Model) -> list[str]:
    """Markdown: at every pattern at which SparseGPT is measured, it or Wanda against the best of all, on the same seeds."""
    titles = (
        "",
        "seeds",
        "better of Wanda and SparseGPT",
        "best",
        "share of the rise",
        "share of ln",
        "seconds",
        "peak memory",
        "method",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for pattern in PATTERNS:
        known = published(rows, model, pattern)
        if "SparseGPT" not in known:
            continue
        winner, best = leader(rows, model, pattern)
        pairs = {text: against(best, known, text) for text in comparable(best, known)}
        numbers = [" / ".join(perplexity_on(pair[side], text) for text, pair in pairs.items()) for side in (0, 1)]
        old = [STALE if any(is_stale(row) for pair in pairs.values() for row in pair[side]) else "" for side in (0, 1)]
        seeds = " / ".join(dict.fromkeys(named_seeds(pair[0]) for pair in pairs.values()))
        cost = "not measured | "
        if has_costs(best) and has_costs(known["SparseGPT"]):
            cost = f"{pace(best, known):.1f} × | {peak(best):.1f} GiB (SparseGPT {peak(known['SparseGPT']):.1f})"
        cells = [pattern, seeds, numbers[0] + old[0], numbers[1] + old[1], *shares(best, known), cost, winner.name]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


EXPLAINED = (
    "Where two numbers stand, the first is on the text `wikipedia`, the second on `wikipedia_long`. Share of the rise: the rise of "
    "perplexity over the dense model's, as a share of that by the better of Wanda and SparseGPT at the same pattern; share of ln: the same "
    "of the logarithm of perplexity. Seconds and peak memory are those of pruning; in brackets seconds as a multiple of SparseGPT's mean. "
    "Perplexities are compared on the seeds that both have, so where one has fewer the share is not that of the means shown, and rows "
    "stand in the order of the share, not of the means. The relative layer error is measured before the last blocks learn together, and "
    "until commit e248095 on tokens of which too many were the first of their windows. The "
    "command is that of the first seed shown; another seed adds `-S calibration.seed=N`."
)
COLUMNS = (
    "method",
    "seeds",
    "perplexity",
    "seed by seed",
    "over dense",
    "share of the rise",
    "share of ln",
    "relative layer error",
    "seconds",
    "peak memory",
    "command",
)


def full_table(rows: Rows) -> str:
    """Markdown: every cell with all its numbers and its command."""
    explained = f"{EXPLAINED} {unsteadiness(rows)}".strip()
    if shared := with_others(rows):
        explained += f" {shared} The command of those measured on a GPU is that of benchmarks.on_gpu, not the one shown."
    lines = ["# Every cell of the leaderboard", "", "Written by `python -m benchmarks.quality`.", "", explained, ""]
    for model in MODELS:
        known_rows = of_model(rows, model)
        lines += [f"## {model.label}", "", *([f"Perplexity on {_on_texts(known_rows)}.", ""] if known_rows else [])]
        for pattern in PATTERNS:
            found = ranked(known_rows, model, pattern)
            if found:
                known = published(known_rows, model, pattern)
                lines += [f"### {pattern}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
                lines += [full_row(contender, pattern, cells, known) for contender, cells in found]
                lines.append("")
        if absent := missing(known_rows, model):
            left = (f"- {point.contender}, {point.pattern}, seed {point.seed}" for point in absent)
            lines += [f"### {UNMEASURED.capitalize()}", "", *left, ""]
    return "\n".join(lines)


def unsteadiness(rows: Rows) -> str:
    """How far seconds are to be trusted, by cells that were measured more than once; nothing where none was."""
    by_cell: dict[str, list[float]] = {}
    for point, row in rows.items():
        if "seconds" in row:
            by_cell.setdefault(f"{point.base} {point.cell}", []).append(row["seconds"])
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
    numbers = [
        named_seeds(cells),
        perplexity(cells),
        " / ".join(", ".join(f"{figures['perplexity']:.2f}" for figures in on(cells, text)) for text in TEXTS if on(cells, text)),
        " / ".join(f"{mean(f['perplexity'] / f['dense_perplexity'] for f in on(cells, text)):.2f}" for text in TEXTS if on(cells, text)),
        *shares(cells, known),
        f"{averaged(cells, 'relative_error'):.4f}",
        *costs(cells, known),
    ]
    return f"| {contender.name} | {' | '.join(numbers)} | `{point.command}` |"


if __name__ == "__main__":
    main()
