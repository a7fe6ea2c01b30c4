import shutil

import pytest
import torch

from stages.errors import SparsesweepError
from stages.streaming.host_memory import HostMemory


def test_buffers_are_counted_and_what_is_beyond_the_budget_lies_in_a_file_without_a_name(tmp_path):
    memory = HostMemory(100, tmp_path)
    first, location = memory.buffer((3, 4), torch.float32)
    assert (first.shape, first.dtype, location, memory.left) == ((3, 4), torch.float32, "memory", 52)
    second, location = memory.buffer((14,), torch.float32)
    assert (second.shape, second.dtype, location, memory.left) == ((14,), torch.float32, f"a file of 0.00 GB in {tmp_path}", 52)
    assert not list(tmp_path.iterdir())
    assert torch.equal(second.copy_(torch.arange(14)), torch.arange(14.0))
    assert memory.buffer((26,), torch.float16)[1] == "memory"
    assert memory.left == 0


def test_unbounded_memory_gives_all_that_is_asked_for():
    memory = HostMemory.unbounded()
    assert [memory.buffer((10,), torch.int32)[1] for _ in range(3)] == ["memory"] * 3


def test_a_buffer_that_the_disk_has_no_space_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(SparsesweepError, match=f"{tmp_path}: found 0.00 GB free on its disk, wanted 0.00 GB"):
        HostMemory(0, tmp_path).buffer((1,), torch.float32)
