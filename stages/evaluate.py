"""Evaluate the dense or the pruned model: perplexity, zero-shot tasks, generations.

python -m stages.evaluate part=dense|sparse
"""

import hashlib
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
from stages.evaluation.generation import generate, require_prompts
from stages.evaluation.harness import FEW_SHOT, WholeModel, zero_shot
from stages.evaluation.perplexity import cut_windows, window_losses
from stages.evaluation.protocol import Protocol, TaskProtocol, versions, write_protocol
from stages.evaluation.results import Results, Samples, Scores
from stages.evaluation.section import Evaluation
from stages.evaluation.streamed import StreamedHarness, StreamedModel
from stages.evaluation.tasks import TASKS, read_task
from stages.files import BASE, DENSE_RESULTS, SPARSE, SPARSE_RESULTS, TEXT, replacing, scratch_directory, sha256, write_json
from stages.rows import Row, texts
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)


TRACKED = ("evaluation", *(f"environment.{library}" for library in ("torch", "transformers", "tokenizers", "datasets", "lm_eval")))


@stage(parts={"dense": TRACKED, "sparse": TRACKED})
def main(part: str, evaluation: Evaluation) -> None:
    stopwatch = record.Stopwatch()
    setup = prepare(evaluation)
    if part == "dense":
        evaluate_dense(setup, stopwatch)
    else:
        evaluate_sparse(setup, stopwatch)
    log.info("wrote the results of the %s model in %.0f s", part, stopwatch.seconds)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The common setup of the evaluations of the dense and the pruned model; no weight is read yet.

    windows: [windows, tokens], int64. rows: task -> its rows.
    """

    evaluation: Evaluation
    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    bos: Bos
    windows: torch.Tensor
    rows: dict[str, list[Row]]
    device: torch.device
    dtype: torch.dtype

    def protocol(self) -> Protocol:
        corpus, prompts = self.evaluation.perplexity.corpus, self.evaluation.generations.prompts
        return Protocol(
            base=self.base.fingerprint,
            tokenizer_sha256=self.base.tokenizer_sha256,
            bos=self.bos.token,
            corpus=corpus,
            corpus_sha256=sha256(rows_file(corpus)),
            window_length=self.windows.shape[1],
            windows=len(self.windows),
            tokens=self.windows.numel(),
            windows_sha256=hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
            tasks={
                task: TaskProtocol(rows=len(rows), sha256=sha256(rows_file(task)), few_shot=FEW_SHOT, metric=TASKS[task].metric)
                for task, rows in self.rows.items()
            },
            prompts=prompts,
            new_tokens=self.evaluation.generations.new_tokens if prompts else 0,
            dtype=str(self.dtype).removeprefix("torch."),
            versions=versions(),
        )


def rows_file(name: str) -> Path:
    """The path of the rows of a corpus or a task."""
    return TEXT / "evaluation" / f"{name}.jsonl"


def prepare(evaluation: Evaluation) -> Setup:
    """Read the text and cut it into windows.

    Raises:
        ConfigError: the device does not exist, or the model or the corpus does not allow the windows.
        TextError: a row of the corpus or of a task has the wrong form; names file and line. Or a prompt has no token.
        CheckpointError: a token of the corpus or of a prompt is beyond the base's embedding.
    """
    device = devices.choose_device("evaluation.device", evaluation.device)
    base, tokenizer, perplexity = Checkpoint(BASE), load_tokenizer(BASE), evaluation.perplexity
    base.require_context(perplexity.window_length, "evaluation.perplexity.window_length")
    bos = decide(evaluation.bos, tokenizer, "evaluation.bos")
    log.info("windows and prompts %s with BOS: %s", "are not begun" if bos.token is None else "begin", bos.reason)
    corpus, length = texts(rows_file(perplexity.corpus)), perplexity.window_length
    windows = cut_windows(corpus, tokenizer, length, perplexity.windows, bos, perplexity.evenly)
    require_embedded(windows.unique().tolist(), embedding_rows(base), tokenizer, f"evaluation.perplexity.corpus {perplexity.corpus}")
    require_prompts(tokenizer, bos, evaluation.generations.prompts, embedding_rows(base))
    rows = {task: read_task(TASKS[task], rows_file(task), evaluation.rows) for task in evaluation.tasks}
    for task, scored in rows.items():
        if evaluation.rows and len(scored) < evaluation.rows:
            log.warning("evaluation.rows: found %d rows of %s, wanted %d; all of them are scored", len(scored), task, evaluation.rows)
    return Setup(
        evaluation=evaluation,
        base=base,
        tokenizer=tokenizer,
        bos=bos,
        windows=windows,
        rows=rows,
        device=device,
        dtype=devices.choose_dtype(evaluation.dtype, device),
    )


def evaluate_dense(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score the base and write its results."""
    log.info("reading %s; evaluating the dense model on %s in %s", BASE, setup.device, setup.dtype)
    dense = score(setup, None)
    with replacing(DENSE_RESULTS) as directory:
        write(directory, setup, dense, dense.metrics(), delta=None, stopwatch=stopwatch)


def evaluate_sparse(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score base + delta and write its results with the dense model's."""
    from stages.checkpoint.delta import SparseDelta  # the dense model's results do not depend on these two
    from stages.evaluation.comparison import compared_metrics, frontier_row, paired_accuracies, paired_generations, read_dense

    dense = read_dense(DENSE_RESULTS, setup.protocol())
    delta = SparseDelta(SPARSE, setup.base.fingerprint)
    log.info("reading %s and %s; evaluating the sparse model on %s in %s", BASE, SPARSE, setup.device, setup.dtype)
    sparse = score(setup, delta.apply)
    tasks = paired_accuracies(dense, sparse, {task: TASKS[task].documents(rows) for task, rows in setup.rows.items()})
    metrics = compared_metrics(dense, sparse, tasks)
    with replacing(SPARSE_RESULTS) as directory:
        paired = replace(sparse, generations=paired_generations(dense, sparse))
        write(directory, setup, paired, metrics, delta=delta.fingerprint, stopwatch=stopwatch)
        write_json(directory / "frontier.json", [frontier_row(delta, metrics)])
        write_json(directory / "accuracy.json", dense.accuracy("dense") + sparse.accuracy("sparse"))
        write_json(directory / "details/paired.json", tasks)


def write(
    directory: Path, setup: Setup, results: Results, metrics: dict[str, float], *, delta: str | None, stopwatch: record.Stopwatch
) -> None:
    """Write the files that both models' results have; `delta` is the delta's fingerprint, None for the dense model."""
    details = directory / "details"
    details.mkdir()
    write_json(directory / "metrics.json", metrics)
    write_json(directory / "run.json", record.of_run(setup.device, setup.dtype, stopwatch))
    write_protocol(details / "protocol.json", setup.protocol(), evaluation=asdict(setup.evaluation), delta=delta)
    results.write(details)


def score(setup: Setup, apply: Apply | None) -> Results:
    """Score the base, or the base changed by `apply`."""
    DENSE_RESULTS.parent.mkdir(exist_ok=True)
    with scratch_directory(DENSE_RESULTS.with_name("evaluation")) as scratch:  # /tmp may be memory
        results = (score_streamed if setup.evaluation.streamed else score_whole)(setup, apply, scratch)
    losses = results.losses
    facts = (losses.perplexity, losses.stderr, *setup.windows.shape, setup.bos.words)
    log.info("perplexity %.3f ± %.3f on %d windows of %d tokens%s", *facts)
    return results


def score_whole(setup: Setup, apply: Apply | None, scratch: Path) -> Results:
    """Score a model in memory."""
    evaluation = setup.evaluation
    model = load_model(setup.base, apply, dtype=setup.dtype, device=setup.device)
    with devices.gpu_memory("evaluation.perplexity.window_length", setup.windows.shape[1]):
        losses = window_losses(model, setup.windows)
    harness = WholeModel(setup.bos, pretrained=model, tokenizer=setup.tokenizer, batch_size=evaluation.batch_size)
    scores, samples = score_tasks(harness, setup, scratch)
    generations = generate(model, setup.tokenizer, setup.bos, evaluation.generations.prompts, evaluation.generations.new_tokens)
    return Results(losses=losses, scores=scores, samples=samples, generations=generations)


def score_streamed(setup: Setup, apply: Apply | None, scratch: Path) -> Results:
    """Score a model with one block in memory at a time; no text is generated."""
    model = StreamedModel(decoder=Decoder(setup.base, setup.dtype, setup.device), apply=apply, scratch=scratch)
    with devices.gpu_memory("evaluation.perplexity.window_length", setup.windows.shape[1]):
        losses = model.window_losses(setup.windows)
    harness = StreamedHarness(model, setup.tokenizer, setup.bos, setup.evaluation.batch_size)
    scores, samples = score_tasks(harness, setup, scratch)
    return Results(losses=losses, scores=scores, samples=samples, generations=[])


def score_tasks(model: LM, setup: Setup, scratch: Path) -> tuple[Scores, Samples]:
    """Score each task; returns scores and samples."""
    with devices.gpu_memory("evaluation.batch_size", setup.evaluation.batch_size):
        return zero_shot(model, setup.rows, scratch)


if __name__ == "__main__":
    main()
