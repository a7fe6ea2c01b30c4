import json

import pytest
import torch
from safetensors.torch import save_file

from stages.checkpoint.delta import (
    Change,
    SparseDelta,
    _pack_by_torch,
    _unpack_by_torch,
    pack,
    read_block,
    unpack,
    write_block,
    write_manifest,
)
from stages.errors import CheckpointError
from stages.recipe import Recipe
from tests import deltas

BLOCK, MANIFEST = "block-00000.safetensors", "delta.json"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (7, 9)])
def test_a_mask_is_the_same_after_packing_and_unpacking(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, shape), mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (7, 9), (3, 5, 7)])
def test_a_mask_is_packed_on_a_gpu_as_on_the_cpu(shape):
    """By operations that every device has, here on the CPU."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = _pack_by_torch(mask)
    assert torch.equal(packed, pack(mask))
    assert packed.dtype == torch.uint8
    assert torch.equal(_unpack_by_torch(packed, shape), mask)


def test_the_first_weight_is_the_lowest_bit():
    assert pack(torch.tensor([[True, False, False, True]])).tolist() == [0b1001]


def test_a_change_zeroes_what_is_pruned_and_moves_what_moved():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    mask = torch.tensor([[False, True], [True, False]])
    assert Change(mask=mask).apply(weight).tolist() == [[0, -2], [3, 0]]
    moved = Change(mask=mask, values=torch.tensor([5.0, 6.0], dtype=torch.bfloat16)).apply(weight)
    assert moved.dtype == torch.bfloat16
    assert moved.tolist() == [[0, 5], [6, 0]]


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("moved", [True, False])
def test_the_changes_of_experts_are_stacked_and_come_back_one_by_one(shape, moved):
    masks = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) > 0.5
    values = [torch.randn(int(mask.sum())) if moved else None for mask in masks]
    stacked = Change.stacked([Change(mask=mask, values=kept) for mask, kept in zip(masks, values, strict=True)])
    assert stacked.shape == (3, *shape)
    assert torch.equal(stacked.mask, masks)
    assert (stacked.values is not None) == moved
    for change, mask, kept in zip(stacked.by_expert(), masks, values, strict=True):
        assert torch.equal(change.mask, mask)
        assert torch.equal(change.values, kept) if moved else change.values is None


def test_the_mask_lies_on_the_rows_and_columns_in_their_new_order():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    change = Change(mask=torch.tensor([[True, False], [True, True]]), columns=torch.tensor([1, 0], dtype=torch.int32))
    assert change.apply(weight).tolist() == [[2, 0], [4, 3]]


def test_pruned_negative_weights_become_plain_zeros():
    pruned = Change(mask=torch.tensor([[False]])).apply(torch.tensor([[-1.0]]))
    assert not torch.signbit(pruned).any()


@pytest.fixture()
def written(tmp_path):
    torch.manual_seed(0)
    changes = {
        "a.weight": Change(mask=torch.rand(5, 7) > 0.5),
        "b.weight": Change(mask=torch.tensor([[True, False]]), values=torch.tensor([9.0])),
        "c.weight": Change(mask=torch.ones(2, 2, dtype=torch.bool), columns=torch.tensor([1, 0], dtype=torch.int32)),
        "d.weight": Change(mask=torch.ones(2, 3, 4, dtype=torch.bool)),
    }
    deltas.write(tmp_path, deltas.recipe(), changes, [deltas.row(name, change.mask) for name, change in changes.items()])
    return tmp_path, changes


def test_a_delta_comes_back_as_written(written):
    directory, changes = written
    delta = SparseDelta(directory, "base1")
    assert set(delta) == set(changes)
    for name, change in changes.items():
        assert torch.equal(delta.change(name, deltas.no_base).mask, change.mask)
    assert delta.change("a.weight", deltas.no_base).values is None
    assert delta.apply("b.weight", torch.tensor([[1.0, 2.0]])).tolist() == [[9.0, 0.0]]
    assert delta.apply("c.weight", torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[2, 1], [4, 3]]
    assert delta.apply("norm.weight", torch.tensor([1.0])).tolist() == [1.0]
    assert delta.recipe == deltas.recipe()
    delta.require_hashes()


def test_the_same_changes_are_the_same_bytes(written, tmp_path):
    directory, changes = written
    first = (directory / BLOCK).read_bytes()
    for _ in range(20):
        write_block(tmp_path / "again.safetensors", changes, "base1")
        assert (tmp_path / "again.safetensors").read_bytes() == first


def test_a_fingerprint_names_the_recipe_and_the_files(written, tmp_path):
    directory, changes = written
    name = SparseDelta(directory, "base1").fingerprint
    assert SparseDelta(directory, "base1").fingerprint == name
    other = deltas.write(tmp_path / "other", deltas.recipe(calibration="decade"), changes, SparseDelta(directory, "base1").matrices)
    assert other.fingerprint != name


def test_the_delta_of_another_base_is_refused(written):
    with pytest.raises(CheckpointError, match="a delta of base base1, wanted one of base base2"):
        SparseDelta(written[0], "base2")


def test_a_delta_of_another_format_is_refused(written):
    manifest = written[0] / MANIFEST
    manifest.write_text(manifest.read_text().replace("sparsesweep-delta/2", "sparsesweep-delta/9"))
    with pytest.raises(CheckpointError, match="found format 'sparsesweep-delta/9', wanted 'sparsesweep-delta/2'"):
        SparseDelta(written[0], "base1")


def test_a_directory_without_a_delta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no delta.json"):
        SparseDelta(tmp_path, "base1")


# What is not as it was written is refused: the manifest.


def edit_manifest(directory, **changes) -> None:
    facts = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**facts, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, r"delta.json: found the keys \[.*'more'.*\], wanted \['format', "),
        ({"shards": ["a"]}, r"delta.json: shards: found \['a'\], wanted a dict"),
        ({"matrices": {}}, "delta.json: matrices: found {}, wanted a list"),
        ({"recipe": {}}, r"delta.json: found a recipe of \[\], wanted \['allocation', "),
        ({"recipe": {**deltas.recipe().as_dict(), "pattern": 3}}, "delta.json: recipe.pattern: found 3, wanted a dict"),
        ({"recipe": {**deltas.recipe().as_dict(), "label": None}}, "delta.json: recipe.label: found None, wanted a str"),
        ({"shards": {"../a.safetensors": "0"}}, r"found shard '../a.safetensors', wanted the name of a safetensors file in"),
        ({"shards": {"/etc/a.safetensors": "0"}}, "found shard '/etc/a.safetensors', wanted the name of a safetensors file in"),
        ({"shards": {"a.txt": "0"}}, "found shard 'a.txt', wanted the name of a safetensors file in"),
        ({"shards": {"a.safetensors": "0"}}, "a.safetensors: not found, though delta.json lists it; run the prune stage again"),
    ],
)
def test_a_manifest_that_is_not_as_written_is_refused(written, changes, message):
    edit_manifest(written[0], **changes)
    with pytest.raises(CheckpointError, match=message):
        SparseDelta(written[0], "base1")


def test_a_file_with_another_hash_than_the_manifest_says_is_refused(written):
    edit_manifest(written[0], shards={BLOCK: "f00d"})
    with pytest.raises(CheckpointError, match=rf"{BLOCK}: found SHA-256 [0-9a-f]{{64}}, wanted f00d; run the prune stage again"):
        SparseDelta(written[0], "base1").require_hashes()


def test_a_recipe_is_the_same_after_writing_and_reading(written):
    assert Recipe.read(json.loads(json.dumps(deltas.recipe().as_dict())), "here") == deltas.recipe()
    assert list(deltas.recipe().sections) == ["method", "pattern", "allocation", "reconstruction", "prune"]


# What is not as it was written is refused: a block's file.


def test_a_truncated_delta_is_named(written):
    path = written[0] / BLOCK
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="block-00000.safetensors.*truncated"):
        list(SparseDelta(written[0], "base1"))


def test_a_missing_block_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="delta file .*block-00007.safetensors: not found"):
        read_block(tmp_path / "block-00007.safetensors", deltas.no_base)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (lambda f: f.update(more=1), r"found metadata \[.*'more'.*\], wanted \['base', 'format', 'polarity', 'scored', 'shapes'\]"),
        (lambda f: f.pop("polarity"), r"found metadata \['base', 'format', 'scored', 'shapes'\], wanted"),
        (lambda f: f.update(format="x"), "found format 'x', wanted 'sparsesweep-delta/2'"),
        (lambda f: f.update(polarity="1 = pruned"), "found polarity '1 = pruned', wanted '1 = kept'"),
        (lambda f: f.update(base="base9"), "found base base9, wanted base1"),
        (lambda f: f.update(base=3), "found base 3, wanted a str"),
        (lambda f: f.update(shapes=3), "found shapes 3, wanted a dict"),
        (lambda f: f["shapes"].update({"a.weight": [5]}), r"tensor a.weight: found shape \[5\], wanted 2 or 3 sizes"),
        (lambda f: f["shapes"].update({"a.weight": [5, 0]}), r"tensor a.weight: found shape \[5, 0\], wanted 2 or 3 sizes"),
        (lambda f: f["shapes"].update({"a.weight": [6, 7]}), r"tensor a.weight.mask: found shape \[5\], wanted \[6\] for a mask of shape"),
        (lambda f: f["shapes"].update({"e.weight": [1, 1]}), "tensor e.weight: found no e.weight.mask, wanted the mask of shape"),
        (lambda f: f["shapes"].pop("a.weight"), r"found tensors \['a.weight.mask'\], wanted only those of \['b.weight'"),
    ],
)
def test_metadata_that_is_not_as_written_is_refused(written, facts, message):
    deltas.rewrite(written[0] / BLOCK, facts=facts)
    with pytest.raises(CheckpointError, match=f"delta file .*{BLOCK}: {message}"):
        list(SparseDelta(written[0], "base1"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({}, "found metadata None"), ({"sparsesweep": "{"}, "found metadata that is not JSON"), ({"sparsesweep": "[]"}, r"metadata \[\]")],
)
def test_a_file_without_metadata_is_refused(written, metadata, message):
    deltas.rewrite(written[0] / BLOCK, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"delta file .*{BLOCK}: .*{message}"):
        list(SparseDelta(written[0], "base1"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t.update({"x.bias": torch.ones(1)}), r"found tensors \['x.bias'\], wanted only those of"),
        (lambda t: t.update({"a.weight.mask": t["a.weight.mask"].int()}), "tensor a.weight.mask: found dtype I32, wanted U8"),
        (lambda t: t.update({"a.weight.mask": t["a.weight.mask"][:4]}), r"tensor a.weight.mask: found shape \[4\], wanted \[5\]"),
        (lambda t: t.update({"b.weight.values": torch.ones(1).int()}), "tensor b.weight.values: found dtype I32, wanted F64 or F32"),
        (lambda t: t.update({"b.weight.values": torch.ones(1, 1)}), r"tensor b.weight.values: found shape \[1, 1\], wanted \[any\]"),
        (lambda t: t.update({"c.weight.columns": torch.arange(2)}), "tensor c.weight.columns: found dtype I64, wanted I32"),
        (lambda t: t.update({"c.weight.rows": torch.arange(3).int()}), r"tensor c.weight.rows: found shape \[3\], wanted \[2\]"),
        (lambda t: t.update({"d.weight.rows": torch.arange(3).int()}), r"d.weight.rows: found an order for a mask of shape \[2, 3, 4\]"),
    ],
)
def test_tensors_that_do_not_fit_their_mask_are_refused_before_one_is_read(written, tensors, message):
    deltas.rewrite(written[0] / BLOCK, tensors)
    with pytest.raises(CheckpointError, match=f"delta file .*{BLOCK}: .*{message}"):
        list(SparseDelta(written[0], "base1"))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "b.weight",
            lambda t: t.update({"b.weight.values": torch.ones(2)}),
            "b.weight.values: found 2 values, wanted one for each of 1 kept weights",
        ),
        (
            "c.weight",
            lambda t: t["c.weight.columns"].fill_(1),
            "c.weight.columns: found an order that names some twice, wanted each once",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_its_mask_is_refused_when_read(written, name, tensors, message):
    deltas.rewrite(written[0] / BLOCK, tensors)
    with pytest.raises(CheckpointError, match=f"delta file .*{BLOCK}: tensor {message}"):
        SparseDelta(written[0], "base1").change(name, deltas.no_base)
    with pytest.raises(CheckpointError, match=message):
        read_block(written[0] / BLOCK, deltas.no_base)


def test_a_base_with_another_shape_is_refused(written):
    with pytest.raises(CheckpointError, match=rf"tensor a.weight: found shape \[7, 5\], wanted \[5, 7\] as in .*{BLOCK}"):
        SparseDelta(written[0], "base1").apply("a.weight", torch.ones(7, 5))


def test_a_tensor_in_two_files_is_refused(written):
    directory, changes = written
    write_block(directory / "block-00001.safetensors", {"a.weight": changes["a.weight"]}, "base1")
    write_manifest(directory, recipe=deltas.recipe(), summary={}, matrices=[])
    with pytest.raises(CheckpointError, match=f"block-00001.safetensors: tensor a.weight: found in {BLOCK}, too, wanted it once"):
        list(SparseDelta(directory, "base1"))


def test_metadata_that_are_nested_without_end_are_named(tmp_path):
    save_file({"a.mask": torch.zeros(1, dtype=torch.uint8)}, tmp_path / BLOCK, metadata={"sparsesweep": "[" * 100_000})
    with pytest.raises(CheckpointError, match="block-00000.safetensors: found metadata that is not JSON .*nested too deeply"):
        read_block(tmp_path / BLOCK, deltas.no_base)


@pytest.mark.parametrize("shape", [[True, 1], [2**64, 1], [2**31, 1], [0, 1], [1.0, 1], [1]])
def test_a_shape_that_no_mask_has_is_named(tmp_path, shape):
    facts = {"format": "sparsesweep-delta/2", "base": "base1", "polarity": "1 = kept", "shapes": {"a": shape}, "scored": {}}
    metadata = {"sparsesweep": json.dumps(facts)}
    save_file({"a.mask": torch.zeros(1, dtype=torch.uint8)}, tmp_path / BLOCK, metadata=metadata)
    with pytest.raises(CheckpointError, match="tensor a: found shape .*, wanted 2 or 3 sizes"):
        read_block(tmp_path / BLOCK, deltas.no_base)


def test_a_shape_far_larger_than_its_mask_is_named(tmp_path):
    facts = {"format": "sparsesweep-delta/2", "base": "base1", "polarity": "1 = kept", "shapes": {"a": [2**31 - 1] * 3}, "scored": {}}
    metadata = {"sparsesweep": json.dumps(facts)}
    save_file({"a.mask": torch.zeros(1, dtype=torch.uint8)}, tmp_path / BLOCK, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"tensor a.mask: found shape \[1\], wanted"):
        read_block(tmp_path / BLOCK, deltas.no_base)
