import shutil

import pytest
import torch

from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint, all_finite, fingerprint
from stages.errors import CheckpointError, ConfigError
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
