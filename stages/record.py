"""What a run was: versions, device, seconds and peak memory, for the provenance of its results."""

import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.config import require
from stages.errors import SparsesweepError

PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "safetensors")
CPU_FACTS = Path("/proc/cpuinfo")


def code_revision() -> str:
    """The git commit of the code, marked -dirty where code or stage definitions differ from it; unknown without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", "stages", "dvc.yaml") else commit
    except (FileNotFoundError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name where the system tells it, else the architecture's."""
    facts = CPU_FACTS.read_text(encoding="utf8", errors="replace").splitlines() if CPU_FACTS.is_file() else []
    named = (value.strip() for key, _, value in (fact.partition(":") for fact in facts) if key.strip() == "model name")
    return next(named, f"{platform.machine()} CPU")


def choose_device(key: str, device: str) -> torch.device:
    """The device asked for by the configuration's `key`; auto: a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(chosen.type == "cpu" or (chosen.index or 0) < present, key, device, f"cpu or auto: torch finds {present} GPUs here")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype: float32 on a CPU, where halves are slow; else the best half that the GPU computes in."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


@contextmanager
def gpu_memory(key: str, found: object) -> Iterator[None]:
    """Turn a GPU that runs out of memory into an error that names the key to lower.

    Raises:
        SparsesweepError: naming the key and its value.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SparsesweepError(f"the GPU is out of memory with {key} = {found}; lower it ({str(error).split('.')[0]})") from error


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU held, or that this process had resident (mapped files included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds of wall time since it was made."""

    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def lap(self) -> float:
        """Seconds since it was made or since the last lap."""
        seconds, self.started = self.seconds, time.perf_counter()
        return seconds


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def of_run(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch, earlier: float = 0) -> dict[str, Any]:
    """The facts that differ from run to run; kept out of every file that a later stage depends on.

    Args:
        earlier: seconds that an interrupted run had spent on what this one took over.
    """
    return {
        "seconds": round(earlier + stopwatch.seconds, 2),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "code": code_revision(),
        "versions": versions(),
    }
