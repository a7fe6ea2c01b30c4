"""Packed releases."""

import hashlib
import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from benchmarks.fuzz.mutations import Files, bytes_of, json_of, safetensors_of
from benchmarks.fuzz.reader import Reader
from stages.release.codec import FORMAT, LENGTH, pack_shard
from stages.release.packed import FOLDER, MANIFEST, unpack_release

SHARD = "model-00001-of-00001.safetensors"
PACKED, BASE, CONFIG = f"{FOLDER}/{SHARD}", f"base/{SHARD}", b"{}"


@cache
def _contents() -> dict[str, bytes]:
    """A base's shard; one whose matrix is half zero; the same packed with values, and as masks alone."""
    matrix = torch.arange(1, 25).reshape(4, 6).bfloat16()
    base = save({"a": matrix, "b": torch.ones(3)}, metadata={"format": "pt"})
    shard = save({"a": matrix.masked_fill(matrix % 2 == 0, 0), "b": torch.ones(3)}, metadata={"format": "pt"})
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: Path(directory) / name for name in ("base", "shard", "values", "masks")}
        paths["base"].write_bytes(base)
        paths["shard"].write_bytes(shard)
        pack_shard(paths["shard"], paths["values"], None)
        pack_shard(paths["shard"], paths["masks"], paths["base"])
        return {name: path.read_bytes() for name, path in paths.items()}


@st.composite
def packed(draw: st.DrawFn) -> Files:
    contents, form = _contents(), draw(st.sampled_from(("values", "masks")))
    origin = {"source": "local", "name": "fuzz/tiny", "revision": None, "shards": {SHARD: _sha256(contents["base"])}}
    manifest = {
        "format": FORMAT,
        "base": origin if form == "masks" else None,
        "shards": {SHARD: {"size": len(contents["shard"]), "sha256": _sha256(contents["shard"])}},
        "files": {"config.json": {"size": len(CONFIG), "sha256": _sha256(CONFIG)}},
    }
    whole = contents[form]
    (length,) = struct.unpack("<Q", whole[:LENGTH])
    header, data = json.loads(whole[LENGTH : LENGTH + length]), whole[LENGTH + length :]
    edited = draw(st.sampled_from(("manifest", "bytes", "header", "base")))
    return {
        MANIFEST: draw(json_of(manifest)) if edited == "manifest" else json.dumps(manifest).encode(),
        PACKED: draw({"bytes": bytes_of(whole), "header": safetensors_of(header, data)}.get(edited, st.just(whole))),
        BASE: draw(bytes_of(contents["base"], most=1)) if edited == "base" else contents["base"],
        "config.json": CONFIG,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_packed(_: Files) -> None:
    unpack_release(Path(), Path("restored"), Path("base"))


READERS = (
    Reader(
        name="packed releases",
        code="release/packed.py, codec.py",
        inputs=packed(),
        read=read_packed,
        names=("packed file", MANIFEST, "base", "config.json", "restored", "packed/"),
        share=2,
    ),
)
