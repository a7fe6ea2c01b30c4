import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.reader import DTYPES, StoredTensor, shard_header
from stages.checkpoint.shard import write_shard
from stages.errors import CheckpointError


def test_a_shard_of_every_dtype_and_shape_is_what_safetensors_writes(tmp_path):
    tensors = {f"tensor {code}": torch.arange(6).reshape(2, 3).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "ünï\\code": torch.ones(2, dtype=torch.bool)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    stored = shard_header(tmp_path / "theirs.safetensors")
    write_shard(tmp_path / "ours.safetensors", stored, (tensors[name] for name in stored))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert set(load_file(tmp_path / "ours.safetensors")) == set(tensors)


def test_a_tensor_that_is_not_what_was_stated_is_refused(tmp_path):
    stated = {"a": StoredTensor(shape=(2,), dtype=torch.float32, offset=0)}
    with pytest.raises(CheckpointError, match=r"tensor a: found torch.float16 of \[2\], wanted torch.float32 of \[2\]"):
        write_shard(tmp_path / "x.safetensors", stated, [torch.zeros(2, dtype=torch.float16)])
    with pytest.raises(CheckpointError, match=r"tensor a: found torch.float32 of \[3\], wanted"):
        write_shard(tmp_path / "x.safetensors", stated, [torch.zeros(3)])
