"""Read a checkpoint tensor by tensor, with one tensor in memory at a time."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stages.errors import CheckpointError, ConfigError
from stages.files import is_inner_path, is_plain_name, read_json, sha256

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # the only shard where there is no index
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
WRITERS = ("_name_or_path", "transformers_version")  # keys of config.json that say nothing of the model
ANSWERING = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
BYTES_AT_ONCE = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a shard.

    offset: byte offset of its data from the start of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def entry(self, index: int) -> "StoredTensor":
        """An entry of the first dimension, 0 <= index < shape[0]."""
        entry = replace(self, shape=self.shape[1:])
        return replace(entry, offset=self.offset + index * entry.nbytes)


def shard_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a shard: tensor name -> shape, dtype and offset, in the order of the file.

    safetensors checks the header: every shape against its number of bytes, no overlap, no gap, and the length of the file.
    The offsets follow from that.

    Raises:
        CheckpointError: the shard is missing, truncated or damaged, or has a tensor of an unknown dtype; names the shard.
    """
    if not path.is_file():
        raise CheckpointError(f"shard {path}: not found, though the index names it")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path}: found {size} bytes that are no whole safetensors file ({error}); is it truncated?") from error
    header, end = {}, size
    for name, (shape, dtype) in reversed(entries.items()):
        if dtype not in DTYPES:
            raise CheckpointError(f"shard {path}, tensor {name}: found dtype {dtype}, wanted one of {', '.join(DTYPES)}")
        end -= torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = StoredTensor(shape=shape, dtype=DTYPES[dtype], offset=end)
    return dict(reversed(header.items()))


def _read_into(file: RawIOBase, buffer: memoryview) -> int:
    """Fill the buffer up to the end of the file; returns the number of bytes read."""
    read = 0
    while read < len(buffer) and (count := file.readinto(buffer[read : read + BYTES_AT_ONCE])):
        read += count
    return read


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor has no NaN or infinity, by its exponent bits; runs in one thread with little memory."""
    if tensor.dtype not in EXPONENTS or not tensor.numel():
        return True
    mask = EXPONENTS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy()
    return not any((bits[i : i + 2**20] & mask == mask).any() for i in range(0, len(bits), 2**20))


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index file: tensor name -> shard.

    Raises:
        CheckpointError: the index has no weight_map, or a shard is not a .safetensors file in the directory of the index.
    """
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: found no weight_map that names tensors and their shards")
    for tensor, shard in table.items():
        if not (is_plain_name(shard) and shard.endswith(".safetensors")):
            raise CheckpointError(f"{index}: found tensor {tensor!r} in {shard!r}, wanted the name of a .safetensors file beside the index")
    return table


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises CheckpointError if it holds something else."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found a {type(data).__name__}, wanted an object")
    return data


class Checkpoint:
    """A directory of safetensors shards with an index, or of one shard.

    Args:
        directory: holds model.safetensors.index.json and the shards that it names, or model.safetensors. The constructor checks the
            header of every shard, before any weight is read.

    Attributes:
        shard_of: tensor name -> file name of its shard, for all tensors of the shards that the index names.
        headers: file name -> tensor name -> StoredTensor.

    Raises:
        CheckpointError: there is neither, a shard is missing or damaged or lacks one of its tensors, or two shards have the same.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shard_of: dict[str, str] = self._weight_map()
        self.headers = {shard: shard_header(directory / shard) for shard in sorted(set(self.shard_of.values()))}
        for name, shard in self.shard_of.items():
            if name not in self.headers[shard]:
                raise CheckpointError(f"shard {directory / shard}: no tensor {name}, though the index says so")
        for shard, stored in self.headers.items():  # clients read all tensors of the shards, those that the index leaves out, too
            if twice := [name for name in stored if self.shard_of.setdefault(name, shard) != shard]:
                raise CheckpointError(f"{directory}: found tensor {twice[0]} in {self.shard_of[twice[0]]} and in {shard}, wanted it once")

    def _weight_map(self) -> dict[str, str]:
        if (self.directory / INDEX).is_file():
            return read_weight_map(self.directory / INDEX)
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(shard_header(self.directory / SINGLE), SINGLE)
        raise CheckpointError(f"{self.directory}: no {INDEX} and no {SINGLE}; is this a checkpoint in safetensors?")

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

    def size_in(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors in this dtype."""
        return sum(math.prod(self.shape(name)) for name in self) * dtype.itemsize

    def tensor(self, name: str, *, pinned: bool = False, entry: int | None = None) -> torch.Tensor:
        """Read a tensor as stored, or one entry of its first dimension, into new CPU memory.

        The file is not mapped: access to a map of a truncated file kills the process without a message.

        Args:
            pinned: whether to use page-locked memory, from which a GPU copies asynchronously.
            entry: index of the entry, such as an expert of those in one tensor; None: the whole tensor.

        Raises:
            CheckpointError: the shard was removed or truncated, or the tensor has NaN or infinity.
        """
        path, stored = self.directory / self.shard_of[name], self.stored(name)
        if entry is not None:
            stored = stored.entry(entry)
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
        """What the fetch stage recorded.

        Raises:
            CheckpointError: it has no hashes of files in this directory.
        """
        path = self.directory / PROVENANCE
        data = _object(path)
        files = data.get("files")
        if not isinstance(files, dict) or not all(is_inner_path(name) and is_plain_name(digest) for name, digest in files.items()):
            raise CheckpointError(
                f"{path}: found no files in its directory with their hashes; is this a checkpoint written by the fetch stage?"
            )
        return data

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            CheckpointError: it is no JSON object.
        """
        return _object(self.directory / "config.json")

    def stated(self, *keys: str) -> list[Any]:
        """The values of keys in config.json, and in the section of the text decoder if it has one; None where there is none."""
        inner = self.config.get("text_config")
        return [section.get(key) for section in (self.config, inner if isinstance(inner, dict) else {}) for key in keys]

    @property
    def tokenizer_sha256(self) -> str | None:
        """SHA-256 [hex] of tokenizer.json, or None if the tokenizer is of another kind."""
        path = self.directory / "tokenizer.json"
        return sha256(path) if path.is_file() else None

    def settings_sha256(self, *, answers: bool) -> str:
        """SHA-256 [hex] of what config.json says of the model, not of who wrote it.

        Args:
            answers: of the files that say how it answers a prompt, too, such as its chat template.
        """
        config = {key: value for key, value in self.config.items() if key not in WRITERS}
        paths = [self.directory / name for name in ANSWERING if answers]
        facts = [config, *((path.name, sha256(path)) for path in paths if path.is_file())]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def context_length(self) -> int | None:
        """The model's context length in tokens, or None if its config does not state it."""
        return next((length for length in self.stated(*CONTEXT_KEYS) if isinstance(length, int)), None)

    def require_context(self, length: int, key: str) -> None:
        """Refuse windows that are longer than the model's context.

        Args:
            length: tokens per window. key: that of the configuration, for the error.

        Raises:
            ConfigError: names the key and both lengths.
        """
        if self.context_length is not None and length > self.context_length:
            raise ConfigError(f"{key}: found {length}, wanted at most the model's context of {self.context_length}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 [hex] over the names and hashes of the shards, as the fetch stage recorded them; see the function fingerprint."""
        return fingerprint(self.provenance["files"])


def fingerprint(files: dict[str, str]) -> str:
    """SHA-256 [hex] that identifies a checkpoint's weights: over the sorted `name hash` lines of its safetensors files."""
    lines = sorted(f"{name} {digest}\n" for name, digest in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
