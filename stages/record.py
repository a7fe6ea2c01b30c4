"""What a run was: versions, device, seconds and peak memory, for the provenance of its results."""

import platform
import resource
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from stages.config import require

PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "safetensors")


def code_revision() -> str:
    """The git commit of the code, marked when the tree differs from it; 'unknown' outside a repository."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def choose_device(device: str) -> torch.device:
    """The device asked for; auto: a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    require(chosen.type == "cpu" or torch.cuda.is_available(), "device", device, "cpu or auto: torch finds no GPU here")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype: float32 on a CPU, where halves are slow; else the best half that the GPU computes in."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


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


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def of_run(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch) -> dict[str, Any]:
    """The facts that differ from run to run; kept out of every file that a later stage depends on."""
    return {
        "seconds": round(stopwatch.seconds, 2),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "code": code_revision(),
        "versions": versions(),
    }
