"""The record of a run for the provenance of its results: versions, device, seconds and peak memory."""

import hashlib
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.devices import device_name, peak_memory
from stages.files import sha256

CODE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "safetensors")


def code_revision() -> str:
    """The git commit of the code, with -dirty if the code or dvc.yaml differs from it; "unknown" without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", "stages", "dvc.yaml") else commit
    except (FileNotFoundError, subprocess.SubprocessError):
        return "unknown"


def code_sha256(*names: str) -> str:
    """Of the code that decides a result.

    Args:
        names: packages and files below stages/.
    """
    files = sorted(file for name in names for file in CODE.glob(f"{name}/**/*.py"))
    files += [CODE / name for name in names if (CODE / name).is_file()]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CODE.parent, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


@dataclass(kw_only=True)
class Stopwatch:
    """Measures seconds of wall time since it was made."""

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
    """The facts that differ from run to run; no file that a later stage depends on contains them.

    Args:
        earlier: seconds that an interrupted run spent on results that this run reuses.
    """
    return {
        "seconds": round(earlier + stopwatch.seconds, 2),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "code": code_revision(),
        "versions": versions(),
    }
