"""A shard packed without loss: masks and kept values, or masks alone, to be applied to the shard of the base.

The packed file is a safetensors file of byte streams, each a zstd frame of its own; docs/packed.md has the format. For each tensor
of the shard, in the order of its bytes:

    NAME.mask          one bit a value, 1 = kept; the first value is the lowest bit of the first byte
    NAME.0, NAME.1, …  the kept values byte by byte: all lowest bytes, …, all highest bytes, which hold the exponent

With values, a value is kept unless all of its bits are zero; with masks alone, where its bits are the base's, and it is zero elsewhere.
Only what stands in the shard decides, so any shard can be packed, and the unpacked file is the same byte for byte.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from stages.checkpoint.reader import StoredTensor, shard_header
from stages.errors import CheckpointError, ReleaseError
from stages.files import sha256

FORMAT = "sparsesweep-packed/1"
METADATA = "sparsesweep"
HEADER = "header"  # the stream with the first bytes of the shard: the length of its header, and the header; others have a dot in their name
LONGEST_HEADER = 100_000_008  # bytes: safetensors reads none that is longer
LENGTH = 8  # bytes that state the length of a header
VALUES_AT_ONCE = 2**22  # of a tensor; a multiple of 8
LEVEL = 3  # of zstd
LARGEST_WINDOW = 2**23  # bytes of memory that a frame may ask of its decoder
BITS = 8  # of a byte

Result = TypeVar("Result")
Stored = dict[str, StoredTensor]
Streams = dict[str, bytes]


def pack_shard(source: Path, target: Path, base: Path | None) -> None:
    """Pack a safetensors file.

    For each thread some values of a tensor are in memory, and what the tensor is packed to.

    Args:
        base: the shard of the base that has the same tensors, to store masks alone; None: masks and values.

    Raises:
        ReleaseError: masks alone do not do, since the base has other tensors or other kept values; names the tensor.
        CheckpointError: a file is damaged.
    """
    stored = shard_header(source)
    of_base = stored if base is None else _same_tensors(source, stored, base)
    names = [HEADER, *(stream for name, tensor in stored.items() for stream in stream_names(name, tensor, values=base is None))]
    size = source.stat().st_size
    with _Values.of(source) as ours, _Values.of(base) as theirs, target.open("wb") as file, _progress(size, source.name) as progress:
        container = _Container(file, names, largest=2 * size + LONGEST_HEADER)
        container.append({HEADER: _first_bytes(source)})
        tasks = [partial(_pack_tensor, name, (ours, theirs), (tensor, of_base[name])) for name, tensor in stored.items()]
        for tensor, streams in zip(stored.values(), _in_threads(tasks), strict=True):
            container.append(streams)
            progress.update(tensor.nbytes)
        container.finish()


def unpack_shard(source: Path, target: Path, base: Path | None, *, size: int, digest: str) -> None:
    """Restore a packed shard.

    For each thread some values of a tensor are in memory. No more than `size` bytes are written.

    Args:
        base: the shard of the base, where masks alone are stored. size: of the shard, in bytes. digest: its SHA-256 [hex].

    Raises:
        ReleaseError: the file was not written by pack_shard, it is damaged, or the base is another; names the file and the tensor.
    """
    try:
        streams = _streams(source)
        _write_header(source, streams.get(HEADER), target, size)
        stored = shard_header(target)
        of_base = stored if base is None else _same_tensors(source, stored, base)
    except CheckpointError as error:
        raise ReleaseError(f"packed file {source}: {error}") from error
    wanted = {HEADER, *(stream for name, tensor in stored.items() for stream in stream_names(name, tensor, values=base is None))}
    if set(streams) != wanted:
        unmatched = sorted(set(streams) ^ wanted)[:3]
        raise ReleaseError(f"packed file {source}: its streams are not those of the tensors that its header names: {unmatched}")
    with _Values.of(source) as packed, _Values.of(base) as theirs, target.open("r+b") as file, _progress(size, target.name) as progress:
        unpack = partial(_unpack_tensor, packed, theirs, streams, file.fileno())
        tasks = [partial(unpack, name, tensor, of_base[name]) for name, tensor in stored.items()]
        for count in _in_threads(tasks):
            progress.update(count)
    if (actual := sha256(target)) != digest:
        reason = "is it damaged?" if base is None else f"is it damaged, or {base} not its base?"
        raise ReleaseError(f"packed file {source}: found SHA-256 {actual} of what it unpacks to, wanted {digest}; {reason}")


def stream_names(name: str, tensor: StoredTensor, *, values: bool) -> list[str]:
    """The streams of a tensor."""
    return [f"{name}.mask", *(f"{name}.{byte}" for byte in range(tensor.dtype.itemsize) if values)]


def _same_tensors(source: Path, stored: Stored, base: Path) -> Stored:
    """The tensors of a base's shard, refused where they are not those of `source`."""
    of_base = shard_header(base)
    for name, tensor in stored.items():
        other = of_base.get(name)
        if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise ReleaseError(f"{source}, tensor {name}: found none of its shape and dtype in {base}, wanted those of its base")
    return of_base


def _progress(size: int, name: str) -> tqdm:
    return tqdm(total=size, desc=name, unit="B", unit_scale=True)


def _in_threads(tasks: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """The results in the order of the tasks; of those that are begun, few wait for the one before them."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# A tensor.


class _Values:
    """The values of a file's tensors as whole numbers without sign, and its bytes; threads may read at once."""

    def __init__(self, path: Path, file: RawIOBase) -> None:
        self.path, self.file = path, file

    @classmethod
    @contextmanager
    def of(cls, path: Path | None) -> Iterator[Any]:
        """Open a file, or none."""
        if path is None:
            yield None
            return
        with path.open("rb", buffering=0) as file:
            yield cls(path, file)

    def bytes_at(self, offset: int, count: int) -> bytes:
        """
        Raises:
            CheckpointError: the file has become shorter.
        """
        data = os.pread(self.file.fileno(), count, offset)
        if len(data) < count:
            raise CheckpointError(f"{self.path}: found {len(data)} bytes at {offset}, wanted {count}: it is truncated")
        return data

    def some(self, tensor: StoredTensor, first: int, count: int) -> np.ndarray:
        """Some values of a tensor, [count], uint8 to uint64."""
        size = tensor.dtype.itemsize
        return np.frombuffer(self.bytes_at(tensor.offset + first * size, count * size), _bits(tensor))


def _bits(tensor: StoredTensor) -> np.dtype:
    return np.dtype(f"<u{tensor.dtype.itemsize}")


def _ranges(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """The first of some values of a tensor, and how many."""
    values = torch.Size(tensor.shape).numel()
    return ((first, min(VALUES_AT_ONCE, values - first)) for first in range(0, values, VALUES_AT_ONCE))


def _pack_tensor(name: str, values: tuple[_Values, _Values | None], tensors: tuple[StoredTensor, StoredTensor]) -> Streams:
    """The streams of a tensor.

    Args:
        values, tensors: of the release, and of the base.
    """
    (ours, of_base), (tensor, other) = values, tensors
    frames = {stream: _Frame() for stream in stream_names(name, tensor, values=of_base is None)}
    for first, count in _ranges(tensor):
        bits = ours.some(tensor, first, count)
        mask = bits != 0 if of_base is None else bits == of_base.some(other, first, count)
        frames[f"{name}.mask"].add(np.packbits(mask, bitorder="little"))
        if of_base is None:
            kept = bits[mask].view(np.uint8).reshape(-1, tensor.dtype.itemsize)
            for byte in range(tensor.dtype.itemsize):
                frames[f"{name}.{byte}"].add(np.ascontiguousarray(kept[:, byte]))
        elif (changed := np.count_nonzero(bits[~mask])) > 0:
            raise ReleaseError(f"{ours.path}, tensor {name}: found {changed} kept values that are not the base's, wanted none: pack values")
    return {stream: frame.finish() for stream, frame in frames.items()}


class _Frame:
    """A zstd frame that is being written."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        self.parts: list[bytes] = []

    def add(self, content: np.ndarray) -> None:
        self.parts.append(self.compressor.compress(content.data))

    def finish(self) -> bytes:
        return b"".join([*self.parts, self.compressor.flush()])


def _unpack_tensor(
    packed: _Values, of_base: _Values | None, streams: Stored, target: int, name: str, tensor: StoredTensor, other: StoredTensor
) -> int:
    """Write a tensor at its place in the file with the descriptor `target`; returns the number of bytes."""
    frames = {stream: _Source(packed, stream, streams[stream]) for stream in stream_names(name, tensor, values=of_base is None)}
    for first, count in _ranges(tensor):
        packed_bits = np.frombuffer(frames[f"{name}.mask"].content(-(-count // BITS)), np.uint8)
        mask = np.unpackbits(packed_bits, count=count, bitorder="little").view(bool)
        bits = np.zeros(count, _bits(tensor))
        if of_base is None:
            kept = np.empty((np.count_nonzero(mask), tensor.dtype.itemsize), np.uint8)
            for byte in range(tensor.dtype.itemsize):
                kept[:, byte] = np.frombuffer(frames[f"{name}.{byte}"].content(len(kept)), np.uint8)
            bits[mask] = kept.view(bits.dtype).reshape(-1)
        else:
            np.copyto(bits, of_base.some(other, first, count), where=mask)
        os.pwrite(target, bits.data, tensor.offset + first * tensor.dtype.itemsize)
    for frame in frames.values():
        frame.require_end()
    return tensor.nbytes


class _Source:
    """A stream of a packed file that is being decompressed, never further than it is read."""

    def __init__(self, packed: _Values, name: str, stored: StoredTensor) -> None:
        self.packed, self.name, self.position, self.end = packed, name, stored.offset, stored.offset + stored.nbytes
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.frame = decompressor.stream_reader(self, read_across_frames=True)  # type: ignore[arg-type]  # of a file it calls read alone

    def read(self, count: int) -> bytes:
        """More of the compressed stream, for the decompressor."""
        data = self.packed.bytes_at(self.position, min(count, self.end - self.position))
        self.position += len(data)
        return data

    def content(self, count: int) -> bytes:
        """The next bytes of what was compressed.

        Raises:
            ReleaseError: the stream is damaged, or shorter.
        """
        try:
            data = self.frame.read(count) if count else b""
        except zstandard.ZstdError as error:
            raise ReleaseError(f"packed file {self.packed.path}, stream {self.name}: it is damaged ({error})") from error
        if len(data) < count:
            raise ReleaseError(f"packed file {self.packed.path}, stream {self.name}: found {len(data)} bytes, wanted {count} more")
        return data

    def require_end(self) -> None:
        """
        Raises:
            ReleaseError: the stream is damaged, or longer.
        """
        try:
            data = self.frame.read(1)
        except zstandard.ZstdError as error:
            raise ReleaseError(f"packed file {self.packed.path}, stream {self.name}: it is damaged ({error})") from error
        if data or self.position < self.end:
            raise ReleaseError(f"packed file {self.packed.path}, stream {self.name}: found more bytes than its tensor has, wanted none")


# The packed file.


class _Container:
    """A safetensors file of streams that is being written; their sizes are known only at its end, so its header is padded with spaces.

    Args:
        names: of all streams, in their order. largest: an upper bound on the bytes of all of them.
    """

    def __init__(self, file: BinaryIO, names: Sequence[str], largest: int) -> None:
        self.file, self.ranges, self.end = file, dict[str, tuple[int, int]](), 0
        self.length = len(_header(dict.fromkeys(names, (largest, 2 * largest))))
        file.seek(LENGTH + self.length)

    def append(self, streams: Streams) -> None:
        for name, content in streams.items():
            self.file.write(content)
            self.ranges[name] = self.end, self.end + len(content)
            self.end += len(content)

    def finish(self) -> None:
        header = _header(self.ranges)
        self.file.seek(0)
        self.file.write(self.length.to_bytes(LENGTH, "little") + header.ljust(self.length))


def _header(ranges: dict[str, tuple[int, int]]) -> bytes:
    """The header of a safetensors file of bytes. ranges: name -> first byte, and the one after the last."""
    entries: dict[str, object] = {"__metadata__": {METADATA: FORMAT}}
    entries |= {name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} for name, (start, end) in ranges.items()}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    return text + b" " * (-len(text) % LENGTH)


def _first_bytes(path: Path) -> bytes:
    """The length of a safetensors file's header, and the header."""
    with path.open("rb") as file:
        length = file.read(LENGTH)
        return length + file.read(int.from_bytes(length, "little"))


def _streams(source: Path) -> Stored:
    """The streams of a packed file, whose metadata and header are checked.

    Raises:
        ReleaseError: pack_shard did not write it. CheckpointError: it is no safetensors file.
    """
    streams = shard_header(source)
    try:
        with safe_open(source, framework="np") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{error}; is it truncated?") from error
    if metadata.get(METADATA) != FORMAT:
        raise ReleaseError(f"packed file {source}: found the format {metadata.get(METADATA)!r}, wanted {FORMAT!r}")
    for name, stream in streams.items():
        if stream.dtype != torch.uint8 or len(stream.shape) != 1:
            raise ReleaseError(f"packed file {source}, stream {name}: found {stream.dtype} of {list(stream.shape)}, wanted bytes in a row")
    return streams


def _write_header(source: Path, header: StoredTensor | None, target: Path, size: int) -> None:
    """Begin the restored shard: its header, and a hole of its size, which takes no disk.

    Raises:
        ReleaseError: there is no header, or it is longer than the shard.
    """
    if header is None or not LENGTH <= header.nbytes <= min(size, LONGEST_HEADER):
        found = "none" if header is None else f"{header.nbytes} bytes"
        raise ReleaseError(f"packed file {source}, stream {HEADER}: found {found}, wanted the header of a shard of {size} bytes")
    with _Values.of(source) as packed, target.open("wb") as file:
        file.write(packed.bytes_at(header.offset, header.nbytes))
        file.truncate(size)
