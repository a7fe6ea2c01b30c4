"""Tasks of lm-eval by their own names: fetched from a hub on loopback, scored by the evaluate stage on a small base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.errors import CheckpointError, ConfigError, TextError
from stages.evaluation import questions, running, setup
from stages.evaluation.harness import WholeModel
from stages.evaluation.questions import STOCK
from stages.evaluation.section import Generations
from stages.files import read_json
from stages.rows import Rows
from tests import benchmarks, tiny
from tests.evaluation import delta as deltas
from tests.test_evaluate import EVALUATION, forbid_weights, run, write_text

TASKS = ["piqa", "gsm8k", "mmlu", "own_choice"]
ASKED = replace(EVALUATION, tasks=TASKS, rows=3, generations=Generations(new_tokens=3, prompts=[]))


@pytest.fixture(scope="module")
def prepared(canonical, tmp_path_factory):
    """A directory with a base, text, a delta and fetched tasks."""
    root = tmp_path_factory.mktemp("tasks")
    shutil.copytree(canonical, root / "artifacts/base")
    write_text(root)
    deltas.write(root / "artifacts/sparse", Checkpoint(root / "artifacts/base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        benchmarks.put(put_on_hub)
        benchmarks.write_own()
        benchmarks.fetch(patch, "gsm8k", "mmlu", "own_choice")
    return root


def put_on_hub(name: str, files: dict[str, bytes], **facts: object) -> None:
    from tests.conftest import HUB
    from tests.hub_server import FakeRepository

    HUB.repositories[name] = FakeRepository(files=files, **facts)


@pytest.fixture()
def root(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def stock(directory: Path, **files: dict) -> TaskManager:
    """lm-eval's manager of tasks that read other files, each a YAML that includes a stock definition."""
    directory.mkdir()
    for name, keys in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_name": None, **keys}))
    return TaskManager(include_defaults=False, include_path=str(directory))


def rows_file(directory: Path, rows: list[dict]) -> str:
    return str(tiny.write_lines(directory, rows).absolute())


def scored_by_lm_eval(root: Path, names: list[str], manager: TaskManager, **options: object) -> dict:
    base = Checkpoint(root / "artifacts/base")
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    whole = WholeModel(tiny.NO_BOS, pretrained=model, tokenizer=tiny.tokenizer(), batch_size=4, max_length=base.context_length)
    return simple_evaluate(model=whole, tasks=names, task_manager=manager, bootstrap_iters=0, limit=3, **options)


def own_managers(root: Path) -> TaskManager:
    files = {"gsm8k_own": {"include": str(STOCK / "gsm8k/gsm8k.yaml"), "dataset_path": "json"}}
    data = {split: rows_file(root / f"gsm8k-{split}.jsonl", rows) for split, rows in benchmarks.GSM8K.items()}
    files["gsm8k_own"]["dataset_kwargs"] = {"data_files": data}
    files["own_again"] = {
        "include": str(root / "tasks/own.yaml"),
        "dataset_kwargs": {"data_files": {"test": str(root / "tasks/rows.jsonl")}},
    }
    for subject in benchmarks.SUBJECTS:
        data = {split: rows_file(root / f"{subject}-{split}.jsonl", rows) for split, rows in benchmarks.MMLU[subject].items()}
        definition = str(STOCK / f"mmlu/default/mmlu_{subject}.yaml")
        files[f"own_{subject}"] = {"include": definition, "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
    manager = stock(root / "stock", **files)
    members = [f"own_{subject}" for subject in benchmarks.SUBJECTS]
    group = {"group": "mmlu_own", "task": members, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (root / "stock/group.yaml").write_text(yaml.safe_dump(group))
    return TaskManager(include_defaults=False, include_path=str(root / "stock")) if manager else manager


def test_scores_are_those_of_lm_eval_on_the_same_rows(root):
    run("dense", replace(ASKED, few_shot=2))
    ours = read_json(root / "results/dense/metrics.json")["tasks"]
    outcome = scored_by_lm_eval(root, ["gsm8k_own", "mmlu_own", "own_again"], own_managers(root), num_fewshot=2)
    theirs = outcome["results"]
    details = root / "results/dense/details"
    said = {row["doc_id"]: row["resps"][0] for row in outcome["samples"]["gsm8k_own"]}
    assert {row["row"]: row["answers"] for row in Rows(details / "samples-gsm8k.jsonl")} == said
    assert len({text for (text,) in said.values()}) == 3
    for row, other in zip(Rows(details / "samples-own_choice.jsonl"), outcome["samples"]["own_again"], strict=True):
        assert [score for score, _ in row["scores"]] == pytest.approx([score for score, _ in other["filtered_resps"]], rel=1e-4)
    for filtered_by in ("strict-match", "flexible-extract"):
        assert ours["gsm8k"][f"exact_match ({filtered_by})"] == theirs["gsm8k_own"][f"exact_match,{filtered_by}"]
    assert ours["mmlu"]["acc"] == pytest.approx(theirs["mmlu_own"]["acc,none"])
    assert ours["own_choice"]["acc"] == pytest.approx(theirs["own_again"]["acc,none"])
    assert ours["own_choice"]["f1"] == pytest.approx(theirs["own_again"]["f1,none"])
    assert 0 < ours["own_choice"]["f1"] < 1
    assert 0 < ours["own_choice"]["f1_stderr"] < 1


def test_answers_are_those_of_lm_eval_in_the_chat_style_too(root):
    run("dense", replace(ASKED, tasks=["own_choice"], styles=["raw", "chat", "system"]))
    theirs = scored_by_lm_eval(
        root, ["own_again"], own_managers(root), apply_chat_template=True, system_instruction=ASKED.system_prompt, num_fewshot=0
    )
    metrics = read_json(root / "results/dense/metrics.json")
    assert set(metrics["styles"]) == {"chat", "system"}
    rows = list(Rows(root / "results/dense/details/styles/system/samples-own_choice.jsonl"))
    for row, other in zip(rows, theirs["samples"]["own_again"], strict=True):
        assert "Answer briefly." in other["arguments"][0][0]
        assert [score for score, _ in row["scores"]] == pytest.approx([score for score, _ in other["filtered_resps"]], rel=1e-4)


def test_whole_texts_have_lm_evals_scores_with_an_error_by_the_bootstrap_and_lower_is_better(root, monkeypatch):
    benchmarks.write_own(benchmarks.ROLLING)
    benchmarks.fetch(monkeypatch, "own_choice")
    asked = replace(ASKED, tasks=["own_choice"])
    run("dense", replace(asked, streamed=True))
    streamed = read_json(root / "results/dense/metrics.json")["tasks"]["own_choice"]
    run("dense", asked)
    theirs = scored_by_lm_eval(root, ["own_again"], own_managers(root))["results"]["own_again"]
    ours = read_json(root / "results/dense/metrics.json")["tasks"]["own_choice"]
    metrics = ("word_perplexity", "bits_per_byte")
    assert set(ours) == {*metrics, *(f"{metric}_stderr" for metric in metrics)}
    assert streamed == pytest.approx(ours, rel=1e-4)
    for metric in metrics:
        assert ours[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-5)
    run("sparse", asked)
    rows = [row for row in read_json(root / "results/sparse/details/measurements.json") if row["kind"] == "task"]
    assert [(row["better"], row["count"], row["stderr"] > 0) for row in rows] == [("lower", 3, True)] * 2
    assert rows[0]["difference"]["value"] == pytest.approx(rows[0]["value"] - ours["word_perplexity"])
    assert read_json(root / "results/sparse/details/paired.json") == []
    assert "mean" not in read_json(root / "results/sparse/metrics.json")


def test_rows_of_a_fetched_task_that_share_a_passage_are_one_cluster(root, monkeypatch):
    words = [f"{benchmarks.WORDS[i]} ".ljust(200, "x") for i in (0, 0, 1)]
    rows = [{"question": "lamp", "options": ["river", "stone"], "answer": i % 2, "passage": words[i]} for i in range(3)]
    benchmarks.write_own(rows=rows)
    benchmarks.fetch(monkeypatch, "own_choice")
    run("dense", replace(ASKED, tasks=["own_choice"]))
    samples = Rows(root / "results/dense/details/samples-own_choice.jsonl")
    assert [row["cluster"] for row in samples] == [0, 0, 1]


def test_a_group_is_one_score_and_every_row_is_kept(root):
    run("dense", replace(ASKED, tasks=["mmlu"], rows=None))
    rows = list(Rows(root / "results/dense/details/samples-mmlu.jsonl"))
    counts = {f"mmlu_{subject}": len(benchmarks.MMLU[subject]["test"]) for subject in benchmarks.SUBJECTS}
    assert {name: sum(row["task"] == name for row in rows) for name in counts} == counts
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert len({row["cluster"] for row in rows}) == len(rows)
    (measured,) = [row for row in read_json(root / "results/dense/details/measurements.json") if row["kind"] == "task"]
    assert (measured["name"], measured["count"]) == ("mmlu", sum(counts.values()))
    assert measured["value"] == pytest.approx(sum(row["values"]["acc"] for row in rows) / len(rows))
    assert measured["stderr"] is not None
    protocol = read_json(root / "results/dense/details/protocol.json")["tasks"]["mmlu"]
    assert (protocol["few_shot"], protocol["available"], protocol["parts"]) == (0, len(rows), 3)


def test_the_task_s_own_number_of_examples_is_taken_and_recorded(root):
    run("dense", replace(ASKED, tasks=["gsm8k"]))
    protocol = read_json(root / "results/dense/details/protocol.json")["tasks"]["gsm8k"]
    assert (protocol["few_shot"], protocol["source"], protocol["rows"]) == (5, "lm-eval 0.4.13", 3)
    assert protocol["metrics"] == ["exact_match (strict-match)", "exact_match (flexible-extract)"]
    assert protocol["better"]["exact_match (strict-match)"] == "higher"
    row = next(iter(Rows(root / "results/dense/details/samples-gsm8k.jsonl")))
    assert set(row["filtered"]) == {"strict-match", "flexible-extract"}
    assert len(row["answers"]) == 1


def test_the_pruned_model_is_paired_with_the_dense_one_in_every_style(root):
    asked = replace(ASKED, styles=["raw", "chat", "few_shot"], generations=Generations(new_tokens=8, prompts=["river stone", "lamp"]))
    run("dense", asked)
    run("sparse", asked)
    dense, sparse = (read_json(root / f"results/{part}/metrics.json") for part in ("dense", "sparse"))
    for style in ("chat", "few_shot"):
        for task, scores in sparse["styles"][style].items():
            for metric in ("acc", "f1"):
                if metric in scores:
                    assert scores[f"dense_{metric}"] == pytest.approx(dense["styles"][style][task][metric])
                    assert scores[f"{metric}_difference"] == pytest.approx(scores[metric] - scores[f"dense_{metric}"])
    assert sparse["tasks"]["own_choice"]["dense_f1"] == dense["tasks"]["own_choice"]["f1"]
    assert {row["task"] for row in read_json(root / "results/sparse/details/paired.json")} == set(TASKS)
    assert (root / "results/sparse/details/styles/chat/samples-piqa.jsonl").is_file()
    drifts = {(row["style"], row["task"]): row for row in read_json(root / "results/sparse/details/prompt_sensitivity.json")}
    of_piqa = drifts["chat", "piqa"]
    assert of_piqa["drift"] == pytest.approx(of_piqa["styled"] - of_piqa["raw"])
    assert of_piqa["raw"] == pytest.approx(sparse["tasks"]["piqa"]["acc_difference"])
    assert of_piqa["styled"] == pytest.approx(sparse["styles"]["chat"]["piqa"]["acc_difference"])
    assert ("few_shot", None) in drifts
    for form in ("raw", "chat"):
        scores = sparse["generations"][form]
        assert scores["dense_distinct_1"] == pytest.approx(dense["generations"][form]["distinct_1"])
        assert 0 < scores["distinct_1"] <= scores["distinct_2"] <= 1
        assert scores["empty"] == 0


def test_a_style_that_the_template_refuses_is_skipped_and_named(root, caplog):
    path = root / "artifacts/base/chat_template.jinja"
    path.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + path.read_text())
    run("dense", replace(ASKED, tasks=["own_choice"], styles=["raw", "chat", "system"]))
    why = "the base's chat template refuses this dialogue (no system role)"
    assert f"evaluation.styles: system is skipped: {why}" in caplog.messages
    protocol = read_json(root / "results/dense/details/protocol.json")
    assert (protocol["styles"]["system"]["skipped"], protocol["styles"]["chat"]["skipped"]) == (why, None)
    assert set(read_json(root / "results/dense/metrics.json")["styles"]) == {"chat"}


def test_a_style_in_which_the_template_refuses_a_row_is_skipped_and_the_row_is_named(root, caplog):
    path = root / "artifacts/base/chat_template.jinja"
    word = benchmarks.WORDS[1].split()[-1]
    path.write_text(
        f"{{% if messages[0]['content'].endswith('{word}') %}}{{{{ raise_exception('no {word}') }}}}{{% endif %}}" + path.read_text()
    )
    run("dense", replace(ASKED, tasks=["own_choice"], styles=["raw", "chat"]))
    protocol = read_json(root / "results/dense/details/protocol.json")
    assert protocol["styles"]["chat"]["skipped"].startswith(
        "evaluation.tasks: own_choice, row 2: the base's chat template refuses this dialogue"
    )
    assert any(message.startswith("evaluation.styles: chat is skipped: evaluation.tasks: own_choice, row 2") for message in caplog.messages)
    run("sparse", replace(ASKED, tasks=["own_choice"], styles=["raw", "chat"]))
    assert "styles" not in read_json(root / "results/sparse/metrics.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streamed": True}, "evaluation.tasks: found 'gsm8k', wanted no task that generates text: in float32 all weights take"),
        ({"streamed": False}, "evaluation.tasks: found 'gsm8k', wanted no task that generates text: in float32 all weights take"),
        ({"streamed": False, "tasks": ["piqa"]}, "evaluation.streamed: found False, wanted true: in float32 all weights take"),
        (
            {"streamed": True, "generations": Generations(new_tokens=3, prompts=["river"])},
            r"evaluation.generations.prompts: found \['river'\], wanted none: in float32 all weights take",
        ),
    ],
)
def test_a_whole_model_that_does_not_fit_is_refused_before_a_weight_is_read(root, monkeypatch, changes, message):
    forbid_weights(root)
    monkeypatch.setattr("stages.evaluation.setup.free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match=message):
        run("dense", replace(ASKED, **changes))


def test_a_streamed_evaluation_generates_the_answers_of_the_whole_model(root):
    run("dense", replace(ASKED, tasks=["gsm8k"]))
    whole = read_json(root / "results/dense/metrics.json")
    run("dense", replace(ASKED, tasks=["gsm8k"], streamed=True))
    assert read_json(root / "results/dense/metrics.json")["tasks"] == whole["tasks"]


def test_a_streamed_model_has_the_same_scores(root):
    asked = replace(ASKED, tasks=["piqa", "mmlu", "own_choice"], styles=["raw", "chat"])
    run("dense", asked)
    whole = read_json(root / "results/dense/metrics.json")
    run("dense", replace(asked, streamed=True))
    streamed = read_json(root / "results/dense/metrics.json")
    assert (streamed["tasks"], streamed["styles"]) == (whole["tasks"], whole["styles"])


METRICS = benchmarks.OWN[benchmarks.OWN.index("metric_list") :]
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
GENERATED = {"output_type: multiple_choice": "output_type: generate_until", 'doc_to_choice: "{{options}}"\n': "", METRICS: EXACT}


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        (
            {},
            [{"question": "a", "options": ["b", "c"], "answer": 0}, {"question": "a", "options": None, "answer": 0}],
            "own_choice, row 2: ",
        ),
        (
            {'doc_to_text: "{{question}}"': 'doc_to_text: "{{missing}}"'},
            None,
            "lm-eval cannot read its definition, or its first row .*missing",
        ),
        (
            {"doc_to_target: answer": "doc_to_target: answer\ntarget_delimiter: ''"},
            [{"question": "a:", "options": ["b", end], "answer": 0} for end in ("c", "")],
            "own_choice, row 2: found an answer without a token, wanted at least one to score",
        ),
        *(
            (
                {},
                [{"question": "a", "options": ["b", "c"], "answer": answer} for answer in (0, wrong)],
                f"own_choice, row 2: found the answer {wrong}, wanted the number of 2 choices, from 0, or the text of one",
            )
            for wrong in (None, -1, 2)
        ),
        (  # a letter, where the choices are texts
            {},
            [{"question": "a", "options": ["b", "c"], "answer": answer} for answer in ("b", "A")],
            "own_choice, row 2: found the answer 'A', wanted the number of 2 choices, from 0, or the text of one",
        ),
        (
            GENERATED,
            [{"question": "a", "answer": answer} for answer in ("b", None)],
            "own_choice, row 2: found the answer null, wanted a text",
        ),
        (
            GENERATED | {"doc_to_target: answer": 'doc_to_target: "{{answer}}, that is None"'},
            [{"question": "a", "answer": answer} for answer in ("b", None)],
            "own_choice, row 2: found the answer null, wanted a text",
        ),
        (
            {"output_type: multiple_choice": "output_type: generate_until", METRICS: EXACT},
            [{"question": "a", "options": ["b", "c"], "answer": answer} for answer in (1, 2)],
            "own_choice, row 2: found the answer 2, wanted the number of 2 choices, from 0",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_before_a_weight_is_read(root, monkeypatch, changes, rows, message):
    forbid_weights(root)
    definition = benchmarks.OWN
    for old, new in changes.items():
        assert old in definition
        definition = definition.replace(old, new)
    benchmarks.write_own(definition, rows)
    benchmarks.fetch(monkeypatch, "own_choice")
    with pytest.raises((TextError, ConfigError), match=f"evaluation.tasks: .*{message}"):
        run("dense", replace(ASKED, tasks=["own_choice"]))


def test_a_token_of_a_task_beyond_the_embedding_is_named_before_a_weight_is_read(root, monkeypatch):
    forbid_weights(root)
    monkeypatch.setattr(setup, "require_embedded", lambda *_: None)  # of the corpus
    monkeypatch.setattr(setup, "embedding_rows", lambda base: 7)
    with pytest.raises(CheckpointError, match="evaluation.tasks: own_choice: found the token .* with id .*, wanted ids below 7"):
        run("dense", replace(ASKED, tasks=["own_choice"]))


def test_rows_longer_than_the_context_are_counted(root, monkeypatch, caplog):
    rows = [{"question": "river " * (600 if i == 1 else 3), "options": ["lamp", "stone"], "answer": 0} for i in range(3)]
    benchmarks.write_own(rows=rows)
    benchmarks.fetch(monkeypatch, "own_choice")
    run("dense", replace(ASKED, tasks=["own_choice"]))
    assert [row.get("cut") for row in Rows(root / "results/dense/details/samples-own_choice.jsonl")] == [None, True, None]
    protocol = read_json(root / "results/dense/details/protocol.json")["tasks"]["own_choice"]
    assert (protocol["cut"], protocol["context"], protocol["available"]) == (1, 512, 3)
    (message,) = [message for message in caplog.messages if "longer than the context" in message]
    assert (
        "own_choice (raw): 1 rows with their answers are longer than the context of 512 tokens and lose their beginning; the longest has "
        in message
    )


def test_a_single_row_has_no_standard_error(root, caplog):
    run("dense", replace(ASKED, tasks=["piqa", "own_choice"], rows=1))
    assert "evaluation.tasks: found 1 row of piqa: its scores have no standard error" in caplog.messages
    scores = read_json(root / "results/dense/metrics.json")["tasks"]["piqa"]
    assert set(scores) == {"acc", "acc_norm"}
    run("sparse", replace(ASKED, tasks=["piqa", "own_choice"], rows=1))


def test_a_task_that_was_not_fetched_is_named(root):
    with pytest.raises(
        TextError, match="artifacts/tasks: found gsm8k, mmlu, own_choice, wanted wikitext; run `python -m stages.fetch part=tasks`"
    ):
        run("dense", replace(ASKED, tasks=["wikitext"]))


def test_a_task_that_two_names_bring_is_refused(root):
    manifest = root / "artifacts/tasks/manifest.json"
    facts = read_json(manifest)
    facts["benchmarks"]["again"] = facts["benchmarks"]["gsm8k"]
    manifest.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="evaluation.tasks: .* wanted gsm8k once: another name brings it, too"):
        run("dense", replace(ASKED, tasks=["gsm8k", "again"]))


def test_more_examples_than_there_are_rows_for_them_are_refused(root):
    with pytest.raises(ConfigError, match="evaluation.tasks: gsm8k: found 8 rows for examples, wanted 9"):
        run("dense", replace(ASKED, tasks=["gsm8k"], few_shot=9))
    with pytest.raises(TextError, match=r"piqa.jsonl: found 5 examples after the rows that are scored \(evaluation.rows\), wanted 6"):
        run("dense", replace(ASKED, tasks=["piqa"], few_shot=6))


def test_a_prompt_that_leaves_no_room_for_the_answer_is_counted(root, monkeypatch, caplog):
    rows = [{"question": "river " * (300 if i == 1 else 3), "answer": "lamp"} for i in range(3)]
    benchmarks.write_own(benchmarks.GENERATED, rows)
    benchmarks.fetch(monkeypatch, "own_choice")
    run("dense", replace(ASKED, tasks=["own_choice"]))
    assert [row.get("cut") for row in Rows(root / "results/dense/details/samples-own_choice.jsonl")] == [None, True, None]
    assert any("the longest has 7" in message for message in caplog.messages)
    benchmarks.write_own(benchmarks.GENERATED.replace("400", "512"), rows)
    benchmarks.fetch(monkeypatch, "own_choice")
    with pytest.raises(ConfigError, match="own_choice generates 512 tokens, wanted fewer than the model's context of 512"):
        run("dense", replace(ASKED, tasks=["own_choice"]))


# The journal.


def test_what_was_scored_before_a_failure_is_not_scored_again(root, monkeypatch):
    asked = replace(ASKED, tasks=["piqa", "own_choice"], generations=Generations(new_tokens=3, prompts=["river stone"]))
    calls: list[str] = []
    observe, ask = running.observe, running.ask
    monkeypatch.setattr(running, "observe", lambda *a: calls.append("windows") or observe(*a))
    monkeypatch.setattr(running, "ask", lambda model, questions: calls.append(questions[0].name) or ask(model, questions))
    with monkeypatch.context() as patch:
        patch.setattr(running, "generate", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            run("dense", asked)
    assert calls == ["windows", "piqa", "own_choice"]
    assert (root / "artifacts/.evaluate-dense").is_dir()
    run("dense", asked)
    assert calls == ["windows", "piqa", "own_choice"]
    resumed = {path.name: path.read_text() for path in (root / "results/dense/details").iterdir()}
    assert not (root / "artifacts/.evaluate-dense").exists()
    run("dense", asked)
    assert len(calls) == 6
    assert {path.name: path.read_text() for path in (root / "results/dense/details").iterdir()} == resumed


@pytest.mark.parametrize(
    ("right", "several", "fine"),
    [
        (np.int32(1), False, True),  # as a function of lm-eval's toxigen returns it
        (True, False, True),
        (1.0, False, False),
        ([0, -1], True, True),  # padded
        ([-1, 9], True, False),
        ([0, "b"], True, False),
        (0, True, False),
        ([0], False, False),
    ],
)
def test_which_answers_are_numbers_of_choices(monkeypatch, right, several, fine):
    class Choosing:
        OUTPUT_TYPE, multiple_input, multiple_target = "multiple_choice", 0, int(several)
        config = SimpleNamespace(process_results=None)
        process_results = None

        def aggregation(self):
            return {"acc": None}

        def doc_iterator(self, limit):
            yield 0, {}

        def doc_to_target(self, row):
            return right

        def doc_to_choice(self, row):
            return ["a", "b"]

    monkeypatch.setattr(questions, "ConfigurableTask", Choosing)
    task = Choosing()
    if fine:
        questions.require_answers("own", task, None)
        return
    with pytest.raises(TextError, match="evaluation.tasks: own, row 1: found the answer .*, wanted"):
        questions.require_answers("own", task, None)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_cannot_be_scored_is_named_and_those_of_other_tasks_stay(root, monkeypatch, streamed):
    asked = replace(ASKED, tasks=["own_choice", "piqa"] if streamed else ["piqa", "own_choice"], streamed=streamed)
    process = ConfigurableTask.process_results

    def broken(task, document, results):
        if "options" in document:
            raise ZeroDivisionError("no words")
        return process(task, document, results)

    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "process_results", broken)
        patch.setattr(questions, "require_answers", lambda *_: None)
        with pytest.raises(TextError, match="evaluation.tasks: own_choice, row 1: lm-eval cannot score its answer .*no words"):
            run("dense", asked)
    calls: list[str] = []
    ask = running.ask
    monkeypatch.setattr(running, "ask", lambda model, left: calls.extend(each.name for each in left) or ask(model, left))
    run("dense", asked)
    assert calls == ["own_choice"]


def test_another_protocol_takes_nothing_over(root, monkeypatch):
    asked = replace(ASKED, tasks=["own_choice"])
    with monkeypatch.context() as patch:
        patch.setattr(running, "ask", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            run("dense", asked)
    calls: list[str] = []
    observe = running.observe
    monkeypatch.setattr(running, "observe", lambda *a: calls.append("windows") or observe(*a))
    run("dense", replace(asked, rows=2))
    assert calls == ["windows"]
