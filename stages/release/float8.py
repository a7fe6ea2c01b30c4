"""A packed release with the matrices in scope as floats of 8 bits, in the layout of compressed-tensors, checked.

For `X.weight`, float8 E4M3, there is `X.weight_scale`, [rows, 1], in the base's dtype: the format float-quantized, a scale for each output
channel, inputs as they are. config.json names it in quantization_config. See stages/quantisation/float8.py.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.layout import read_layout
from stages.checkpoint.model import empty_model
from stages.checkpoint.reader import INDEX, Checkpoint, read_weight_map
from stages.errors import ConfigError, ReleaseError
from stages.files import read_json, write_json
from stages.quantisation.float8 import DTYPE, Float8, dequantise, quantise, require_linear
from stages.release.loading import Loaded, check_loading

PACKAGE = "compressed_tensors"
SIGN = 0x7F  # the bits of a float8 without its sign
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


@dataclass(frozen=True, kw_only=True)
class CountedFloat8:
    """What was read back. bytes: of all shards. zeros, weights: of the matrices in scope. loaded: how stock transformers loads it."""

    bytes: int
    zeros: int
    weights: int
    loaded: Loaded


def require_float8(delta: SparseDelta) -> None:
    """Refuse what cannot be written or checked, before anything is.

    Raises:
        ConfigError: compressed-tensors, with which the release is loaded once, is not installed. ArchitectureError: see require_linear.
    """
    require_linear(delta)
    if find_spec(PACKAGE) is None:
        advice = "pip install -c constraints.txt -e '.[float8]' brings it"
        raise ConfigError(f"publish.dtype: found float8 without the package compressed-tensors, with which it is loaded; {advice}")


def write_float8(directory: Path, base: Checkpoint, delta: SparseDelta) -> CountedFloat8:
    """Rewrite a packed release and check it; see to_float8 and check_float8."""
    to_float8(directory, delta)
    return check_float8(directory, base, delta)


def to_float8(directory: Path, delta: SparseDelta) -> None:
    """Rewrite a packed release's shards, index and config; one shard is in memory at a time."""
    packed = Checkpoint(directory)
    weight_map: dict[str, str] = {}
    for shard, header in tqdm(packed.headers.items(), desc="writing float8", unit="shard"):
        tensors: dict[str, torch.Tensor] = {}
        for name in header:
            tensors |= _stored(name, packed.tensor(name)) if name in delta else {name: packed.tensor(name)}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = read_json(directory / INDEX)
    total = sum(_file_bytes(directory / shard) for shard in packed.headers)
    write_json(directory / INDEX, {"metadata": index.get("metadata", {}) | {"total_size": total}, "weight_map": weight_map})
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", config | {"quantization_config": quantization_config(packed, delta)})


def _stored(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = quantise(weight)
    return {name: codes, scale_of(name): scales}


def scale_of(name: str) -> str:
    """Name of a matrix's scales."""
    return f"{name}_scale"


def _file_bytes(path: Path) -> int:
    """Bytes of the tensors in a shard."""
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def quantization_config(base: Checkpoint, delta: SparseDelta) -> dict[str, Any]:
    """The section of config.json. Linear layers out of scope, such as the output head, are in `ignore`."""
    model = empty_model(base.directory, torch.float32)
    slices = read_layout(model, base).slices
    in_scope = {slices[name].name for name in delta}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in linear if f"{name}.weight" not in in_scope],
        "kv_cache_scheme": None,
    }


def check_float8(directory: Path, base: Checkpoint, delta: SparseDelta, free_memory: int | None = None) -> CountedFloat8:
    """Read every tensor back, count zeros matrix by matrix against the masks, and load the release in stock transformers.

    Args:
        free_memory: bytes, by which check_loading decides whether the model is loaded whole; None: what is free now.

    Raises:
        ReleaseError: names the tensor or the check that failed.
    """
    zeros = weights = size = 0
    weight_map = read_json(directory / INDEX)["weight_map"]
    for name in tqdm(base, desc="checking float8", unit="tensor"):
        path = directory / weight_map[name]
        with safe_open(path, framework="pt") as file:
            written = file.get_tensor(name)
            scales = file.get_tensor(scale_of(name)) if name in delta else None
        wanted = delta.apply(name, base.tensor(name))
        size += written.nbytes + (0 if scales is None else scales.nbytes)
        if scales is None:
            if written.dtype != wanted.dtype or not torch.equal(written, wanted):
                raise ReleaseError(f"{name}: out of scope, yet it differs from the base's")
            continue
        zero = _check_codes(name, written, scales, wanted, ~delta.change(name, base.tensor).mask)
        zeros, weights = zeros + int(zero.sum()), weights + zero.numel()
    loaded = check_loading(Float8Checkpoint(directory, base), base, Float8(delta), rounded=True, free_memory=free_memory)
    return CountedFloat8(bytes=size, zeros=zeros, weights=weights, loaded=loaded)


def _check_codes(name: str, codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Where codes are zero, [rows, columns], bool. Args: weight: before it was rounded. pruned: where the mask is False."""
    if codes.dtype != DTYPE:
        raise ReleaseError(f"{name}: found {codes.dtype}, wanted {DTYPE}")
    zero = codes.view(torch.uint8) & SIGN == 0
    if (pruned & ~zero).any():
        raise ReleaseError(f"{name}: found {int((pruned & ~zero).sum())} pruned weights that are not zero, wanted none")
    wanted_codes, wanted_scales = quantise(weight)
    if not (torch.equal(codes.view(torch.uint8), wanted_codes.view(torch.uint8)) and torch.equal(scales, wanted_scales)):
        raise ReleaseError(f"{name}: its codes or scales are not those of the pruned weights")
    return zero


class Float8Checkpoint(Checkpoint):
    """A release in float8 under the base's names, without scales: matrices in scope are codes times scales, float32."""

    def __init__(self, directory: Path, base: Checkpoint) -> None:
        self.directory, self.shard_of, self.headers = directory, base.shard_of, base.headers
        self._stored_in = read_weight_map(directory / INDEX)

    def tensor(self, name: str, *, pinned: bool = False, entry: int | None = None) -> torch.Tensor:
        """See Checkpoint."""
        with safe_open(self.directory / self._stored_in[name], framework="pt") as file:
            tensor = file.get_tensor(name)
            if scale_of(name) in self._stored_in:
                tensor = dequantise(tensor, file.get_tensor(scale_of(name)))
        tensor = tensor if entry is None else tensor[entry]
        return tensor.pin_memory() if pinned else tensor
