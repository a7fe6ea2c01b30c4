"""Evaluated experiments with plausible numbers from a seeded generator, in the form in which the stages write them."""

import copy
import json
import math
import random
from typing import Any

from stages.evaluation import degeneration
from stages.evaluation.measurement import as_rows, from_rows
from stages.evaluation.statistics import Estimate, difference, mean
from stages.experiments.details import Details, Scores, of_dense
from stages.experiments.page.group import Group
from stages.experiments.reading import Experiment

METHODS = {"magnitude": 3.4, "wanda": 1.25, "sparsegpt": 1.18, "admm_short": 0.85, "ria": 1.3, "dsnot": 1.27}  # how much each loses
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "lambada", "piqa")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = ("The capital of France is", "Write one sentence about the sea.", "List three uses of a hammer.")
WINDOWS, DOCUMENTS, TOKENS, BLOCKS = 18, 7, 1024, 30
PARAMS: dict[str, Any] = {
    "environment": {"torch": "2.13.0", "transformers": "5.23.0"},
    "base": {"source": "wheel", "name": "org/small-model", "dtype": "bfloat16"},
    "calibration": {"name": "embedded", "windows": 32, "window_length": 512, "seed": 0, "sources": {"c4_pages": {"weight": 1.0}}},
    "method": {"score": {"name": "wanda"}, "comparison_group": "row", "update": {"name": "none"}, "damping": {"share": 0.01}},
    "allocation": {"name": "uniform"},
    "reconstruction": {"name": "none"},
    "prune": {"device": "auto", "dtype": "auto", "micro_batch": None, "error_tokens": 256, "propagate": "pruned"},
    "evaluation": {"name": "quick", "tasks": list(TASKS), "rows": 60, "generations": {"new_tokens": 48, "prompts": list(PROMPTS)}},
    "publish": {"name": None},
}


def dense_scores(seed: int = 0, rows: int = 60, corpora: tuple[str, ...] = ("wikipedia",)) -> Scores:
    """The dense model's scores."""
    numbers = random.Random(f"dense {seed}")
    clusters = [index * DOCUMENTS // WINDOWS for index in range(WINDOWS)]
    passages = {task: [row // 3 if task == "boolq" else row for row in range(rows)] for task in TASKS}
    return Scores(
        windows={corpus: {"nll": [numbers.gauss(2.98, 0.2) for _ in range(WINDOWS)]} for corpus in corpora},
        rows={task: {"acc": [float(numbers.random() < 0.45) for _ in range(rows)]} for task in TASKS},
        window_clusters={corpus: list(clusters) for corpus in corpora},
        row_clusters={task: list(of) for task, of in passages.items()},
    )


def sparse_scores(dense: Scores, loss: float, numbers: random.Random) -> Scores:
    """A pruned model's scores. loss: what it loses on average [nats per token]."""
    rises = {corpus: [loss * numbers.gauss(1, 0.08) for _ in of["nll"]] for corpus, of in dense.windows.items()}
    flip = min(0.45, 0.06 + loss / 8)

    def answer(right: float) -> float:
        return float(numbers.random() < 0.3) if numbers.random() < flip else right

    return Scores(
        windows={
            corpus: {
                "nll": [value + rise for value, rise in zip(of["nll"], rises[corpus], strict=True)],
                "kld": [abs(rise) * numbers.gauss(0.85, 0.05) for rise in rises[corpus]],
                "same_top": [max(0.0, 1 - 0.4 * abs(rise)) for rise in rises[corpus]],
            }
            for corpus, of in dense.windows.items()
        },
        rows={task: {"acc": list(map(answer, of["acc"]))} for task, of in dense.rows.items()},
        window_clusters=dense.window_clusters,
        row_clusters=dense.row_clusters,
    )


def details(
    name: str, method: str, pattern: str, dense: Scores, *, sparsity: float = 0.5, seed: int = 0, blocks: int = BLOCKS, **protocol: Any
) -> Details:
    """An experiment. pattern: "unstructured", "2:4" or "4:8"."""
    numbers = random.Random(f"{name} {method} {pattern} {sparsity} {seed}")
    harder = {"unstructured": 1.0, "2:4": 2.1, "4:8": 1.5}[pattern]
    scores = sparse_scores(dense, METHODS[method] * harder * 0.6 * (sparsity / 0.5) ** 4, numbers)
    generations = [_texts(prompt, method) for prompt in PROMPTS]
    rows = as_rows(from_rows(measurements(scores, dense))) + as_rows(from_rows(_degeneration(generations)))
    rows += as_rows(from_rows(_sizes(sparsity)))
    return Details(
        experiment=Experiment(
            name=name,
            revision="0" * 39 + "1",
            params=_params(method, pattern, sparsity, seed),
            measurements=from_rows(rows),
            prune_metrics={"sparsity": sparsity, "seconds": 40.0},
            protocol={
                "base": "f" * 64,
                "corpora": {corpus: _windows() for corpus in dense.windows},
                "bos": None,
                "tasks": {task: _rows(len(of["acc"])) for task, of in dense.rows.items()},
                "evaluation": {"rows": 60, "corpora": {corpus: {"evenly": False} for corpus in dense.windows}},
                "delta": name,
                **protocol,
            },
            method=method,
            pattern=pattern,
        ),
        command=f"dvc exp run -S method={method} -S pattern.sparsity={sparsity} -S calibration.seed={seed}",
        measurements=rows,
        scores=scores,
        generations=generations,
        matrices=[_matrix(block, kind, sparsity, numbers) for block in range(blocks) for kind in MATRICES],
        run={
            "seconds": round(40 * METHODS["magnitude"] / METHODS[method] * numbers.uniform(0.9, 1.1), 2),
            "peak_memory_gib": round(numbers.uniform(0.55, 1.7), 3),
            "joules": {"package-0": round(numbers.uniform(2e3, 9e3), 1)},
            "device": "AMD EPYC, 2 threads",
        },
        ruler=[],
        speed={name: {**_SPEED, "tokens_per_second": pace} for name, pace in (("dense", 12.0), ("sparse", 12.5))},
    )


def repeated_group(seeds: tuple[int, ...] = (0, 1, 2)) -> Group:
    """Two methods at 50% and one at 2:4 with several calibration seeds, and another method with one."""
    dense = dense_scores()
    cells = [("wanda", "wanda", "unstructured"), ("sparsegpt", "sparsegpt", "unstructured"), ("wanda-2-4", "wanda", "2:4")]
    results = [details(f"{name}-seed{seed}", method, pattern, dense, seed=seed) for name, method, pattern in cells for seed in seeds]
    results.append(details("ria-alone", "ria", "unstructured", dense))
    return Group(results=results, dense=of_dense(dense), differs={})


def group(seed: int = 0, *, sparsities: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8), rows: int = 60, ruler: bool = True) -> Group:
    """Five sparsities of three methods, and four of N:M."""
    dense = dense_scores(seed, rows)
    results = [
        details(f"{method.split('_')[0]}-{100 * sparsity:.0f}", method, "unstructured", dense, sparsity=sparsity)
        for sparsity in sparsities
        for method in ("wanda", "sparsegpt", "admm_short")
    ]
    results += [
        details(f"{method.split('_')[0]}-{pattern.replace(':', '-')}", method, pattern, dense)
        for pattern in ("2:4", "4:8")
        for method in ("wanda", "sparsegpt", "admm_short")
    ]
    if ruler:
        results[0].ruler.extend(_ruler())
    return Group(results=results, dense=of_dense(dense), differs={})


def other_group() -> Group:
    """Two experiments of another protocol."""
    dense = dense_scores(1)
    results = [details(f"{method}-bos", method, "unstructured", dense, bos=1) for method in ("wanda", "sparsegpt")]
    return Group(results=results, dense=of_dense(dense), differs={"bos": (1, None), "windows_sha256": ("a" * 64, "b" * 64)})


def measurements(scores: Scores, dense: Scores) -> list[dict[str, Any]]:
    """What the evaluation writes of these scores."""
    rows = []
    for corpus, of in scores.windows.items():
        clusters = scores.window_clusters[corpus]
        facts = {"kind": "corpus", "name": corpus, "count": WINDOWS * (TOKENS - 1), "counted": "tokens", "clusters": DOCUMENTS}
        loss, other = mean(of["nll"], clusters), mean(dense.windows[corpus]["nll"], clusters)
        low, high = map(math.exp, loss.interval or (0, 0))
        value, there = math.exp(loss.value), math.exp(other.value)
        facts |= {"better": "lower", "unit": ""}
        rows.append(
            {**facts, "metric": "perplexity", "label": "perplexity", "value": value, "stderr": value * (loss.stderr or 0)}
            | {"low": low, "high": high, "dense": there, "difference": {"value": value - there, "stderr": None, "low": None, "high": None}}
        )
        gap = difference(of["nll"], dense.windows[corpus]["nll"], clusters)
        factor = {key: math.exp(number or 0) for key, number in _fields(gap).items()} | {"stderr": math.exp(gap.value) * (gap.stderr or 0)}
        rows.append({**facts, "metric": "perplexity_ratio", "label": "perplexity over dense", **factor} | _NO_DENSE)
        logarithm = {**_fields(gap), "unit": "nats", **_NO_DENSE}
        rows.append({**facts, "metric": "perplexity_ln_ratio", "label": "ln of perplexity over dense", **logarithm})
        rows.append({**facts, "metric": "mean_kld", "label": "Mean KLD", **_fields(mean(of["kld"], clusters)), "unit": "nats"} | _NO_DENSE)
        top = _fields(mean([100 * share for share in of["same_top"]], clusters))
        rows.append({**facts, "metric": "same_top_p", "label": "Same top p", **top, "unit": "%", "better": "higher"} | _NO_DENSE)
        rows.append({**facts, "metric": "rms_delta_p", "label": "RMS Δp", "value": 9.1, "unit": "%"} | _NO_ERROR | _NO_DENSE)
    apart = []
    for task, of in scores.rows.items():
        ours, theirs, clusters = of["acc"], dense.rows[task]["acc"], scores.row_clusters[task]
        gap = difference(ours, theirs, clusters)
        apart.append(gap)
        rows.append({"kind": "task", "name": task, "metric": "acc", "label": "accuracy", **_fields(mean(ours, clusters)), **_COUNTED})
        rows[-1] |= {"count": len(ours), "clusters": gap.clusters, "dense": mean(theirs).value, "difference": _fields(gap)}
    values = [mean(of["acc"], scores.row_clusters[task]) for task, of in scores.rows.items()]
    value, stderr = sum(one.value for one in values) / len(values), math.hypot(*(one.stderr or 0 for one in values)) / len(values)
    rows.append({"kind": "mean", "name": "tasks", "metric": "accuracy", "label": "mean accuracy", **_COUNTED, "counted": "tasks"})
    rows[-1] |= {"value": value, "stderr": stderr, "low": value - 2 * stderr, "high": value + 2 * stderr, "dense": 0.45}
    rows[-1] |= {"count": len(values), "clusters": len(values), "difference": None}
    return rows


_SPEED = {"tokens": 240, "seconds": 20.0, "peak_memory_gib": 0.75, "device": "AMD EPYC, 2 threads"}
_NO_ERROR = {"stderr": None, "low": None, "high": None}
_NO_DENSE = {"dense": None, "difference": None}
_COUNTED = {"counted": "rows", "unit": "", "better": "higher"}


def _fields(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval or (None, None)
    return {"value": estimate.value, "stderr": estimate.stderr, "low": low, "high": high}


def _windows() -> dict[str, Any]:
    return {"window_length": TOKENS, "windows": WINDOWS, "tokens": WINDOWS * TOKENS, "available": 301}


def _rows(rows: int) -> dict[str, Any]:
    facts = {"few_shot": 0, "metrics": ["acc"], "macro": [], "cut": 0, "parts": 1, "context": 2048}
    return {**facts, "rows": rows, "available": 3270, "asked": rows}


def _params(method: str, pattern: str, sparsity: float, seed: int) -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    params["method"]["name"], params["calibration"]["seed"] = method, seed
    params["pattern"] = {"name": "unstructured", "sparsity": sparsity}
    if pattern != "unstructured":
        kept, of = map(int, pattern.split(":"))
        params["pattern"] = {"name": "nm", "kept": kept, "group": of, "permutation_rounds": None}
    if method == "admm_short":
        params["method"]["update"] = {"name": "admm", "steps": 20, "rho": 0.1}
    return params


def _texts(prompt: str, method: str) -> dict[str, str]:
    said = f" a place by the river, where people of the town meet and talk, as {method} <has> it & says again and again."
    row = {"prompt": prompt, "raw_dense": " Paris, which lies on the Seine.", "raw_sparse": said}
    return (
        {**row, "chat_refused": "the template wants a turn of the user"}
        if "hammer" in prompt
        else {
            **row,
            "chat_dense": "Here is what I think: it is Paris.",
            "chat_sparse": f"Here is{said}",
        }
    )


def _degeneration(generations: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What the evaluation measures of these; a token is a letter."""
    ours, theirs = ([_answers(row, of) for row in generations] for of in ("sparse", "dense"))
    return json.loads(json.dumps(as_rows(degeneration.measure(ours, theirs, lambda text: list(map(ord, text))))))


def _sizes(sparsity: float) -> list[dict[str, Any]]:
    sizes = {"dense_bytes": 2.0, "mask_bytes": 0.125, "delta_bytes": 0.127, "packed_bytes": 0.125 + 2 * (1 - sparsity)}
    facts = {"kind": "size", "name": "matrices", "count": BLOCKS * len(MATRICES), "counted": "matrices", "clusters": 1, "unit": "bytes"}
    return [
        {**facts, "metric": metric, "label": metric, "value": 69672960 * of, "better": "lower", **_NO_ERROR, **_NO_DENSE}
        for metric, of in sizes.items()
    ]


def _answers(row: dict[str, str], of: str) -> dict[str, str]:
    """One model's continuations of a prompt."""
    return {form: row[f"{form}_{of}"] for form in ("raw", "chat") if f"{form}_{of}" in row}


def _matrix(block: int, kind: str, sparsity: float, numbers: random.Random) -> dict[str, Any]:
    weights = 576 * 576
    zeros = round(weights * sparsity)
    part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    error = 0.08 + 0.01 * MATRICES.index(kind) + 0.003 * block + numbers.uniform(0, 0.03)
    return {
        "block": block,
        "matrix": f"model.layers.{block}.{part}.{kind}",
        "tensor": f"model.layers.{block}.{part}.{kind}.weight",
        "expert": None,
        "shape": [576, 576],
        "transposed": False,
        "weights": weights,
        "zeros": zeros,
        "asked": sparsity,
        "sparsity": zeros / weights,
        "relative_error": error,
        "relative_error_held_out": error * 1.1,
        "refined": None,
        "trained": None,
        "tokens": 16384,
        "calibrated_on": "its tokens",
        "damping": 0.02 if block == 3 and kind == "down_proj" else 0.01,
    }


def _ruler() -> list[dict[str, Any]]:
    facts = {"kind": "corpus", "name": "wikipedia", "count": WINDOWS * (TOKENS - 1), "counted": "tokens", "clusters": DOCUMENTS, "unit": ""}
    facts |= {"better": "lower", **_NO_DENSE}
    rows = [("Q8_0", 1.06, 19.7, 0.004, 0.52), ("Q4_0", 0.56, 21.9, 0.11, 0.5), ("Q2_K", 0.33, 34.2, 0.6, 0.41)]
    found = []
    for kind, size, perplexity, divergence, accuracy in rows:
        of_kind = {**facts, "type": kind, "bytes_per_weight": size, "stderr": 0.5, "metric": "perplexity", "label": "perplexity"}
        found.append({**of_kind, "value": perplexity, "low": 0.93 * perplexity, "high": 1.08 * perplexity})
        found.append(
            {**of_kind, "metric": "mean_kld", "label": "Mean KLD", "unit": "nats", "value": divergence}
            | {"low": 0.9 * divergence, "high": 1.1 * divergence}
        )
        found.append(
            {**of_kind, "kind": "mean", "name": "tasks", "metric": "accuracy", "label": "mean accuracy, every task alike"}
            | {"better": "higher", "count": len(TASKS), "counted": "tasks", "clusters": len(TASKS)}
            | {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
        )
    return found
