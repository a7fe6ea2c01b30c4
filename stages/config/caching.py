"""Refuse to end a stage whose results do not fit into DVC's cache.

DVC copies what a stage wrote into its cache. Where the disk of the cache is full it logs an error, records the stage as done, and goes on:
an experiment without its results. A stage that fails is not recorded.
"""

import configparser
import os
from pathlib import Path

import yaml

from stages.errors import SparsesweepError
from stages.files import free_disk

STAGE, ROOT = "DVC_STAGE", "DVC_ROOT"  # variables that DVC sets for a stage: its name, and the directory of dvc.yaml
CACHE = ".dvc/cache"


def require_room_in_cache() -> None:
    """Refuse where DVC runs this stage and its cache has no room for the results; do nothing in a stage that is run by hand.

    Raises:
        SparsesweepError: names the cache, the bytes free and the bytes needed.
    """
    name = os.environ.get(STAGE)
    if name is None:
        return
    root = Path(os.environ.get(ROOT, "."))
    stage = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf8"))["stages"].get(name, {})
    results = [root / path for path in [*stage.get("outs", []), *stage.get("metrics", [])]]
    cache, needed = cache_directory(root), sum(map(_size, results))
    free = free_disk(cache)
    if free < needed:
        found = (
            f"found {free / 1e9:.2f} GB free on its disk, wanted {needed / 1e9:.2f} GB for the results of {name}, which DVC copies there"
        )
        raise SparsesweepError(f"{cache}: {found}; nothing is recorded: make room, then run the same command again")


def cache_directory(root: Path) -> Path:
    """Where DVC keeps what stages wrote: as the configuration of the repository or of the clone says, else its default."""
    directory = root / CACHE
    for name in ("config", "config.local"):
        settings = configparser.ConfigParser(strict=False, interpolation=None)
        settings.read(root / ".dvc" / name, encoding="utf8")
        if settings.has_option("cache", "dir"):
            directory = root / ".dvc" / settings.get("cache", "dir").strip("\"'")
    return directory


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
