"""The section `prune`: how the prune stage runs."""

from dataclasses import dataclass
from enum import StrEnum

from stages.devices import device_field, dtype_field
from stages.schema import number, one_of, require

# Keys that speak of the machine and of what is kept on its disk, and change nothing of the result; a recipe has none of them.
ANY_MACHINE: dict[str, str | None] = {"device": "auto", "memory_budget": None, "statistics": "none"}


class Propagation(StrEnum):
    """Whose outputs are the inputs of what is pruned next: the pruned block's, the dense block's, or the pruned layers' one by one."""

    PRUNED = "pruned"
    DENSE = "dense"
    SEQUENTIAL = "sequential"


class Kept(StrEnum):
    """What the observe stage keeps of the inputs of layers, for all points that one pass can serve: nothing, what grows with their number,
    or also their Gram matrices."""

    NONE = "none"
    NORMS = "norms"
    GRAM = "gram"


@dataclass(kw_only=True, slots=True)
class Prune:
    """device, dtype: of the arithmetic; statistics are float32 always.

    micro_batch: windows per forward pass; null: by the kind of device.
    propagate: whose outputs the next block is pruned for, the pruned block's or the dense one's; sequential: likewise, and each layer is
        pruned for what the pruned layers before it in its block give.
    error_tokens: calibration tokens on which the relative output error is measured.
    expert_tokens: an expert that fewer calibration tokens chose is calibrated on a sample of all.
    memory_budget: of host memory, GiB; null: what is free.
    statistics: what a dense pass keeps on the disk for all points of a sweep, see Kept.
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
    statistics: str = one_of(*Kept)

    def check(self, key: str) -> None:
        if self.statistics != Kept.NONE:
            condition = f"with {key}.statistics = {self.statistics}"
            wanted = f"{Propagation.DENSE} {condition}: other orders have other statistics at every point"
            require(self.propagate == Propagation.DENSE, f"{key}.propagate", self.propagate, wanted)
            require(self.processes == 1, f"{key}.processes", self.processes, f"1 {condition}: one process keeps and reads them")
