"""Several processes that prune one model, each with some of the windows: how they are started, and their collective operations.

torchrun starts them: by hand, or in the place of a single process. In a single process, without torch.distributed, each operation returns
its argument.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import distributed as dist

from stages.errors import ConfigError


def is_started() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_processes() -> int:
    """How many processes torchrun started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if is_started() else 1


def become(module: str, arguments: list[str], processes: int) -> NoReturn:
    """Run a module in several processes on this machine instead of this one; torchrun takes this process's place.

    Each takes an equal share of the processor's threads unless OMP_NUM_THREADS says otherwise.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module, *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialise torch.distributed if torchrun started this process: nccl on GPUs, gloo on CPUs."""
    if not is_started():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that wait for this one


def require_gpus(device: torch.device, processes: int) -> None:
    """Refuse more processes on this machine than it has GPUs, where a GPU computes.

    Raises:
        ConfigError: there are more processes than GPUs, or one GPU was named and there are several processes.
    """
    if device.type != "cuda":
        return
    if device.index is not None and processes > 1:
        raise ConfigError(
            f"prune.device: found {str(device)!r} for {processes} processes, wanted cuda or auto: each takes a GPU of its own"
        )
    if processes > torch.cuda.device_count():
        raise ConfigError(f"prune.processes: found {processes}, wanted at most the {torch.cuda.device_count()} GPUs of this machine")


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process by its local rank, or the given device if it names one.

    Raises:
        ConfigError: see require_gpus.
    """
    if device.type != "cuda" or not is_started():
        return device
    require_gpus(device, local_world_size())
    if device.index is not None:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes have called this."""
    all_reduce(torch.zeros(()))


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, changed in place to its sum over all processes; the same bits in each."""
    if dist.is_initialized():
        device = tensor.device
        on_device = tensor.to(_backend_device())
        dist.all_reduce(on_device)
        tensor.copy_(on_device.to(device))
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, changed in place to its mean over all processes."""
    return all_reduce(tensor.div_(world_size()))


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """The tensor, changed in place to that of the process with rank `source`.

    Raises:
        ValueError: it is not contiguous: its memory is sent in the order in which it is stored.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"found a tensor of strides {tensor.stride()} for shape {list(tensor.shape)}, wanted a contiguous one")
    if dist.is_initialized():
        on_device = tensor.to(_backend_device())
        dist.broadcast(on_device, source)
        tensor.copy_(on_device)
    return tensor


def _backend_device() -> torch.device:
    """The device that the backend sends tensors from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
