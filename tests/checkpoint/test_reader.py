import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.model import load_model
from stages.checkpoint.reader import INDEX, PROVENANCE, Checkpoint, all_finite, fingerprint, read_weight_map, shard_header
from stages.errors import CheckpointError, ConfigError
from tests import tiny


def test_tensors_come_back_as_they_were_saved(base):
    for name, tensor in tiny.model().state_dict().items():
        assert base.shape(name) == tuple(tensor.shape)
        assert base.dtype(name) == torch.bfloat16
        assert torch.equal(base.tensor(name), tensor)


@pytest.fixture()
def copy(base, tmp_path):
    return shutil.copytree(base.directory, tmp_path / "copy")


def test_an_entry_of_the_first_dimension_is_read_alone(base):
    for name in base:
        assert torch.equal(base.tensor(name, entry=3), base.tensor(name)[3])


def test_a_truncated_shard_is_named_before_any_tensor_is_read(copy):
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:5])
    message = rf"{shard.name}: found 5 bytes that are no whole safetensors file \(.*header too small\); is it truncated"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy)


def test_a_shard_that_is_no_file_is_named(copy):
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.unlink()
    shard.mkdir()
    with pytest.raises(CheckpointError, match=f"{shard.name}: not found, though the index names it"):
        Checkpoint(copy)


def test_a_tensor_that_its_shard_lacks_is_named(copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["other.weight"] = next(iter(index["weight_map"].values()))
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no tensor other.weight, though the index says so"):
        Checkpoint(copy)


def test_a_shard_that_is_cut_short_or_removed_later_is_named(copy):
    checkpoint = Checkpoint(copy)
    stored, shard = checkpoint.stored("model.norm.weight"), copy / checkpoint.shard_of["model.norm.weight"]
    shard.write_bytes(shard.read_bytes()[: stored.offset + 10])
    with pytest.raises(
        CheckpointError, match=f"{shard.name}: found 10 bytes of model.norm.weight, wanted {stored.nbytes}: it is truncated"
    ):
        checkpoint.tensor("model.norm.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: No such file or directory; was it there a moment ago"):
        checkpoint.tensor("model.norm.weight")


def test_offsets_follow_from_shapes_and_dtypes(tmp_path):
    tensors = {
        "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def write_shard(path, header: dict | bytes, data: bytes):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([3], 0, 12), "b": entry([3], 8, 20)}, 20, "invalid offset for tensor `b`"),
        ({"a": entry([3], 12, 24)}, 24, "invalid offset for tensor `a`"),
        ({"a": entry([3], 12, 0)}, 12, "invalid offset for tensor `a`"),
        ({"a": entry([4], 0, 12)}, 12, "invalid shape"),
        ({"a": entry([-3], 0, 12)}, 12, "invalid value"),
        ({"a": entry([2**62, 8], 0, 12)}, 12, ""),
        ({"a": entry([3], 0, 12)}, 11, "not fully covered"),
        ({"a": entry([3], 0, 12)}, 13, "not fully covered"),
        ({"a": entry([3], 0, 12, dtype="F31")}, 12, "unknown variant"),
        (b"[]", 0, "invalid JSON"),
        (b'{"a"', 0, "invalid JSON"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, data, message):
    shard = write_shard(tmp_path / "a.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=rf"a.safetensors: found \d+ bytes that are no whole safetensors file \(.*{message}"):
        shard_header(shard)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U16"])
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
    size = {"F8_E4M3": 1, "U16": 2}[dtype]
    shard = write_shard(tmp_path / "a.safetensors", {"w": entry([4], 0, 4 * size, dtype)}, bytes(4 * size))
    with pytest.raises(CheckpointError, match=f"a.safetensors, tensor w: found dtype {dtype}, wanted one of F64, F32, F16, BF16"):
        shard_header(shard)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "x/y.safetensors", "..", "config.json", "", None])
def test_an_index_names_only_files_beside_it(copy, shard):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: found tensor 'model.norm.weight' in .*, wanted the name of a .safetensors file"):
        Checkpoint(copy)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_table_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=f"{INDEX}: found no weight_map that names tensors and their shards"):
        read_weight_map(tmp_path / INDEX)


def test_a_directory_without_an_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json"):
        Checkpoint(tmp_path)


def test_the_fingerprint_is_of_the_weights_alone():
    shards = {"a.safetensors": "1", "b.safetensors": "2"}
    assert fingerprint({**shards, "config.json": "3"}) == fingerprint({**shards, "config.json": "4"})
    assert fingerprint(shards) != fingerprint({**shards, "b.safetensors": "3"})


def test_a_model_with_other_parameters_than_its_tensors_is_refused(base):
    class Short(Checkpoint):
        def __iter__(self):
            return (name for name in super().__iter__() if name != "model.norm.weight")

    with pytest.raises(CheckpointError, match="does not fit MistralForCausalLM: it has no tensor model.norm.weight"):
        load_model(Short(base.directory), None, dtype=torch.float32, device=torch.device("cpu"))


def test_windows_longer_than_the_models_context_are_refused(base):
    base.require_context(512, "calibration.window_length")
    with pytest.raises(ConfigError, match="calibration.window_length: found 513, wanted at most the model's context of 512"):
        base.require_context(513, "calibration.window_length")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_single_value_that_is_not_finite_is_seen(dtype, value):
    tensor = torch.randn(3, 700_000).to(dtype)
    assert all_finite(tensor)
    tensor[-1, -1] = value
    assert not all_finite(tensor)


def test_integers_and_empty_tensors_are_finite():
    assert all_finite(torch.tensor([2**31 - 1]))
    assert all_finite(torch.empty(0))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"files": 7}', '{"files": {"a": 7}}', '{"files": {"../../a": "0"}}', '{"files": {"/a": "0"}}']
)
def test_a_record_without_hashes_of_files_beside_it_is_refused(copy, content):
    (copy / PROVENANCE).write_text(content)
    with pytest.raises(CheckpointError, match="provenance.json: found"):
        _ = Checkpoint(copy).fingerprint


@pytest.mark.parametrize("content", ["[]", "7", "null"])
def test_a_config_that_is_no_object_is_named(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json: found a .*, wanted an object"):
        _ = Checkpoint(copy).context_length


def test_a_section_that_is_none_states_nothing(copy):
    (copy / "config.json").write_text('{"text_config": 7}')
    assert Checkpoint(copy).context_length is None


def test_a_tensor_that_the_index_leaves_out_is_read_as_clients_read_it(copy):
    index = json.loads((copy / INDEX).read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    (copy / INDEX).write_text(json.dumps(index))
    checkpoint = Checkpoint(copy)
    assert checkpoint.shard_of["model.norm.weight"] == shard
    assert checkpoint.tensor("model.norm.weight").shape == checkpoint.headers[shard]["model.norm.weight"].shape


def test_a_tensor_in_two_shards_is_named(copy):
    index = json.loads((copy / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    both = {**load_file(copy / first), "model.norm.weight": torch.ones(2), "other.weight": torch.ones(1)}
    save_file(both, copy / first)
    save_file({**load_file(copy / second), "other.weight": torch.ones(1)}, copy / second)
    index["weight_map"] |= {"model.norm.weight": first}
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"found tensor (other|model.norm).weight in .* and in .*, wanted it once"):
        Checkpoint(copy)


def test_settings_are_those_of_the_model_and_with_answers_of_how_it_answers(copy):
    def settings(*, answers: bool) -> str:
        return Checkpoint(copy).settings_sha256(answers=answers)

    config = json.loads((copy / "config.json").read_text())
    alone, answering = settings(answers=False), settings(answers=True)
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert (settings(answers=False), settings(answers=True)) == (alone, answering)
    (copy / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    assert settings(answers=False) == alone
    assert settings(answers=True) != answering
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 123.0}))
    assert settings(answers=False) != alone
