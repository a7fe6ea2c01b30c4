"""Evaluate the dense or the pruned model: perplexity, zero-shot tasks, generations.

python -m stages.evaluate part=dense|sparse
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read by datasets when imported: evaluation reads what fetch brought
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from lm_eval.api.model import LM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages import config, record
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.model import load_model, load_tokenizer
from stages.checkpoint.reader import Checkpoint
from stages.config import stage
from stages.evaluation.generation import generate
from stages.evaluation.harness import WholeModel, zero_shot
from stages.evaluation.perplexity import WindowLosses, cut_windows, window_losses
from stages.evaluation.streamed import StreamedHarness, StreamedModel
from stages.files import BASE, DENSE_RESULTS, SPARSE, SPARSE_RESULTS, TEXT, read_json, read_lines, replacing, write_json, write_lines
from stages.streaming.decoder import Decoder

log = logging.getLogger(__name__)


@stage(parts={"dense": ("evaluation",), "sparse": ("evaluation",)})
def main(part: str, evaluation: config.Evaluation) -> None:
    stopwatch = record.Stopwatch()
    device = record.choose_device("evaluation.device", evaluation.device)
    dtype = record.choose_dtype(evaluation.dtype, device)
    base = Checkpoint(BASE)
    length = evaluation.perplexity.window_length
    base.require_context(length, "evaluation.perplexity.window_length")
    delta = SparseDelta(SPARSE, base.fingerprint) if part == "sparse" else None
    tokenizer = load_tokenizer(BASE)
    texts = [row["text"] for row in read_lines(TEXT / "evaluation" / f"{evaluation.perplexity.corpus}.jsonl")]
    windows = cut_windows(texts, tokenizer, length, evaluation.perplexity.windows)
    log.info("reading %s%s; evaluating the %s model on %s in %s", BASE, f" and {SPARSE}" if delta else "", part, device, dtype)
    if evaluation.streamed:
        losses, scores, samples = score_streamed(Decoder(base, dtype, device), delta, tokenizer, windows, evaluation)
        generations: list[dict[str, str]] = []
    else:
        model = load_model(base, None if delta is None else delta.apply, dtype=dtype, device=device)
        losses, scores, samples = score_whole(model, tokenizer, windows, evaluation)
        generations = generate(model, tokenizer, evaluation.generations.prompts, evaluation.generations.new_tokens)
    log.info("perplexity %.3f ± %.3f on %d windows of %d tokens", losses.perplexity, losses.stderr, *windows.shape)

    metrics = {"perplexity": losses.perplexity, "perplexity_stderr": losses.stderr, **flatten(scores)}
    accuracy = [{"model": part, "task": task, **pick(score, "accuracy", "stderr", "rows")} for task, score in scores.items()]
    with replacing(DENSE_RESULTS if delta is None else SPARSE_RESULTS) as results:
        if delta is not None:
            metrics = beside_dense_metrics(metrics, losses)
            generations = beside_dense_generations(generations)
            accuracy = read_json(DENSE_RESULTS / "details/accuracy.json") + accuracy
            write_json(results / "frontier.json", [frontier_row(delta, metrics)])
            write_json(results / "accuracy.json", accuracy)
        write_json(results / "metrics.json", metrics)
        write_json(results / "run.json", record.of_run(device, dtype, stopwatch))
        details = results / "details"
        details.mkdir()
        write_json(details / "scores.json", scores)
        write_json(details / "accuracy.json", accuracy)
        write_json(details / "windows.json", losses.losses)
        write_json(details / "protocol.json", {**describe(evaluation), "tokens": windows.numel()})
        write_json(details / "generations.json", generations)
        for task, rows in samples.items():
            write_lines(details / f"samples-{task}.jsonl", rows)
    log.info("wrote the results of the %s model in %.0f s", part, stopwatch.seconds)


Scores = tuple[WindowLosses, dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]


def score_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor, evaluation: config.Evaluation) -> Scores:
    """Window losses, task scores and task samples of a model in memory."""
    with record.gpu_memory("evaluation.perplexity.window_length", windows.shape[1]):
        losses = window_losses(model, windows)
    return losses, *score_tasks(WholeModel(pretrained=model, tokenizer=tokenizer, batch_size=evaluation.batch_size), evaluation)


def score_streamed(
    decoder: Decoder, delta: SparseDelta | None, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor, evaluation: config.Evaluation
) -> Scores:
    """The same, one block in memory at a time."""
    DENSE_RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DENSE_RESULTS.parent, prefix=".streamed-") as scratch:  # /tmp may be memory
        model = StreamedModel(decoder=decoder, delta=delta, scratch=Path(scratch))
        with record.gpu_memory("evaluation.perplexity.window_length", windows.shape[1]):
            losses = model.window_losses(windows)
        return losses, *score_tasks(StreamedHarness(model, tokenizer, evaluation.batch_size), evaluation)


def score_tasks(model: LM, evaluation: config.Evaluation) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    with tempfile.TemporaryDirectory() as scratch, record.gpu_memory("evaluation.batch_size", evaluation.batch_size):
        return zero_shot(model, evaluation.tasks, rows_in=TEXT / "evaluation", limit=evaluation.rows, scratch=Path(scratch))


def pick(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Some keys of a row: DVC plots only rows that all have the same keys."""
    return {key: row[key] for key in keys}


def flatten(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Task scores as flat metrics; the mean's standard error takes the tasks as independent."""
    flat: dict[str, float] = {}
    for task, score in scores.items():
        flat |= {task: score["accuracy"], f"{task}_stderr": score["stderr"]}
    if scores:
        flat["accuracy_mean"] = sum(score["accuracy"] for score in scores.values()) / len(scores)
        flat["accuracy_mean_stderr"] = sum(score["stderr"] ** 2 for score in scores.values()) ** 0.5 / len(scores)
    return flat


def describe(evaluation: config.Evaluation) -> dict[str, Any]:
    """What the numbers mean, for whoever reads them later."""
    return {
        "evaluation": evaluation.name,
        "corpus": evaluation.perplexity.corpus,
        "window_length": evaluation.perplexity.window_length,
        "tasks": {"few_shot": 0, "rows": evaluation.rows or "all", "metric": "accuracy, not length-normalised"},
    }


def beside_dense_metrics(metrics: dict[str, float], losses: WindowLosses) -> dict[str, float]:
    """The pruned model's metrics with the dense model's perplexity and accuracy, and the paired ratio."""
    dense = read_json(DENSE_RESULTS / "metrics.json")
    ratio, stderr = losses.ratio(WindowLosses(losses=read_json(DENSE_RESULTS / "details/windows.json")))
    first = {"perplexity": metrics.pop("perplexity"), "perplexity_stderr": metrics.pop("perplexity_stderr")}
    first |= {"perplexity_ratio": ratio, "perplexity_ratio_stderr": stderr, "dense_perplexity": dense["perplexity"]}
    if "accuracy_mean" in dense:
        first |= {"accuracy_mean": metrics.pop("accuracy_mean"), "accuracy_mean_stderr": metrics.pop("accuracy_mean_stderr")}
        first["dense_accuracy_mean"] = dense["accuracy_mean"]
    return {**first, **metrics}


def beside_dense_generations(generations: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each prompt with the dense model's continuation beside the pruned one's."""
    dense = read_json(DENSE_RESULTS / "details/generations.json")
    rows = []
    for before, after in zip(dense, generations, strict=True):
        row = {"prompt": after["prompt"]}
        for form in ("raw", "chat"):
            if form in after:
                row |= {f"{form}_dense": before[form], f"{form}_sparse": after[form]}
        rows.append(row)
    return rows


def frontier_row(delta: SparseDelta, metrics: dict[str, float]) -> dict[str, Any]:
    """One point of the perplexity-sparsity plot."""
    return {
        "method": delta.recipe.label,
        "pattern": delta.recipe.pattern_label,
        "sparsity": delta.summary["sparsity"],
        "perplexity": metrics["perplexity"],
        "perplexity_ratio": metrics["perplexity_ratio"],
    }


if __name__ == "__main__":
    main()
