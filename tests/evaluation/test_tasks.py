import pytest

from stages.errors import TextError
from stages.evaluation.tasks import TASKS, count_rows, read_examples, read_task
from tests import tiny
from tests.evaluation.rows import GOOD


def test_every_task_says_where_it_was_published():
    for task in TASKS.values():
        assert task.citation is not None
        assert task.citation.url in task.reference


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_read_with_the_columns_of_the_task(tmp_path, name):
    path = tiny.write_lines(tmp_path / "a.jsonl", [{**GOOD[name], "extra": 1}] * 5)
    assert read_task(TASKS[name], path, 3) == [GOOD[name]] * 3
    assert len(read_task(TASKS[name], path, None)) == 5
    assert set(GOOD[name]) == set(TASKS[name].columns)


def test_one_row_is_enough_and_none_is_not(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD["piqa"]])
    assert read_task(TASKS["piqa"], path, None) == [GOOD["piqa"]]
    path = tiny.write_lines(tmp_path / "a.jsonl", [{**GOOD["mmlu"], "split": "dev"}])
    with pytest.raises(TextError, match=r"a\.jsonl: found no row that is scored, wanted at least one"):
        read_task(TASKS["mmlu"], path, None)


def test_rows_of_a_task_with_subjects_are_limited_by_subject_and_examples_are_not_scored(tmp_path):
    rows = [
        {**GOOD["mmlu"], "subject": subject, "split": split, "question": f"{subject} {split} {i}"}
        for subject in ("anatomy", "virology")
        for split in ("dev", "test")
        for i in range(3)
    ]
    path = tiny.write_lines(tmp_path / "a.jsonl", rows)
    task = TASKS["mmlu"]
    scored = read_task(task, path, 2)
    assert [row["question"] for row in scored] == ["anatomy test 0", "anatomy test 1", "virology test 0", "virology test 1"]
    assert {name: len(members) for name, members in task.subsets(scored).items()} == {"mmlu_anatomy": 2, "mmlu_virology": 2}
    shown = read_examples(task, path, 2, 2)
    assert [row["question"] for row in shown] == ["anatomy dev 0", "anatomy dev 1", "virology dev 0", "virology dev 1"]
    with pytest.raises(TextError, match=r"a\.jsonl: found 3 examples for each subset, wanted 4"):
        read_examples(task, path, None, 4)


def test_examples_are_the_rows_after_those_that_are_scored(tmp_path):
    rows = [{**GOOD["piqa"], "goal": str(i)} for i in range(5)]
    path = tiny.write_lines(tmp_path / "a.jsonl", rows)
    assert read_examples(TASKS["piqa"], path, 2, 3) == rows[2:]
    for after, found in ((3, 2), (None, 0)):
        with pytest.raises(TextError, match=rf"a\.jsonl: found {found} examples after the rows that are scored"):
            read_examples(TASKS["piqa"], path, after, 3)


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_column_is_named(tmp_path, name):
    for column in TASKS[name].columns:
        bad = {key: value for key, value in GOOD[name].items() if key != column}
        path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD[name], bad])
        with pytest.raises(TextError, match=rf'a\.jsonl, line 2: found .*, wanted "{column}"'):
            read_task(TASKS[name], path, None)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("value", [None, 7.5, [], {}])
def test_a_column_that_holds_something_else_is_named(tmp_path, name, value):
    for column in TASKS[name].columns:
        path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD[name], {**GOOD[name], column: value}])
        with pytest.raises(TextError, match=rf'a\.jsonl, line 2, "{column}": found .*, wanted'):
            read_task(TASKS[name], path, None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("boolq", {"label": 2}, '"label": found 2, wanted 0 or 1'),
        ("boolq", {"label": "yes"}, '"label": found "yes", wanted 0 or 1'),
        ("boolq", {"label": 1.0}, '"label": found 1.0, wanted 0 or 1'),
        ("piqa", {"label": -1}, '"label": found -1, wanted 0 or 1'),
        ("hellaswag", {"label": ""}, '"label": found "", wanted the number of an ending, from 0'),
        ("hellaswag", {"label": "2"}, '"label": found "2", wanted the number of an ending, from 0'),
        ("winogrande", {"answer": "3"}, '"answer": found "3", wanted "1" or "2"'),
        ("winogrande", {"sentence": "no gap"}, '"sentence": found "no gap", wanted a string with a gap, _'),
        ("arc_easy", {"answerKey": "E"}, '"answerKey": found "E", wanted a label of "choices"'),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, '"choices": found .*, wanted an object with "text" and "label"'),
        ("openbookqa", {"choices": {"text": [], "label": []}}, '"choices": found .*, wanted an object with "text" and "label"'),
    ],
)
def test_an_answer_that_is_no_choice_is_named(tmp_path, name, changes, message):
    path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD[name], {**GOOD[name], **changes}])
    with pytest.raises(TextError, match=rf"a\.jsonl, line 2, {message}"):
        read_task(TASKS[name], path, None)


def test_rows_that_can_be_scored_are_counted_without_examples(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD["piqa"]] * 3)
    assert count_rows(TASKS["piqa"], path) == 3
    path = tiny.write_lines(tmp_path / "b.jsonl", [GOOD["mmlu"], {**GOOD["mmlu"], "split": "dev"}])
    assert count_rows(TASKS["mmlu"], path) == 1


def test_rows_beyond_the_limit_are_not_read(tmp_path):
    path = tiny.write_lines(tmp_path / "a.jsonl", [GOOD["piqa"]] * 2 + [{}])
    assert len(read_task(TASKS["piqa"], path, 2)) == 2
