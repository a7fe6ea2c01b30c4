"""Write the pruned model as a plain checkpoint with its card, and check what was written.

python -m stages.publish
"""

import logging
from dataclasses import asdict
from typing import Any

from stages import record
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.config.entry import stage
from stages.config.environment import Environment
from stages.errors import ReleaseError
from stages.evaluation.measurement import as_rows
from stages.files import BASE, RELEASE, SPARSE, replacing, require_free_disk, write_json
from stages.recipe import Recipe
from stages.release.benchmarks import write_eval_results
from stages.release.card import Others, write_card
from stages.release.float8 import CountedFloat8, require_float8, write_float8
from stages.release.frontier import draw
from stages.release.licence import require_derivable
from stages.release.llama_cpp.writing import GgufWriter, write_checked
from stages.release.naming import default_name
from stages.release.packed import pack_release
from stages.release.packing import pack, write_sums
from stages.release.params import local_paths, write_params
from stages.release.records import Records
from stages.release.section import CONTENTS, Contents
from stages.release.verification import Verified, verify
from stages.release.zeros import write_zeros

log = logging.getLogger(__name__)


@stage(*(f"publish.{key}" for key in CONTENTS), "environment")
def main(environment: Environment, **contents: Any) -> None:
    publish = Contents(**{key: contents[f"publish_{key}"] for key in CONTENTS})
    base = Checkpoint(BASE)
    delta = SparseDelta(SPARSE, base.fingerprint)
    records = Records.read()
    records.require_of(delta)
    records.require_versions(environment)
    require_derivable(records.base["license"], any_license=publish.any_license)
    delta.require_hashes()
    log.info("read %s, %s and the results of pruning and evaluation", BASE, SPARSE)
    if publish.masks_only and not delta.masks_alone:
        raise ReleaseError(f"publish.masks_only: found true, and kept weights of {SPARSE} that are not the base's, wanted false")
    rounded = publish.dtype == "float8"
    float8_results = records.float8(delta) if rounded else []
    if rounded:
        require_float8(delta)
    picture = None
    if publish.frontier is not None:
        scored = float8_results if rounded else records.sparse
        picture = draw(publish.frontier, records.protocol, scored, sparsity=delta.summary["sparsity"], sparse=records.sparse)
    name = publish.name or default_name(records.base["name"], delta.recipe)
    sections = records.sections(delta.recipe, publish=asdict(publish), environment=asdict(environment))
    gguf = [GgufWriter(base, delta, of) for of in publish.written_gguf_types]
    shards = [(BASE / shard).stat().st_size for shard in base.headers]
    packed = sum(shards) + max(shards) if publish.packed else 0  # one is unpacked again while all that is packed is there
    require_free_disk(RELEASE, sum(shards) + packed + sum(writer.size for writer in gguf))
    with replacing(RELEASE) as release:
        write_params(release / "params.yaml", sections)
        pack(base, delta, release)
        verified = verify(release, base, delta)
        log.info("checked %d matrices and %d other tensors; loaded: %s", verified.matrices, verified.other_tensors, verified.loaded.loading)
        float8 = write_float8(release, base, delta) if rounded else None
        if float8 is not None:
            log.info("checked the same in float8; loaded: %s", float8.loaded.loading)
        write_json(release / PROVENANCE, provenance(delta.recipe, records, verified, float8))
        write_zeros(release, delta)
        files = write_checked(gguf, release, name)
        if picture is not None:
            picture.write(release)
        others = Others(gguf=files, float8=float8, float8_results=float8_results, packed=publish.packed, picture=picture)
        to_be_set = local_paths(sections)
        write_card(release / "README.md", name=name, delta=delta, records=records, verified=verified, others=others, to_be_set=to_be_set)
        write_eval_results(release, records, float8_results or records.sparse)
        if publish.packed:
            pack_release(release, base if publish.masks_only else None)
        write_sums(release)
    log.info("wrote %s: %s", RELEASE, name)


def provenance(recipe: Recipe, records: Records, verified: Verified, float8: CountedFloat8 | None) -> dict[str, Any]:
    """Where everything in the release comes from, and what was read back of it."""
    checked = {"verified": asdict(verified), **({} if float8 is None else {"float8": asdict(float8)})}
    return {
        "base": records.base,
        "text": records.text,
        "calibration": records.calibration,
        "recipe": recipe.as_dict(),
        "prune": records.run,
        "evaluation": {"protocol": records.protocol, "dense": as_rows(records.dense), "sparse": as_rows(records.sparse)},
        "publish": {"code": record.code_revision(), "versions": record.versions(), **checked},
    }


if __name__ == "__main__":
    main()
