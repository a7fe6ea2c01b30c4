"""Tasks of lm-eval by their own names, fetched from a hub on loopback."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import fetch
from stages.errors import ConfigError, SourceError, TextError
from stages.evaluation.manifest import read_manifest
from stages.files import OWN_TASKS, sha256
from stages.sources import tasks
from tests import benchmarks
from tests.hub_server import COMMIT


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_task_is_written_with_the_splits_that_are_read_and_its_commit(monkeypatch, hub_repository):
    benchmarks.put(hub_repository)
    benchmarks.fetch(monkeypatch, "gsm8k")
    (benchmark,) = read_manifest(Path("artifacts/tasks"))["gsm8k"]
    (subtask,) = benchmark.subtasks
    assert (benchmark.is_group, subtask.definition, subtask.own, list(subtask.data)) == (
        False,
        "gsm8k/gsm8k.yaml",
        False,
        ["test", "train"],
    )
    for split, data in subtask.data.items():
        path = Path("artifacts/tasks") / data.file
        assert pq.read_table(path).to_pylist() == benchmarks.GSM8K[split]
        assert (data.rows, data.sha256) == (len(benchmarks.GSM8K[split]), sha256(path))
    (source,) = json.loads(Path("artifacts/tasks/manifest.json").read_text())["sources"]
    assert source == {"repo": "openai/gsm8k", "config": "main", "revision": COMMIT, "license": "mit"}
    assert not Path("artifacts/downloads").exists()


def test_a_group_is_written_with_its_tasks_and_how_lm_eval_weighs_them(monkeypatch, hub_repository):
    benchmarks.put(hub_repository)
    (group,) = benchmarks.fetch(monkeypatch, "mmlu")["mmlu"]
    assert (group.name, group.is_group, group.aggregated) == ("mmlu", True, {"acc": True})
    assert {task.name for task in group.subtasks} == {f"mmlu_{subject}" for subject in benchmarks.SUBJECTS}
    assert all(list(task.data) == ["test", "dev"] for task in group.subtasks)


def test_a_tag_is_each_of_its_tasks(monkeypatch, hub_repository):
    benchmarks.put(hub_repository)
    found = benchmarks.fetch(monkeypatch, "math_word_problems")["math_word_problems"]
    assert [(each.name, each.is_group) for each in found] == [("gsm8k", False), ("gsm8k_cot_zeroshot", False)]


def test_a_task_of_ones_own_is_written_with_its_definition(monkeypatch):
    benchmarks.write_own()
    (benchmark,) = benchmarks.fetch(monkeypatch, "own_choice")["own_choice"]
    (subtask,) = benchmark.subtasks
    assert (subtask.own, subtask.definition, subtask.data["test"].rows) == (True, "own/own.yaml", 5)
    assert Path("artifacts/tasks/own/own.yaml").read_text() == benchmarks.OWN
    assert not Path("artifacts/tasks/own/rows.jsonl").exists()  # they are in data/


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "evaluation.tasks: found 'gsm8', wanted a name that lm-eval 0.4.13 knows, such as gsm8k"),
        ("zzzzzz", "wanted a name that lm-eval 0.4.13 knows, or that of a YAML file in the folder tasks/"),
        ("squad_completion", "squad_completion: a Python class defines this task"),
        ("humaneval", "humaneval: it runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_anything_is_downloaded(monkeypatch, hub_repository, name, message):
    benchmarks.put(hub_repository)
    with pytest.raises(ConfigError, match=message):
        benchmarks.fetch(monkeypatch, "gsm8k", name)
    assert not Path("artifacts/downloads").exists()
    assert not Path("artifacts/tasks").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("custom_dataset: '!function a.b'", "a Python function makes its rows"),
        ("doc_to_image: picture", "it asks about images or sound"),
        ("answer_key: 1", "found the keys answer_key"),
        ("test_split: null", "found neither test_split nor validation_split"),
        ("dataset_path: null", "found no dataset_path"),
    ],
)
def test_a_definition_that_asks_for_more_is_refused(monkeypatch, line, message):
    key = line.partition(":")[0]
    kept = "\n".join(row for row in benchmarks.OWN.splitlines() if not row.startswith(f"{key}:"))
    benchmarks.write_own(f"{kept}\n{line}\n")
    with pytest.raises(ConfigError, match=f"evaluation.tasks: own_choice: {message}"):
        benchmarks.fetch(monkeypatch, "own_choice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": "auto"}, "hub dataset openai/gsm8k is gated"),
        ({"script": True}, "hub dataset openai/gsm8k: found the script gsm8k.py; code of a data set is never run"),
        ({"broken": True}, "data set openai/gsm8k, main: cannot be read"),
        ({"splits": ["train"]}, "data set openai/gsm8k, main: found the splits train, wanted test"),
    ],
)
def test_a_data_set_that_cannot_be_fetched_is_named_with_the_task(monkeypatch, hub_repository, changes, message):
    splits = changes.get("splits", ["train", "test"])
    files = {f"main/{split}-0.parquet": benchmarks.parquet(benchmarks.GSM8K[split]) for split in splits}
    files |= {"gsm8k.py": b""} if changes.get("script") else {}
    if changes.get("broken"):
        files = {name: b"no parquet" for name in files}
    hub_repository("datasets/openai/gsm8k", {"README.md": benchmarks.card({"main": splits}), **files}, gated=changes.get("gated", False))
    with pytest.raises(SourceError, match=f"evaluation.tasks: gsm8k: {message}"):
        benchmarks.fetch(monkeypatch, "gsm8k")
    assert not Path("artifacts/tasks").exists()


def test_a_data_set_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(SourceError, match="evaluation.tasks: gsm8k: hub dataset openai/gsm8k: not found"):
        benchmarks.fetch(monkeypatch, "gsm8k")


def test_the_stage_fetches_what_text_evaluation_has_not(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "fetch", lambda names, directory, downloads: asked.append(names) or {})
    fetch.main.function(part="tasks", evaluation_tasks=["boolq", "gsm8k", "piqa"], text_evaluation={"boolq": None, "articles": None})
    assert asked == [["gsm8k", "piqa"]]


def test_where_nothing_is_asked_an_empty_manifest_is_written(monkeypatch):
    monkeypatch.setattr(tasks, "fetch", None)
    fetch.main.function(part="tasks", evaluation_tasks=["boolq"], text_evaluation={"boolq": None})
    assert read_manifest(Path("artifacts/tasks")) == {}


def test_a_manifest_of_another_version_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"benchmarks": {"a": [{"name": "a"}]}}')
    with pytest.raises(TextError, match="manifest.json: found another form .*; run `python -m stages.fetch part=tasks`"):
        read_manifest(tmp_path)


def test_the_splits_of_a_definition_are_those_that_lm_eval_reads(tmp_path):
    made = tasks.Definition(task_name="a", path=tmp_path, config={"test_split": "test", "training_split": "train"}, overrides={})
    assert made.splits == ["test", "train"]
    assert replace(made, config={"validation_split": "valid", "fewshot_split": "dev", "training_split": "train"}).splits == ["valid", "dev"]
    assert replace(made, config={"test_split": "test", "fewshot_config": {"samples": [{}]}}).splits == ["test"]
    assert replace(made, config={"test_split": "test"}).splits == ["test"]


def test_code_of_a_data_set_is_not_trusted_whatever_its_definition_says():
    config = {"dataset_kwargs": {"trust_remote_code": True, "data_dir": "a"}}
    assert tasks._options(config) == {"data_dir": "a"}


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("a: " + "[" * 100_000, "own.yaml: not YAML that lm-eval can read .*in more than 100 levels"),
        ("task: own_choice\ndataset_path: [json]\n", r'own_choice: dataset_path: found \["json"\], wanted str or NoneType'),
        ("task: own_choice\ndataset_path: json\ntest_split: {a: 1}\n", "own_choice: test_split: found"),
        ("group: own_choice\ntask: [0.5]\n", "own_choice: found the member 0.5, wanted one that lm-eval defines"),
        ("task: 7\n", "evaluation.tasks: .*own.yaml: found the name 7, wanted a string"),
    ],
)
def test_a_definition_of_another_form_is_named(monkeypatch, definition, message):
    benchmarks.write_own(definition)
    with pytest.raises(ConfigError, match=message):
        benchmarks.fetch(monkeypatch, "own_choice")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("{metric: [[]]}", r"metric \[\[\]\] with weight_by_size true"),
        ("{metric: acc, weight_by_size: 2}", 'metric "acc" with weight_by_size 2'),
    ],
)
def test_a_groups_metric_of_another_form_is_named(monkeypatch, metric, message):
    benchmarks.write_own(benchmarks.OWN)
    (OWN_TASKS / "group.yaml").write_text(f"group: both\ntask: [own_choice]\naggregate_metric_list: [{metric}]\n")
    with pytest.raises(ConfigError, match=f"both: aggregate_metric_list: found {message}, wanted a metric's name with true or false"):
        benchmarks.fetch(monkeypatch, "both")


SUBTASK = {"name": "a", "definition": "own/a.yaml", "own": True, "sha256": "0", "overrides": {}, "data": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"definition": "../../a.yaml"}, "a: found the path '../../a.yaml', wanted one inside the folder of the tasks"),
        ({"data": {"test": {"file": "/etc/passwd", "rows": 1, "sha256": "0"}}}, "a: found the path '/etc/passwd', wanted one inside"),
        ({"name": 7}, "subtasks.0..name: found 7, wanted str"),
        ({"overrides": []}, "subtasks.0..overrides: found"),
    ],
)
def test_a_manifest_that_names_other_files_or_other_types_is_refused(tmp_path, changes, message):
    benchmark = {"name": "a", "is_group": False, "aggregated": {}, "subtasks": [{**SUBTASK, **changes}]}
    (tmp_path / "manifest.json").write_text(json.dumps({"benchmarks": {"a": [benchmark]}}))
    with pytest.raises(TextError, match=f"manifest.json: found another form .*{message}"):
        read_manifest(tmp_path)
