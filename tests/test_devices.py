"""Which device and dtype a stage computes with."""

import platform

import pytest
import torch

from stages import devices
from stages.errors import ConfigError, SparsesweepError


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="prune.device: found 'cuda', wanted cpu or auto: torch finds 0 GPUs here"):
        devices.choose_device("prune.device", "cuda")
    assert devices.choose_device("prune.device", "auto") == torch.device("cpu")


def test_a_cpu_computes_in_float32_and_an_old_gpu_in_float16(monkeypatch):
    assert devices.choose_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert devices.choose_dtype("auto", torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert devices.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert devices.choose_dtype("float32", torch.device("cuda")) == torch.float32


def test_a_gpu_without_memory_is_an_error_that_names_the_key_to_lower():
    message = r"^the GPU is out of memory with prune.micro_batch = 8; lower it \(CUDA out of memory\)$"
    with pytest.raises(SparsesweepError, match=message), devices.gpu_memory("prune.micro_batch", 8):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="another error"), devices.gpu_memory("prune.micro_batch", 8):
        raise RuntimeError("another error")


def test_a_cpu_is_called_by_its_name_where_the_system_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPU_FACTS", tmp_path / "cpuinfo")
    threads = f", {torch.get_num_threads()} threads"
    assert devices.device_name(torch.device("cpu")) == f"{platform.machine()} CPU{threads}"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast: One\nflags\t\t: a b\n\nprocessor\t: 1\n")
    assert devices.device_name(torch.device("cpu")) == f"Fast: One{threads}"


def test_the_peak_of_a_stretch_of_work_is_its_own():
    with devices.PeakMemory(torch.device("cpu")) as small:
        pass
    with devices.PeakMemory(torch.device("cpu")) as large:
        held = torch.zeros(256 * 2**20, dtype=torch.uint8).add_(1)
    del held
    with devices.PeakMemory(torch.device("cpu")) as after:
        pass
    assert large.bytes - small.bytes > 128 * 2**20
    assert after.bytes < large.bytes - 128 * 2**20
