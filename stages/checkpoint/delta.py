"""The sparse delta: what pruning changed, and nothing else.

For every matrix in scope the mask as packed bits, 1 = kept; only where survivors moved their values; and only where rows or
columns changed places their order. One safetensors file per decoder block and a manifest. base + delta = the pruned model.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stages.errors import CheckpointError
from stages.files import read_json, sha256, write_json
from stages.recipe import Recipe

FORMAT = "sparsesweep-delta/2"
BLOCK_FORMAT = "sparsesweep-delta/1"  # of a block's file
MANIFEST = "delta.json"
METADATA = "sparsesweep"  # one key: safetensors writes several in an order that changes from run to run


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a mask.

    Args:
        mask: [any shape], bool.

    Returns:
        [ceil(elements / 8)], uint8; the first element is the lowest bit of the first byte.
    """
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask of `shape`, bool, whose bits `pack` gave."""
    bits = np.unpackbits(packed.numpy(), count=torch.Size(shape).numel(), bitorder="little")
    return torch.from_numpy(bits).bool().view(shape)


@dataclass(kw_only=True, slots=True)
class Change:
    """What happened to one matrix.

    mask: [rows, columns], bool, True = kept.
    values: [kept], the survivors' new values in row-major order in the base's dtype; None where they did not move.
    rows, columns: [rows], [columns], int32, where the base's are put before the mask is laid on: the new row i is the base's
        row rows[i]; None where they stay in place.
    """

    mask: torch.Tensor
    values: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def reorder(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's matrix, its rows and columns in their new places."""
        weight = weight if self.rows is None else weight[self.rows.long().to(weight.device)]
        return weight if self.columns is None else weight[:, self.columns.long().to(weight.device)]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The pruned matrix, [rows, columns], in the dtype of `weight`, exact zeros where the mask is False."""
        if self.values is None:
            return self.reorder(weight).masked_fill(~self.mask, 0)
        return torch.zeros_like(weight).masked_scatter_(self.mask, self.values.to(weight.dtype))


def write_block(path: Path, changes: dict[str, Change], base: str) -> None:
    """Write one block's changes, tensor name -> Change, with what is needed to read them back and to refuse another base."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, change in changes.items():
        shapes[name] = list(change.mask.shape)
        tensors[f"{name}.mask"] = pack(change.mask)
        if change.values is not None:
            tensors[f"{name}.values"] = change.values
        for key, order in (("rows", change.rows), ("columns", change.columns)):
            if order is not None:
                tensors[f"{name}.{key}"] = order
    facts = {"format": BLOCK_FORMAT, "base": base, "polarity": "1 = kept", "shapes": shapes}
    save_file(tensors, path, metadata={METADATA: json.dumps(facts)})


def read_block(path: Path) -> dict[str, Change]:
    """One block's changes, as `write_block` wrote them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return {name: _read_change(path, name, *stored) for name, stored in _block_index(path).items()}


Stored = tuple[tuple[int, ...], frozenset[str]]  # a matrix's shape, and what is stored of it beside the mask


def _block_index(path: Path) -> dict[str, Stored]:
    """Tensor name -> what the file has of it."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes, stored = json.loads(file.metadata()[METADATA])["shapes"], set(file.keys())
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"delta file {path}: {error}; is it truncated?") from error
    parts = ("values", "rows", "columns")
    return {name: (tuple(shape), frozenset(part for part in parts if f"{name}.{part}" in stored)) for name, shape in shapes.items()}


def _read_change(path: Path, name: str, shape: tuple[int, ...], parts: frozenset[str]) -> Change:
    with safe_open(path, framework="pt") as file:
        mask = unpack(file.get_tensor(f"{name}.mask"), shape)
        return Change(mask=mask, **{part: file.get_tensor(f"{name}.{part}") for part in parts})


def write_manifest(directory: Path, *, recipe: Recipe, summary: dict[str, float], matrices: list[dict[str, Any]]) -> None:
    """Finish a delta: what made it, what came of it, and the same of each matrix.

    Args:
        summary: "sparsity", achieved, and "relative_error", the mean over matrices.
        matrices: see prune.matrix_row.
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
        recipe: what made it. summary: "sparsity", achieved, and "relative_error". matrices: a row for each, see prune.matrix_row.
        shards: file name -> SHA-256.

    Raises:
        CheckpointError: no delta there, a truncated file, or the delta of another base.
    """

    def __init__(self, directory: Path, base: str) -> None:
        self.directory = directory
        if not (directory / MANIFEST).is_file():
            raise CheckpointError(f"{directory}: no {MANIFEST}; is this a delta written by the prune stage?")
        manifest = read_json(directory / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{directory}: found format {manifest.get('format')!r}, wanted {FORMAT!r}; run the prune stage again")
        self.recipe = Recipe.read(manifest["recipe"], str(directory / MANIFEST))
        self.summary: dict[str, float] = manifest["summary"]
        self.matrices: list[dict[str, Any]] = manifest["matrices"]
        self.shards: dict[str, str] = manifest["shards"]
        if self.recipe.base != base:
            raise CheckpointError(f"{directory}: a delta of base {self.recipe.base[:12]}, wanted one of base {base[:12]}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 [hex] that names the delta: over what made it and the hashes of its files."""
        facts = {"recipe": self.recipe.as_dict(), "shards": self.shards}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, tuple[int, ...], frozenset[str]]]:
        paths = [self.directory / shard for shard in self.shards]
        return {name: (path, *stored) for path in paths for name, stored in _block_index(path).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def change(self, name: str) -> Change:
        return _read_change(self._stored[name][0], name, *self._stored[name][1:])

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the pruned model has it; a tensor out of scope comes back as it is."""
        return self.change(name).apply(tensor) if name in self else tensor
