"""Evaluate the dense, the pruned or the quantised model: perplexity, divergence, zero-shot tasks, generations.

python -m stages.evaluate part=dense|sparse|quantised
"""

import hashlib
import logging
import os
from contextlib import AbstractContextManager
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
from stages.evaluation.documents import read_corpus
from stages.evaluation.generation import generate, require_prompts
from stages.evaluation.harness import FEW_SHOT, WholeModel, zero_shot
from stages.evaluation.measurement import as_rows
from stages.evaluation.metric import Corpus, Metric, Observed
from stages.evaluation.metrics import METRICS
from stages.evaluation.protocol import CorpusProtocol, Protocol, TaskProtocol, versions, write_protocol
from stages.evaluation.results import Results, Samples, results_of
from stages.evaluation.scoring import DENSE, StreamedModels, Variants
from stages.evaluation.section import Evaluation, Ruler
from stages.evaluation.streamed import StreamedHarness
from stages.evaluation.tasks import TASKS, read_task
from stages.files import BASE, DENSE_RESULTS, RULER_RESULTS, SPARSE, SPARSE_RESULTS, TEXT, replacing, scratch_directory, sha256, write_json
from stages.rows import Row
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)


TRACKED = ("evaluation", *(f"environment.{library}" for library in ("torch", "transformers", "tokenizers", "datasets", "lm_eval")))


@stage(parts={"dense": TRACKED, "sparse": TRACKED, "quantised": ("ruler", *TRACKED)})
def main(part: str, evaluation: Evaluation, ruler: Ruler | None = None) -> None:
    stopwatch = record.Stopwatch()
    setup = prepare(evaluation)
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

    corpora: the windows of each. rows: task -> its rows.
    """

    evaluation: Evaluation
    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    bos: Bos
    corpora: list[Corpus]
    rows: dict[str, list[Row]]
    device: torch.device
    dtype: torch.dtype

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
            tasks={
                task: TaskProtocol(rows=len(rows), sha256=sha256(rows_file(task)), few_shot=FEW_SHOT, metrics=list(TASKS[task].metrics))
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
        ConfigError: the device does not exist, or the model or a corpus does not allow the windows.
        TextError: a row of a corpus or of a task has the wrong form; names file and line. Or a prompt has no token.
        CheckpointError: a token of a corpus or of a prompt is beyond the base's embedding.
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
    rows = {task: read_task(TASKS[task], rows_file(task), evaluation.rows) for task in evaluation.tasks}
    for task, scored in rows.items():
        if evaluation.rows and len(scored) < evaluation.rows:
            log.warning("evaluation.rows: found %d rows of %s, wanted %d; all of them are scored", len(scored), task, evaluation.rows)
    return Setup(
        evaluation=evaluation,
        base=base,
        tokenizer=tokenizer,
        bos=bos,
        corpora=corpora,
        rows=rows,
        device=device,
        dtype=devices.choose_dtype(evaluation.dtype, device),
    )


def evaluate_dense(setup: Setup, stopwatch: record.Stopwatch) -> None:
    """Score the base and write its results."""
    log.info("reading %s; evaluating the dense model on %s in %s", BASE, setup.device, setup.dtype)
    dense = score(setup, None, None)
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
    sparse = score(setup, delta.apply, dense)
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
        results, facts = results_of(setup.corpora, observed[name], metrics, {}, [], dense), {"type": name}
        rows += [{**row, **facts, "bytes_per_weight": quantiser.bytes_per_weight} for row in as_rows(results.measurements)]
        log.info("%s, %.3f bytes a weight: perplexity %s", name, quantiser.bytes_per_weight, results.measurements[0].shown(3))
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


def score(setup: Setup, apply: Apply | None, dense: Results | None) -> Results:
    """Score the base, or the base changed by `apply`.

    Args:
        dense: the dense model's results; None for the dense model itself.
    """
    evaluation, name = setup.evaluation, DENSE if dense is None else "sparse"
    metrics = [METRICS[metric] for metric in evaluation.metrics if dense is not None or not METRICS[metric].needs_dense]
    variants = {DENSE: None} if any(metric.needs_dense for metric in metrics) else {}
    observed = observe(setup, Decoder(setup.base, setup.dtype, setup.device), {**variants, name: apply}, metrics)[name]
    with scratch_files() as scratch:
        samples, generations = (score_streamed if evaluation.streamed else score_whole)(setup, apply, scratch)
    results = results_of(setup.corpora, observed, metrics, samples, generations, dense)
    perplexities = {measured.name: measured.shown(3) for measured in results.measurements if measured.metric == "perplexity"}
    for corpus in setup.corpora:
        facts = (corpus.name, perplexities[corpus.name], *corpus.windows.shape, setup.bos.words)
        log.info("perplexity on %s: %s on %d windows of %d tokens%s", *facts)
    return results


def observe(setup: Setup, decoder: Decoder, variants: Variants, metrics: list[Metric]) -> dict[str, dict[str, Observed]]:
    """Run models over the corpora side by side; see StreamedModels.observe."""
    longest = max(corpus.windows.shape[1] for corpus in setup.corpora)
    with scratch_files() as scratch, devices.gpu_memory("evaluation.corpora", longest):
        return StreamedModels(decoder=decoder, variants=variants, scratch=scratch).observe(setup.corpora, metrics)


def scratch_files() -> AbstractContextManager[Path]:
    """A directory for hidden states and the rows of tasks; /tmp may be memory."""
    DENSE_RESULTS.parent.mkdir(exist_ok=True)
    return scratch_directory(DENSE_RESULTS.with_name("evaluation"))


def score_whole(setup: Setup, apply: Apply | None, scratch: Path) -> tuple[Samples, list[dict[str, str]]]:
    """Score the tasks with a model in memory, and continue the prompts."""
    evaluation = setup.evaluation
    if not (setup.rows or evaluation.generations.prompts):
        return {}, []
    model = load_model(setup.base, apply, dtype=setup.dtype, device=setup.device)
    harness = WholeModel(setup.bos, pretrained=model, tokenizer=setup.tokenizer, batch_size=evaluation.batch_size)
    samples = score_tasks(harness, setup, scratch)
    return samples, generate(model, setup.tokenizer, setup.bos, evaluation.generations.prompts, evaluation.generations.new_tokens)


def score_streamed(setup: Setup, apply: Apply | None, scratch: Path) -> tuple[Samples, list[dict[str, str]]]:
    """Score the tasks with one block in memory at a time; no text is generated."""
    decoder = Decoder(setup.base, setup.dtype, setup.device)
    models = StreamedModels(decoder=decoder, variants={"scored": apply}, scratch=scratch)
    return score_tasks(StreamedHarness(models, setup.tokenizer, setup.bos, setup.evaluation.batch_size), setup, scratch), []


def score_tasks(model: LM, setup: Setup, scratch: Path) -> Samples:
    """Score each task."""
    with devices.gpu_memory("evaluation.batch_size", setup.evaluation.batch_size):
        return zero_shot(model, setup.rows, scratch)


if __name__ == "__main__":
    main()
