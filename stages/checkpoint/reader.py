"""Read a checkpoint tensor by tensor: at no time is more than one tensor of it in memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stages.errors import CheckpointError, ConfigError
from stages.files import is_plain_name, read_json, sha256

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


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a shard.

    offset: of its first byte, from the start of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shard_header(path: Path) -> dict[str, StoredTensor]:
    """Tensor name -> its shape, dtype and offset, in the order of the file.

    safetensors checks the header: every shape against the bytes that it takes, no overlap, no gap, and the length of the file.
    The offsets follow from that.

    Raises:
        CheckpointError: the shard is missing, truncated, damaged, or has tensors of a dtype that is not read; the message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"shard {path}: not found, though the index names it")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            stated = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path}: found {size} bytes that are no whole safetensors file ({error}); is it truncated?") from error
    header, end = {}, size
    for name, (shape, dtype) in reversed(stated.items()):
        if dtype not in DTYPES:
            raise CheckpointError(f"shard {path}, tensor {name}: found dtype {dtype}, wanted one of {', '.join(DTYPES)}")
        end -= torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = StoredTensor(shape=shape, dtype=DTYPES[dtype], offset=end)
    return dict(reversed(header.items()))


def _read_into(file: RawIOBase, buffer: memoryview) -> int:
    """Fill the buffer as far as the file goes; returns the bytes read."""
    read = 0
    while read < len(buffer) and (count := file.readinto(buffer[read : read + BYTES_AT_ONCE])):
        read += count
    return read


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is free of NaN and infinity, by its exponent bits: in one thread and little memory."""
    if tensor.dtype not in EXPONENTS or not tensor.numel():
        return True
    mask = EXPONENTS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy()
    return not any((bits[i : i + 2**20] & mask == mask).any() for i in range(0, len(bits), 2**20))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index file.

    Raises:
        CheckpointError: the index has no such table, or names anything but a .safetensors file beside it.
    """
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: found no weight_map that names tensors and their shards")
    for tensor, shard in table.items():
        if not (is_plain_name(shard) and shard.endswith(".safetensors")):
            raise CheckpointError(f"{index}: found tensor {tensor!r} in {shard!r}, wanted the name of a .safetensors file beside the index")
    return table


class Checkpoint:
    """A directory of safetensors shards with an index.

    Args:
        directory: holds model.safetensors.index.json and the shards that it names; every shard's header is checked here,
            before any weight is read.

    Attributes:
        shard_of: tensor name -> file name of its shard. headers: file name -> tensor name -> where it is stored.

    Raises:
        CheckpointError: no index, a shard that is missing or damaged, a tensor that its shard lacks.
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

    def stored(self, name: str) -> StoredTensor:
        return self.headers[self.shard_of[name]][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.stored(name).dtype

    def tensor(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Read a tensor as stored, into CPU memory of its own.

        It is read, not mapped: when a file is cut short, a map of it ends the process without a message.

        Args:
            pinned: in page-locked memory, from which a GPU copies without waiting.

        Raises:
            CheckpointError: the shard is gone or cut short, or the tensor holds NaN or infinity.
        """
        path, stored = self.directory / self.shard_of[name], self.stored(name)
        buffer = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=pinned)
        try:
            with path.open("rb", buffering=0) as shard:
                shard.seek(stored.offset)
                count = _read_into(shard, memoryview(buffer.numpy().data))
        except OSError as error:
            raise CheckpointError(f"shard {path}: {error.strerror}; was it there a moment ago?") from error
        if count < len(buffer):
            raise CheckpointError(f"shard {path}: found {count} bytes of {name}, wanted {len(buffer)}: it is truncated")
        tensor = buffer.view(stored.dtype).view(stored.shape)
        if not all_finite(tensor):
            raise CheckpointError(f"tensor {name} in {path}: found NaN or infinity, wanted finite weights")
        return tensor

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.directory / PROVENANCE)

    @property
    def tokenizer_sha256(self) -> str | None:
        """The SHA-256 of tokenizer.json, or None where the tokenizer is of another kind."""
        path = self.directory / "tokenizer.json"
        return sha256(path) if path.is_file() else None

    @cached_property
    def context_length(self) -> int | None:
        """The number of tokens that the model was made for, or None where its config does not say."""
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
