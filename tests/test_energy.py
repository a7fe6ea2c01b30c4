"""The counters of a machine are files and a driver's; here they are files of a test and a driver of one."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from stages import energy
from stages.energy import Counter, metered

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A processor with one package, that counts to 1000 J, and the domain of its cores, which the package has in it."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{label}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / name / "energy_uj").write_text("900000000\n")
    return tmp_path / "intel-rapl:0/energy_uj"


def test_joules_are_those_since_the_beginning_by_package(package):
    with metered(CPU) as meter:
        package.write_text("950000000")
        assert meter.joules() == {"package-0": 50.0}
        package.write_text("975500000")
        assert meter.joules() == {"package-0": 75.5}


def test_a_counter_that_begins_anew_goes_on(package):
    with metered(CPU) as meter:
        package.write_text("20000000")
        assert meter.joules() == {"package-0": 120.0}


def test_a_long_run_reads_the_counter_before_it_wraps_twice(package, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.01)
    readings = iter([*range(900, 1000, 50), 100, 600, *range(100, 1100, 500)])
    read, seen = [], energy._reader(package)

    def counted() -> float:
        read.append(seen())
        package.write_text(str(next(readings, 600) * 10**6))
        return read[-1]

    monkeypatch.setattr(energy, "_reader", lambda path: counted)
    with metered(CPU) as meter:
        while len(read) < 10:
            time.sleep(0.01)
        total = meter.joules()["package-0"]
    assert total == 1700.0  # 900 -> 1950 -> 2600 in steps that each wrap at most once


def test_what_may_not_be_read_is_no_counter(package):
    (package.parent / "max_energy_range_uj").unlink()
    with metered(CPU) as meter:
        assert meter.joules() is None


def test_a_gpu_counts_in_millijoules_by_its_uuid(monkeypatch, tmp_path):
    asked = []
    driver = SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000_000 + 1_500 * len(asked.append(handle) or asked),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    with metered(GPU) as meter:
        assert meter.joules() == {"GPU": 1.5}
    assert set(asked) == {"GPU-1-2"}


def test_without_the_package_or_with_an_old_card_a_gpu_has_no_counter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.of_gpu(GPU) == []
    error = type("NVMLError", (Exception,), {})

    def refuse() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=error, nvmlInit=refuse))
    assert energy.of_gpu(GPU) == []


def test_a_counter_adds_what_is_new():
    values = iter([10.0, 15.0, 15.0, 18.0])
    counter = Counter(name="a", read=lambda: next(values))
    for total in (5.0, 5.0, 8.0):
        counter.update()
        assert counter.total == total
