"""Keep statistics of the dense model's inputs, from which a further point is pruned without a pass of the calibration windows.

python -m stages.observe                      prune.statistics says what is kept; by default nothing
"""

from typing import TYPE_CHECKING

from stages.config.entry import Idle, stage
from stages.files import KEPT_MANIFEST, STATISTICS, replacing, write_json

if TYPE_CHECKING:
    from stages.pruning.section import Prune

NONE = "none"  # prune.statistics


def record_nothing() -> None:
    with replacing(STATISTICS) as directory:
        write_json(directory / KEPT_MANIFEST, {"statistics": NONE})


@stage(
    "prune",
    "environment.torch",
    "environment.transformers",
    "environment.safetensors",
    idle=Idle("prune.statistics", NONE, record_nothing),
)
def main(prune: "Prune") -> None:
    if prune.statistics == NONE:
        record_nothing()
        return
    from stages.pruning.kept import observe_dense_model  # which imports transformers

    observe_dense_model(prune)


if __name__ == "__main__":
    main()
