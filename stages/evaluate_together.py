"""Evaluate the pruned models of several clones of this repository side by side, before each clone's own evaluation.

python -m stages.evaluate_together CLONE…

Runs in a clone whose dense model is evaluated, and scores by its params.yaml what the prune stages of all that are named left. What is
found lies in the journal of each clone's evaluation, which takes it over as it does an interrupted run's; a clone whose base, text or
settings differ takes nothing. `python -m stages.sweep --together` runs it.
"""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config.entry import stage
from stages.evaluation.tracked import TRACKED
from stages.files import DENSE_RESULTS, SPARSE, SPARSE_JOURNAL, scratch_directory

if TYPE_CHECKING:
    from stages.evaluation.section import Evaluation

log = logging.getLogger(__name__)
CLONES = "SPARSESWEEP_CLONES"  # the environment variable that names the clones: the command line is Hydra's


@stage(*TRACKED)
def evaluate(evaluation: "Evaluation") -> None:
    from stages import record
    from stages.checkpoint.delta import SparseDelta
    from stages.comparison.reference import read_dense
    from stages.evaluation.journal import TOGETHER, opened
    from stages.evaluation.running import score_together
    from stages.evaluation.setup import prepare

    stopwatch, clones = record.Stopwatch(), [Path(clone) for clone in os.environ[CLONES].split(os.pathsep)]
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch, ExitStack() as stack:
        setup = prepare(evaluation, scratch)
        read_dense(DENSE_RESULTS, setup.protocol())  # refuses another protocol before a weight is read
        models = {}
        for clone in clones:
            delta = SparseDelta(clone / SPARSE, setup.base.fingerprint)
            journal = stack.enter_context(opened(clone / SPARSE_JOURNAL, setup.fingerprint(delta.fingerprint), stays=True))
            models[str(clone)] = delta.apply, journal
        log.info("evaluating %d sparse models side by side on %s in %s", len(models), setup.device, setup.dtype)
        score_together(setup, models)
        share = {"models": len(models), "seconds": round(stopwatch.seconds / len(models), 2)}
        for _, journal in models.values():
            journal.write(share, TOGETHER)
    log.info("evaluated %d sparse models side by side in %.0f s", len(models), stopwatch.seconds)


def main(clones: list[str]) -> None:
    if not clones:
        sys.exit("found no clone, wanted those whose pruned models are evaluated")
    os.environ[CLONES] = os.pathsep.join(clones)
    sys.argv[1:] = []
    evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
