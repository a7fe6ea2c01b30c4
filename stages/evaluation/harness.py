"""Tasks scored by lm-eval's own models, filters and metrics, on requests that were built before, see questions.py."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from stages.bos import Bos
from stages.checkpoint.tokens import require_requests
from stages.errors import CheckpointError, TextError
from stages.evaluation.bootstrap import RESAMPLES, Items, bootstrap_error
from stages.evaluation.encoding import encode
from stages.evaluation.questions import BROKEN, KEY, Questions, all_requests, grouped, is_mean, metric_name, seed_as_lm_eval, words_of
from stages.evaluation.results import Answers
from stages.evaluation.shared_prefix import SharedPrefixes
from stages.evaluation.statistics import numbered

TOKENS_A_SEQUENCE = 256  # of evaluation.batch_size sequences, so many tokens are computed at once


class WholeModel(HFLM):
    """lm-eval's model, which computes what sequences begin with once.

    Its texts begin with BOS as decided, and its progress bars obey TQDM_DISABLE, see stages/__init__.py.
    """

    def __init__(self, bos: Bos, **arguments: Any) -> None:
        super().__init__(backend="causal", **arguments)  # which lm-eval guesses wrongly of some multimodal models
        self.bos, self._rolling = bos, False
        self._shared = SharedPrefixes(self.model, self.max_length, tokens_at_once=self.batch_size * TOKENS_A_SEQUENCE)
        self.add_bos_token: bool | None = None  # the tokenizer's own way; tok_encode sees to the rest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **arguments: Any) -> list[int]:
        if add_special_tokens is False or self._rolling:
            return super().tok_encode(string, add_special_tokens=add_special_tokens, **arguments)
        return encode(self.tokenizer, self.bos, string)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts whose continuations are generated: padded on the left, and cut there to `left_truncate_len` tokens."""
        ids = [self.tok_encode(string)[-left_truncate_len if left_truncate_len else 0 :] for string in strings]
        width = max(map(len, ids))
        padded = [[self.tokenizer.pad_token_id or 0] * (width - len(each)) + each for each in ids]
        return torch.tensor(padded), torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; lm-eval puts its prefix token, BOS, before each, so that the texts themselves must not begin with it."""
        added, self._rolling = self.add_bos_token, True
        self.add_bos_token = added if self.bos.token is None else False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token, self._rolling = added, False

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations; see shared_prefix.py. Args: override_bs: not used, what is computed at once is bounded in tokens."""
        require_requests(requests, self.model.get_input_embeddings().num_embeddings, self.tokenizer)
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        asked = [(context, continuation) for _, context, continuation in requests]
        for number, score in tqdm(self._shared.scores(asked), total=len(asked), desc="continuations", disable=disable_tqdm):
            found[number] = tuple(score)
        return found


def ask(model: LM, questions: Sequence[Questions]) -> None:
    """Hand a model all requests; they keep its responses, and forget those of a model before it.

    Args:
        model: a WholeModel or a StreamedHarness.
    """
    seed_as_lm_eval()
    for instance in (instance for each in questions for instance in each.instances):
        instance.resps, instance.filtered_resps = [], {}
    for kind, instances in all_requests(questions):
        for instance, response in zip(instances, getattr(model, kind)(instances), strict=True):
            instance.resps.append(response)


def answers(questions: Questions) -> Answers:
    """What a model said to questions that it was asked, with the values of lm-eval's metrics.

    Raises:
        TextError: an answer cannot be scored; names task and row. CheckpointError: a score is no finite number.
    """
    rows: list[dict[str, Any]] = []
    collected: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(dict)  # score -> task -> values of its rows
    shared: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(dict)  # score -> task -> their clusters
    first_cluster = 0
    for name, task in questions.tasks.items():
        try:
            task.apply_filters()
        except BROKEN as error:
            raise TextError(f"{KEY}: {name}: its filters cannot read the answers ({words_of(error)})") from error
        documents, requests = questions.documents(name), grouped(task.instances)
        clusters = numbered(questions.shared(name)).tolist()
        for number, document in documents:
            of_row = requests[number]
            scores: dict[tuple[str, str], Any] = {}
            for filtered_by in of_row[0].filtered_resps:
                responses = [request.filtered_resps[filtered_by] for request in of_row]
                try:
                    values, target = task.process_results(document, responses), str(task.doc_to_target(document))
                except BROKEN as error:
                    raise TextError(f"{KEY}: {name}, row {number + 1}: lm-eval cannot score its answer ({words_of(error)})") from error
                scores |= {(metric, filtered_by): value for metric, value in values.items()}
            for key in questions.metrics:
                if key in scores:
                    collected[key].setdefault(name, []).append(scores[key])
                    shared[key].setdefault(name, []).append(clusters[number])
            row: dict[str, Any] = {
                "row": len(rows),
                "cluster": first_cluster + clusters[number],
                "values": scores,
                "target": target,
            }
            row |= {"task": name} if questions.source.is_group else {}
            row |= {"cut": True} if number in questions.cut[name] else {}
            rows.append(row | _said(task.OUTPUT_TYPE, of_row))
            _require_finite(rows[-1].get("scores", []), f"row {number} of {name}")
        first_cluster += max(clusters, default=-1) + 1
    of_rows = [key for key in questions.metrics if _is_of_rows(questions, key, rows)]
    for row in rows:
        row["values"] = {metric_name(*key): float(row["values"][key]) for key in of_rows}
    others = {metric_name(*key): _aggregate(questions, key, values, shared[key]) for key, values in collected.items() if key not in of_rows}
    return Answers(rows=rows, aggregates=others)


def _said(kind: Any, requests: list[Any]) -> dict[str, Any]:
    """A model's own words or scores, as plain data."""
    if kind == "generate_until":
        return {"answers": requests[0].resps, "filtered": {name: str(value) for name, value in requests[0].filtered_resps.items()}}
    first = next(iter(requests[0].filtered_resps))
    return {"scores": [request.filtered_resps[first] for request in requests]}


def _require_finite(scores: list[Any], where: str) -> None:
    """Refuse log-likelihoods that are no numbers, as of activations beyond the dtype's range: no answer would be right or wrong by them."""
    for score in scores:
        likelihood = score[0] if isinstance(score, (tuple, list)) else score
        if not math.isfinite(likelihood):
            raise CheckpointError(f"{where}: found a log-likelihood of {likelihood}, wanted a finite number")


def _is_of_rows(questions: Questions, key: tuple[str, str], rows: list[dict[str, Any]]) -> bool:
    """Whether a score is the mean of a finite number of each row."""
    if not is_mean(list(questions.tasks.values()), key[0]):
        return False
    values = [row["values"].get(key) for row in rows]
    return all(isinstance(value, (int, float, np.number)) and math.isfinite(value) for value in values)


def _aggregate(questions: Questions, key: tuple[str, str], values: dict[str, list[Any]], clusters: dict[str, list[int]]) -> dict[str, Any]:
    """lm-eval's own value of a score, with the number of rows and clusters that it is made of, and its error by the bootstrap.

    Args:
        values: task -> what lm-eval aggregates, of each row. clusters: task -> of each row.
    """

    def score(items: Items) -> float:
        of_tasks = [float(questions.tasks[name].aggregation()[key[0]](list(of))) for name, of in items.items()]
        return float(aggregate_subtask_metrics(of_tasks, list(map(len, items.values())), questions.source.aggregated.get(key[0], True)))

    try:
        value = score(values)
        error = bootstrap_error(score, values, clusters) if math.isfinite(value) else None
    except BROKEN as reason:
        raise CheckpointError(f"{metric_name(*key)} of {questions.name}: found none ({reason}), wanted a finite number") from None
    if not math.isfinite(value):
        raise CheckpointError(f"{metric_name(*key)} of {questions.name}: found {value}, wanted a finite number")
    return {
        "value": value,
        "count": sum(map(len, values.values())),
        "stderr": None if error is None or not math.isfinite(error) else error,
        "clusters": sum(len(set(of)) for of in clusters.values()),
        "resamples": RESAMPLES,
    }
