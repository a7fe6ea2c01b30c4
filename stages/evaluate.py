"""Evaluate the dense or the pruned model: perplexity, divergence, tasks, generations.

python -m stages.evaluate part=dense|sparse
"""

import logging
from dataclasses import asdict, replace
from pathlib import Path

from stages import record
from stages.config.entry import stage
from stages.evaluation import dense_states
from stages.evaluation.journal import TOGETHER, Journal, opened
from stages.evaluation.protocol import write_protocol
from stages.evaluation.results import Results
from stages.evaluation.running import score
from stages.evaluation.section import Evaluation
from stages.evaluation.setup import Setup, prepare
from stages.evaluation.tracked import TRACKED
from stages.files import (
    BASE,
    DENSE_JOURNAL,
    DENSE_RESULTS,
    DENSE_STATES,
    PROMPT_SENSITIVITY,
    SPARSE,
    SPARSE_JOURNAL,
    SPARSE_RESULTS,
    replacing,
    scratch_directory,
    write_json,
)

log = logging.getLogger(__name__)


@stage(parts={"dense": TRACKED, "sparse": TRACKED})
def main(part: str, evaluation: Evaluation) -> None:
    stopwatch = record.Stopwatch()
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch:  # /tmp may be memory
        setup = prepare(evaluation, scratch)
        if part == "dense":
            evaluate_dense(setup, stopwatch)
        else:
            evaluate_sparse(setup, stopwatch)
    log.info("wrote the results of the %s model in %.0f s", part, stopwatch.seconds)


def evaluate_dense(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score the base and write its results."""
    log.info("reading %s; evaluating the dense model on %s in %s", BASE, setup.device, setup.dtype)
    fingerprint = setup.fingerprint(None)
    with opened(DENSE_JOURNAL, fingerprint) as journal:
        dense = score(setup, None, None, journal)
        with replacing(DENSE_STATES) as states, replacing(DENSE_RESULTS) as directory:
            dense_states.write(states, journal, fingerprint, setup.device)
            write(directory, setup, dense, delta=None, journal=journal, stopwatch=stopwatch)


def evaluate_sparse(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score base + delta and write its results with the dense model's."""
    from stages.checkpoint.delta import SparseDelta  # the dense model's results do not depend on these two
    from stages.comparison.paired import frontier_rows, paired_accuracies, paired_generations, prompt_sensitivity
    from stages.comparison.reference import read_dense
    from stages.comparison.size import size_measurements

    dense = read_dense(DENSE_RESULTS, setup.protocol())
    delta = SparseDelta(SPARSE, setup.base.fingerprint)
    log.info("reading %s and %s; evaluating the sparse model on %s in %s", BASE, SPARSE, setup.device, setup.dtype)
    with opened(SPARSE_JOURNAL, setup.fingerprint(delta.fingerprint)) as journal:
        sparse = score(setup, delta.apply, dense, journal)
        with replacing(SPARSE_RESULTS) as directory:
            sizes = size_measurements(setup.base, delta, SPARSE)
            paired = replace(sparse, generations=paired_generations(dense, sparse), measurements=[*sparse.measurements, *sizes])
            write(directory, setup, paired, delta=delta.fingerprint, journal=journal, stopwatch=stopwatch)
            write_json(directory / "frontier.json", frontier_rows(delta, sparse))
            write_json(directory / "accuracy.json", dense.accuracy("dense") + sparse.accuracy("sparse"))
            write_json(directory / "details/paired.json", paired_accuracies(dense, sparse))
            if sparse.styles:
                write_json(directory / PROMPT_SENSITIVITY, prompt_sensitivity(dense, sparse))


def speed(journal: Journal) -> dict[str, float] | None:
    """How fast the prompts were continued, one after the other; None where none were."""
    measured = journal.read("speed") if journal.has("speed") else None
    if measured is None:
        return None
    return {**measured, "tokens_per_second": round(measured["tokens"] / max(measured["seconds"], 0.01), 2)}


def write(directory: Path, setup: Setup, results: Results, *, delta: str | None, journal: Journal, stopwatch: record.Stopwatch) -> None:
    """Write the files that both models' results have.

    Args:
        delta: the delta's fingerprint; None for the dense model.
    """
    details = directory / "details"
    details.mkdir()
    write_json(directory / "metrics.json", results.metrics)
    together = journal.read(TOGETHER) if journal.has(TOGETHER) else {"models": 1, "seconds": 0, "peak_memory_gib": 0}
    run = record.of_run(setup.device, setup.dtype, stopwatch, together["seconds"])
    peak = max(run["peak_memory_gib"], together["peak_memory_gib"])
    facts = {"peak_memory_gib": peak, "generation": speed(journal), "evaluated_together": together["models"]}
    write_json(directory / "run.json", run | facts)
    write_protocol(details / "protocol.json", setup.protocol(), evaluation=asdict(setup.evaluation), delta=delta)
    results.write(details)


if __name__ == "__main__":
    main()
