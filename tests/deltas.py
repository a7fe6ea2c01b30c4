"""Recipes and deltas made by hand, for tests of what reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.checkpoint.delta import Change, SparseDelta, write_block, write_manifest
from stages.checkpoint.reader import Checkpoint
from stages.recipe import Recipe

WANDA = {
    "name": "wanda",
    "score": {"name": "wanda"},
    "comparison_group": "row",
    "update": {"name": "none"},
    "damping": {"share": 0.01, "limit": 1.0, "shrinkage": False},
}


def recipe(**changes: Any) -> Recipe:
    """Wanda at 50%, but for the fields given."""
    facts = {
        "method": WANDA,
        "pattern": {"name": "unstructured", "sparsity": 0.5},
        "allocation": {"name": "uniform"},
        "reconstruction": {"name": "none"},
        "prune": {"propagate": "pruned"},
        "base": "base1",
        "calibration": "c0ffee",
        "label": "wanda",
        "pattern_label": "unstructured",
    }
    return Recipe(**{**facts, **changes})


def row(tensor: str, mask: torch.Tensor, *, expert: int | None = None, transposed: bool = False) -> dict[str, Any]:
    """What the manifest says of a matrix.

    Args:
        mask: of the tensor, as stored.
    """
    part = mask if expert is None else mask[expert]
    shape = list(part.T.shape if transposed else part.shape)
    zeros = int((~part).sum())
    return {
        "block": 0,
        "matrix": tensor if expert is None else f"{tensor}[{expert}]",
        "tensor": tensor,
        "expert": expert,
        "shape": shape,
        "transposed": transposed,
        "weights": part.numel(),
        "zeros": zeros,
        "asked": zeros / part.numel(),
        "sparsity": zeros / part.numel(),
        "relative_error": 0.2,
        "relative_error_held_out": 0.3,
        "refined": True,
        "trained": None,
        "tokens": 64,
        "calibrated_on": "its tokens",
        "damping": None,
    }


def write(directory: Path, made: Recipe, changes: dict[str, Change], rows: list[dict[str, Any]]) -> SparseDelta:
    """A delta of one block, and what its manifest says."""
    directory.mkdir(parents=True, exist_ok=True)
    write_block(directory / "block-00000.safetensors", changes, made.base)
    sparsity = sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows)
    write_manifest(directory, recipe=made, summary={"sparsity": sparsity, "relative_error": 0.2}, matrices=rows)
    return SparseDelta(directory, made.base)


def rewrite(path: Path, tensors=lambda tensors: None, facts=lambda facts: None, metadata=None) -> None:
    """Write a block's file again with other tensors or other facts about them."""
    with safe_open(path, framework="pt") as file:
        stated = json.loads(file.metadata()["sparsesweep"])
    stored = load_file(path)
    tensors(stored)
    facts(stated)
    save_file(stored, path, metadata={"sparsesweep": json.dumps(stated)} if metadata is None else metadata)


def no_base(name: str, *, entry: int | None = None) -> torch.Tensor:
    """Reads no tensor of a base: masks of bits are read without."""
    raise AssertionError(f"read {name} of the base")


def matrices(base: Checkpoint) -> list[str]:
    """The matrices in scope of a checkpoint of tests.tiny."""
    return [name for name in base if ".layers." in name and len(base.shape(name)) == 2]
