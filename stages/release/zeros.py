"""Which weights of a release are zero, and whether a checkpoint that was trained from it still has these zeros.

The masks of a release are the zeros of its matrices: a weight is kept unless it is zero. sparsity.json in the release says in which
tensors they are, what pattern they have, and for each tensor their number and a hash of its mask.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from stages.checkpoint.delta import SparseDelta, mask_sha256, pack
from stages.checkpoint.reader import INDEX, Checkpoint
from stages.checkpoint.shard import write_shard
from stages.errors import ReleaseError
from stages.files import read_json, replacing, require_free_disk, write_json
from stages.release.manifests import read_manifest_of
from stages.release.packed import MANIFEST as PACKED
from stages.release.packing import SUMS, write_sums

MANIFEST = "sparsity.json"
FORMAT = "sparsesweep-sparsity/1"


@dataclass(kw_only=True)
class TensorZeros:
    """The zeros of a tensor.

    shape: [rows, columns], or [experts, rows, columns]. transposed: whether rows and columns are stored in the other order, so that inputs
        are the rows of the stored matrix.
    weights: how many. pruned: how many the recipe set to zero. zeros: how many are zero, kept ones that were zero before included.
    mask_sha256: of the mask's bits, True where a weight is not zero, the first the lowest of the first byte; hex.
    """

    shape: list[int]
    transposed: bool
    weights: int
    pruned: int
    zeros: int
    mask_sha256: str


@dataclass(kw_only=True)
class Zeros:
    """The zeros of a release.

    pattern: name unstructured with its sparsity, or nm with kept and group. comparison_group: which weights of a matrix competed,
        "row" or "matrix". allocation: name; uniform: every matrix has the pattern's sparsity.
    weights, pruned, zeros: sums over the tensors. sparsity: zeros / weights. tensors: name -> its zeros.
    """

    format: str
    pattern: dict[str, Any]
    comparison_group: str
    allocation: str
    weights: int
    pruned: int
    zeros: int
    sparsity: float
    tensors: dict[str, TensorZeros]


def write_zeros(release: Path, delta: SparseDelta) -> None:
    """Write sparsity.json: counted on the written bytes, perhaps float8, with one tensor in memory."""
    shards, tensors, recipe = read_json(release / INDEX)["weight_map"], dict[str, TensorZeros](), delta.recipe
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in delta.matrices:
        rows_of[row["tensor"]].append(row)
    for name, rows in rows_of.items():
        with safe_open(release / shards[name], framework="pt") as shard:
            stored = shard.get_tensor(name)
        mask = (stored.float() if stored.itemsize == 1 else stored) != 0
        tensors[name] = TensorZeros(
            shape=list(mask.shape),
            transposed=rows[0]["transposed"],
            weights=mask.numel(),
            pruned=sum(row["zeros"] for row in rows),
            zeros=int((~mask).sum()),
            mask_sha256=mask_sha256(pack(mask)),
        )
    sums = {key: sum(getattr(tensor, key) for tensor in tensors.values()) for key in ("weights", "pruned", "zeros")}
    zeros = Zeros(
        format=FORMAT,
        pattern={key: value for key, value in recipe.pattern.items() if key in ("name", "sparsity", "kept", "group")},
        comparison_group=recipe.method["comparison_group"],
        allocation=recipe.allocation["name"],
        **sums,
        sparsity=sums["zeros"] / sums["weights"],
        tensors=tensors,
    )
    write_json(release / MANIFEST, asdict(zeros))


def read_zeros(release: Path) -> Zeros:
    """
    Raises:
        ReleaseError: the directory has no sparsity.json, or one of another form.
    """
    otherwise = "a release; name the one that this was trained from with --against"
    zeros: Zeros = read_manifest_of(Zeros, release / MANIFEST, wanted_format=FORMAT, otherwise=otherwise)
    return zeros


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is left of a tensor's zeros.

    wanted: zeros of the release. lost: how many of them are no longer zero; None: there are as many, but elsewhere, and no release to say
        which. more: zeros where the release has none.
    """

    tensor: str
    wanted: int
    lost: int | None
    more: int


def compare(directory: Path, release: Path | None) -> Iterator[Kept]:
    """Compare the zeros of a checkpoint with those of a release, with a tensor of each in memory.

    Args:
        directory: any checkpoint in safetensors. release: whose zeros are wanted; None: those that its own sparsity.json states.

    Raises:
        ReleaseError: a tensor of the release is not in the checkpoint, or has another shape; or the release is not what its manifest says;
            or either is packed.
        CheckpointError: the checkpoint cannot be read.
    """
    zeros, checkpoint = read_zeros(release or directory), plain_checkpoint(directory)
    theirs = None if release is None else plain_checkpoint(release)
    _require_tensors(zeros, checkpoint)
    for name, wanted in tqdm(zeros.tensors.items(), desc="counting zeros", unit="tensor"):
        zero = checkpoint.tensor(name) == 0
        if theirs is None:
            count = int(zero.sum())
            lost = 0 if mask_sha256(pack(~zero)) == wanted.mask_sha256 else max(wanted.zeros - count, 0) or None
            yield Kept(tensor=name, wanted=wanted.zeros, lost=lost, more=max(count - wanted.zeros, 0))
        else:
            masked = _pruned(theirs, name, wanted)
            yield Kept(tensor=name, wanted=wanted.zeros, lost=int((masked & ~zero).sum()), more=int((zero & ~masked).sum()))


def apply(directory: Path, release: Path, target: Path) -> None:
    """Set the zeros of a release in a checkpoint again; all other weights and files stay as they are.

    Args:
        target: a directory that is made, or replaced when all is done; may be the checkpoint's own.

    Raises:
        ReleaseError: see compare. SparsesweepError: the disk is full.
    """
    zeros, checkpoint, theirs = read_zeros(release), plain_checkpoint(directory), plain_checkpoint(release)
    _require_tensors(zeros, checkpoint)

    def masked(name: str) -> torch.Tensor:
        tensor = checkpoint.tensor(name)
        return tensor if name not in zeros.tensors else tensor.masked_fill_(_pruned(theirs, name, zeros.tensors[name]), 0)

    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    others = [path for path in files if path.relative_to(directory).as_posix() not in checkpoint.headers]
    require_free_disk(target, sum(path.stat().st_size for path in files))
    with replacing(target.resolve()) as scratch:
        for path in others:
            copy = scratch / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for shard, stored in tqdm(checkpoint.headers.items(), desc="writing shards", unit="shard"):
            write_shard(scratch / shard, stored, map(masked, stored))
        if (scratch / SUMS).is_file():
            write_sums(scratch)
        if lost := [kept.tensor for kept in compare(scratch, release) if kept.lost]:
            raise ReleaseError(f"{target}: found zeros of {', '.join(lost[:3])} lost in what was written, wanted none")


def plain_checkpoint(directory: Path) -> Checkpoint:
    """
    Raises:
        ReleaseError: it is packed; names the command that unpacks it. CheckpointError: see Checkpoint.
    """
    if (directory / PACKED).is_file():
        command = f"python -m stages.release unpack {directory} --out DIR"
        raise ReleaseError(f"{directory}: found a packed release, wanted a plain checkpoint, which `{command}` restores")
    return Checkpoint(directory)


def _require_tensors(zeros: Zeros, checkpoint: Checkpoint) -> None:
    for name, wanted in zeros.tensors.items():
        if name not in checkpoint:
            cause = "is it an adapter that was not merged, or another architecture?"
            raise ReleaseError(f"{checkpoint.directory}: found no tensor {name}, wanted all that the release has zeros in; {cause}")
        if list(checkpoint.shape(name)) != wanted.shape:
            raise ReleaseError(f"{checkpoint.directory}, tensor {name}: found shape {list(checkpoint.shape(name))}, wanted {wanted.shape}")


def _pruned(release: Checkpoint, name: str, wanted: TensorZeros) -> torch.Tensor:
    """Where the release is zero, bool; refused where these are not the zeros that its manifest states."""
    if name not in release:
        raise ReleaseError(f"{release.directory}: found no tensor {name}, though {MANIFEST} names it")
    zero = release.tensor(name) == 0
    if mask_sha256(pack(~zero)) != wanted.mask_sha256:
        raise ReleaseError(f"{release.directory}, tensor {name}: its zeros are not those of {MANIFEST}; was the release changed?")
    return zero
