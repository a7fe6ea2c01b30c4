"""What the hub would store of a sweep's releases, by the chunks of its own client library, offline.

python -m benchmarks.deduplication

Prunes artifacts/base (`dvc repro fetch_base`) by magnitude at several sparsities. The shards of the releases are then handed, one point
after the other, to hf_xet, whose storage is a directory here: it cuts them into chunks by content and keeps each chunk once. Writes the
table between the markers in docs/packed.md.
"""

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hf_xet
import torch
from safetensors.torch import save_file

from benchmarks.markers import show_between
from benchmarks.release import make_delta
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.delta import pack as packed_bits
from stages.checkpoint.reader import Checkpoint
from stages.files import BASE, remove
from stages.release.codec import pack_shard
from stages.release.packing import pack

DOCUMENT = Path("docs/packed.md")
START, END = "<!-- deduplication: python -m benchmarks.deduplication -->", "<!-- end of deduplication -->"
SPARSITIES = (0.5, 0.55)
FORMS = {
    "dense": "dense, after the base",
    "values": "packed, masks and values",
    "masks": "packed, masks alone",
    "columns": "bits of the masks, column after column",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deduplication", description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/deduplication"), metavar="DIR", help="default: %(default)s")
    scratch = parser.parse_args().scratch
    scratch.mkdir(parents=True, exist_ok=True)
    base, rows = Checkpoint(BASE), []
    with tempfile.TemporaryDirectory(dir=scratch.absolute()) as directory:
        storages = Path(directory) / "storages"
        _store(storages / "dense", [base.directory / shard for shard in base.headers])
        for sparsity in SPARSITIES:
            point = Path(directory) / "point"
            point.mkdir()
            write_forms(base, make_delta(base, point / "delta", sparsity), point)
            for form in FORMS:
                rows.append({"sparsity": sparsity, "form": form, **_store(storages / form, sorted((point / form).iterdir()))})
            remove(point)
    show_between(DOCUMENT, START, END, table(rows, base.provenance["name"]))


def write_forms(base: Checkpoint, delta: SparseDelta, directory: Path) -> None:
    """Write the shards of a release in every form, each in a folder of its own."""
    for form in FORMS:
        (directory / form).mkdir()
    pack(base, delta, directory / "dense")
    for shard in base.headers:
        pack_shard(directory / "dense" / shard, directory / "values" / shard, None)
        pack_shard(directory / "dense" / shard, directory / "masks" / shard, base.directory / shard)
    masks = {name: packed_bits(delta.change(name, base.tensor).mask.mT.contiguous()) for name in delta}
    save_file(masks, directory / "columns/masks.safetensors")


def _store(storage: Path, files: list[Path]) -> dict[str, int]:
    """Hand files to the hub's client, and let it keep their chunks in a directory; returns all bytes of them, and those that were new."""
    handles = []
    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{storage}") as commit:
        for file in files:
            handles.append(commit.start_upload_file(str(file)))
    metrics = [handle.result().dedup_metrics for handle in handles]
    return {"bytes": sum(one.total_bytes for one in metrics), "new": sum(one.new_bytes for one in metrics)}


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Markdown: a line for each form, a column for each point."""
    points = " | ".join(f"{sparsity:.0%}" for sparsity in SPARSITIES)
    lines = [f"| form | {points} |", "|---" * (1 + len(SPARSITIES)) + "|"]
    for form, words in FORMS.items():
        cells = [f"{row['new'] / 1e6:.1f} of {row['bytes'] / 1e6:.1f} MB" for row in rows if row["form"] == form]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    made = f"Bytes that are new to the storage, of all, at each point after those before it. {model}, pruned by magnitude, each row alike"
    return "\n".join(lines) + f"\n\n{made}; hf_xet {version('hf-xet')}, torch {torch.__version__}."


if __name__ == "__main__":
    main()
