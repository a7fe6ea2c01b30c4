"""Write a shard tensor by tensor, with one tensor in memory at a time.

The bytes are those of safetensors' own `save_file` for tensors in the order that it stores them in: dtypes from wide to narrow, then names.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from stages.checkpoint.reader import DTYPES, StoredTensor
from stages.errors import CheckpointError

ALIGNMENT = 8  # bytes, of the header
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_shard(path: Path, stored: Mapping[str, StoredTensor], tensors: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file.

    Args:
        stored: tensor name -> its shape and dtype, in the order of the file; offsets are not looked at.
        tensors: in the same order; each is written before the next is asked for.

    Raises:
        CheckpointError: a tensor has another shape or dtype than was stated; names it.
    """
    with path.open("wb") as file:
        file.write(_header(stored))
        for (name, wanted), tensor in zip(stored.items(), tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (wanted.dtype, wanted.shape):
                found = f"{tensor.dtype} of {list(tensor.shape)}"
                raise CheckpointError(f"{path}, tensor {name}: found {found}, wanted {wanted.dtype} of {list(wanted.shape)}")
            file.write(raw_bytes(tensor).data)


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor on the host, [bytes], uint8, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _header(stored: Mapping[str, StoredTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in stored.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
