"""The bytes of what pruning made: the dense matrices, their masks, the delta on disk, and the matrices packed.

    packed = one bit a weight for the mask, and the kept weights as stored

A release is plain dense tensors; packed is what a lossless form of them needs without further compression.
"""

from pathlib import Path
from typing import Any

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.evaluation.measurement import Better, Kind, Measurement
from stages.files import bytes_in

BITS = 8  # of a byte


def size_measurements(base: Checkpoint, delta: SparseDelta, directory: Path) -> list[Measurement]:
    """The bytes of the matrices in scope, in their several forms.

    Args:
        directory: of the delta.
    """
    weights = sum(row["weights"] for row in delta.matrices)
    kept = weights - sum(row["zeros"] for row in delta.matrices)
    dense = sum(base.stored(name).nbytes for name in delta)
    mask = -(-weights // BITS)
    sizes = {
        "dense_bytes": ("dense matrices", dense),
        "mask_bytes": ("masks", mask),
        "delta_bytes": ("delta on disk", bytes_in(directory)),
        "packed_bytes": ("matrices packed: masks and kept weights", mask + round(dense * kept / weights)),
    }
    facts: dict[str, Any] = {
        "kind": Kind.SIZE,
        "name": "matrices",
        "count": len(delta.matrices),
        "counted": "matrices",
        "clusters": 1,
        "unit": "bytes",
    }
    return [
        Measurement(**facts, metric=metric, label=label, value=float(value), better=Better.LOWER)
        for metric, (label, value) in sizes.items()
    ]
