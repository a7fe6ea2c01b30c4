"""The section `prune`: how the prune stage runs."""

from dataclasses import dataclass
from enum import StrEnum

from stages.devices import device_field, dtype_field
from stages.schema import number, one_of

ANY_MACHINE: dict[str, str | None] = {"device": "auto", "memory_budget": None}  # keys that speak of the machine; a recipe has none of them


class Propagation(StrEnum):
    """Whose outputs are the inputs of what is pruned next: the pruned block's, the dense block's, or the pruned layers' one by one."""

    PRUNED = "pruned"
    DENSE = "dense"
    SEQUENTIAL = "sequential"


@dataclass(kw_only=True, slots=True)
class Prune:
    """device, dtype: of the arithmetic; statistics are float32 always.

    micro_batch: windows per forward pass; null: by the kind of device.
    propagate: whose outputs the next block is pruned for, the pruned block's or the dense one's; sequential: likewise, and each layer is
        pruned for what the pruned layers before it in its block give.
    error_tokens: calibration tokens on which the relative output error is measured.
    expert_tokens: an expert that fewer calibration tokens chose is calibrated on a sample of all.
    memory_budget: of host memory, GiB; null: what is free.
    processes: that share the work on this machine, each with its share of the windows, and with a GPU of its own where there are GPUs.
    """

    device: str = device_field()
    dtype: str = dtype_field()
    micro_batch: int | None = number(minimum=1)
    propagate: str = one_of(*Propagation)
    error_tokens: int = number(minimum=1, unit="token")
    expert_tokens: int = number(minimum=0, unit="tokens")
    memory_budget: float | None = number(above=0, unit="GiB")
    processes: int = number(minimum=1, unit="process")
