"""Evaluate the pruned models of several clones of this repository side by side, before each clone's own evaluation.

python -m stages.evaluate_together CLONE…

Runs in a clone whose dense model is evaluated, and scores by its params.yaml what the prune stages of all that are named left. What is
found lies in the journal of each clone's evaluation, which takes it over as it does an interrupted run's. A clone whose settings or base
differ, or whose model cannot be scored, is named and left out. `python -m stages.sweep --together` runs it.
"""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config.entry import stage
from stages.config.params import PARAMS, read_params
from stages.evaluation.tracked import TRACKED
from stages.files import DENSE_RESULTS, SPARSE, SPARSE_JOURNAL, scratch_directory

if TYPE_CHECKING:
    from stages.checkpoint.delta import SparseDelta
    from stages.evaluation.section import Evaluation
    from stages.evaluation.setup import Setup

log = logging.getLogger(__name__)
CLONES = "SPARSESWEEP_CLONES"  # the environment variable that names the clones, one a line: the command line is Hydra's


@stage(*TRACKED)
def evaluate(evaluation: "Evaluation") -> None:
    from stages import devices, record
    from stages.comparison.reference import read_dense
    from stages.errors import SparsesweepError
    from stages.evaluation.journal import TOGETHER, opened
    from stages.evaluation.running import score_together
    from stages.evaluation.setup import prepare

    stopwatch, clones = record.Stopwatch(), dict.fromkeys(map(Path, os.environ[CLONES].splitlines()))
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch, ExitStack() as stack:
        setup = prepare(evaluation, scratch)
        read_dense(DENSE_RESULTS, setup.protocol())  # refuses another protocol before a weight is read
        models, failed = {}, dict[str, SparsesweepError]()
        for clone in clones:
            try:
                delta = _delta(clone, setup)
                journal = stack.enter_context(opened(clone / SPARSE_JOURNAL, setup.fingerprint(delta.fingerprint), stays=True))
                if not setup.is_finished(journal):
                    models[str(clone)] = delta.apply, journal
            except SparsesweepError as error:
                failed[str(clone)] = error
        journals = [journal for _, journal in models.values()]
        earlier = [journal.read(TOGETHER) if journal.has(TOGETHER) else {} for journal in journals]

        def note() -> None:
            """Say in every journal how long its model took so far, whatever happens next."""
            seconds, peak = stopwatch.seconds / len(journals), devices.peak_memory(setup.device) / 2**30
            for journal, before in zip(journals, earlier, strict=True):
                facts = {
                    "models": max(len(journals), before.get("models", 1)),
                    "seconds": round(before.get("seconds", 0) + seconds, 2),
                    "peak_memory_gib": round(max(before.get("peak_memory_gib", 0), peak), 3),
                }
                journal.write(facts, TOGETHER)

        log.info("evaluating %d sparse models side by side on %s in %s", len(models), setup.device, setup.dtype)
        if models:
            failed |= score_together(setup, models, note)
    for name, reason in failed.items():
        log.error("%s: left out: %s: %s", name, type(reason).__name__, reason)
    log.info("evaluated %d sparse models side by side in %.0f s", len(clones) - len(failed), stopwatch.seconds)
    if len(failed) == len(clones):
        sys.exit(1)


def _delta(clone: Path, setup: "Setup") -> "SparseDelta":
    """The pruned model of a clone.

    Raises:
        SparsesweepError: it is damaged, of another base, or to be evaluated otherwise.
    """
    from stages.checkpoint.delta import SparseDelta
    from stages.errors import ConfigError
    from stages.experiments.lock import value_at

    ours, theirs = read_params(PARAMS), read_params(clone / PARAMS)
    for key in TRACKED:
        if value_at(ours, key) != value_at(theirs, key):
            raise ConfigError(f"{clone / PARAMS}: found another {key} than that of {PARAMS.absolute()}, wanted the same evaluation")
    return SparseDelta(clone / SPARSE, setup.base.fingerprint)


def main(clones: list[str]) -> None:
    if not clones:
        sys.exit("found no clone, wanted those whose pruned models are evaluated")
    os.environ[CLONES] = "\n".join(clones)
    sys.argv[1:] = []
    evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
