"""params.yaml, tasks of one's own, and what stages wrote for other stages: manifest, protocol, measurements, journals."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from omegaconf import OmegaConf
from safetensors.torch import save as safetensors

from benchmarks.fuzz.mutations import RAW, Files, bytes_of, json_of, lines_of, text_of, values_of
from benchmarks.fuzz.reader import Reader
from stages.config import sections
from stages.config.compose import composed
from stages.config.params import read_params
from stages.evaluation import dense_states
from stages.evaluation import journal as evaluation_journal
from stages.evaluation.manifest import Benchmark, read_manifest
from stages.evaluation.protocol import read_protocol
from stages.evaluation.questions import fetched_source
from stages.evaluation.results import read_results
from stages.files import BENCHMARKS, PRUNE_RESULTS, replacing
from stages.pruning import journal as pruning_journal
from stages.release.records import Records
from stages.sources import tasks
from stages.sources.tasks import fetch
from stages.sweeps.file import read_sweep


def yaml_of(value: Any) -> SearchStrategy[bytes]:
    """Plain data, edited, as YAML in JSON's form or its own, with tags and anchors, damaged."""
    return values_of(value, 2).flatmap(_as_yaml)


@st.composite
def _as_yaml(draw: st.DrawFn, value: Any) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return text_of(value)
    try:
        text = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=draw(st.booleans()))
    except UnicodeEncodeError:  # half a surrogate pair, which libyaml does not write
        return text_of(value)
    for name, raw in RAW.items():
        text = text.replace(f"'{name}'", raw if raw else "~")
    if draw(st.integers(0, 2)) == 0:
        at = draw(st.integers(0, text.count("\n")))
        lines = text.split("\n")
        lines.insert(at, draw(st.sampled_from(LINES)))
        text = "\n".join(lines)
    data = text.encode("utf8", "surrogatepass")
    return draw(bytes_of(data, most=2)) if draw(st.integers(0, 3)) == 0 else data


LINES = (
    "a: !!python/object/apply:os.system ['touch outside']",
    "a: !!python/name:os.system",
    "a: !function canary.run",
    "a: &a [*a]",
    "a: &a {b: *a}",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "<<: {a: 1}",
    "<<: *nothing",
    "a: &x [1, 1]\nb: &y [*x, *x]\nc: &z [*y, *y, *y, *y]\nd: [*z, *z, *z, *z]",
    "%YAML 9.9",
    "---\nb: 1",
    "a: 0x" + "f" * 5000,
    "a: 1:" + "59:" * 50 + "1",
    "\ta: 1",
    "a: " + "[" * 3000,
    "\n".join([" " * depth + "a:" for depth in range(1500)]),
    "\n".join(["a0: &a0 [1, 1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]),
    "a: !!binary aaaa=a",
    "a: !!timestamp 99999-99-99",
    "a: !!int x",
    "a: !!float 1__",
    "2024-01-01: 1",
    "null: 1",
    "a: .inf",
)
CANARY = b"def run(*_):\n    open('outside', 'w').write('run')\nrun()\n"


# params.yaml


@cache
def _params() -> dict[str, Any]:
    """What `dvc exp run` writes, with fewer corpora, so that it is read in less time."""
    params: Any = OmegaConf.to_container(composed())
    evaluation, calibration = params["text"]["evaluation"], params["text"]["calibration"]
    params["text"] = {"evaluation": {name: evaluation[name] for name in list(evaluation)[:2]}, "calibration": calibration}
    params["evaluation"] |= {"tasks": [name for name in params["evaluation"]["tasks"] if name in params["text"]["evaluation"]]}
    return params


def params() -> SearchStrategy[Files]:
    return st.deferred(lambda: yaml_of(_params())).map(lambda content: {"params.yaml": content})


def read_configuration(_: Files) -> None:
    sections.read(OmegaConf.create(read_params(Path("params.yaml"))))


# Sweep files

RESOURCES = {"gpus": None, "cpus": 1, "memory_gib": 1.5, "threads": None}
SWEEPS = (
    {
        "target": "evaluate_sparse",
        "overrides": ["evaluation=sweep"],
        "grid": {"method": ["wanda", "ria"], "pattern.sparsity": [0.5, 0.6]},
        "points": [["method=wanda", "pattern=nm_2_4"]],
        "resources": RESOURCES,
    },
    {
        "overrides": ["evaluation=sweep"],
        "search": {"parameter": "pattern.sparsity", "low": 0.3, "high": 0.8, "metric": "perplexity", "limit": 1.5, "points": 6},
        "resources": RESOURCES,
    },
)


def sweeps() -> SearchStrategy[Files]:
    return st.sampled_from(SWEEPS).flatmap(yaml_of).map(lambda content: {"sweep.yaml": content})


def read_sweep_file(_: Files) -> None:
    read_sweep(Path("sweep.yaml"))


# Tasks of one's own, and the manifest of those that were fetched.

OWN = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GROUP = {
    "group": "own",
    "task": ["one", {"task": "two", "num_fewshot": 1}],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}
TASK_ROWS = [{"question": "river", "options": ["stone", "lamp"], "answer": 0}] * 3


def own_tasks() -> SearchStrategy[Files]:
    member = yaml.safe_dump({**OWN, "task": "one"}).encode()
    other = yaml.safe_dump({**OWN, "task": "two"}).encode()
    files = {
        "tasks/own.yaml": yaml_of(OWN) | yaml_of(GROUP) | yaml_of({"include": "one.yaml", "task": "own", "num_fewshot": 2}),
        "tasks/one.yaml": st.just(member) | st.just(member + b"include: own.yaml\n"),
        "tasks/two.yaml": st.just(other),
        "tasks/canary.py": st.just(CANARY),
        "tasks/rows.jsonl": st.just(b"".join(text_of(row) + b"\n" for row in TASK_ROWS)) | lines_of(TASK_ROWS),
    }
    return st.fixed_dictionaries(files)


def read_own_tasks(_: Files) -> None:
    with replacing(BENCHMARKS) as directory:
        fetch(["own"], directory, Path("downloads").absolute())


@contextmanager
def without_lm_evals_index() -> Iterator[None]:
    """Reading lm-eval's own thousands of files takes seconds."""
    datasets.disable_progress_bars()
    with mock.patch.object(tasks, "_stock_index", dict), mock.patch.object(datasets.config, "HF_DATASETS_OFFLINE", True, create=True):
        yield
    datasets.enable_progress_bars()


def manifests() -> SearchStrategy[Files]:
    data = {"test": {"file": "data/own-0/test.parquet", "rows": 3, "sha256": "0" * 64}}
    subtask = {"name": "one", "definition": "own/one.yaml", "own": True, "sha256": "0" * 64, "overrides": {"num_fewshot": 1}, "data": data}
    stock = {**subtask, "definition": "gsm8k/gsm8k.yaml", "own": False}
    benchmark = {"name": "own", "is_group": True, "aggregated": {"acc": True}, "subtasks": [subtask, stock]}
    return json_of({"benchmarks": {"own": [benchmark]}, "sources": []}).map(lambda content: {str(BENCHMARKS / "manifest.json"): content})


def read_task_manifest(_: Files) -> None:
    benchmarks: list[Benchmark] = [benchmark for of_name in read_manifest(BENCHMARKS).values() for benchmark in of_name]
    for benchmark in benchmarks:
        source = fetched_source(benchmark, None, "0" * 64, Path("scratch"))
        for task in source.tasks.values():
            read = [task["include"], *task["dataset_kwargs"]["data_files"].values()]
            outside = [path for path in read if not _is_below(path, (BENCHMARKS.absolute(), tasks.STOCK))]
            if outside:
                raise RuntimeError(f"evaluation would read {outside}")


def _is_below(path: str, folders: tuple[Path, ...]) -> bool:
    return any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in folders)


# Results that stages read.

CORPUS = {"sha256": "0" * 64, "window_length": 8, "windows": 2, "tokens": 16, "windows_sha256": "0" * 64}
TASK = {"rows": 2, "sha256": "0" * 64, "few_shot": 0, "metrics": ["acc"], "source": "text.evaluation", "better": {}, "macro": [], "cut": 0}
STYLE = {"few_shot": None, "system_prompt": None, "template_sha256": None, "skipped": None}
PROTOCOL = {
    "base": "0" * 64,
    "tokenizer_sha256": None,
    "bos": None,
    "corpora": {"articles": CORPUS},
    "metrics": ["perplexity"],
    "tasks": {"piqa": TASK},
    "styles": {"chat": STYLE},
    "prompts": ["river"],
    "new_tokens": 3,
    "dtype": "float32",
    "versions": {"torch": "2.13.0"},
    "evaluation": {"name": "tiny"},
    "delta": None,
}
WINDOWS = {"articles": {"clusters": [0, 1], "nll": [2.5, 3.5]}}
SAMPLES = [{"row": number, "cluster": number, "values": {"acc": 1.0}, "task": "piqa"} for number in range(2)]
GENERATIONS = [{"prompt": "river", "raw": "stone"}]
AGGREGATES = {"raw": {"piqa": {"f1": {"value": 0.5, "count": 2}}}}
MEASUREMENT = {
    "kind": "corpus",
    "name": "articles",
    "metric": "perplexity",
    "label": "perplexity",
    "value": 20.0,
    "count": 16,
    "counted": "tokens",
    "clusters": 2,
    "difference": {"value": 1.0, "stderr": 0.1, "low": 0.8, "high": 1.2},
}


def _one_edited(files: dict[str, tuple[bytes, SearchStrategy[bytes]]]) -> SearchStrategy[Files]:
    """Files of which one is edited, as (valid, edited) has them."""
    valid = {name: content for name, (content, _) in files.items()}
    return st.one_of([edited.map(lambda content, name=name: {**valid, name: content}) for name, (_, edited) in files.items()])


def _json(value: Any) -> tuple[bytes, SearchStrategy[bytes]]:
    return json.dumps(value).encode(), json_of(value)


def _lines(rows: list[Any]) -> tuple[bytes, SearchStrategy[bytes]]:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows), lines_of(rows)


def results() -> SearchStrategy[Files]:
    files = {
        "protocol.json": _json(PROTOCOL),
        "windows.json": _json(WINDOWS),
        "generations.json": _json(GENERATIONS),
        "aggregates.json": _json(AGGREGATES),
        "samples-piqa.jsonl": _lines(SAMPLES),
        "styles/chat/samples-piqa.jsonl": _lines(SAMPLES),
    }
    return _one_edited(files)


def read_dense_results(_: Files) -> None:
    read_results(Path(), read_protocol(Path("protocol.json")))


def records() -> SearchStrategy[Files]:
    provenance = {"section": {}, "files": {}, "sources": {}, "base": "0" * 64, "windows_sha256": "0" * 64, "versions": {"torch": "2.13.0"}}
    files = {f"{folder}/provenance.json": _json(provenance) for folder in ("artifacts/base", "artifacts/text", "artifacts/calibration")}
    files |= {f"{PRUNE_RESULTS}/provenance.json": _json(provenance)}
    for results_of in ("results/dense", "results/sparse"):
        files |= {f"{results_of}/details/protocol.json": _json(PROTOCOL), f"{results_of}/details/measurements.json": _json([MEASUREMENT])}
        files |= {f"{results_of}/run.json": _json({"device": "cpu", "generation": None})}
    files |= {
        "results/sparse/details/paired.json": _json([{"task": "piqa"}]),
        "results/sparse/details/generations.json": _json(GENERATIONS),
        "results/sparse/details/prompt_sensitivity.json": _json([]),
    }
    return _one_edited(files)


def read_records(_: Files) -> None:
    Records.read()


# Journals of runs that were interrupted.


def journals() -> SearchStrategy[Files]:
    tensors = safetensors({"a": torch.zeros(2)}, metadata={"seconds": "1.5"})
    windows = safetensors({"articles\nnll": torch.zeros(2, 3)})
    files = {
        f"prune/{pruning_journal.FINGERPRINT}": (json.dumps({"a": 1}, indent=1).encode(), json_of({"a": 1})),
        "prune/block-00000.json": _json({"sha256": "0" * 64, "seconds": 1.5}),
        "prune/block-00000.safetensors": (tensors, bytes_of(tensors)),
        f"prune/{pruning_journal.EVIDENCE}": (tensors, bytes_of(tensors)),
        f"evaluate/{evaluation_journal.FINGERPRINT}": (json.dumps({"a": 1}, indent=1).encode(), json_of({"a": 1})),
        "evaluate/windows.safetensors": (windows, bytes_of(windows)),
        "evaluate/generations-4d97715acf302524.json": _json(GENERATIONS),
    }
    return _one_edited(files)


def _no_tensor(name: str, *, entry: int | None = None) -> torch.Tensor:
    raise KeyError(name)


NO_BASE: Any = SimpleNamespace(fingerprint="base1", tensor=_no_tensor)


def read_journals(_: Files) -> None:
    with evaluation_journal.opened(Path("evaluate"), {"a": 1}) as evaluated:
        evaluated.observed(dict)
        if evaluated.has("generations"):
            evaluated.read("generations")
    with pruning_journal.opened(Path("prune"), {"a": 1}, NO_BASE) as pruned:
        pruned.allocation_evidence(dict)
        _ = pruned.seconds_before
        pruned.changes(0)


STATES_OF = SimpleNamespace(name="news", windows=torch.zeros(2, 5, dtype=torch.int64))
CPU = torch.device("cpu")


def states() -> SearchStrategy[Files]:
    """Hidden states of the dense model, and what they are of."""
    tensors = safetensors({"news": torch.zeros(2, 5, 4)})
    manifest = {"kept": True, **dense_states._origin({"a": 1}, CPU)}
    return _one_edited({dense_states.MANIFEST: _json(manifest), dense_states.STATES: (tensors, bytes_of(tensors))})


def read_states(_: Files) -> None:
    dense_states.read(Path(), [STATES_OF], {"a": 1}, CPU)


READERS = (
    Reader(
        name="params.yaml",
        code="config/params.py, sections.py, checks.py",
        inputs=params(),
        read=read_configuration,
        names=("params.yaml", *(f"{name}" for name in sections.SECTIONS)),
        share=0.4,
    ),
    Reader(
        name="sweep files",
        code="sweeps/file.py",
        inputs=sweeps(),
        read=read_sweep_file,
        names=("sweep.yaml",),
        share=2,
    ),
    Reader(
        name="task files of one's own",
        code="sources/tasks.py",
        inputs=own_tasks(),
        read=read_own_tasks,
        names=("evaluation.tasks",),
        memory=128,
        share=0.4,
        around=without_lm_evals_index,
    ),
    Reader(
        name="manifest of fetched tasks",
        code="evaluation/manifest.py",
        inputs=manifests(),
        read=read_task_manifest,
        names=("manifest.json",),
        share=10,
    ),
    Reader(
        name="results of the dense model",
        code="evaluation/protocol.py, results.py",
        inputs=results(),
        read=read_dense_results,
        names=("protocol.json", "windows.json", "generations.json", "aggregates.json", "samples-piqa.jsonl"),
        share=9,
    ),
    Reader(
        name="hidden states of the dense model",
        code="evaluation/dense_states.py",
        inputs=states(),
        read=read_states,
        names=(dense_states.MANIFEST, dense_states.STATES),
        share=4,
    ),
    Reader(
        name="records of a release",
        code="release/records.py",
        inputs=records(),
        read=read_records,
        names=(
            "provenance.json",
            "protocol.json",
            "measurements.json",
            "paired.json",
            "generations.json",
            "run.json",
            "prompt_sensitivity.json",
        ),
        share=3,
    ),
    Reader(
        name="journals",
        code="evaluation/journal.py, pruning/journal.py",
        inputs=journals(),
        read=read_journals,
        names=("prune", "evaluate"),
        share=5,
    ),
)
