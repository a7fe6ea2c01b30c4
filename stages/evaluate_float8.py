"""Evaluate the pruned model as publish.dtype=float8 rounds it: perplexity, divergence and tasks, with the dense model's results.

python -m stages.evaluate_float8

With publish.dtype=base there is nothing to evaluate, and none of the libraries that evaluation takes seconds to import is needed.
"""

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from stages.config.entry import Idle, stage
from stages.evaluation.tracked import TRACKED
from stages.files import BASE, DENSE_RESULTS, FLOAT8_JOURNAL, FLOAT8_RESULTS, SPARSE, replacing, scratch_directory, write_json

if TYPE_CHECKING:
    from stages.evaluation.section import Evaluation

log = logging.getLogger(__name__)
AS_THE_BASE = "base"  # publish.dtype


def record_nothing() -> None:
    with replacing(FLOAT8_RESULTS) as directory:
        write_json(directory / "measurements.json", [])


@stage("publish.dtype", *TRACKED, idle=Idle("publish.dtype", AS_THE_BASE, record_nothing))
def main(publish_dtype: str, evaluation: "Evaluation") -> None:
    if publish_dtype == AS_THE_BASE:
        record_nothing()
    else:
        evaluate_rounded(evaluation)


def evaluate_rounded(evaluation: "Evaluation") -> None:
    """Score base + delta, rounded, by the same evaluation as the pruned model; no prompt is continued."""
    from stages import record
    from stages.checkpoint.delta import SparseDelta
    from stages.comparison.reference import read_dense
    from stages.evaluation.journal import opened
    from stages.evaluation.measurement import as_rows
    from stages.evaluation.metrics import METRICS
    from stages.evaluation.protocol import write_protocol
    from stages.evaluation.results import Scores
    from stages.evaluation.running import answer_tasks, loader, measure, observe
    from stages.evaluation.scoring import DENSE
    from stages.evaluation.setup import prepare
    from stages.quantisation.float8 import Float8
    from stages.streaming.decoder import Decoder

    stopwatch = record.Stopwatch()
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch:
        setup = prepare(evaluation, scratch)
        dense = replace(read_dense(DENSE_RESULTS, setup.protocol()), generations=[])
        delta = SparseDelta(SPARSE, setup.base.fingerprint)
        log.info("reading %s and %s; evaluating the sparse model in float8 on %s in %s", BASE, SPARSE, setup.device, setup.dtype)
        apply, metrics = Float8(delta), [METRICS[metric] for metric in setup.evaluation.metrics]
        decoder = Decoder(setup.base, setup.dtype, setup.device)
        with opened(FLOAT8_JOURNAL, setup.fingerprint(f"{delta.fingerprint} in float8")) as journal:
            observed = journal.observed(lambda: observe(setup, decoder, {DENSE: None, "float8": apply}, metrics)["float8"])
            answers = answer_tasks(setup, decoder, apply, loader(setup, apply), journal)
            measured = measure(setup, observed, metrics, Scores(answers=answers, generations=[]), dense).measurements
            with replacing(FLOAT8_RESULTS) as directory:
                write_json(directory / "measurements.json", as_rows(measured))
                asked = asdict(setup.evaluation)
                write_protocol(directory / "protocol.json", setup.protocol(), evaluation=asked, delta=delta.fingerprint)
                write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))
    log.info("float8: %s %s; %.0f s", measured[0].label, measured[0].shown(3), stopwatch.seconds)


if __name__ == "__main__":
    main()
