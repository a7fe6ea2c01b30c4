"""base + delta as a plain dense checkpoint: the base's dtype, shards and config, exact zeros where weights are pruned."""

import shutil
from pathlib import Path

from tqdm import tqdm

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.shard import write_shard
from stages.errors import ReleaseError
from stages.files import SUMS, sha256


def pack(base: Checkpoint, delta: SparseDelta, directory: Path) -> None:
    """Write every shard of the base with the delta applied, and the other files that were fetched with it as they are.

    One tensor is in memory at a time.

    Raises:
        ReleaseError: one of those is not the one that was fetched; names it.
    """
    for shard, stored in tqdm(base.headers.items(), desc="writing shards", unit="shard"):
        write_shard(directory / shard, stored, (delta.apply(name, base.tensor(name)) for name in stored))
    for name, wanted in base.provenance["files"].items():
        if name in base.headers:
            continue
        source, copy = base.directory / name, directory / name
        actual = sha256(source) if source.is_file() else "no file"
        if actual != wanted:
            raise ReleaseError(f"{source}: found {actual}, wanted SHA-256 {wanted}; run the fetch stage again")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def write_sums(directory: Path) -> None:
    """SHA256SUMS of all files, in the format of sha256sum(1)."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    (directory / SUMS).write_text("".join(f"{sha256(directory / name)}  {name}\n" for name in names if name != SUMS), encoding="utf8")
