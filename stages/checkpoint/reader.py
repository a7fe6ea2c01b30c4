"""Read a checkpoint tensor by tensor: at no time is more than one tensor of it in memory."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch

from stages.errors import CheckpointError, ConfigError
from stages.files import read_json, sha256

INDEX = "model.safetensors.index.json"
PROVENANCE = "provenance.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EXPONENTS = {torch.float64: 0x7FF0 << 48, torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
BYTES_AT_ONCE = 2**26


def shard_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, its length checked against the file's.

    Raises:
        CheckpointError: the shard is missing, truncated or no safetensors file; the message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"shard {path}: not found, though the index names it")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= size - 8:
            raise CheckpointError(f"shard {path}: {size} bytes do not hold a safetensors header; is it truncated?")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"shard {path}: its header is not JSON ({error})") from None
    end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise CheckpointError(f"shard {path}: found {size} bytes, wanted {8 + length + end}: it is truncated or damaged")
    return header


def _read_into(file: RawIOBase, buffer: memoryview) -> int:
    """Fill the buffer as far as the file goes; returns the bytes read."""
    read = 0
    while read < len(buffer) and (count := file.readinto(buffer[read : read + BYTES_AT_ONCE])):
        read += count
    return read


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is free of NaN and infinity, seen from the exponent bits, in one thread and little memory."""
    if tensor.dtype not in EXPONENTS or not tensor.numel():
        return True
    mask = EXPONENTS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy()
    return not any((bits[i : i + 2**20] & mask == mask).any() for i in range(0, len(bits), 2**20))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index file.

    Raises:
        CheckpointError: the index has no such table.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: found no weight_map that names tensors and their shards")
    return table


class Checkpoint:
    """A directory of safetensors shards with an index.

    Args:
        directory: holds model.safetensors.index.json and the shards that it names; every shard's header is checked here,
            before any weight is read.

    Raises:
        CheckpointError: no index, a shard missing or truncated, a tensor that its shard lacks.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / INDEX).is_file():
            raise CheckpointError(f"{directory}: no {INDEX}; is this a checkpoint written by the fetch stage?")
        self.shard_of: dict[str, str] = read_weight_map(directory / INDEX)
        self.headers = {shard: shard_header(directory / shard) for shard in sorted(set(self.shard_of.values()))}
        for name, shard in self.shard_of.items():
            if name not in self.headers[shard]:
                raise CheckpointError(f"shard {directory / shard}: no tensor {name}, though the index says so")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self.shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[self.shard_of[name]][name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        found = self.headers[self.shard_of[name]][name]["dtype"]
        if found not in DTYPES:
            raise CheckpointError(f"tensor {name}: found dtype {found}, wanted one of {', '.join(DTYPES)}")
        return DTYPES[found]

    def tensor(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """The tensor as stored, on the CPU, in memory of its own.

        Read, not mapped: a file that is cut short under a map kills the process without a word.

        Args:
            pinned: in page-locked memory, from which a GPU copies without waiting.

        Raises:
            CheckpointError: the shard is gone or cut short, or the tensor holds NaN or infinity.
        """
        path, header = self.directory / self.shard_of[name], self.headers[self.shard_of[name]][name]
        start, end = header["data_offsets"]
        buffer = torch.empty(end - start, dtype=torch.uint8, pin_memory=pinned)
        try:
            with path.open("rb", buffering=0) as shard:
                shard.seek(8 + int.from_bytes(shard.read(8), "little") + start)
                found = _read_into(shard, memoryview(buffer.numpy().data))
        except OSError as error:
            raise CheckpointError(f"shard {path}: {error.strerror}; was it there a moment ago?") from error
        if found < len(buffer):
            raise CheckpointError(f"shard {path}: found {found} bytes of {name}, wanted {len(buffer)}: it is truncated")
        tensor = buffer.view(self.dtype(name)).view(self.shape(name))
        if not all_finite(tensor):
            raise CheckpointError(f"tensor {name} in {path}: found NaN or infinity, wanted finite weights")
        return tensor

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.directory / PROVENANCE)

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of its tokenizer.json, or None where it has another kind."""
        path = self.directory / "tokenizer.json"
        return sha256(path) if path.is_file() else None

    @cached_property
    def context_length(self) -> int | None:
        """Tokens that the model was made for, where its config says so."""
        config = read_json(self.directory / "config.json")
        stated = (part.get(key) for part in (config, config.get("text_config") or {}) for key in CONTEXT_KEYS)
        return next((length for length in stated if isinstance(length, int)), None)

    def require_context(self, length: int, key: str) -> None:
        """Refuse windows that the model was not made for.

        Args:
            length: tokens. key: of the configuration, for the error.

        Raises:
            ConfigError: naming the key and both lengths.
        """
        if self.context_length is not None and length > self.context_length:
            raise ConfigError(f"{key}: found {length}, wanted at most the model's context of {self.context_length}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of the shards, as the fetch stage recorded them."""
        return fingerprint(self.provenance["files"])


def fingerprint(files: dict[str, str]) -> str:
    """SHA-256 [hex] that names a checkpoint's weights: over the sorted `name hash` lines of its safetensors files."""
    lines = sorted(f"{name} {digest}\n" for name, digest in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
