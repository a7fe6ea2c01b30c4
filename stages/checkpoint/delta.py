"""The sparse delta: only the changes that pruning made. base + delta = the pruned model.

For every matrix in scope it stores the mask, as packed bits, 1 = kept, or as what gives it from the base's weights (see scored_mask);
the values of kept weights only if they changed; and the order of rows and columns only if they were reordered. It consists of one
safetensors file per decoder block and a manifest.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import pad

from stages.checkpoint.scored_mask import ScoredMask
from stages.devices import to_host
from stages.errors import CheckpointError
from stages.files import parsed_json, read_json, sha256, write_json
from stages.groups import FEW_COLUMNS
from stages.recipe import Recipe, fingerprint

if TYPE_CHECKING:
    from stages.streaming.host_memory import HostMemory

FORMAT = "sparsesweep-delta/2"
BLOCK_FORMAT = "sparsesweep-delta/2"  # of a block's file
POLARITY = "1 = kept"
MANIFEST = "delta.json"
MANIFEST_KEYS = {"format", "recipe", "summary", "shards", "matrices"}
METADATA = "sparsesweep"  # one key: safetensors writes several in an order that changes from run to run
METADATA_KEYS = {"format", "base", "polarity", "shapes", "scored"}
SCORED_KEYS = {"mask_sha256", "group", "transposed"}
OF_SCORES = ("scales", "thresholds", "ties")
ORDERS = ("rows", "columns")
LARGEST = 2**31 - 1  # rows, columns or experts: orders are 32-bit integers
FLOATS = ("F64", "F32", "F16", "BF16")


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bits.

    Args:
        mask: any shape, bool.

    Returns:
        [ceil(elements / 8)], uint8, on the mask's device; the first element is the lowest bit of the first byte.
    """
    if mask.device.type != "cpu":
        return _pack_by_torch(mask)
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Unpack a mask of `shape`, bool, from the bits that `pack` returned, on their device."""
    if packed.device.type != "cpu":
        return _unpack_by_torch(packed, shape)
    bits = np.unpackbits(packed.numpy(), count=torch.Size(shape).numel(), bitorder="little")
    return torch.from_numpy(bits).bool().view(shape)


def _pack_by_torch(mask: torch.Tensor) -> torch.Tensor:
    """As `pack`, by operations that every device has."""
    bits = pad(mask.reshape(-1), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * _bit_values(mask.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_by_torch(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """As `unpack`, likewise."""
    bits = (packed[:, None] & _bit_values(packed.device)).bool()
    return bits.view(-1)[: math.prod(shape)].view(shape)


def _bit_values(device: torch.device) -> torch.Tensor:
    """The value of each bit of a byte, [8], uint8, lowest first."""
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)


class Change:
    """The change of one tensor: a matrix, or all experts in one tensor. Its mask takes a bit of memory for each weight.

    Args:
        mask: [rows, columns] or [experts, rows, columns], bool, on any device, True = kept.
        values: [kept weights], their new values in row-major order in the base's dtype, on the CPU; None if they did not change.
        rows: [rows], int32, the order of the mask's rows: row i of the mask is row rows[i] of the base; None if the order is the base's.
        columns: [columns], int32, likewise.
        scored: what gives the mask from the base's weights, where that is known; then nothing else is stored.

    Attributes:
        packed: the mask, see pack, on the CPU. shape: that of the mask.
    """

    __slots__ = ("columns", "packed", "rows", "scored", "shape", "values")

    def __init__(
        self,
        *,
        mask: torch.Tensor,
        values: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        scored: ScoredMask | None = None,
    ) -> None:
        self.packed, self.shape = to_host(pack(mask)), tuple(mask.shape)
        self.values, self.rows, self.columns, self.scored = values, rows, columns, scored

    @classmethod
    def of_packed(
        cls, packed: torch.Tensor, shape: tuple[int, ...], scored: ScoredMask | None = None, **others: torch.Tensor | None
    ) -> "Change":
        """A change whose mask is packed already; others: values, rows and columns."""
        change = cls.__new__(cls)
        change.packed, change.shape, change.scored = packed, shape, scored
        change.values, change.rows, change.columns = (others.get(key) for key in ("values", *ORDERS))
        return change

    @classmethod
    def stacked(cls, changes: "list[Change]", files: "HostMemory | None" = None) -> "Change":
        """Stack the changes of the experts in one tensor, in order; none of them reorders anything.

        Args:
            files: holds their values; None: they are in memory.
        """
        shape, kept = changes[0].shape, [change.values for change in changes if change.values is not None]
        values = None
        if kept:
            buffer = files.buffer((sum(map(len, kept)),), kept[0].dtype)[0] if files else None
            values = torch.cat(kept, out=buffer)
        scored = ScoredMask.stacked([change.scored for change in changes])
        if math.prod(shape) % 8:
            return cls(mask=torch.stack([change.mask for change in changes]), values=values, scored=scored)
        packed = torch.cat([change.packed for change in changes])  # the bits of each begin with a byte
        return cls.of_packed(packed, (len(changes), *shape), values=values, scored=scored)

    def of_shape(self, shape: tuple[int, ...]) -> "Change":
        """The same of a tensor of another shape, with as many weights in the same order; nothing is reordered."""
        scored = self.scored if self.scored and _rows(shape, tuple(self.scored.scales.shape), self.scored.transposed) else None
        return Change.of_packed(self.packed, shape, values=self.values, scored=scored)

    def with_values(self, values: torch.Tensor) -> "Change":
        """The same mask and order with other values."""
        return Change.of_packed(self.packed, self.shape, values=values, rows=self.rows, columns=self.columns)

    @property
    def mask(self) -> torch.Tensor:
        """The mask, unpacked into a new tensor on the CPU."""
        return unpack(self.packed, self.shape)

    def mask_on(self, device: torch.device) -> torch.Tensor:
        """The mask, unpacked into a new tensor on a device."""
        return unpack(self.packed.to(device), self.shape)

    def by_expert(self) -> Iterator["Change"]:
        """Yield the change of each expert of those in one tensor, in order."""
        count, kept = math.prod(self.shape[1:]), 0
        for expert in range(self.shape[0]):
            bits = self.packed[expert * count // 8 : -(-(expert + 1) * count // 8)]
            offset = expert * count % 8
            mask = unpack(bits, (offset + count,))[offset:].view(self.shape[1:])
            first, kept = kept, kept + int(mask.sum()) if self.values is not None else 0
            yield Change(mask=mask, values=None if self.values is None else self.values[first:kept])

    def reorder(self, weight: torch.Tensor) -> torch.Tensor:
        """Reorder the base's matrix into the order of the mask's rows and columns."""
        weight = weight if self.rows is None else weight[self.rows.long().to(weight.device)]
        return weight if self.columns is None else weight[:, self.columns.long().to(weight.device)]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Compute the pruned tensor, in the shape and dtype of `weight`, exactly zero where the mask is False."""
        mask = self.mask_on(weight.device)
        if self.values is None:
            return self.reorder(weight).masked_fill(~mask, 0)
        return torch.zeros_like(weight).masked_scatter_(mask, self.values.to(weight))


def write_block(path: Path, changes: dict[str, Change], base: str) -> None:
    """Write one block's changes, tensor name -> Change, with shapes to read them back and the fingerprint of the base."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    scored: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        shapes[name] = list(change.shape)
        if (rule := change.scored) is not None:
            scored[name] = {"mask_sha256": mask_sha256(change.packed), "group": rule.group, "transposed": rule.transposed}
            stored = {key: getattr(rule, key) for key in OF_SCORES}
        else:
            stored = {"mask": change.packed, "values": change.values, "rows": change.rows, "columns": change.columns}
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in stored.items() if tensor is not None}
    facts = {"format": BLOCK_FORMAT, "base": base, "polarity": POLARITY, "shapes": shapes, "scored": scored}
    save_file(tensors, path, metadata={METADATA: json.dumps(facts)})


def mask_sha256(packed: torch.Tensor) -> str:
    """Of the bits of a mask, see pack, on the CPU; hex."""
    return hashlib.sha256(packed.numpy().data).hexdigest()


def _rows(shape: tuple[int, ...], scales: tuple[int, ...], transposed: bool) -> int | None:
    """The number of rows of each matrix in a tensor of this shape whose scales have that shape, or None if they do not fit."""
    if len(shape) == 3 and (len(scales) != 2 or scales[0] != shape[0]):
        return None
    experts = scales[0] if len(scales) == 2 else 1
    stored = shape[1:] if len(shape) == 3 else (shape[0] // experts if experts else 0, shape[1])
    rows, columns = stored[::-1] if transposed else stored
    fits = len(scales) in (1, 2) and math.prod(scales) * rows == math.prod(shape) and columns == scales[-1]
    return rows if fits and rows else None


class ReadWeight(Protocol):
    """Reads a tensor of the base, or an entry of its first dimension, as Checkpoint.tensor does."""

    def __call__(self, name: str, /, *, entry: int | None = None) -> torch.Tensor: ...


def read_block(path: Path, weight: ReadWeight) -> dict[str, Change]:
    """Read one block's changes, as `write_block` wrote them.

    Raises:
        CheckpointError: the file is missing, or `write_block` did not write it; names the file and the tensor.
    """
    return {name: stored.read(weight) for name, stored in _BlockFile(path).changes.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _StoredChange:
    """The location of one tensor's change in a block's file.

    name: that of the tensor in the base. shape: that of its mask. keys: those stored of it: "mask", "values", "rows", "columns"; or of
        OF_SCORES.
    mask_sha256, group, transposed: of a mask by scores, see ScoredMask; mask_sha256: of its packed bits, hex.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    mask_sha256: str = ""
    group: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def mask_alone(self) -> bool:
        """Whether every kept weight has the base's value, in the base's place."""
        return "mask" not in self.keys or self.keys == ("mask",)

    def read(self, weight: ReadWeight) -> Change:
        """Read the change.

        Raises:
            CheckpointError: the values are not as many as the kept weights, an order is no permutation, or the base's weights do not
                give the mask.
        """
        tensors = self._tensors()
        if "mask" not in tensors:
            scored = self._scored(tensors)
            return Change.of_packed(self._by_scores(scored, weight), self.shape, scored)
        change = Change.of_packed(tensors.pop("mask"), self.shape, None, **tensors)
        if change.values is not None and len(change.values) != (kept := int(change.mask.count_nonzero())):
            raise self._damaged("values", f"{len(change.values)} values", f"one for each of {kept} kept weights")
        for order in (key for key in ORDERS if key in tensors):
            if not torch.equal(tensors[order].sort().values, torch.arange(len(tensors[order]), dtype=torch.int32)):
                raise self._damaged(order, "an order that names some twice", "each once")
        return change

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Read the change and apply it to the base's tensor, on that tensor's device."""
        if "mask" in self.keys:
            return self.read(_no_weight).apply(weight)
        mask = self._mask(self._scored(self._tensors()), weight)
        self._require(to_host(pack(mask)))
        return weight.masked_fill(mask.logical_not_(), 0)

    def _tensors(self) -> dict[str, torch.Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(f"{self.name}.{key}") for key in self.keys}

    def _scored(self, tensors: dict[str, torch.Tensor]) -> ScoredMask:
        return ScoredMask(**tensors, group=self.group, transposed=self.transposed)

    def _by_scores(self, scored: ScoredMask, weight: ReadWeight) -> torch.Tensor:
        """The packed mask; of experts in one tensor one expert's weights are in memory at a time, where its bits begin with a byte."""
        try:
            if len(self.shape) == 3 and math.prod(self.shape[1:]) % 8 == 0:
                weights = (weight(self.name, entry=index) for index in range(self.shape[0]))
                masks = (self._mask(scored.expert(index), one, self.shape[1:]) for index, one in enumerate(weights))
                packed = torch.cat([to_host(pack(mask)) for mask in masks])
            else:
                packed = to_host(pack(self._mask(scored, weight(self.name))))
        except KeyError as error:
            raise CheckpointError(f"delta file {self.path}: tensor {self.name}: found no such tensor in the base") from error
        self._require(packed)
        return packed

    def _mask(self, scored: ScoredMask, weight: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        if tuple(weight.shape) != (shape := self.shape if shape is None else shape):
            raise CheckpointError(f"tensor {self.name}: found shape {list(weight.shape)}, wanted {list(shape)} as in {self.path}")
        try:
            return scored.mask(weight)
        except ValueError as error:  # scores that are not finite
            raise self._damaged("scales", str(error).removeprefix("found ").split(", wanted")[0], "finite scores") from error

    def _require(self, packed: torch.Tensor) -> None:
        if mask_sha256(packed) != self.mask_sha256:
            raise self._damaged("scales", "scores that give another mask", "those of the base that was pruned")

    def _damaged(self, key: str, actual: str, expected: str) -> CheckpointError:
        return CheckpointError(f"delta file {self.path}: tensor {self.name}.{key}: found {actual}, wanted {expected}")


def _no_weight(name: str, /, *, entry: int | None = None) -> torch.Tensor:
    """For masks that are stored."""
    raise AssertionError(f"{name} was read")


class _BlockFile:
    """A block's file whose metadata and headers are checked; no tensor is read.

    Attributes:
        base: fingerprint of the checkpoint that was pruned. changes: tensor name -> location of its change.

    Raises:
        CheckpointError: the file is missing or truncated, or its metadata and its tensors do not fit; names the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"delta file {path}: not found")
        try:
            with safe_open(path, framework="pt") as file:
                facts = self._facts(file.metadata() or {})
                slices = {key: file.get_slice(key) for key in sorted(file.keys())}
                headers = {key: (stored.get_dtype(), tuple(stored.get_shape())) for key, stored in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"delta file {path}: {error}; is it truncated?") from error
        self.base: str = facts["base"]
        self.changes = {
            name: self._scored(name, tuple(shape), headers, facts["scored"][name])
            if name in facts["scored"]
            else self._stored(name, tuple(shape), headers)
            for name, shape in facts["shapes"].items()
        }
        named = {f"{name}.{key}" for name, stored in self.changes.items() for key in stored.keys}
        if unknown := sorted(set(headers) - named):
            raise CheckpointError(f"delta file {path}: found tensors {unknown[:3]}, wanted only those of {sorted(self.changes)[:3]}, ...")

    def _facts(self, metadata: dict[str, str]) -> dict[str, Any]:
        try:
            facts = parsed_json(metadata.get(METADATA, "null"))
        except ValueError as error:
            raise CheckpointError(f"delta file {self.path}: found metadata that is not JSON ({error})") from error
        if not isinstance(facts, dict) or set(facts) != METADATA_KEYS:
            description = sorted(facts) if isinstance(facts, dict) else facts
            raise CheckpointError(f"delta file {self.path}: found metadata {description}, wanted {sorted(METADATA_KEYS)}")
        for key, expected in (("format", BLOCK_FORMAT), ("polarity", POLARITY)):
            if facts[key] != expected:
                raise CheckpointError(f"delta file {self.path}: found {key} {facts[key]!r}, wanted {expected!r}")
        for key, kind in (("base", str), ("shapes", dict), ("scored", dict)):
            if not isinstance(facts[key], kind):
                raise CheckpointError(f"delta file {self.path}: found {key} {facts[key]!r}, wanted a {kind.__name__}")
        if unknown := sorted(set(facts["scored"]) - set(facts["shapes"])):
            raise CheckpointError(f"delta file {self.path}: found scored {unknown[:3]}, wanted tensors with a shape")
        for name, shape in facts["shapes"].items():
            if (
                not isinstance(shape, list)
                or len(shape) not in (2, 3)
                or not all(type(size) is int and 0 < size <= LARGEST for size in shape)
            ):
                raise CheckpointError(f"delta file {self.path}: tensor {name}: found shape {shape!r}, wanted 2 or 3 sizes")
        return facts

    def _stored(self, name: str, shape: tuple[int, ...], headers: dict[str, tuple[str, tuple[int, ...]]]) -> _StoredChange:
        """Check the headers of one tensor's change."""
        count = math.prod(shape)
        dtypes = {"mask": ("U8",), "values": FLOATS, "rows": ("I32",), "columns": ("I32",)}
        lengths: dict[str, int | None] = {"mask": -(-count // 8), "values": None, "rows": None, "columns": None}
        if len(shape) == 2:
            lengths |= {"rows": shape[0], "columns": shape[1]}
        stored = {key: headers[f"{name}.{key}"] for key in dtypes if f"{name}.{key}" in headers}
        if "mask" not in stored:
            raise CheckpointError(f"delta file {self.path}: tensor {name}: found no {name}.mask, wanted the mask of shape {list(shape)}")
        for key, (dtype, sizes) in stored.items():
            message = f"delta file {self.path}: tensor {name}.{key}: found"
            if dtype not in dtypes[key]:
                raise CheckpointError(f"{message} dtype {dtype}, wanted {' or '.join(dtypes[key])}")
            if len(sizes) != 1 or lengths[key] not in (None, sizes[0]):
                raise CheckpointError(f"{message} shape {list(sizes)}, wanted [{lengths[key] or 'any'}] for a mask of shape {list(shape)}")
            if key in ORDERS and len(shape) != 2:
                raise CheckpointError(f"{message} an order for a mask of shape {list(shape)}, wanted one of a matrix alone")
        return _StoredChange(path=self.path, name=name, shape=shape, keys=tuple(stored))

    def _scored(self, name: str, shape: tuple[int, ...], headers: dict[str, tuple[str, tuple[int, ...]]], facts: Any) -> _StoredChange:
        """Check the headers of a mask that its scores give, and what is said of it."""
        message = f"delta file {self.path}: tensor {name}: found"
        if not isinstance(facts, dict) or set(facts) != SCORED_KEYS or type(facts["transposed"]) is not bool:
            raise CheckpointError(f"{message} scored as {facts!r}, wanted {sorted(SCORED_KEYS)}")
        digest, group = facts["mask_sha256"], facts["group"]
        if not isinstance(digest, str):
            raise CheckpointError(f"{message} mask_sha256 {digest!r}, wanted a SHA-256 in hexadecimal digits")
        if group is not None and not _is_group(group):
            raise CheckpointError(f"{message} group {group!r}, wanted N and M with 0 <= N <= M and M in 2..{FEW_COLUMNS}")
        stored = {key: headers[f"{name}.{key}"] for key in OF_SCORES if f"{name}.{key}" in headers}
        needed = {"scales"} if group else {"scales", "thresholds"}
        if not needed <= set(stored) or (group and set(stored) != needed):
            raise CheckpointError(f"{message} {sorted(stored)}, wanted {sorted(needed)}{'' if group else ' and perhaps ties'}")
        for key, (dtype, _) in stored.items():
            if dtype != (wanted := "I32" if key == "ties" else "F32"):
                raise CheckpointError(f"delta file {self.path}: tensor {name}.{key}: found dtype {dtype}, wanted {wanted}")
        scales = stored["scales"][1]
        rows = _rows(shape, scales, facts["transposed"])
        if rows is None or (group and scales[-1] % group[1]):
            wanted = f"[columns] or [experts, columns] of a mask of shape {list(shape)}" + (f" in groups of {group[1]}" if group else "")
            raise CheckpointError(f"delta file {self.path}: tensor {name}.scales: found shape {list(scales)}, wanted {wanted}")
        for key in ("thresholds", "ties"):
            if key in stored and stored[key][1] != (*scales[:-1], rows):
                found = f"found shape {list(stored[key][1])}, wanted {[*scales[:-1], rows]}"
                raise CheckpointError(f"delta file {self.path}: tensor {name}.{key}: {found}")
        return _StoredChange(
            path=self.path,
            name=name,
            shape=shape,
            keys=tuple(stored),
            mask_sha256=digest,
            group=None if group is None else (group[0], group[1]),
            transposed=facts["transposed"],
        )


def _is_group(group: Any) -> bool:
    """Whether JSON says N of M."""
    if not isinstance(group, list) or len(group) != 2 or not all(type(number) is int for number in group):
        return False
    return 0 <= group[0] <= group[1] and 2 <= group[1] <= FEW_COLUMNS


def write_manifest(directory: Path, *, recipe: Recipe, summary: dict[str, float], matrices: list[dict[str, Any]]) -> None:
    """Write the manifest of a delta: its recipe, its summary, the hashes of its files, and one row per matrix.

    Args:
        summary: "sparsity", achieved, and "relative_error", the mean over matrices.
        matrices: one row per matrix, see prune.matrix_row.
    """
    shards = {path.name: sha256(path) for path in sorted(directory.glob("*.safetensors"))}
    facts = {"format": FORMAT, "recipe": recipe.as_dict(), "summary": summary, "shards": shards, "matrices": matrices}
    write_json(directory / MANIFEST, facts)


class SparseDelta:
    """A delta on disk.

    Args:
        directory: holds delta.json and the block files.
        base: fingerprint of the checkpoint that it is to be applied to.

    Attributes:
        recipe: that of the run that made it. summary: "sparsity", achieved, and "relative_error". matrices: one row per matrix, see
            prune.matrix_row.
        shards: file name -> SHA-256.

    Raises:
        CheckpointError: there is no delta, `write_manifest` did not write its manifest, a file is missing, or the delta is of
            another base.
    """

    def __init__(self, directory: Path, base: str) -> None:
        self.directory = directory
        if not (directory / MANIFEST).is_file():
            raise CheckpointError(f"{directory}: no {MANIFEST}; is this a delta written by the prune stage?")
        manifest = _read_manifest(directory)
        self.recipe = Recipe.read(manifest["recipe"], str(directory / MANIFEST))
        self.summary: dict[str, float] = manifest["summary"]
        self.matrices: list[dict[str, Any]] = manifest["matrices"]
        self.shards: dict[str, str] = manifest["shards"]
        if self.recipe.base != base:
            raise CheckpointError(f"{directory}: a delta of base {self.recipe.base[:12]}, wanted one of base {base[:12]}")
        for shard in self.shards:
            if not (directory / shard).is_file():
                raise CheckpointError(f"delta file {directory / shard}: not found, though {MANIFEST} lists it; run the prune stage again")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 [hex] that identifies the delta: over its recipe and the hashes of its files."""
        return fingerprint(self.recipe.as_dict(), self.shards)

    def require_hashes(self) -> None:
        """Read every file once and compare its SHA-256 with the manifest's.

        Raises:
            CheckpointError: a file has another hash; names it.
        """
        for shard, expected_sha256 in self.shards.items():
            if (actual_sha256 := sha256(self.directory / shard)) != expected_sha256:
                path, hashes = self.directory / shard, f"found SHA-256 {actual_sha256}, wanted {expected_sha256}"
                raise CheckpointError(f"delta file {path}: {hashes}; run the prune stage again")

    @cached_property
    def _stored(self) -> dict[str, _StoredChange]:
        changes: dict[str, _StoredChange] = {}
        for file in (_BlockFile(self.directory / shard) for shard in self.shards):
            if file.base != self.recipe.base:
                raise CheckpointError(f"delta file {file.path}: found base {file.base[:12]}, wanted {self.recipe.base[:12]}")
            for name, stored in file.changes.items():
                if name in changes:
                    raise CheckpointError(f"delta file {file.path}: tensor {name}: found in {changes[name].path.name}, too, wanted it once")
                changes[name] = stored
        return changes

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    @property
    def masks_alone(self) -> bool:
        """Whether every kept weight has the base's value, in the base's place."""
        return all(stored.mask_alone for stored in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the mask."""
        return self._stored[name].shape

    def change(self, name: str, weight: ReadWeight) -> Change:
        """Read the change of a tensor.

        Raises:
            CheckpointError: see read_block.
        """
        return self._stored[name].read(weight)

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Apply the delta to a tensor of the base; a tensor out of scope is returned unchanged.

        Raises:
            CheckpointError: the tensor has another shape than the mask; see also read_block.
        """
        if name not in self:
            return tensor
        stored = self._stored[name]
        if tensor.shape != stored.shape:
            raise CheckpointError(f"tensor {name}: found shape {list(tensor.shape)}, wanted {list(stored.shape)} as in {stored.path}")
        return stored.apply(tensor)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest.

    Raises:
        CheckpointError: another format, missing or unknown keys, or a shard that is not a file in the directory of the manifest.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        actual_format = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{directory}: found format {actual_format!r}, wanted {FORMAT!r}; run the prune stage again")
    if set(manifest) != MANIFEST_KEYS:
        raise CheckpointError(f"{path}: found the keys {sorted(manifest)}, wanted {sorted(MANIFEST_KEYS)}; run the prune stage again")
    for key, kind in (("summary", dict), ("shards", dict), ("matrices", list)):
        if not isinstance(manifest[key], kind):
            raise CheckpointError(f"{path}: {key}: found {manifest[key]!r}, wanted a {kind.__name__}")
    for shard in manifest["shards"]:
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: found shard {shard!r}, wanted the name of a safetensors file in {directory}")
    return manifest
