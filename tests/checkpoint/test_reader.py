import shutil

import pytest
import torch

from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint, fingerprint
from stages.errors import CheckpointError
from tests import tiny


def test_tensors_come_back_as_they_were_saved(base):
    for name, tensor in tiny.model().state_dict().items():
        assert base.shape(name) == tuple(tensor.shape)
        assert base.dtype(name) == torch.bfloat16
        assert torch.equal(base.tensor(name), tensor)


def test_a_truncated_shard_is_named_before_any_tensor_is_read(base, tmp_path):
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:5])
    with pytest.raises(CheckpointError, match=f"{shard.name}: 5 bytes do not hold a safetensors header"):
        Checkpoint(copy)


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
