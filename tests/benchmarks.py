"""Small data sets of lm-eval's tasks on the loopback hub, in the hub's own columns, and their fetching without lm-eval's whole index."""

import io
from functools import cache
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.tasks import TaskManager

from stages.evaluation.manifest import Benchmark
from stages.files import replacing
from stages.sources import tasks
from tests import tiny

SUBJECTS = ("anatomy", "virology", "sociology")
WORDS = tiny.sentences(40, seed=9, length=6)
OWN = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: f1, higher_is_better: true}
"""
ROLLING = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATED = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 400, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def card(configs: dict[str, list[str]]) -> bytes:
    """A data set's README with its configurations, each with its splits in a folder of its own."""
    lines = ["---", "license: mit", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {name}/{split}-*")]
    return "\n".join([*lines, "---", ""]).encode()


GSM8K = {
    split: [{"question": WORDS[i], "answer": f"{WORDS[i]} #### {i}"} for i in range(count)] for split, count in (("train", 8), ("test", 4))
}
MMLU = {
    subject: {
        split: [
            {"question": f"{WORDS[i]} {subject} {split}", "subject": subject, "choices": WORDS[i + 1 : i + 5], "answer": i % 4}
            for i in range(count)
        ]
        for split, count in (("test", 2 + number), ("dev", 5))
    }
    for number, subject in enumerate(SUBJECTS)
}


def put(hub_repository) -> None:
    """Put both data sets on the hub."""
    files = {f"main/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in GSM8K.items()}
    hub_repository("datasets/openai/gsm8k", {"README.md": card({"main": ["train", "test"]}), **files})
    files = {f"{subject}/{split}-0.parquet": parquet(rows) for subject, splits in MMLU.items() for split, rows in splits.items()}
    hub_repository("datasets/cais/mmlu", {"README.md": card(dict.fromkeys(SUBJECTS, ["test", "dev"])), **files})


@cache
def index() -> dict:
    """lm-eval's index of a few folders, in which the group mmlu has three of its subjects."""
    folders = ["gsm8k", "mmlu/default", "squad_completion", "humaneval", "boolq", "wikitext"]
    found = TaskManager(include_defaults=False, include_path=[str(tasks.STOCK / folder) for folder in folders]).task_index
    for tag in [name for name, entry in found.items() if name.startswith("mmlu_") and entry.yaml_path is None]:
        found[tag].tags &= {f"mmlu_{subject}" for subject in SUBJECTS}
    return found


def fetch(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, list[Benchmark]]:
    """Fetch tasks into artifacts/tasks of the current directory, as the stage does."""
    monkeypatch.setattr(tasks, "_stock_index", index)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False, raising=False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(Path("artifacts/hub").absolute())
    )  # another test's commit is the same
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with replacing(Path("artifacts/tasks")) as directory:
        return tasks.fetch(list(names), directory, Path("artifacts/downloads").absolute())


def write_own(definition: str = OWN, rows: list[dict] | None = None) -> None:
    """Write a task of one's own into the folder tasks of the current directory."""
    made = [{"question": WORDS[i], "options": ["river stone garden", "lamp"], "answer": i % 2} for i in range(5)]
    tiny.write_lines(Path("tasks/rows.jsonl"), made if rows is None else rows)
    Path("tasks/own.yaml").write_text(definition)
