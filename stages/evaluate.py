"""Evaluate the dense, the pruned or the quantised model: perplexity, divergence, tasks, generations.

python -m stages.evaluate part=dense|sparse|quantised
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read by datasets when imported: evaluation reads what fetch brought
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from stages import devices, record
from stages.bos import Bos, decide
from stages.checkpoint.model import Apply, load_model, load_tokenizer
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import embedding_rows, require_embedded
from stages.config.entry import stage
from stages.errors import TextError
from stages.evaluation.documents import read_corpus
from stages.evaluation.encoding import CONTEXT_LENGTH, Encoder
from stages.evaluation.generation import generate, require_prompts
from stages.evaluation.harness import WholeModel, answers, ask
from stages.evaluation.journal import Journal, opened
from stages.evaluation.manifest import read_manifest
from stages.evaluation.measurement import as_rows
from stages.evaluation.metric import Corpus, Metric, Observed
from stages.evaluation.metrics import METRICS
from stages.evaluation.protocol import CorpusProtocol, Protocol, TaskProtocol, versions, write_protocol
from stages.evaluation.questions import Asking, Questions, Source, embedded_source, fetched_source
from stages.evaluation.results import Answers, Results, Scores, corpus_measurements, results_of
from stages.evaluation.scoring import DENSE, StreamedModels, Variants
from stages.evaluation.section import Evaluation, Ruler
from stages.evaluation.streamed import StreamedHarness
from stages.evaluation.styles import RENDERED, Style, StyleProtocol, refusal
from stages.evaluation.tasks import TASKS, read_examples, read_task
from stages.files import (
    BASE,
    BENCHMARKS,
    DENSE_JOURNAL,
    DENSE_RESULTS,
    RULER_RESULTS,
    SPARSE,
    SPARSE_JOURNAL,
    SPARSE_RESULTS,
    TEXT,
    replacing,
    scratch_directory,
    sha256,
    write_json,
)
from stages.schema import require
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)


TRACKED = ("evaluation", *(f"environment.{library}" for library in ("torch", "transformers", "tokenizers", "datasets", "lm_eval")))


@stage(parts={"dense": TRACKED, "sparse": TRACKED, "quantised": ("ruler", *TRACKED)})
def main(part: str, evaluation: Evaluation, ruler: Ruler | None = None) -> None:
    stopwatch = record.Stopwatch()
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch:  # /tmp may be memory
        setup = prepare(evaluation, scratch)
        if ruler is not None:
            evaluate_quantised(setup, ruler.types, stopwatch)
        elif part == "dense":
            evaluate_dense(setup, stopwatch)
        else:
            evaluate_sparse(setup, stopwatch)
    log.info("wrote the results of the %s model in %.0f s", part, stopwatch.seconds)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The common setup of the evaluations of the dense and the pruned model; no weight is read yet.

    corpora: the windows of each. questions: style -> task -> its questions. styles: how the others than raw are asked.
    scratch: a directory for temporary files.
    """

    evaluation: Evaluation
    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    bos: Bos
    corpora: list[Corpus]
    questions: dict[str, dict[str, Questions]]
    styles: dict[str, StyleProtocol]
    device: torch.device
    dtype: torch.dtype
    scratch: Path

    @property
    def tasks(self) -> dict[str, TaskProtocol]:
        return {name: questions.protocol() for name, questions in self.questions[Style.RAW].items()}

    def protocol(self) -> Protocol:
        prompts = self.evaluation.generations.prompts
        return Protocol(
            base=self.base.fingerprint,
            tokenizer_sha256=self.base.tokenizer_sha256,
            bos=self.bos.token,
            corpora={
                corpus.name: CorpusProtocol(
                    sha256=sha256(rows_file(corpus.name)),
                    window_length=corpus.windows.shape[1],
                    windows=len(corpus.windows),
                    tokens=corpus.windows.numel(),
                    windows_sha256=hashlib.sha256(corpus.windows.numpy().tobytes()).hexdigest(),
                )
                for corpus in self.corpora
            },
            metrics=self.evaluation.metrics,
            tasks=self.tasks,
            styles=self.styles,
            prompts=prompts,
            new_tokens=self.evaluation.generations.new_tokens if prompts else 0,
            dtype=str(self.dtype).removeprefix("torch."),
            versions=versions(),
        )

    def waiting(self, journal: Journal) -> list[Questions]:
        """The questions that no interrupted run scored."""
        return [
            questions
            for style, of_style in self.questions.items()
            for name, questions in of_style.items()
            if not journal.has("answers", style, name)
        ]

    def fingerprint(self, delta: str | None) -> dict[str, Any]:
        """What determines the scores; `delta` is the delta's fingerprint, None for the dense model."""
        device, streamed = str(self.device), self.evaluation.streamed
        return {"protocol": asdict(self.protocol()), "delta": delta, "device": device, "streamed": streamed, "code": record.code_revision()}


def rows_file(name: str) -> Path:
    """The path of the rows of a corpus or a task."""
    return TEXT / "evaluation" / f"{name}.jsonl"


def prepare(evaluation: Evaluation, scratch: Path) -> Setup:
    """Read the text, cut it into windows, and make all requests of all tasks.

    Raises:
        ConfigError: the device does not exist, the model or a corpus does not allow the windows, or a task asks for what is not done here.
        TextError: a row of a corpus or of a task has the wrong form; names file and line, or task and row. Or a prompt has no token.
        CheckpointError: a token of a corpus, of a task or of a prompt is beyond the base's embedding.
    """
    device = devices.choose_device("evaluation.device", evaluation.device)
    base, tokenizer = Checkpoint(BASE), load_tokenizer(BASE)
    bos = decide(evaluation.bos, tokenizer, "evaluation.bos")
    log.info("windows and prompts %s with BOS: %s", "are not begun" if bos.token is None else "begin", bos.reason)
    corpora = []
    for name, windows in evaluation.corpora.items():
        key = f"evaluation.corpora.{name}"
        base.require_context(windows.window_length, f"{key}.window_length")
        corpora.append(read_corpus(name, rows_file(name), windows, tokenizer, bos))
        require_embedded(corpora[-1].windows.unique().tolist(), embedding_rows(base), tokenizer, key)
    require_prompts(tokenizer, bos, evaluation.generations.prompts, embedding_rows(base))
    styles = {style: asked_in(evaluation, style, tokenizer) for style in evaluation.styles if style != Style.RAW}
    asking = Asking(
        encoder=Encoder(tokenizer, bos, base.context_length),
        limit=evaluation.rows,
        examples=evaluation.examples,
        system_prompt=evaluation.system_prompt,
        embedding_rows=embedding_rows(base),
        streamed=evaluation.streamed,
        scratch=scratch,
    )
    asked = [Style.RAW, *(style for style, made in styles.items() if made.skipped is None)]
    sources = sources_of(evaluation, scratch, examples=evaluation.examples if Style.FEW_SHOT in asked else 0)
    questions: dict[str, dict[str, Questions]] = {}
    for style in map(str, asked):
        try:
            questions[style] = {source.name: asking.build(source, style) for source in sources}
        except TextError as error:
            if style not in RENDERED:
                raise
            log.warning("evaluation.styles: %s is skipped: %s", style, error)
            styles[style] = replace(styles[style], skipped=str(error))
    for name, of_task in questions[Style.RAW].items():
        warn_of_rows(name, of_task.protocol(), of_task, evaluation.rows)
    return Setup(
        evaluation=evaluation,
        base=base,
        tokenizer=tokenizer,
        bos=bos,
        corpora=corpora,
        questions=questions,
        styles=styles,
        device=device,
        dtype=devices.choose_dtype(evaluation.dtype, device),
        scratch=scratch,
    )


def asked_in(evaluation: Evaluation, style: str, tokenizer: PreTrainedTokenizerBase) -> StyleProtocol:
    """How a style other than raw is asked; a style that the base's chat template refuses is skipped, and the protocol says why."""
    skipped = refusal(style, tokenizer, evaluation.system_prompt)
    if skipped is not None:
        log.warning("evaluation.styles: %s is skipped: %s", style, skipped)
    text = str(tokenizer.chat_template) if style in RENDERED and tokenizer.chat_template else None
    return StyleProtocol(
        few_shot=evaluation.examples if style == Style.FEW_SHOT else None,
        system_prompt=evaluation.system_prompt if style == Style.SYSTEM else None,
        template_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        skipped=skipped,
    )


def sources_of(evaluation: Evaluation, scratch: Path, examples: int) -> list[Source]:
    """The tasks that are asked for: rows of text.evaluation, or what the fetch stage wrote of lm-eval's.

    Args:
        examples: those of the style few_shot; 0: it is not used.

    Raises:
        TextError: see read_task and read_examples. ConfigError: see questions.embedded_source; or a task is there twice.
    """
    embedded = [name for name in evaluation.tasks if name in TASKS and rows_file(name).is_file()]
    fetched = read_manifest(BENCHMARKS) if set(evaluation.tasks) - set(embedded) else {}
    sources: list[Source] = []
    for name in evaluation.tasks:
        if name in embedded:
            shots = evaluation.few_shot or 0
            rows = read_task(TASKS[name], rows_file(name), evaluation.rows)
            needed = max(shots, examples)
            shown = read_examples(TASKS[name], rows_file(name), evaluation.rows, needed) if needed else []
            hashed = sha256(rows_file(name))
            sources.append(embedded_source(TASKS[name], rows, shown, few_shot=shots, sha256=hashed, scratch=scratch))
        elif name in fetched:
            for benchmark in fetched[name]:
                facts = json.dumps([asdict(subtask) for subtask in benchmark.subtasks], sort_keys=True)
                hashed = hashlib.sha256(facts.encode()).hexdigest()
                sources.append(fetched_source(benchmark, evaluation.few_shot, hashed, scratch))
        else:
            raise TextError(
                f"{BENCHMARKS}: found {', '.join(fetched) or 'no task'}, wanted {name}; run `python -m stages.fetch part=tasks`"
            )
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "evaluation.tasks", evaluation.tasks, f"{twice} once: another name brings it, too")
    return sources


def warn_of_rows(name: str, protocol: TaskProtocol, questions: Questions, wanted: int | None) -> None:
    """Say where a task has fewer rows than asked for, or only one."""
    if wanted is not None and protocol.rows < wanted * len(questions.tasks):
        log.warning(
            "evaluation.rows: found %d rows of %s, wanted %d; all of them are scored", protocol.rows, name, wanted * len(questions.tasks)
        )
    if protocol.rows == 1:
        log.warning("evaluation.tasks: found 1 row of %s: its scores have no standard error", name)


def evaluate_dense(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score the base and write its results."""
    log.info("reading %s; evaluating the dense model on %s in %s", BASE, setup.device, setup.dtype)
    with opened(DENSE_JOURNAL, setup.fingerprint(None)) as journal:
        dense = score(setup, None, None, journal)
        with replacing(DENSE_RESULTS) as directory:
            write(directory, setup, dense, delta=None, stopwatch=stopwatch)


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
            write(directory, setup, paired, delta=delta.fingerprint, stopwatch=stopwatch)
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
    observed = observe(setup, decoder, {DENSE: None, **quantisers}, metrics) if types else {}
    for name, quantiser in quantisers.items():
        measured = corpus_measurements(setup.corpora, observed[name], metrics, dense)
        facts = {"type": name, "bytes_per_weight": quantiser.bytes_per_weight}
        rows += [{**row, **facts} for row in as_rows(measured)]
        log.info("%s, %.3f bytes a weight: %s %s", name, quantiser.bytes_per_weight, measured[0].label, measured[0].shown(3))
    with replacing(RULER_RESULTS) as directory:
        write_json(directory / "measurements.json", rows)
        write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))


def write(directory: Path, setup: Setup, results: Results, *, delta: str | None, stopwatch: record.Stopwatch) -> None:
    """Write the files that both models' results have; `delta` is the delta's fingerprint, None for the dense model."""
    details = directory / "details"
    details.mkdir()
    write_json(directory / "metrics.json", results.metrics)
    write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))
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
    (score_streamed if evaluation.streamed else score_whole)(setup, apply, journal)
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
        journal.write(generate(model, setup.tokenizer, setup.bos, prompts, evaluation.generations.new_tokens), "generations")


def score_streamed(setup: Setup, apply: Apply | None, journal: Journal) -> None:
    """Score all tasks with one block in memory at a time; no text is generated."""
    if not journal.has("generations"):
        journal.write([], "generations")
    waiting = setup.waiting(journal)
    if waiting:
        decoder = Decoder(setup.base, setup.dtype, setup.device)
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
