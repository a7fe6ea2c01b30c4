"""Evaluate the dense, the pruned or the quantised model: perplexity, divergence, tasks, generations.

python -m stages.evaluate part=dense|sparse|quantised
"""

import logging
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read by datasets when imported: evaluation reads what fetch brought
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from lm_eval.api.model import LM

from stages import devices, record
from stages.checkpoint.model import Apply, load_model
from stages.config.entry import stage
from stages.evaluation.encoding import CONTEXT_LENGTH
from stages.evaluation.generation import generate
from stages.evaluation.harness import WholeModel, answers, ask
from stages.evaluation.journal import Journal, opened
from stages.evaluation.measurement import as_rows
from stages.evaluation.metric import Metric, Observed
from stages.evaluation.metrics import METRICS
from stages.evaluation.protocol import write_protocol
from stages.evaluation.questions import Questions
from stages.evaluation.results import Answers, Results, Scores, corpus_measurements, results_of
from stages.evaluation.scoring import DENSE, StreamedModels, Variants
from stages.evaluation.section import Evaluation, Ruler
from stages.evaluation.setup import Setup, prepare
from stages.evaluation.streamed import StreamedHarness
from stages.files import (
    BASE,
    DENSE_JOURNAL,
    DENSE_RESULTS,
    RULER_RESULTS,
    SPARSE,
    SPARSE_JOURNAL,
    SPARSE_RESULTS,
    replacing,
    scratch_directory,
    write_json,
)
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)


TRACKED = ("evaluation", *(f"environment.{library}" for library in ("torch", "transformers", "tokenizers", "datasets", "lm_eval")))


@stage(parts={"dense": TRACKED, "sparse": TRACKED, "quantised": ("ruler", *TRACKED)})
def main(part: str, evaluation: Evaluation, ruler: Ruler | None = None) -> None:
    stopwatch = record.Stopwatch()
    if ruler is not None and not ruler.types:
        with replacing(RULER_RESULTS) as directory:
            write_json(directory / "measurements.json", [])
        return
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch:  # /tmp may be memory
        setup = prepare(evaluation, scratch)
        if ruler is not None:
            evaluate_quantised(setup, ruler.types, stopwatch)
        elif part == "dense":
            evaluate_dense(setup, stopwatch)
        else:
            evaluate_sparse(setup, stopwatch)
    log.info("wrote the results of the %s model in %.0f s", part, stopwatch.seconds)


def evaluate_dense(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score the base and write its results."""
    log.info("reading %s; evaluating the dense model on %s in %s", BASE, setup.device, setup.dtype)
    with opened(DENSE_JOURNAL, setup.fingerprint(None)) as journal:
        dense = score(setup, None, None, journal)
        with replacing(DENSE_RESULTS) as directory:
            write(directory, setup, dense, delta=None, stopwatch=stopwatch, speed=speed(journal))


def evaluate_sparse(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score base + delta and write its results with the dense model's."""
    from stages.checkpoint.delta import SparseDelta  # the dense model's results do not depend on these two
    from stages.evaluation.comparison import frontier_rows, paired_accuracies, paired_generations
    from stages.evaluation.reference import read_dense
    from stages.evaluation.size import size_measurements

    dense = read_dense(DENSE_RESULTS, setup.protocol())
    delta = SparseDelta(SPARSE, setup.base.fingerprint)
    log.info("reading %s and %s; evaluating the sparse model on %s in %s", BASE, SPARSE, setup.device, setup.dtype)
    with opened(SPARSE_JOURNAL, setup.fingerprint(delta.fingerprint)) as journal:
        sparse = score(setup, delta.apply, dense, journal)
        with replacing(SPARSE_RESULTS) as directory:
            sizes = size_measurements(setup.base, delta, SPARSE)
            paired = replace(sparse, generations=paired_generations(dense, sparse), measurements=[*sparse.measurements, *sizes])
            write(directory, setup, paired, delta=delta.fingerprint, stopwatch=stopwatch, speed=speed(journal))
            write_json(directory / "frontier.json", frontier_rows(delta, sparse))
            write_json(directory / "accuracy.json", dense.accuracy("dense") + sparse.accuracy("sparse"))
            write_json(directory / "details/paired.json", paired_accuracies(dense, sparse))


def evaluate_quantised(setup: Setup, types: list[str], stopwatch: record.Stopwatch) -> None:
    """Score the base quantised to each type on the corpora, side by side with the dense model; the tasks are left out."""
    from stages.evaluation.quantisation import Quantiser
    from stages.evaluation.reference import read_dense

    dense, rows = read_dense(DENSE_RESULTS, setup.protocol()), []
    metrics = [METRICS[metric] for metric in setup.evaluation.metrics]
    decoder = Decoder(setup.base, setup.dtype, setup.device)
    quantisers = {name: Quantiser.for_decoder(decoder, name) for name in types}
    observed = observe(setup, decoder, {DENSE: None, **quantisers}, metrics)
    for name, quantiser in quantisers.items():
        measured = corpus_measurements(setup.corpora, observed[name], metrics, dense)
        facts = {"type": name, "bytes_per_weight": quantiser.bytes_per_weight}
        rows += [{**row, **facts} for row in as_rows(measured)]
        log.info("%s, %.3f bytes a weight: %s %s", name, quantiser.bytes_per_weight, measured[0].label, measured[0].shown(3))
    with replacing(RULER_RESULTS) as directory:
        write_json(directory / "measurements.json", rows)
        write_protocol(directory / "protocol.json", setup.protocol(), evaluation=asdict(setup.evaluation), delta=None)
        write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))


def speed(journal: Journal) -> dict[str, float] | None:
    """How fast the prompts were continued, one after the other; None where none were."""
    measured = journal.read("speed") if journal.has("speed") else None
    if measured is None:
        return None
    return {**measured, "tokens_per_second": round(measured["tokens"] / max(measured["seconds"], 0.01), 2)}


def write(
    directory: Path,
    setup: Setup,
    results: Results,
    *,
    delta: str | None,
    stopwatch: record.Stopwatch,
    speed: dict[str, float] | None,
) -> None:
    """Write the files that both models' results have.

    Args:
        delta: the delta's fingerprint; None for the dense model. speed: of generating text; None where none was generated.
    """
    details = directory / "details"
    details.mkdir()
    write_json(directory / "metrics.json", results.metrics)
    write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch) | {"generation": speed})
    write_protocol(details / "protocol.json", setup.protocol(), evaluation=asdict(setup.evaluation), delta=delta)
    results.write(details)


def score(setup: Setup, apply: Apply | None, dense: Results | None, journal: Journal) -> Results:
    """Score the base, or the base changed by `apply`.

    Args:
        dense: the dense model's results; None for the dense model itself. journal: takes over what an interrupted run scored.
    """
    evaluation = setup.evaluation
    metrics = [METRICS[metric] for metric in evaluation.metrics if dense is not None or not METRICS[metric].needs_dense]
    variants = {DENSE: None} if any(metric.needs_dense for metric in metrics) else {}
    name = DENSE if dense is None else "sparse"
    decoder = Decoder(setup.base, setup.dtype, setup.device)
    observed = journal.observed(lambda: observe(setup, decoder, {**variants, name: apply}, metrics)[name])
    if evaluation.streamed:
        score_streamed(setup, decoder, apply, journal)
    else:
        score_whole(setup, apply, journal)
    scores = Scores(
        answers={
            style: {name: Answers(**journal.read("answers", style, name)) for name in of_style}
            for style, of_style in setup.questions.items()
        },
        generations=journal.read("generations"),
    )
    tokenize = partial(setup.tokenizer.encode, add_special_tokens=False)
    results = results_of(setup.corpora, observed, metrics, scores, setup.tasks, dense, tokenize)
    perplexities = {measured.name: measured.shown(3) for measured in results.measurements if measured.metric == "perplexity"}
    for corpus in setup.corpora:
        facts = (corpus.name, perplexities[corpus.name], *corpus.windows.shape, setup.bos.words)
        log.info("perplexity on %s: %s on %d windows of %d tokens%s", *facts)
    return results


def observe(setup: Setup, decoder: Decoder, variants: Variants, metrics: list[Metric]) -> dict[str, dict[str, Observed]]:
    """Run models over the windows of all corpora side by side; see StreamedModels.observe."""
    models = StreamedModels(decoder=decoder, variants=variants, scratch=setup.scratch)
    with devices.gpu_memory("evaluation.corpora", max(corpus.windows.shape[1] for corpus in setup.corpora)):
        return models.observe(setup.corpora, metrics)


def score_whole(setup: Setup, apply: Apply | None, journal: Journal) -> None:
    """Score the tasks with a model in memory, task by task, and continue the prompts."""
    evaluation, prompts = setup.evaluation, setup.evaluation.generations.prompts
    waiting = setup.waiting(journal)
    if not prompts and not journal.has("generations"):
        journal.write([], "generations")
    if not waiting and journal.has("generations"):
        return
    model = load_model(setup.base, apply, dtype=setup.dtype, device=setup.device)
    context, batch_size = setup.base.context_length or CONTEXT_LENGTH, evaluation.batch_size
    harness = WholeModel(setup.bos, pretrained=model, tokenizer=setup.tokenizer, batch_size=batch_size, max_length=context)
    for questions in waiting:
        score_tasks(harness, [questions], setup, journal)
    if not journal.has("generations"):
        stopwatch = record.Stopwatch()
        rows, tokens = generate(model, setup.tokenizer, setup.bos, prompts, evaluation.generations.new_tokens)
        journal.write({"tokens": tokens, "seconds": round(stopwatch.seconds, 2)} if tokens else None, "speed")
        journal.write(rows, "generations")


def score_streamed(setup: Setup, decoder: Decoder, apply: Apply | None, journal: Journal) -> None:
    """Score all tasks with one block in memory at a time; no text is generated."""
    if not journal.has("generations"):
        journal.write([], "generations")
    waiting = setup.waiting(journal)
    if waiting:
        models = StreamedModels(decoder=decoder, variants={"scored": apply}, scratch=setup.scratch)
        score_tasks(StreamedHarness(models, setup.tokenizer, setup.bos, setup.evaluation.batch_size), waiting, setup, journal)


def score_tasks(model: LM, waiting: list[Questions], setup: Setup, journal: Journal) -> None:
    """Score tasks and keep their scores."""
    with devices.gpu_memory("evaluation.batch_size", setup.evaluation.batch_size):
        ask(model, waiting)
    for questions in waiting:
        journal.write(asdict(answers(questions)), "answers", questions.style, questions.name)


if __name__ == "__main__":
    main()
