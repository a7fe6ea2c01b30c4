"""The three orders of pruning, `prune=exact|one_pass|sequential`, by what they leave of both embedded models and what they cost.

python -m benchmarks.orders                       measure what is missing, first seeds first
python -m benchmarks.orders --base gemma3_270m    measure what is missing on one model
python -m benchmarks.orders --minutes 60          begin no point later than that
python -m benchmarks.orders --table               measure nothing, write the table

Each point is one `dvc exp run` with the leaderboard's calibration and texts (benchmarks.quality). Points are kept in
benchmarks/orders.json, so that a later run goes on where an earlier one stopped. Writes the table of docs/engine.md.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks import quality
from benchmarks.contenders import MODELS, SEEDS, TEXTS, Model, Point
from benchmarks.markers import show_between
from benchmarks.table import the_default_afterwards
from stages.files import read_json

DOCUMENT, RESULTS = Path("docs/engine.md"), Path("benchmarks/orders.json")
START, END = "<!-- orders: python -m benchmarks.orders -->", "<!-- end of orders -->"
ORDERS = ("exact", "one_pass", "sequential")
PATTERNS = ("50%", "2:4")
METHODS = {
    "Wanda": dict.fromkeys(PATTERNS, "method=wanda"),
    "SparseGPT": dict.fromkeys(PATTERNS, "method=sparsegpt"),
    "best": {  # at 2:4 with one pass of joint learning, of which experiment=best_2_4 makes two
        "50%": "method=admm_short allocation=loss reconstruction=distilled",
        "2:4": "method=admm_short reconstruction=distilled pattern.permutation_rounds=2",
    },
}

WHILE_TRAINING = ("exact", "sequential")  # what learns is refused with dense propagation: no block is run pruned

Rows = dict[Point, dict[str, Any]]


def points() -> list[Point]:
    """First seeds before others, what learns last, all orders of a cell one after another."""
    cells = [(seed, method, model, pattern) for seed in SEEDS for method in METHODS for model in MODELS for pattern in PATTERNS]
    cells.sort(key=lambda cell: (cell[1] == "best", cell[0]))
    return [
        Point(base=model.base, contender=method, overrides=overrides(method, pattern, order), pattern=pattern, seed=seed)
        for seed, method, model, pattern in cells
        for order in orders_of(method)
    ]


def overrides(method: str, pattern: str, order: str) -> str:
    """What composes a point, besides model, pattern and seed; the dense model is not run again for each."""
    return f"{METHODS[method][pattern]} prune={order} evaluation.metrics=[perplexity]"


def orders_of(method: str) -> tuple[str, ...]:
    return WHILE_TRAINING if method == "best" else ORDERS


def load() -> Rows:
    rows = read_json(RESULTS) if RESULTS.is_file() else []
    return {quality.of_row(row): row for row in rows}


def write(rows: Rows) -> None:
    """Into the file, in the order of the points."""
    quality.write_whole(RESULTS, [rows[known] for known in points() if known in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point later than that")
    parser.add_argument("--base", choices=[model.base for model in MODELS], help="measure points on this model alone")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    rows, started = load(), time.monotonic()
    left = [point for point in points() if point not in rows and arguments.base in (None, point.base)]
    if left and not arguments.table:
        with the_default_afterwards():
            for point in left:
                if time.monotonic() - started > 60 * arguments.minutes:
                    break
                rows[point] = quality.run(point)
                write(rows)
    show_between(DOCUMENT, START, END, tables(rows))


def tables(rows: Rows) -> str:
    """Markdown: a table of every model, and what the numbers are."""
    if not rows:
        return "Not measured yet."
    parts = [f"**{model.label}**\n\n{table(rows, model)}" for model in MODELS if any(point.base == model.base for point in rows)]
    devices = " and ".join(sorted({row["device"] for row in rows.values()}))
    left = len(points()) - len(rows)
    notes = (
        f"Perplexity on {' / '.join(TEXTS)}, with the calibration, texts and BOS of the leaderboard, over the seeds that all orders have; "
        "± is the standard deviation over these. Seconds and peak memory are those of pruning, as multiples of those of `exact` on the "
        f"same seeds, where points were measured one at a time; in float32 on {devices}. best: "
        f"{'; '.join(f'at {pattern} `{composed}`' for pattern, composed in METHODS['best'].items())}; "
        "it runs pruned blocks, which `one_pass` does not." + (f" {left} of {len(points())} points are not measured yet." if left else "")
    )
    return "\n\n".join([*parts, notes + between_devices(rows)])


def between_devices(rows: Rows) -> str:
    """How far perplexities are from those of the leaderboard that were measured on another device with code that prunes alike."""
    exact = {point: row for point, row in rows.items() if " prune=exact " in point.overrides}
    known = {
        (row["base"], row["overrides"], row["pattern"], row["seed"]): row for row in quality.load().values() if not quality.is_stale(row)
    }
    ratios = []
    for point, row in exact.items():
        other = known.get((point.base, point.overrides.partition(" prune=")[0], point.pattern, point.seed))
        if other is not None and other["device"] != row["device"]:
            pairs = [(row["texts"][text], other["texts"][text]) for text in TEXTS if text in row["texts"] and text in other["texts"]]
            ratios += [abs(math.log(own["perplexity"] / others["perplexity"])) for own, others in pairs]
    if not ratios:
        return ""
    return (
        f" The same points on the leaderboard, from other devices, differ by {median(ratios):.1%} in the median of {len(ratios)} and by "
        f"up to {max(ratios):.1%}: smaller differences of one seed tell nothing."
    )


def table(rows: Rows, model: Model) -> str:
    """Markdown: a row of every method and pattern of which all orders have a seed in common."""
    titles = ("", "", "seeds", *(f"`{order}`" for order in ORDERS), *(f"seconds of `{order}`" for order in ORDERS[1:]))
    titles += tuple(f"memory of `{order}`" for order in ORDERS[1:])
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method in METHODS:
        for pattern in PATTERNS:
            of_order = {order: _of_order(rows, model, method, pattern, order) for order in orders_of(method)}
            seeds = sorted(set.intersection(*(set(found) for found in of_order.values())))
            if not seeds:
                continue
            chosen = {order: [found[seed] for seed in seeds] for order, found in of_order.items()}
            perplexities = [_perplexities(chosen[order]) if order in chosen else "–" for order in ORDERS]
            costs = [_cost(of_order, order, key) if order in chosen else "–" for key in quality.COSTS for order in ORDERS[1:]]
            cells = [method, pattern, ", ".join(map(str, seeds)), *perplexities, *costs]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(of_order: dict[str, dict[int, dict[str, Any]]], order: str, key: str) -> str:
    """As a multiple of that of `exact`, on the seeds of which both have it."""
    seeds = [seed for seed, row in of_order[order].items() if key in row and key in of_order["exact"].get(seed, {})]
    if not seeds:
        return "not measured"
    own, exact = (mean(of_order[name][seed][key] for seed in seeds) for name in (order, "exact"))
    return f"{own / exact:.2f} ×"


def _of_order(rows: Rows, model: Model, method: str, pattern: str, order: str) -> dict[int, dict[str, Any]]:
    """Seed -> row."""
    wanted = (model.base, method, overrides(method, pattern, order), pattern)
    return {point.seed: row for point, row in rows.items() if (point.base, point.contender, point.overrides, point.pattern) == wanted}


def _perplexities(found: list[dict[str, Any]]) -> str:
    """On each text: the mean and, of several seeds, the sample standard deviation."""
    of_text = [[row["texts"][text]["perplexity"] for row in found] for text in TEXTS]
    return " / ".join(f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") for values in of_text)


if __name__ == "__main__":
    main()
