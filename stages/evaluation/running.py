"""Run one model, or several side by side, over the windows of the corpora, the tasks and the prompts of an evaluation."""

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import cast

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read by datasets when imported: evaluation reads what fetch brought
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from lm_eval.api.model import LM
from tqdm import tqdm
from transformers import PreTrainedModel

from stages import devices, record
from stages.checkpoint.model import Apply, load_model
from stages.errors import SparsesweepError
from stages.evaluation import dense_states
from stages.evaluation.encoding import CONTEXT_LENGTH
from stages.evaluation.generation import generate
from stages.evaluation.harness import WholeModel, answers, ask
from stages.evaluation.journal import Journal
from stages.evaluation.metric import Metric, Observed
from stages.evaluation.metrics import METRICS
from stages.evaluation.questions import Questions
from stages.evaluation.results import Answers, Results, Scores, results_of
from stages.evaluation.scoring import DENSE, Keep, StreamedModels, Variants
from stages.evaluation.setup import Setup
from stages.evaluation.streamed import SharedScores, StreamedHarness
from stages.files import DENSE_STATES
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)

Load = Callable[[], PreTrainedModel]


def score(setup: Setup, apply: Apply | None, dense: Results | None, journal: Journal) -> Results:
    """Score the base, or the base changed by `apply`.

    The dense model's hidden states, with which pruned models are compared, stay in its journal; where they were kept they are read.

    Args:
        dense: the dense model's results; None for the dense model itself. journal: takes over what an interrupted run scored.
    """
    metrics = [METRICS[metric] for metric in setup.evaluation.metrics if dense is not None or not METRICS[metric].needs_dense]
    name = DENSE if dense is None else "sparse"
    decoder = Decoder(setup.base, setup.dtype, setup.device)

    def observed_now() -> dict[str, Observed]:
        if dense is not None:
            return observe_pruned(setup, decoder, {name: apply}, metrics)[name]
        keep = partial(_keep_dense, setup, journal) if needs_dense(setup) else None
        return observe(setup, decoder, {name: apply}, metrics, None, keep)[name]

    observed = journal.observed(observed_now)
    load = loader(setup, apply)
    answers = answer_tasks(setup, decoder, apply, load, journal)
    scores = Scores(answers=answers, generations=continue_prompts(setup, load, journal))
    results = measure(setup, observed, metrics, scores, dense)
    perplexities = {measured.name: measured.shown(3) for measured in results.measurements if measured.metric == "perplexity"}
    for corpus in setup.corpora:
        facts = (corpus.name, perplexities[corpus.name], *corpus.windows.shape, setup.bos.words)
        log.info("perplexity on %s: %s on %d windows of %d tokens%s", *facts)
    return results


def score_together(setup: Setup, models: Mapping[str, tuple[Apply, Journal]], kept: Callable[[], None]) -> dict[str, SparsesweepError]:
    """Score several pruned models and leave in the journal of each what is found, for its own evaluation to take over.

    The base is read once for the windows of all, and once for their tasks if these are streamed; whole models follow one another. A model
    that cannot be scored stops no other.

    Args:
        models: by name, what makes each of the base's, and its journal. kept: is called whenever journals have more.

    Returns:
        Why models were left out, by name.
    """
    metrics = [METRICS[metric] for metric in setup.evaluation.metrics]
    decoder = Decoder(setup.base, setup.dtype, setup.device)
    failed: dict[str, SparsesweepError] = {}
    unseen = {name: apply for name, (apply, journal) in models.items() if not journal.has_observed}
    observed: dict[str, dict[str, Observed]] = {}
    while unseen and not observed:
        try:
            observed = observe_pruned(setup, decoder, unseen, metrics)
        except SparsesweepError as error:
            if error.model is None or error.model not in unseen:
                raise
            failed[error.model] = error.with_traceback(None)
            del unseen[error.model]
    for name in unseen:
        models[name][1].observed(partial(observed.__getitem__, name))
    kept()
    waiting = [name for name in models if name not in failed and setup.waiting(models[name][1])]
    scores = streamed_scores(setup, decoder, {name: models[name][0] for name in waiting})

    def go_on(name: str, *, prompts: bool) -> None:
        apply, journal = models[name]
        load = loader(setup, apply)
        try:
            answer_tasks(setup, decoder, apply, load, journal, (scores, name))
            if prompts:
                continue_prompts(setup, load, journal)
        except SparsesweepError as error:
            failed[name] = error.with_traceback(None)
        kept()
        del load
        gc.collect()  # of a whole model, before the next is loaded

    if setup.evaluation.streamed:  # what all are asked at once is kept of all before a whole model is loaded
        for name in waiting:
            go_on(name, prompts=False)
    for name in models:
        if name not in failed:
            go_on(name, prompts=True)
    return failed


def needs_dense(setup: Setup) -> bool:
    """Whether a metric compares a pruned model with the dense one."""
    return any(METRICS[metric].needs_dense for metric in setup.evaluation.metrics)


def observe_pruned(
    setup: Setup, decoder: Decoder, variants: Mapping[str, Apply | None], metrics: list[Metric]
) -> dict[str, dict[str, Observed]]:
    """Run pruned models over the windows of all corpora, next to the dense one where it is needed and its states were not kept."""
    known = None
    if needs_dense(setup):
        known = dense_states.read(DENSE_STATES, setup.corpora, setup.fingerprint(None), setup.device)
    beside = {DENSE: None} if needs_dense(setup) and known is None else {}
    return observe(setup, decoder, {**beside, **variants}, metrics, known)


def _keep_dense(setup: Setup, journal: Journal, hidden: Mapping[str, Sequence[torch.Tensor]]) -> None:
    dense_states.keep(journal, setup.corpora, hidden[DENSE])


def measure(setup: Setup, observed: Mapping[str, Observed], metrics: list[Metric], scores: Scores, dense: Results | None) -> Results:
    """Make all measurements of a model; args: see results_of."""
    tokenize = partial(setup.tokenizer.encode, add_special_tokens=False)
    return results_of(setup.corpora, observed, metrics, scores, setup.tasks, dense, tokenize)


def observe(
    setup: Setup,
    decoder: Decoder,
    variants: Variants,
    metrics: list[Metric],
    dense: Sequence[torch.Tensor] | None = None,
    keep: Keep | None = None,
) -> dict[str, dict[str, Observed]]:
    """Run models over the windows of all corpora side by side; see StreamedModels.observe.

    Args:
        dense: the dense model's hidden states, if they are known.
    """
    models = StreamedModels(decoder=decoder, variants=variants, scratch=setup.scratch)
    with devices.gpu_memory("evaluation.corpora", max(corpus.windows.shape[1] for corpus in setup.corpora)):
        return models.observe(setup.corpora, metrics, {} if dense is None else {DENSE: dense}, keep)


def loader(setup: Setup, apply: Apply | None) -> Load:
    """A function that loads the whole model when it is first called."""
    return cache(partial(load_model, setup.base, apply, dtype=setup.dtype, device=setup.device))


def streamed_scores(setup: Setup, decoder: Decoder, variants: Variants) -> SharedScores:
    """Of models that answer tasks with one block of each in memory; nothing is computed before one of them is asked."""
    models = StreamedModels(decoder=decoder, variants=variants, scratch=setup.scratch)
    return SharedScores(models, setup.evaluation.batch_size)


def answer_tasks(
    setup: Setup,
    decoder: Decoder,
    apply: Apply | None,
    load: Load,
    journal: Journal,
    shared: tuple[SharedScores, str] | None = None,
) -> dict[str, dict[str, Answers]]:
    """Answer the tasks: one after the other with the whole model in memory, or all at once with one block of it.

    Args:
        shared: scores of streamed models side by side, and which of them this one is; None: it is alone.

    Returns:
        Style -> task -> answers; those of an interrupted run stand in the journal.
    """
    waiting, batch_size = setup.waiting(journal), setup.evaluation.batch_size

    def whole() -> WholeModel:
        context = setup.base.context_length or CONTEXT_LENGTH
        return WholeModel(setup.bos, pretrained=load(), tokenizer=setup.tokenizer, batch_size=batch_size, max_length=context)

    if waiting and setup.evaluation.streamed:
        scores, name = shared or (streamed_scores(setup, decoder, {"scored": apply}), "scored")
        ask_all(StreamedHarness(scores, name, setup.tokenizer, setup.bos, whole), waiting, batch_size, journal)
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
    """Ask a model all questions and keep its answers in the journal.

    Raises:
        SparsesweepError: answers cannot be scored, the first of them; those of all others are in the journal.
    """
    with devices.gpu_memory("evaluation.batch_size", batch_size):
        ask(model, waiting)
    failures = []
    for questions in waiting:
        try:
            journal.write(asdict(answers(questions)), "answers", questions.style, questions.name)
        except SparsesweepError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def continue_prompts(setup: Setup, load: Load, journal: Journal) -> list[dict[str, str]]:
    """Continue the prompts with a whole model, and measure how fast and in how much memory."""
    asked = setup.evaluation.generations
    if not journal.has("generations"):
        rows: list[dict[str, str]] = []
        if asked.prompts:
            model, stopwatch = load(), record.Stopwatch()
            with devices.PeakMemory(setup.device) as peak:
                rows, tokens = generate(model, setup.tokenizer, setup.bos, asked.prompts, asked.new_tokens)
            facts = {"tokens": tokens, "seconds": round(stopwatch.seconds, 2), "peak_memory_gib": round(peak.bytes / 2**30, 3)}
            journal.write(facts if tokens else None, "speed")
        journal.write(rows, "generations")
    return cast(list[dict[str, str]], journal.read("generations"))
