"""What float8 does to a pruned model: the same weights, scored as they are and as publish.dtype=float8 rounds them.

dvc exp run -S publish.dtype=float8 -S evaluation=sweep [-S base=gemma3_270m]
python -m benchmarks.float8_scores

Reads results/sparse, results/float8 and release/ as the stages left them, both scored by the same protocol. Writes a row for each base,
recipe and text into benchmarks/float8_scores.json, and the table in docs/release.md. Takes no time.
"""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import arguments
from benchmarks.markers import show_between
from stages import limits
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.evaluation.measurement import Measurement, from_rows
from stages.evaluation.protocol import compared
from stages.files import BASE, FLOAT8_RESULTS, PRUNE_RESULTS, RELEASE, SPARSE_RESULTS, read_json, write_json

FILE, DOCUMENT = Path("benchmarks/float8_scores.json"), Path("docs/release.md")
START, END = "<!-- float8 scores: python -m benchmarks.float8_scores -->", "<!-- end of float8 scores -->"
METRICS = {"perplexity": ("perplexity", 2), "mean_kld": ("mean KLD, nats", 3), "accuracy": ("accuracy", 3)}  # heading, digits
DTYPES = {"as it is": SPARSE_RESULTS / "details", "float8": FLOAT8_RESULTS}
KEY = ("model", "pruned", "text")


def measured() -> dict[str, Any]:
    """What the workspace holds.

    Raises:
        SystemExit: there are no scores in float8, or they are of another protocol.
    """
    if not read_json(FLOAT8_RESULTS / "measurements.json"):
        raise SystemExit(f"{FLOAT8_RESULTS}: found no scores, wanted those of dvc exp run -S publish.dtype=float8")
    protocols = [read_json(directory / "protocol.json") for directory in DTYPES.values()]
    if compared(protocols[0]) != compared(protocols[1]):
        raise SystemExit(f"{FLOAT8_RESULTS}: found scores of another protocol than those of {SPARSE_RESULTS}; run the stages again")
    prune, (corpus, *_) = read_json(PRUNE_RESULTS / PROVENANCE), list(protocols[0]["corpora"])
    scores = {name: of_metrics(from_rows(read_json(directory / "measurements.json")), corpus) for name, directory in DTYPES.items()}
    return {
        "model": Checkpoint(BASE).provenance["name"],
        "pruned": f"{prune['label']}, {prune['pattern_label']}",
        "text": limits.scored_text(protocols[0], corpus),
        "scores": scores,
        "sparsity": {
            "as it is": read_json(PRUNE_RESULTS / "metrics.json")["sparsity"],
            "float8": read_json(RELEASE / "sparsity.json")["sparsity"],
        },
        "bytes": {"as it is": weights_of(BASE), "float8": weights_of(RELEASE)},
        "device": prune["device"],
        "code": prune["code"],
    }


def of_metrics(measurements: list[Measurement], corpus: str) -> dict[str, list[float | None]]:
    """The value and the standard error of each metric that was measured, on a corpus or as the mean of the tasks."""
    found = [one for one in measurements if one.metric in METRICS and one.name in (corpus, "tasks") and one.style == "raw"]
    return {one.metric: [one.value, one.stderr] for one in found}


def weights_of(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint; a plain release has as many as its base."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: two lines for each row."""
    if not rows:
        return "Not measured yet."
    cells = []
    for row in rows:
        for name, scores in row["scores"].items():
            shown = [_shown(scores.get(metric), digits) for metric, (_, digits) in METRICS.items()]
            sizes = [f"{row['sparsity'][name]:.4f}", f"{row['bytes'][name] / 1e6:.0f} MB"]
            cells.append([row["model"], row["pruned"], name, *shown, *sizes])
    headings = ["model", "pruned by", "weights", *(heading for heading, _ in METRICS.values()), "zeros in scope", "safetensors"]
    texts = "; ".join(f"{row['model']}: {row['text']}, on {row['device']}, commit {row['code'][:7]}" for row in rows)
    note = f"{texts}. ± is one standard error over the text, which both lines share. One run each; no other text or seed was measured."
    return f"{tabulate(cells, headings, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _shown(score: list[float | None] | None, digits: int) -> str:
    if score is None or score[0] is None:
        return "not measured"
    value, error = score
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def main() -> None:
    row, known = measured(), read_json(FILE) if FILE.is_file() else []
    rows = [*(other for other in known if any(other[key] != row[key] for key in KEY)), row]
    write_json(FILE, rows)
    show_between(DOCUMENT, START, END, table(rows))


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
