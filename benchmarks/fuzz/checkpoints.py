"""Checkpoints, deltas and GGUF files."""

import hashlib
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.fuzz.mutations import NUMBERS, Files, bytes_of, json_of, safetensors_of
from benchmarks.fuzz.reader import Reader
from stages.checkpoint.delta import BLOCK_FORMAT, FORMAT, METADATA, POLARITY, SparseDelta, read_block
from stages.checkpoint.layout import read_layout
from stages.checkpoint.reader import INDEX, PROVENANCE, Checkpoint
from stages.checkpoint.tokens import embedding_rows
from stages.files import sha256
from stages.sources import base as bases
from stages.sources.base import GgufBase, LocalBase

SHARD, BLOCK = "model-00001-of-00001.safetensors", "block-00000.safetensors"
SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "max_position_embeddings": 64,
    "num_key_value_heads": 1,
    **SIZES,
}


@cache
def model() -> MistralForCausalLM:
    with torch.device("meta"):
        return MistralForCausalLM(MistralConfig(**{**SIZES, "num_key_value_heads": 1}))


def header_of(shapes: dict[str, tuple[int, ...]], dtype: str, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of tensors of one dtype, and the bytes of its data."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header, offset


# A checkpoint in a directory.


@cache
def _checkpoint() -> tuple[dict[str, Any], bytes]:
    header, size = header_of({name: tuple(tensor.shape) for name, tensor in model().state_dict().items()}, "BF16", 2)
    return {"__metadata__": {"format": "pt"}, **header}, bytes(size)


def checkpoints() -> SearchStrategy[Files]:
    header, data = _checkpoint()
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(names, SHARD)}
    provenance = {"files": {SHARD: "0" * 64}, "fingerprint": "0" * 64}
    text = json.dumps(header).encode()
    whole = st.just(struct.pack("<Q", len(text)) + text + data)
    files = {
        SHARD: whole | safetensors_of(header, data),
        INDEX: st.just(json.dumps(index).encode()) | json_of(index),
        "config.json": st.just(json.dumps(CONFIG).encode()) | json_of(CONFIG),
        PROVENANCE: st.just(json.dumps(provenance).encode()) | json_of(provenance),
        "tokenizer.json": st.just(b"{}"),
    }
    return st.fixed_dictionaries(files)


def read_checkpoint(_: Files) -> None:
    checkpoint = Checkpoint(Path())
    for name in checkpoint:
        checkpoint.tensor(name)
    read_layout(model(), checkpoint)
    _ = checkpoint.context_length, checkpoint.fingerprint, checkpoint.tokenizer_sha256, embedding_rows(checkpoint)


def read_local_base(_: Files) -> None:
    Path("base").mkdir()
    local = LocalBase(source="local", path=".", name="fuzz/tiny", fingerprint=None, license="mit")
    bases.fetch(local, Path("base"), Path("downloads"))


# A delta.


@cache
def _block() -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, metadata and data of a block's file: a matrix with a mask alone, one with values, one with orders,
    and two by their scores."""
    masks = {"a": [3, 5], "b": [2, 4], "c": [2, 3], "d": [2, 2], "e": [2, 4]}
    bits = {"d": 0b1010, "e": 0b11001100}  # of a base of zeros, whose scores are all equal
    digests = {name: hashlib.sha256(bytes([of_mask])).hexdigest() for name, of_mask in bits.items()}
    scored = {
        "d": {"mask_sha256": digests["d"], "group": None, "transposed": True},
        "e": {"mask_sha256": digests["e"], "group": [2, 4], "transposed": False},
    }
    header: dict[str, Any] = {}
    data = b""

    def add(name: str, dtype: str, content: np.ndarray) -> None:
        nonlocal data
        header[name] = {"dtype": dtype, "shape": list(content.shape), "data_offsets": [len(data), len(data) + content.nbytes]}
        data += content.tobytes()

    add("d.scales", "F32", np.array([1, 0.5], np.float32))
    add("d.thresholds", "F32", np.array([0.25, -1], np.float32))
    add("d.ties", "I32", np.array([1, 0], np.int32))
    add("e.scales", "F32", np.ones(4, np.float32))
    add("c.columns", "I32", np.array([2, 0, 1], np.int32))
    add("c.rows", "I32", np.array([1, 0], np.int32))
    add("b.values", "BF16", np.zeros(5, np.int16))
    add("a.mask", "U8", np.array([0b10101010, 0b1010101], np.uint8))
    add("b.mask", "U8", np.array([0b00011111], np.uint8))
    add("c.mask", "U8", np.array([0b00111], np.uint8))
    return header, {"format": BLOCK_FORMAT, "base": "base1", "polarity": POLARITY, "shapes": masks, "scored": scored}, data


@st.composite
def _blocks(draw: st.DrawFn) -> bytes:
    header, facts, data = _block()
    metadata = json.dumps(facts) if draw(st.booleans()) else draw(json_of(facts)).decode("utf8", "replace")
    complete = {"__metadata__": {METADATA: metadata}, **header}
    if draw(st.booleans()):
        return draw(safetensors_of(complete, data))
    text = json.dumps(complete).encode()
    return draw(bytes_of(struct.pack("<Q", len(text)) + text + data, most=1))


def deltas() -> SearchStrategy[Files]:
    sections = {"method": {"name": "wanda"}, "pattern": {"name": "unstructured"}, "allocation": {}, "reconstruction": {}, "prune": {}}
    recipe = {**sections, "base": "base1", "calibration": "c0ffee", "label": "wanda", "pattern_label": "unstructured"}
    summary = {"sparsity": 0.5, "relative_error": 0.1}
    manifest = {"format": FORMAT, "recipe": recipe, "summary": summary, "shards": {BLOCK: "0" * 64}, "matrices": []}
    files = st.fixed_dictionaries({BLOCK: _blocks(), "delta.json": st.just(json.dumps(manifest).encode()) | json_of(manifest)})
    return files.map(_with_hashes)


def _with_hashes(files: Files) -> Files:
    """The same, the manifest with the hash of the block's file, which its writer states."""
    digest = hashlib.sha256(files[BLOCK]).hexdigest().encode()
    return {**files, "delta.json": files["delta.json"].replace(b"0" * 64, digest)}


def _weight(name: str, *, entry: int | None = None) -> torch.Tensor:
    """Of a base that has the tensors of the sound file."""
    return torch.zeros(_block()[1]["shapes"][name])


def read_delta(_: Files) -> None:
    delta = SparseDelta(Path(), "base1")
    for name in delta:
        delta.change(name, _weight)
        if name in _block()[1]["shapes"]:
            delta.apply(name, _weight(name))
    read_block(Path(BLOCK), _weight)
    _ = delta.fingerprint
    delta.require_hashes()


# A GGUF file.


@cache
def gguf() -> bytes:
    """A Llama of one block with random weights and sixteen tokens."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tiny.gguf"
        writer = GGUFWriter(path, "llama")
        for add, value in (
            (writer.add_context_length, 64),
            (writer.add_embedding_length, 8),
            (writer.add_feed_forward_length, 12),
            (writer.add_block_count, 1),
            (writer.add_head_count, 2),
            (writer.add_head_count_kv, 2),
            (writer.add_vocab_size, 16),
            (writer.add_bos_token_id, 1),
            (writer.add_eos_token_id, 2),
        ):
            add(value)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(
            ["<unk>", "<s>", "</s>", *(f"{first}{second}" for first in "ab" for second in ("", *"abcd"))][:13] + list("cde")
        )
        writer.add_token_merges(["a b", "a a"])
        sizes = {"token_embd": (16, 8), "output": (16, 8), "output_norm": (8,)}
        sizes |= {f"blk.0.{name}": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        sizes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
        sizes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
        for name, shape in sizes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


GGUF_SIZES = tuple(
    f"llama.{name}"
    for name in ("block_count", "embedding_length", "feed_forward_length", "vocab_size", "context_length", "attention.head_count")
)


def ggufs() -> SearchStrategy[Files]:
    content = gguf()
    head = content.index(b"token_embd") + 600  # the keys, the tokens and the table of tensors
    counts = [content.index(key.encode()) + len(key) + 4 for key in GGUF_SIZES]  # after the key stands the type, then the value
    sized = st.tuples(st.sampled_from(counts), st.sampled_from(NUMBERS)).map(
        lambda edit: content[: edit[0]] + struct.pack("<I", edit[1] % 2**32) + content[edit[0] + 4 :]
    )
    damaged_head = bytes_of(content[:head]).map(lambda start: start + content[head:])
    return st.fixed_dictionaries({"tiny.gguf": damaged_head | bytes_of(content) | sized})


def read_gguf(_: Files) -> None:
    path = Path("tiny.gguf")
    Path("base").mkdir()
    section = GgufBase(
        source="gguf",
        path=str(path),
        sha256=sha256(path),
        name="fuzz/tiny",
        dtype="bfloat16",
        dequantised_by=bases.dequantisers(),
        license="mit",
    )
    bases.fetch(section, Path("base"), Path("downloads"))


READERS = (
    Reader(
        name="safetensors shards and index",
        code="checkpoint/reader.py, layout.py, tokens.py",
        inputs=checkpoints(),
        read=read_checkpoint,
        names=("shard ", INDEX, "config.json", PROVENANCE, "tensor ", "does not fit"),
        share=8,
    ),
    Reader(
        name="checkpoint directories",
        code="sources/base.py, decoder.py",
        inputs=checkpoints(),
        read=read_local_base,
        names=("shard ", INDEX, "config.json", "local checkpoint", "tensor "),
        share=4,
    ),
    Reader(
        name="deltas",
        code="checkpoint/delta.py, scored_mask.py, recipe.py",
        inputs=deltas(),
        read=read_delta,
        names=(BLOCK, "delta.json", "delta"),
        share=12,
    ),
    Reader(
        name="GGUF files", code="sources/base.py", inputs=ggufs(), read=read_gguf, names=("tiny.gguf", "tensor "), memory=128, share=0.8
    ),
)
