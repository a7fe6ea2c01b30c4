"""Choose the device and the dtype of a stage, and measure its memory."""

import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from stages.errors import SparsesweepError
from stages.schema import checked, one_of, require

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}  # its settings, by either name
CPU_FACTS, RESIDENT = Path("/proc/cpuinfo"), Path("/proc/self/statm")


def device_field() -> Any:
    """A field for a device, see choose_device."""
    return checked(lambda device: re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is not None, "auto, cpu or cuda[:N]")


def dtype_field() -> Any:
    """A field for a dtype, see choose_dtype."""
    return one_of("auto", "bfloat16", "float16", "float32")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name if the system states it, else the architecture's."""
    facts = CPU_FACTS.read_text(encoding="utf8", errors="replace").splitlines() if CPU_FACTS.is_file() else []
    named = (value.strip() for key, _, value in (fact.partition(":") for fact in facts) if key.strip() == "model name")
    return next(named, f"{platform.machine()} CPU")


def choose_device(key: str, device: str) -> torch.device:
    """Choose the device that the configuration's `key` names; auto: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the named GPU does not exist.
    """
    if not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # tensors of many sizes leave gaps otherwise
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(chosen.type == "cpu" or (chosen.index or 0) < gpu_count, key, device, f"cpu or auto: torch finds {gpu_count} GPUs here")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose the compute dtype; auto: float32 on a CPU, where half precision is slow, else the best half precision of the GPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


@contextmanager
def gpu_memory(key: str, value: object) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU into an error that names the key to lower.

    Args:
        key: that of the configuration. value: its value.

    Raises:
        SparsesweepError: the GPU is out of memory; names the key and its value.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SparsesweepError(f"the GPU is out of memory with {key} = {value}; lower it ({str(error).split('.')[0]})") from error


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one of this thread for a while; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU; from a GPU through page-locked memory, which is several times faster."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(index) * torch.cuda.get_device_properties(device).total_memory
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(allowed) - torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0] + cached)


_EARLIER_PEAKS: dict[torch.device, int] = {}  # of GPUs whose count of the peak was begun anew


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process (including mapped files)."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), _EARLIER_PEAKS.get(device, 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeakMemory:
    """The peak memory while the context lasts: allocated on the GPU, or resident in this process, looked at every SAMPLED seconds."""

    SAMPLED = 0.02

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._ended = Event()
        self._watch = Thread(target=self._look, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            _EARLIER_PEAKS[self.device] = peak_memory(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._ended.set()
            self._watch.join()

    def _look(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self.SAMPLED)
            self.bytes = max(self.bytes, _resident())


def _resident() -> int:
    """Bytes of this process that are in memory now; where the system does not tell, the most there ever were."""
    if not RESIDENT.is_file():
        return peak_memory(torch.device("cpu"))
    return int(RESIDENT.read_text().split()[1]) * resource.getpagesize()
