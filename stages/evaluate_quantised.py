"""Evaluate the dense model quantised to each type of `ruler.types`: what a pruned model is held against.

python -m stages.evaluate_quantised

Without types there is nothing to evaluate, and none of the libraries that evaluation takes seconds to import is needed.
"""

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from stages.config.entry import Idle, stage
from stages.evaluation.tracked import TRACKED
from stages.files import DENSE_RESULTS, RULER_JOURNALS, RULER_RESULTS, replacing, scratch_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.evaluation.metric import Observed
    from stages.evaluation.section import Evaluation, Ruler

log = logging.getLogger(__name__)


def record_nothing() -> None:
    with replacing(RULER_RESULTS) as directory:
        write_json(directory / "measurements.json", [])


@stage("ruler", *TRACKED, idle=Idle("ruler.types", [], record_nothing, frozenset({"tasks"})))
def main(ruler: "Ruler", evaluation: "Evaluation") -> None:
    if ruler.types:
        evaluate_types(ruler, evaluation)
    else:
        record_nothing()


def evaluate_types(ruler: "Ruler", evaluation: "Evaluation") -> None:
    """Score the base quantised to each type: the corpora side by side with the dense model, then the tasks; no prompt is continued."""
    from stages import record
    from stages.comparison.reference import read_dense
    from stages.evaluation.journal import opened
    from stages.evaluation.measurement import as_rows
    from stages.evaluation.metrics import METRICS
    from stages.evaluation.protocol import write_protocol
    from stages.evaluation.results import Scores
    from stages.evaluation.running import answer_tasks, loader, measure, observe
    from stages.evaluation.scoring import DENSE
    from stages.evaluation.setup import prepare
    from stages.quantisation.ggml import Quantiser
    from stages.streaming.decoder import Decoder

    stopwatch = record.Stopwatch()
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch, ExitStack() as stack:
        setup = prepare(evaluation, scratch)
        dense = replace(read_dense(DENSE_RESULTS, setup.protocol()), generations=[])
        metrics = [METRICS[metric] for metric in setup.evaluation.metrics]
        decoder, rows = Decoder(setup.base, setup.dtype, setup.device), list[dict[str, Any]]()
        quantisers = {name: Quantiser.for_decoder(decoder, name) for name in ruler.types}
        observe_all = cache(lambda: observe(setup, decoder, {DENSE: None, **quantisers}, metrics))  # side by side, when one is asked for
        journals = {
            name: stack.enter_context(opened(RULER_JOURNALS / f".evaluate-{name}", setup.fingerprint(name))) for name in ruler.types
        }
        observed = {name: journal.observed(partial(_of_variant, observe_all, name)) for name, journal in journals.items()}
        for name, quantiser in quantisers.items():
            answers = answer_tasks(setup, decoder, quantiser, loader(setup, quantiser), journals[name]) if ruler.tasks else {}
            measured = measure(setup, observed[name], metrics, Scores(answers=answers, generations=[]), dense).measurements
            facts = {"type": name, "bytes_per_weight": quantiser.bytes_per_weight, "shares": quantiser.shares}
            rows += [{**row, **facts} for row in as_rows(measured)]
            log.info("%s, %.3f bytes a weight: %s %s", name, quantiser.bytes_per_weight, measured[0].label, measured[0].shown(3))
        with replacing(RULER_RESULTS) as directory:
            write_json(directory / "measurements.json", rows)
            write_protocol(directory / "protocol.json", setup.protocol(), evaluation=asdict(setup.evaluation), delta=None)
            write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))
    log.info("wrote the results of the quantised models in %.0f s", stopwatch.seconds)


def _of_variant(observe_all: "Callable[[], dict[str, dict[str, Observed]]]", name: str) -> "dict[str, Observed]":
    """What was observed of one of several models that are run side by side."""
    return observe_all()[name]


if __name__ == "__main__":
    main()
