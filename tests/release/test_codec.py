import json
import struct

import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.checkpoint.reader import DTYPES
from stages.errors import ReleaseError
from stages.files import sha256
from stages.release import codec
from stages.release.codec import FORMAT, METADATA, pack_shard, unpack_shard
from tests import architectures


def sparse(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return tensor.masked_fill(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, 0)


@pytest.fixture()
def shards(tmp_path):
    """A base's shard and the pruned one, of every dtype and of odd shapes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {f"block.{code}": (100 * torch.randn(5, 7, generator=generator)).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"matrix": torch.randn(40, 33, generator=generator).bfloat16(), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    tensors["zeros"] = torch.tensor([0.0, -0.0, 1.0])
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({**tensors, "matrix": sparse(tensors["matrix"])}, tmp_path / "pruned.safetensors", metadata={"format": "pt"})
    return tmp_path


def restored(directory, base=None, size=None, digest=None) -> bytes:
    plain = directory / "pruned.safetensors"
    unpack_shard(
        directory / "packed",
        directory / "restored",
        base and directory / base,
        size=plain.stat().st_size if size is None else size,
        digest=digest or sha256(plain),
    )
    return (directory / "restored").read_bytes()


@pytest.mark.parametrize("base", [None, "base.safetensors"])
@pytest.mark.parametrize("at_once", [8, codec.VALUES_AT_ONCE])
def test_a_shard_comes_back_byte_for_byte(shards, base, at_once, monkeypatch):
    monkeypatch.setattr(codec, "VALUES_AT_ONCE", at_once)
    pack_shard(shards / "pruned.safetensors", shards / "packed", base and shards / base)
    assert restored(shards, base) == (shards / "pruned.safetensors").read_bytes()


@pytest.mark.parametrize("kind", architectures.CONFIGS)
def test_a_shard_of_every_architecture_comes_back_byte_for_byte(tmp_path, kind):
    directory = architectures.write(tmp_path / "base", kind)
    for shard in sorted(directory.glob("*.safetensors")):
        tensors = load_file(shard)
        matrices = {name for name, tensor in tensors.items() if tensor.dim() > 1}
        pruned = {name: sparse(tensor) if name in matrices else tensor for name, tensor in tensors.items()}
        save_file(pruned, tmp_path / "pruned.safetensors", metadata={"format": "pt"})
        for base in (None, shard):
            pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", base)
            assert restored(tmp_path, base) == (tmp_path / "pruned.safetensors").read_bytes()


def test_the_streams_are_those_that_are_documented(tmp_path):
    """By hand: two kept values of four, of which one is 1.0 = 0x3f80 and one -2.0 = 0xc000."""
    tensor = torch.tensor([[0.0, 1.0, 0.0, -2.0]]).bfloat16()
    save_file({"a": tensor}, tmp_path / "pruned.safetensors", metadata={"format": "pt"})
    pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", None)
    with safe_open(tmp_path / "packed", framework="np") as file:
        assert file.metadata() == {METADATA: FORMAT}
        streams = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 -- no mapping
    content = (tmp_path / "pruned.safetensors").read_bytes()
    assert streams.pop("header") == content[:-8]
    decompressed = {name: zstandard.ZstdDecompressor().decompressobj().decompress(stream) for name, stream in streams.items()}
    assert decompressed == {"a.mask": b"\x0a", "a.0": b"\x80\x00", "a.1": b"\x3f\xc0"}


def test_random_weights_of_which_half_are_zero_take_less_than_half(tmp_path):
    save_file({"a": sparse(0.02 * torch.randn(512, 512)).bfloat16()}, tmp_path / "pruned.safetensors")
    pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", None)
    assert (tmp_path / "packed").stat().st_size < 0.43 * (tmp_path / "pruned.safetensors").stat().st_size
    tensors = load_file(tmp_path / "pruned.safetensors")
    save_file({"a": tensors["a"] + (tensors["a"] == 0)}, tmp_path / "base.safetensors")
    pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", tmp_path / "base.safetensors")
    assert (tmp_path / "packed").stat().st_size < 0.065 * (tmp_path / "pruned.safetensors").stat().st_size


def test_a_header_has_room_for_every_size_that_its_streams_may_have(tmp_path):
    contents = {f"stream.{number}": bytes([number]) * 12345 for number in range(80)}
    with (tmp_path / "packed").open("wb") as file:
        container = codec._Container(file, list(contents), largest=sum(map(len, contents.values())))
        container.append(contents)
        container.finish()
    with safe_open(tmp_path / "packed", framework="np") as file:
        assert {name: file.get_tensor(name).tobytes() for name in contents} == contents


# Refused.


def test_masks_alone_are_refused_where_kept_weights_changed(shards):
    tensors = load_file(shards / "base.safetensors")
    tensors["matrix"][0, 0] += 1
    save_file(tensors, shards / "pruned.safetensors")
    with pytest.raises(ReleaseError, match="pruned.safetensors, tensor matrix: found 1 kept values that are not the base's, wanted none"):
        pack_shard(shards / "pruned.safetensors", shards / "packed", shards / "base.safetensors")


def test_a_base_of_other_tensors_is_refused(shards):
    pack_shard(shards / "pruned.safetensors", shards / "packed", shards / "base.safetensors")
    save_file({"matrix": torch.zeros(40, 32).bfloat16()}, shards / "other.safetensors")
    with pytest.raises(ReleaseError, match="tensor .*: found none of its shape and dtype in .*other.safetensors, wanted those of its base"):
        restored(shards, "other.safetensors")


def test_a_base_of_other_values_is_refused_by_the_hash(shards):
    pack_shard(shards / "pruned.safetensors", shards / "packed", shards / "base.safetensors")
    tensors = load_file(shards / "base.safetensors")
    save_file({**tensors, "scalar": torch.tensor(3.5)}, shards / "other.safetensors")
    with pytest.raises(ReleaseError, match="found SHA-256 [0-9a-f]{64} .*, wanted [0-9a-f]{64}; .* or .*other.safetensors not its base"):
        restored(shards, "other.safetensors")


def test_every_truncation_is_refused_and_no_flipped_bit_gives_other_bytes(tmp_path):
    save_file({"a": sparse(torch.randn(8, 5)).bfloat16(), "b": torch.ones(3)}, tmp_path / "pruned.safetensors")
    pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", None)
    plain, whole = (tmp_path / "pruned.safetensors").read_bytes(), (tmp_path / "packed").read_bytes()
    for end in range(0, len(whole), 7):
        (tmp_path / "packed").write_bytes(whole[:end])
        with pytest.raises(ReleaseError, match="packed file .*packed"):
            restored(tmp_path)
    refused = 0
    for at in range(0, len(whole), 3):
        (tmp_path / "packed").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert restored(tmp_path) == plain  # a bit of the padding, or one that zstd does not use
        except ReleaseError as error:
            assert "packed file" in str(error)
            refused += 1
    assert refused > 0.8 * len(range(0, len(whole), 3))


def rewritten(path, **changes: bytes) -> None:
    """The packed file with other streams."""
    with safe_open(path, framework="pt") as file:
        streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
    streams |= {name.replace("_", "."): torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in changes.items()}
    save_file(streams, path, metadata={METADATA: FORMAT})


def frame(content: bytes, **options: int) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


@pytest.fixture()
def small(tmp_path):
    save_file({"a": torch.tensor([[0.0, 1.0, 0.0, -2.0]]).bfloat16()}, tmp_path / "pruned.safetensors")
    pack_shard(tmp_path / "pruned.safetensors", tmp_path / "packed", None)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_0": frame(b"\x80")}, "stream a.0: found 1 bytes, wanted 2 more|stream a.0: found 0 bytes"),
        ({"a_0": frame(bytes(2**24))}, "stream a.0: found more bytes than its tensor has, wanted none"),
        ({"a_0": frame(b"\x80\x00") + frame(b"\0")}, "stream a.0: found more bytes than its tensor has, wanted none"),
        ({"a_0": frame(b"\x80\x00") + b"junk"}, "stream a.0: (it is damaged|found more bytes)"),
        ({"a_mask": frame(b"\x0f")}, "stream a.0: found 2 bytes, wanted 4 more|stream a.0: found 0 bytes"),
        ({"a_2": frame(b"")}, r"its streams are not those of the tensors that its header names: \['a.2'\]"),
        ({"header": b"\0\0"}, "stream header: found 2 bytes, wanted the header of a shard of"),
        ({"header": (2**40).to_bytes(8, "little") + b"{}"}, "found .* bytes that are no whole safetensors file"),
    ],
)
def test_streams_that_do_not_fit_the_header_are_refused(small, changes, message):
    rewritten(small / "packed", **changes)
    with pytest.raises(ReleaseError, match=f"packed file .*packed.*({message})"):
        restored(small)


def test_a_frame_that_asks_for_much_memory_is_refused(small):
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    rewritten(small / "packed", a_0=compressor.compress(b"\x80\x00") + compressor.flush())
    with pytest.raises(ReleaseError, match="stream a.0: it is damaged"):
        restored(small)


def test_a_shard_that_is_stated_larger_or_smaller_than_its_header_says_is_refused(small):
    size = (small / "pruned.safetensors").stat().st_size
    for stated in (size - 1, size + 1, 2**40):
        with pytest.raises(ReleaseError, match="found .* bytes that are no whole safetensors file"):
            restored(small, size=stated)


def test_a_header_that_describes_more_than_the_stated_size_is_refused(small):
    text = json.dumps({"a": {"dtype": "BF16", "shape": [2**40], "data_offsets": [0, 2**41]}}).encode()
    rewritten(small / "packed", header=struct.pack("<Q", len(text)) + text)
    with pytest.raises(ReleaseError, match="found 200 bytes that are no whole safetensors file"):
        restored(small, size=200)


def test_a_safetensors_file_that_is_not_packed_is_refused(small):
    (small / "packed").write_bytes((small / "pruned.safetensors").read_bytes())
    with pytest.raises(ReleaseError, match="packed: found the format None, wanted 'sparsesweep-packed/1'"):
        restored(small)
