"""A delta of one matrix, half of it pruned at random."""

from pathlib import Path

import torch

from stages.checkpoint.delta import Change, SparseDelta, write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.recipe import Recipe
from tests.deltas import row

UP = "model.layers.1.mlp.up_proj.weight"


def write(directory: Path, base: Checkpoint, value: float | None = None) -> SparseDelta:
    """Args: value: of every kept weight; None: they are the base's."""
    directory.mkdir(parents=True, exist_ok=True)
    mask = torch.rand(base.shape(UP), generator=torch.Generator().manual_seed(0)) > 0.5
    values = None if value is None else torch.full((int(mask.sum()),), value, dtype=torch.bfloat16)
    change = Change(mask=mask, values=values)
    write_block(directory / "block-00001.safetensors", {UP: change}, base.fingerprint)
    sections = {name: {"name": name} for name in ("method", "allocation", "reconstruction", "prune")}
    recipe = Recipe(
        **sections,
        pattern={"name": "unstructured", "sparsity": 0.5},
        base=base.fingerprint,
        calibration="0" * 64,
        label="random",
        pattern_label="unstructured",
    )
    write_manifest(directory, recipe=recipe, summary={"sparsity": 0.5, "relative_error": 0.1}, matrices=[row(UP, change.mask)])
    return SparseDelta(directory, base.fingerprint)
