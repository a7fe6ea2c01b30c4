"""Keep statistics of the dense model's inputs, from which a further point is pruned without a pass of the calibration windows.

python -m stages.observe                      prune.statistics says what is kept; by default nothing
"""

import logging

from stages.config.entry import stage
from stages.files import KEPT_MANIFEST, STATISTICS, replacing, write_json
from stages.pruning.section import Kept, Prune

log = logging.getLogger(__name__)


@stage("prune", "environment.torch", "environment.transformers", "environment.safetensors")
def main(prune: Prune) -> None:
    if prune.statistics == Kept.NONE:
        with replacing(STATISTICS) as directory:
            write_json(directory / KEPT_MANIFEST, {"statistics": str(Kept.NONE)})
        return
    from stages.pruning.kept import observe_dense_model  # which imports transformers

    observe_dense_model(prune)


if __name__ == "__main__":
    main()
