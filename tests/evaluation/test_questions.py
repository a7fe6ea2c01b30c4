"""The requests of tasks, built without a model."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from stages.errors import ConfigError, TextError
from stages.evaluation.questions import STOCK, Questions, Source, _replaced, metric_name, shared_texts
from tests import tiny
from tests.evaluation.asking import asking, questions
from tests.evaluation.rows import GOOD

SUBJECTS = ("anatomy", "high_school_physics")


def prompts(tasks) -> dict[str, list[tuple[str, str]]]:
    return {name: [instance.args for instance in task.instances] for name, task in tasks.items()}


def mmlu(split: str, count: int) -> list[dict]:
    return [
        {**GOOD["mmlu"], "subject": subject, "split": split, "question": f" {split} {subject} {i} "}
        for subject in SUBJECTS
        for i in range(count)
    ]


@pytest.mark.parametrize("few_shot", [0, 5])
def test_prompts_of_mmlu_are_those_of_lm_evals_own_tasks(tmp_path, few_shot):
    rows, shown = mmlu("test", 3), mmlu("dev", 5)
    (ours,) = questions({"mmlu": rows}, tmp_path, examples={"mmlu": shown if few_shot else []}, few_shot=few_shot)
    theirs = {}
    for subject in SUBJECTS:
        data = {
            split: str(tiny.write_lines(tmp_path / f"{subject}-{split}.jsonl", [row for row in of if row["subject"] == subject]))
            for split, of in (("test", rows), ("dev", shown))
        }
        config = load_yaml(STOCK / f"mmlu/default/mmlu_{subject}.yaml")
        config |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data, "cache_dir": str(tmp_path / subject)},
        }
        task = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
        task.set_config("num_fewshot", few_shot)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
        theirs[f"mmlu_{subject}"] = task
    assert prompts(ours.tasks) == prompts(theirs)
    first = prompts(ours.tasks)["mmlu_anatomy"][0][0]
    assert first.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert first.count("Answer:") == few_shot + 1
    assert ours.protocol().few_shot == few_shot


WRONG = {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
GPQA = [{"Question": f"which {number}", "Correct Answer": f"right {number}", **WRONG} for number in range(12)]


def gpqa(scratch: Path, style: str = "raw") -> Questions:
    """A task that shuffles the choices of its answers."""
    scratch.mkdir()
    rows = {"train": tiny.write_lines(scratch / "rows.jsonl", GPQA)}
    definition = _replaced(STOCK / "gpqa/zeroshot/gpqa_diamond_zeroshot.yaml", "json", rows, scratch)
    source = Source(
        name="gpqa",
        tasks={"gpqa": definition},
        documents={"gpqa": None},
        few_shot=None,
        metrics=None,
        aggregated={},
        is_group=False,
        sha256="",
        source="here",
    )
    return asking(scratch).build(source, style)


def test_a_task_that_shuffles_asks_the_same_in_every_process(tmp_path):
    asked = []
    for drawn in (1, 2):
        random.seed(drawn)
        asked.append(gpqa(tmp_path / str(drawn)))
    first, second = asked
    assert prompts(first.tasks) == prompts(second.tasks)
    assert first.protocol() == second.protocol()
    letters = {task.doc_to_target(instance.doc) for task in first.tasks.values() for instance in task.instances}
    assert len(letters) > 1  # it did shuffle


def test_other_requests_are_another_protocol(tmp_path):
    asked = gpqa(tmp_path / "asked")
    before = asked.protocol()
    asked.instances[0].doc["answer"] = "another"
    assert replace(asked).protocol() != before  # the hash is made once


def test_a_task_that_has_no_examples_is_refused_in_the_style_of_examples(tmp_path):
    with pytest.raises(ConfigError, match="found gpqa, whose definition says num_fewshot: 0, wanted tasks with examples"):
        gpqa(tmp_path / "asked", "few_shot")


def test_a_prompt_that_leaves_no_token_before_its_answer_is_refused(tmp_path):
    with pytest.raises(TextError, match="row 1: found a prompt without a token, wanted at least one to continue"):
        questions({"lambada": [{**GOOD["lambada"], "text": "  lamp"}]}, tmp_path)


def test_examples_come_before_the_question_in_the_order_of_their_rows(tmp_path):
    rows = [{**GOOD["piqa"], "goal": f"goal {i}"} for i in range(5)]
    (asked,) = questions({"piqa": rows[:2]}, tmp_path, examples={"piqa": rows[2:4]}, style="few_shot")
    context = asked.instances[0].args[0]
    assert [context.index(f"goal {i}") for i in (2, 3, 0)] == sorted(context.index(f"goal {i}") for i in (2, 3, 0))
    assert asked.protocol().few_shot == 2


def test_the_chat_style_renders_the_question_and_the_system_style_the_prompt_before_it(tmp_path):
    for style, begins in (("chat", "<|user|>\n"), ("system", "<|system|>\nBe brief.")):
        (tmp_path / style).mkdir()
        (asked,) = questions({"piqa": [GOOD["piqa"]]}, tmp_path / style, style=style)
        context, answer = asked.instances[0].args
        assert context.startswith(begins)
        assert context.endswith("<|assistant|>\n")
        assert answer == "lamp"


def test_the_metrics_of_our_tasks_are_those_of_their_table(tmp_path):
    names = ["piqa", "lambada"]
    asked = questions({name: [GOOD[name]] for name in names}, tmp_path)
    assert [each.protocol().metrics for each in asked] == [["acc", "acc_norm"], ["acc"]]


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        (
            [{"passage": "a" * 90, "q": "1"}, {"passage": "b" * 90, "q": "2"}, {"passage": "a" * 90, "q": "3"}],
            ["a" * 90, "b" * 90, "a" * 90],
        ),
        ([{"passage": "short", "article": "a" * 200}] * 2, ["a" * 200] * 2),
        ([{"context": "Answer briefly."}] * 3, [0, 1, 2]),  # an instruction
        ([{"passage": "a" * 200}, {"passage": None}], [0, 1]),
        ([{"question": "a" * 200}] * 2, [0, 1]),
        ([], []),
    ],
)
def test_rows_about_one_text_are_of_one_cluster(rows, shared):
    assert list(shared_texts(rows)) == shared


def test_a_score_is_named_with_its_filter():
    assert metric_name("acc", "none") == "acc"
    assert metric_name("exact_match", "strict-match") == "exact_match (strict-match)"


def test_a_stock_definition_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no task 'mmlu_guessing' in its folder mmlu/default"):
        questions({"mmlu": [{**GOOD["mmlu"], "subject": "guessing"}]}, tmp_path)
