import pytest
import torch

from stages.checkpoint.delta import Change, SparseDelta, pack, unpack, write_block, write_manifest
from stages.errors import CheckpointError


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (7, 9)])
def test_a_mask_survives_packing(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, shape), mask)


def test_the_first_weight_is_the_lowest_bit():
    assert pack(torch.tensor([[True, False, False, True]])).tolist() == [0b1001]


def test_a_change_zeroes_what_is_dropped_and_moves_what_moved():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    mask = torch.tensor([[False, True], [True, False]])
    assert Change(mask=mask).apply(weight).tolist() == [[0, -2], [3, 0]]
    moved = Change(mask=mask, values=torch.tensor([5.0, 6.0], dtype=torch.bfloat16)).apply(weight)
    assert moved.dtype == torch.bfloat16
    assert moved.tolist() == [[0, 5], [6, 0]]


def test_dropped_negative_weights_become_plain_zeros():
    dropped = Change(mask=torch.tensor([[False]])).apply(torch.tensor([[-1.0]]))
    assert not torch.signbit(dropped).any()


@pytest.fixture()
def written(tmp_path):
    torch.manual_seed(0)
    changes = {
        "a.weight": Change(mask=torch.rand(5, 7) > 0.5),
        "b.weight": Change(mask=torch.tensor([[True, False]]), values=torch.tensor([9.0])),
    }
    write_block(tmp_path / "block-00000.safetensors", changes, "base1")
    write_manifest(tmp_path, base="base1", recipe={"method": "x"}, matrices=[])
    return tmp_path, changes


def test_a_delta_comes_back_as_written(written):
    directory, changes = written
    delta = SparseDelta(directory, "base1")
    assert set(delta) == set(changes)
    for name, change in changes.items():
        assert torch.equal(delta.change(name).mask, change.mask)
    assert delta.change("a.weight").values is None
    assert delta.apply("b.weight", torch.tensor([[1.0, 2.0]])).tolist() == [[9.0, 0.0]]
    assert delta.apply("norm.weight", torch.tensor([1.0])).tolist() == [1.0]


def test_the_same_changes_are_the_same_bytes(written, tmp_path):
    directory, changes = written
    first = (directory / "block-00000.safetensors").read_bytes()
    for _ in range(20):
        write_block(tmp_path / "again.safetensors", changes, "base1")
        assert (tmp_path / "again.safetensors").read_bytes() == first


def test_the_delta_of_another_base_is_refused(written):
    with pytest.raises(CheckpointError, match="a delta of base base1, wanted one of base base2"):
        SparseDelta(written[0], "base2")


def test_a_delta_of_another_format_is_refused(written):
    manifest = written[0] / "delta.json"
    manifest.write_text(manifest.read_text().replace("sparsesweep-delta/1", "sparsesweep-delta/9"))
    with pytest.raises(CheckpointError, match="found format 'sparsesweep-delta/9', wanted 'sparsesweep-delta/1'"):
        SparseDelta(written[0], "base1")


def test_a_truncated_delta_is_named(written):
    path = written[0] / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="block-00000.safetensors.*truncated"):
        list(SparseDelta(written[0], "base1"))


def test_a_directory_without_a_delta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no delta.json"):
        SparseDelta(tmp_path, "base1")
