"""A reader of packed releases that was written from the text of docs/packed.md alone: numpy, zstandard and the standard library."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}  # of safetensors, bytes


def unpack(directory: Path, target: Path, base: Path | None = None) -> None:
    """Restore all files but SHA256SUMS."""
    manifest = json.loads((directory / "packed.json").read_text(encoding="utf8"))
    assert manifest["format"] == "sparsesweep-packed/1"
    assert (manifest["base"] is None) == (base is None)
    target.mkdir()
    for name, stated in manifest["files"].items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, target / name)
        check(target / name, stated["sha256"], stated["size"])
    if (directory / "README.md").is_file():
        shutil.copyfile(directory / "README.md", target / "README.md")
    for name, stated in manifest["shards"].items():
        if base is not None:
            check(base / name, manifest["base"]["shards"][name])
        (target / name).write_bytes(restored(directory / "packed" / name, None if base is None else base / name))
        check(target / name, stated["sha256"], stated["size"])


def check(path: Path, digest: str, size: int | None = None) -> None:
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest, path
    assert size is None or len(content) == size, path


def restored(packed: Path, base: Path | None) -> bytes:
    """The bytes of a shard."""
    entries, data = safetensors(packed.read_bytes())
    assert entries.pop("__metadata__") == {"sparsesweep": "sparsesweep-packed/1"}
    streams = {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    theirs, their_data = safetensors(base.read_bytes()) if base else ({}, b"")
    header = streams.pop("header")
    tensors, _ = safetensors(header)
    tensors.pop("__metadata__", None)
    body = bytearray(max((entry["data_offsets"][1] for entry in tensors.values()), default=0))
    for name, entry in tensors.items():
        width, count = WIDTHS[entry["dtype"]], math.prod(entry["shape"])
        bits = np.frombuffer(content(streams.pop(f"{name}.mask")), np.uint8)
        mask = np.unpackbits(bits, count=count, bitorder="little").astype(bool)
        values = np.zeros((count, width), np.uint8)
        if base is None:
            for byte in range(width):
                values[mask, byte] = np.frombuffer(content(streams.pop(f"{name}.{byte}")), np.uint8)
        else:
            of_base = np.frombuffer(their_data[slice(*theirs[name]["data_offsets"])], np.uint8).reshape(count, width)
            values[mask] = of_base[mask]
        body[slice(*entry["data_offsets"])] = values.tobytes()
    assert not streams
    return header + bytes(body)


def safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def content(frame: bytes) -> bytes:
    """What a zstd frame holds, which does not state how much that is."""
    return zstandard.ZstdDecompressor().decompressobj().decompress(frame)
