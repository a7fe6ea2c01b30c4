"""Evaluate the dense or the pruned model: perplexity, divergence, tasks, generations.

python -m stages.evaluate part=dense|sparse
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read by datasets when imported: evaluation reads what fetch brought
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from lm_eval.api.model import LM
from tqdm import tqdm
from transformers import PreTrainedModel

from stages import devices, record
from stages.checkpoint.model import Apply, load_model
from stages.config.entry import stage
from stages.evaluation.encoding import CONTEXT_LENGTH
from stages.evaluation.generation import generate
from stages.evaluation.harness import WholeModel, answers, ask
from stages.evaluation.journal import Journal, opened
from stages.evaluation.metric import Metric, Observed
from stages.evaluation.metrics import METRICS
from stages.evaluation.protocol import write_protocol
from stages.evaluation.questions import Questions
from stages.evaluation.results import Answers, Results, Scores, results_of
from stages.evaluation.scoring import DENSE, StreamedModels, Variants
from stages.evaluation.section import Evaluation
from stages.evaluation.setup import Setup, prepare
from stages.evaluation.streamed import StreamedHarness
from stages.evaluation.tracked import TRACKED
from stages.files import (
    BASE,
    DENSE_JOURNAL,
    DENSE_RESULTS,
    PROMPT_SENSITIVITY,
    SPARSE,
    SPARSE_JOURNAL,
    SPARSE_RESULTS,
    replacing,
    scratch_directory,
    write_json,
)
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)

Load = Callable[[], PreTrainedModel]


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
    with opened(DENSE_JOURNAL, setup.fingerprint(None)) as journal:
        dense = score(setup, None, None, journal)
        with replacing(DENSE_RESULTS) as directory:
            write(directory, setup, dense, delta=None, stopwatch=stopwatch, speed=speed(journal))


def evaluate_sparse(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score base + delta and write its results with the dense model's."""
    from stages.checkpoint.delta import SparseDelta  # the dense model's results do not depend on these two
    from stages.evaluation.comparison import frontier_rows, paired_accuracies, paired_generations, prompt_sensitivity
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
            if sparse.styles:
                write_json(directory / PROMPT_SENSITIVITY, prompt_sensitivity(dense, sparse))


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
    load = loader(setup, apply)
    answers = answer_tasks(setup, decoder, apply, load, journal)
    scores = Scores(answers=answers, generations=continue_prompts(setup, load, journal))
    results = measure(setup, observed, metrics, scores, dense)
    perplexities = {measured.name: measured.shown(3) for measured in results.measurements if measured.metric == "perplexity"}
    for corpus in setup.corpora:
        facts = (corpus.name, perplexities[corpus.name], *corpus.windows.shape, setup.bos.words)
        log.info("perplexity on %s: %s on %d windows of %d tokens%s", *facts)
    return results


def measure(setup: Setup, observed: Mapping[str, Observed], metrics: list[Metric], scores: Scores, dense: Results | None) -> Results:
    """Make all measurements of a model; args: see results_of."""
    tokenize = partial(setup.tokenizer.encode, add_special_tokens=False)
    return results_of(setup.corpora, observed, metrics, scores, setup.tasks, dense, tokenize)


def observe(setup: Setup, decoder: Decoder, variants: Variants, metrics: list[Metric]) -> dict[str, dict[str, Observed]]:
    """Run models over the windows of all corpora side by side; see StreamedModels.observe."""
    models = StreamedModels(decoder=decoder, variants=variants, scratch=setup.scratch)
    with devices.gpu_memory("evaluation.corpora", max(corpus.windows.shape[1] for corpus in setup.corpora)):
        return models.observe(setup.corpora, metrics)


def loader(setup: Setup, apply: Apply | None) -> Load:
    """A function that loads the whole model when it is first called."""
    return cache(partial(load_model, setup.base, apply, dtype=setup.dtype, device=setup.device))


def answer_tasks(setup: Setup, decoder: Decoder, apply: Apply | None, load: Load, journal: Journal) -> dict[str, dict[str, Answers]]:
    """Answer the tasks: one after the other with the whole model in memory, or all at once with one block of it.

    Returns:
        Style -> task -> answers; those of an interrupted run stand in the journal.
    """
    waiting, batch_size = setup.waiting(journal), setup.evaluation.batch_size

    def whole() -> WholeModel:
        context = setup.base.context_length or CONTEXT_LENGTH
        return WholeModel(setup.bos, pretrained=load(), tokenizer=setup.tokenizer, batch_size=batch_size, max_length=context)

    if waiting and setup.evaluation.streamed:
        models = StreamedModels(decoder=decoder, variants={"scored": apply}, scratch=setup.scratch)
        ask_all(StreamedHarness(models, setup.tokenizer, setup.bos, batch_size, whole), waiting, batch_size, journal)
    elif waiting:
        model = whole()
        with tqdm(total=sum(len(questions.instances) for questions in waiting), desc="all tasks", unit="request") as bar:
            for questions in waiting:
                bar.set_postfix_str(questions.name)
                ask_all(model, [questions], batch_size, journal)
                bar.update(len(questions.instances))
    return {
        style: {name: Answers(**journal.read("answers", style, name)) for name in of_style} for style, of_style in setup.questions.items()
    }


def ask_all(model: LM, waiting: list[Questions], batch_size: int, journal: Journal) -> None:
    """Ask a model all questions and keep its answers in the journal."""
    with devices.gpu_memory("evaluation.batch_size", batch_size):
        ask(model, waiting)
    for questions in waiting:
        journal.write(asdict(answers(questions)), "answers", questions.style, questions.name)


def continue_prompts(setup: Setup, load: Load, journal: Journal) -> list[dict[str, str]]:
    """Continue the prompts with a whole model and measure how fast."""
    asked = setup.evaluation.generations
    if not journal.has("generations"):
        rows: list[dict[str, str]] = []
        if asked.prompts:
            model, stopwatch = load(), record.Stopwatch()
            rows, tokens = generate(model, setup.tokenizer, setup.bos, asked.prompts, asked.new_tokens)
            journal.write({"tokens": tokens, "seconds": round(stopwatch.seconds, 2)} if tokens else None, "speed")
        journal.write(rows, "generations")
    return cast(list[dict[str, str]], journal.read("generations"))


if __name__ == "__main__":
    main()
