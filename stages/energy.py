"""Measure the energy that a run takes, by the counters that hardware keeps.

    GPU   the driver's total of the card (NVML), Volta or later; by the package nvidia-ml-py, the extra `energy`
    CPU   the processor's packages (RAPL), as Linux lists them; most systems let only root read them

A counter counts all that runs on its card or package, not this process alone; what is outside of them, such as disks, is not in it.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
SECONDS = 30  # between readings: a counter of 32 bits wraps within minutes under load


@dataclass(kw_only=True)
class Counter:
    """A counter of joules.

    name: what it counts. read: joules from some moment on. wraps_at: joules at which it begins at 0 again; None: never.
    """

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None
    total: float = 0.0
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read()

    def update(self) -> None:
        """Add what was counted since the last reading."""
        now = self.read()
        self.total += now - self.last + (self.wraps_at or 0) * (now < self.last)
        self.last = now


@dataclass(kw_only=True)
class Meter:
    """The counters of the devices of a run, read now and then until it ends; made by `metered`."""

    counters: list[Counter]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self) -> None:
        with self.lock:
            for counter in self.counters:
                counter.update()

    def joules(self) -> dict[str, float] | None:
        """Joules since the meter was made, by what was counted; None where this machine has no counter to read."""
        self.update()
        return {counter.name: round(counter.total, 1) for counter in self.counters} or None


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measure the energy of the processor and, where the run computes on one, of the GPU, for the length of the with statement."""
    meter, stopped = Meter(counters=[*of_packages(), *of_gpu(device)]), threading.Event()

    def watch() -> None:
        while not stopped.wait(SECONDS):
            meter.update()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stopped.set()
        thread.join()


def of_packages() -> list[Counter]:
    """The counters of the processor's packages; none where the system has none or forbids to read them."""
    counters = []
    for directory in sorted(POWERCAP.glob("intel-rapl:*")):  # AMD's, too
        try:
            name = (directory / "name").read_text(encoding="utf8").strip()
            if name.startswith("package"):
                microjoules = int((directory / "max_energy_range_uj").read_text(encoding="utf8"))
                counters.append(Counter(name=name, read=_reader(directory / "energy_uj"), wraps_at=microjoules / 1e6))
        except (OSError, ValueError):
            continue
    return counters


def _reader(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text(encoding="utf8")) / 1e6


def of_gpu(device: torch.device) -> list[Counter]:
    """The counter of the GPU that a run computes on; none without the package, or on a card that has none."""
    if device.type != "cuda":
        return []
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return [Counter(name="GPU", read=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
    except pynvml.NVMLError:
        return []
