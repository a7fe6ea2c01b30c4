"""Is the written release what the recipe asks for? Measured on its own bytes and in stock transformers.

What was asked is computed here once more, from the recipe and the shapes alone, by none of the code that chooses masks:

    unstructured, per row       floor(columns * sparsity) pruned weights in each row
    unstructured, per matrix    floor(rows * columns * sparsity) in the matrix
    with an allocation          floor(weights of all matrices * sparsity) in all of them, each matrix within the allocation's bounds and
                                with exactly what the allocation gave it, as the manifest states
    N:M                         M - N of every M consecutive columns

The mask has exactly these counts. The bytes may have more zeros: kept weights that were zero in the base, or that became zero when
they were rounded.
"""

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stages.checkpoint.delta import Change, SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.errors import ReleaseError
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.patterns import PATTERNS, ComparisonGroup, PatternSection
from stages.recipe import Recipe
from stages.release.loading import Loaded, check_loading

ROW_KEYS = ("matrix", "tensor", "expert", "shape", "transposed", "weights", "zeros", "asked")

Row = dict[str, Any]  # of the manifest, see prune.matrix_row


@dataclass(kw_only=True, slots=True)
class Verified:
    """What the checks found.

    matrices: in scope. changed: tensors in scope whose kept weights are not the base's. other_tensors: out of scope.
    sparsity: fraction of zeros in the bytes of the matrices in scope; above the sparsity asked for where kept weights were
        zero before, or became zero when they were rounded.
    share: of the weights of all tensors, the fraction that is in scope.
    loaded: how stock transformers loads it.
    """

    matrices: int
    changed: int
    other_tensors: int
    sparsity: float
    share: float
    loaded: Loaded


def verify(release: Path, base: Checkpoint, delta: SparseDelta, free_memory: int | None = None) -> Verified:
    """Check every tensor, then that stock transformers loads the release, and that its logits are those of base + delta.

    Args:
        free_memory: bytes, by which check_loading decides whether the model is loaded whole; None: what is free now.

    Raises:
        ReleaseError: names the tensor or the check that failed.
    """
    written = Checkpoint(release)
    facts = _check_tensors(written, base, delta)
    return Verified(**facts, loaded=check_loading(written, base, delta.apply, free_memory=free_memory))


# What was asked.


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a recipe asks of the masks.

    bounds: fractions of zeros, least and most, of each matrix; None where every comparison group has the pattern's.
    """

    pattern: PatternSection
    comparison_group: ComparisonGroup
    bounds: tuple[Fraction, Fraction] | None

    @classmethod
    def by(cls, recipe: Recipe) -> "Asked":
        """
        Raises:
            ConfigError: the recipe's sections are not of this version.
        """
        allocation = ALLOCATIONS.section(recipe.allocation, "recipe.allocation")
        budgeted = ALLOCATIONS.of(allocation).budgeted
        return cls(
            pattern=PATTERNS.section(recipe.pattern, "recipe.pattern"),
            comparison_group=recipe.method["comparison_group"],
            bounds=None if budgeted is None else (Fraction(str(allocation.lowest)), Fraction(str(allocation.highest))),
        )

    def group_size(self, rows: int, columns: int) -> int:
        """See PatternSection."""
        return self.pattern.group_size(self.comparison_group, rows, columns)

    def pruned_of(self, weights: int) -> int:
        """How many of so many weights that compete are pruned."""
        return floor(weights * self.pattern.exact_sparsity)


def count_in_each_group(marked: torch.Tensor, group_size: int) -> torch.Tensor:
    """How many weights are marked in each comparison group, [groups], int64.

    Args:
        marked: [rows, columns], bool.
    """
    return marked.reshape(-1, group_size).sum(dim=1)


def _group_name(rows: int, columns: int, group_size: int, index: int) -> str:
    """Which group of a matrix it is, for an error."""
    row, first = divmod(index * group_size, columns)
    if group_size == rows * columns:
        return ""
    return f", row {row}" if group_size == columns else f", row {row}, columns {first} to {first + group_size - 1}"


# What is there.


def _check_tensors(written: Checkpoint, base: Checkpoint, delta: SparseDelta) -> dict[str, Any]:
    """Compare tensor by tensor, with one of each in memory; returns what Verified has of them."""
    if set(written) != set(base):
        raise ReleaseError(f"{written.directory}: found tensors {sorted(set(written) ^ set(base))[:3]} on one side only")
    rows, asked = _rows_of_tensors(base, delta), Asked.by(delta.recipe)
    zeros = changed = 0
    for name in tqdm(base, desc="checking tensors", unit="tensor"):
        after = written.tensor(name)
        if name not in delta:
            if not _same_bits(base.tensor(name), after):
                raise ReleaseError(f"{name}: out of scope, yet its bits differ from the base's")
            continue
        change = delta.change(name, base.tensor)
        _check_kept(name, change, base, after)
        mask, zero = change.mask, after == 0
        pruned = ~mask
        for row in rows[name]:
            _check_matrix(row, _matrix(pruned, row), _matrix(zero, row), asked)
        if not (zero | mask).all():
            raise ReleaseError(f"{name}: found {int((pruned & ~zero).sum())} pruned weights that are not zero, wanted none")
        zeros, changed = zeros + int(zero.sum()), changed + (change.values is not None)
    _check_total(delta, asked)
    weights = sum(row["weights"] for row in delta.matrices)
    share = weights / sum(torch.Size(base.shape(name)).numel() for name in base)
    others = len(set(base)) - len(rows)
    return {"matrices": len(delta.matrices), "changed": changed, "other_tensors": others, "sparsity": zeros / weights, "share": share}


def _rows_of_tensors(base: Checkpoint, delta: SparseDelta) -> dict[str, list[Row]]:
    """The manifest's rows by tensor: one for a matrix, one for each expert of a tensor that holds several.

    Raises:
        ReleaseError: the delta's files, its manifest and the base do not have the same matrices; names the first.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in delta.matrices:
        if missing := [key for key in ROW_KEYS if key not in row]:
            wanted = f"{', '.join(missing)} for each; run the prune stage again"
            raise ReleaseError(f"{delta.directory}: found matrices with {', '.join(row)} in the manifest, wanted {wanted}")
        rows[row["tensor"]].append(row)
    if not set(delta) == set(rows) <= set(base):
        unmatched = sorted(set(delta) ^ set(rows)) or sorted(set(rows) - set(base))
        raise ReleaseError(f"{delta.directory}: its files, its manifest and the base do not have the same matrices: {unmatched[:3]}")
    for name, rows_of_tensor in rows.items():
        if delta.shape(name) != base.shape(name):
            raise ReleaseError(f"{name}: found a mask of shape {list(delta.shape(name))}, wanted {list(base.shape(name))} as in the base")
        _check_rows(name, rows_of_tensor, base.shape(name))
    return rows


def _check_rows(name: str, rows: list[Row], shape: tuple[int, ...]) -> None:
    """The manifest's rows of a tensor cover it: each of its matrices once, in its shape."""
    *several, first, second = shape
    if not several and len(rows) > 1:  # groups of rows
        several, first = [len(rows)], first // len(rows) if first % len(rows) == 0 else 0
    experts = set(range(several[0])) if several else {None}
    listed = [row["expert"] for row in rows]
    if len(listed) != len(experts) or set(listed) != experts:
        raise ReleaseError(f"{name}: found the experts {listed} in the manifest, wanted each of {sorted(map(str, experts))} once")
    for row in rows:
        wanted = [second, first] if row["transposed"] else [first, second]
        if row["shape"] != wanted or row["weights"] != first * second:
            stated = f"shape {row['shape']} and {row['weights']} weights"
            raise ReleaseError(f"{row['matrix']}: found {stated} in the manifest, wanted {wanted} and {first * second}")


def _matrix(tensor: torch.Tensor, row: Row) -> torch.Tensor:
    """[rows, columns], a view of a tensor that is laid out like the checkpoint's."""
    stored = row["shape"][::-1] if row["transposed"] else row["shape"]
    matrix = tensor if row["expert"] is None else tensor.view(-1, *stored)[row["expert"]]
    return matrix.T if row["transposed"] else matrix


def _check_kept(name: str, change: Change, base: Checkpoint, after: torch.Tensor) -> None:
    """Kept weights have the values of the delta or else, bit for bit, those of the base."""
    written, wanted = (after.dtype, tuple(after.shape)), (base.dtype(name), base.shape(name))
    if written != wanted:
        raise ReleaseError(
            f"{name}: found {written[0]} of shape {list(written[1])}, wanted {wanted[0]} of {list(wanted[1])} as in the base"
        )
    if change.values is not None:
        same = _same_bits(after[change.mask], change.values)
    else:
        same = bool(((_bits(after) == _bits(change.reorder(base.tensor(name)))) | ~change.mask).all())
    if not same:
        raise ReleaseError(f"{name}: its kept weights differ from the {'base' if change.values is None else 'delta'}'s")


def _check_matrix(row: Row, pruned: torch.Tensor, zero: torch.Tensor, asked: Asked) -> None:
    """Compare a matrix, [rows, columns], with the recipe and with what the manifest says of it.

    Args:
        pruned: where the mask is False. zero: where the release is zero.
    """
    name, count = row["matrix"], int(pruned.sum())
    if asked.bounds is None:
        _check_groups(name, pruned, zero, asked)
    else:
        least, most = (floor(pruned.numel() * bound) for bound in asked.bounds)
        if not least <= count <= most:
            raise ReleaseError(f"{name}: found {count} pruned weights in the mask, wanted {least} to {most} by the allocation's bounds")
        if count != (given := round(row["asked"] * pruned.numel())):
            raise ReleaseError(f"{name}: found {count} pruned weights in the mask, wanted {given} as the allocation gave it")
    if row["zeros"] != count:
        raise ReleaseError(f"{name}: found {count} pruned weights in the mask, wanted {row['zeros']} as in the manifest")


def _check_groups(name: str, pruned: torch.Tensor, zero: torch.Tensor, asked: Asked) -> None:
    """Each comparison group has as many zeros as the recipe asks for, or more, and exactly as many pruned weights."""
    rows, columns = pruned.shape
    group_size = asked.group_size(rows, columns)
    if columns % group_size and group_size != rows * columns:
        raise ReleaseError(f"{name}: found {columns} columns, wanted a multiple of {group_size} by the recipe's pattern")
    wanted = asked.pruned_of(group_size)
    zeros, masked = (count_in_each_group(marked, group_size) for marked in (zero, pruned))
    for counts, wrong, counted in ((zeros, zeros < wanted, "zeros"), (masked, masked != wanted, "pruned weights in the mask")):
        if wrong.any():
            index = int(wrong.nonzero()[0])
            where, count = _group_name(rows, columns, group_size, index), int(counts[index])
            wanted_by = f"wanted {wanted}{' or more' if counts is zeros else ''} by the recipe"
            raise ReleaseError(f"{name}{where}: found {count} {counted}, {wanted_by}")


def _check_total(delta: SparseDelta, asked: Asked) -> None:
    """All matrices together have the zeros asked for; each was compared with its row before."""
    weights, pruned = (sum(row[key] for row in delta.matrices) for key in ("weights", "zeros"))
    if asked.bounds is not None and pruned != (wanted := asked.pruned_of(weights)):
        raise ReleaseError(
            f"{delta.directory}: found {pruned} pruned weights in all matrices together, wanted {wanted}, "
            f"the fraction {asked.pattern.sparsity:g} of {weights}"
        )
    if delta.summary.get("sparsity") != pruned / weights:
        raise ReleaseError(f"{delta.directory}: found sparsity {delta.summary.get('sparsity')} in the manifest, wanted {pruned / weights}")


def _same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(_bits(tensor), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as whole numbers: NaN equals itself, and -0 is not 0."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.contiguous().view(getattr(torch, f"int{8 * tensor.itemsize}"))
