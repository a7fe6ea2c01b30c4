"""Write the pruned model as a plain checkpoint with its card, and check what was written.

python -m stages.publish
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from stages import record
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.config import SECTIONS, stage
from stages.files import (
    BASE,
    CALIBRATION,
    DENSE_RESULTS,
    PRUNE_RESULTS,
    RELEASE,
    SPARSE,
    SPARSE_RESULTS,
    TEXT,
    read_json,
    replacing,
    require_free_disk,
    write_json,
)
from stages.release.card import default_name, write_card
from stages.release.packing import pack, write_sums
from stages.release.verification import verify

log = logging.getLogger(__name__)


@stage(*SECTIONS)
def main(**sections: Any) -> None:
    base = Checkpoint(BASE)
    delta = SparseDelta(SPARSE, base.fingerprint)
    recipe, results = {**delta.recipe.as_dict(), **delta.summary}, read_results()
    log.info("read %s, %s and the results of pruning and evaluation", BASE, SPARSE)
    name = sections["publish"].name or default_name(base.provenance["name"], recipe)
    require_free_disk(RELEASE, sum((BASE / shard).stat().st_size for shard in base.headers))
    with replacing(RELEASE) as release:
        pack(base, delta, release)
        verified = verify(release, base, delta)
        log.info("checked %d matrices and %d other tensors", verified.matrices, verified.other_tensors)
        write_json(release / PROVENANCE, provenance(base, recipe, results))
        write_params(release / "params.yaml", sections)
        write_card(
            release / "README.md",
            name=name,
            base=base.provenance,
            recipe=recipe,
            matrices=delta.matrices,
            results=results,
            verified=verified,
        )
        write_sums(release)
    log.info("wrote %s: %s", RELEASE, name)


def read_results() -> dict[str, Any]:
    """What the earlier stages measured, by the names that the card uses."""
    return {
        "prune": read_json(PRUNE_RESULTS / "provenance.json"),
        "dense": read_json(DENSE_RESULTS / "metrics.json"),
        "sparse": read_json(SPARSE_RESULTS / "metrics.json"),
        "accuracy": [row for row in read_json(SPARSE_RESULTS / "accuracy.json") if row["model"] == "sparse"],
        "protocol": read_json(SPARSE_RESULTS / "details/protocol.json"),
        "generations": read_json(SPARSE_RESULTS / "details/generations.json"),
    }


def provenance(base: Checkpoint, recipe: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Where everything in the release comes from."""
    return {
        "base": base.provenance,
        "text": read_json(TEXT / PROVENANCE),
        "calibration": read_json(CALIBRATION / PROVENANCE),
        "recipe": recipe,
        "prune": results["prune"],
        "evaluation": {"protocol": results["protocol"], "dense": results["dense"], "sparse": results["sparse"]},
        "publish": {"code": record.code_revision(), "versions": record.versions()},
    }


def write_params(path: Path, sections: dict[str, Any]) -> None:
    """The configuration as `dvc repro` replays it; paths of local sources stay private."""
    params = {name: asdict(section) for name, section in sections.items()}
    for source in (params["base"], *params["text"]["calibration"].values(), *params["text"]["evaluation"].values()):
        if "path" in source:
            source["path"] = None
    path.write_text("# As params.yaml of sparsesweep, `dvc repro` makes this release again.\n" + yaml.safe_dump(params, sort_keys=False))


if __name__ == "__main__":
    main()
