"""base + delta as a plain dense checkpoint: the base's dtype, shards and config, exact zeros where weights went."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import INDEX, PROVENANCE, Checkpoint
from stages.files import sha256

SUMS = "SHA256SUMS"


def pack(base: Checkpoint, delta: SparseDelta, directory: Path) -> None:
    """Write every shard of the base with the delta applied, and the base's other files as they are."""
    for shard, header in tqdm(base.headers.items(), desc="writing shards", unit="shard", disable=None):
        names = [name for name in header if name != "__metadata__"]
        tensors = {name: delta.apply(name, base.tensor(name)) for name in names}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    for path in sorted(base.directory.iterdir()):
        if path.name not in base.headers and path.name not in (PROVENANCE, INDEX):
            shutil.copyfile(path, directory / path.name)
    shutil.copyfile(base.directory / INDEX, directory / INDEX)


def write_sums(directory: Path) -> None:
    """SHA256SUMS of all files, in the format of sha256sum(1)."""
    files = sorted(path for path in directory.iterdir() if path.name != SUMS)
    (directory / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
