"""What was left out, in words."""

import pytest

from stages import limits

BOOLQ = {"rows": 20, "available": 3270, "parts": 1, "asked": 20}


def protocol(windows: int, available: int | None, evenly: bool | None) -> dict:
    evaluation = {} if evenly is None else {"corpora": {"news": {"evenly": evenly}}}
    return {"corpora": {"news": {"windows": windows, "available": available}}, "evaluation": evaluation}


@pytest.mark.parametrize(
    ("windows", "available", "evenly", "words"),
    [
        (18, 1301, False, "the first 18 of 1,301 windows"),
        (18, 1301, True, "18 of 1,301 windows, spread evenly"),
        (18, 1301, None, "18 of 1,301 windows"),
        (18, 18, False, "all 18 windows"),
        (18, None, False, ""),
    ],
)
def test_windows_are_said_with_those_that_there_are(windows, available, evenly, words):
    assert limits.windows_of(protocol(windows, available, evenly), "news") == words


@pytest.mark.parametrize(
    ("facts", "words", "short"),
    [
        (BOOLQ, "first 20 of 3,270 rows", "20 of 3270"),
        ({**BOOLQ, "rows": 3270}, "all 3,270 rows", "3270"),
        ({**BOOLQ, "rows": 1, "available": 1}, "its only row", "1"),
        ({"rows": 20}, "20 rows", "20"),
        ({**BOOLQ, "rows": 114, "parts": 57}, "114 of 3,270 rows, the first of each of its 57 tasks", "114 of 3270"),
    ],
)
def test_rows_are_said_with_those_that_there_are(facts, words, short):
    assert (limits.rows_of(facts), limits.short(facts)) == (words, short)


def test_several_tasks_are_said_in_one():
    rte = {**BOOLQ, "available": 277}
    assert limits.rows_of_each([BOOLQ, rte]) == "2 tasks, 20 rows each, the first of 277 to 3,270"
    assert limits.rows_of_each([BOOLQ]) == "1 task, 20 rows each, the first of 3,270"
    assert limits.rows_of_each([{"rows": 20}, {"rows": 30}]) == "2 tasks, 20 to 30 rows each"


def test_rows_may_be_left_out_where_their_number_is_not_known():
    assert [limits.may_be_limited(facts) for facts in (BOOLQ, {"rows": 20}, {**BOOLQ, "rows": 3270})] == [True, True, False]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({**BOOLQ, "cut": 0, "context": 2048}, []),
        (
            {**BOOLQ, "cut": 3, "context": 2048},
            ["3 of 20 rows of boolq are longer than the model's context of 2,048 tokens and were cut on the left."],
        ),
        ({"rows": 20, "cut": 1}, ["1 of 20 rows of boolq is longer than the model's context and was cut on the left."]),
        ({**BOOLQ, "rows": 15, "available": 15}, ["boolq has 15 rows, where 20 were asked for; all of them are scored."]),
        ({**BOOLQ, "rows": 15, "available": 15, "asked": None}, []),
    ],
)
def test_cut_rows_and_fewer_than_asked_for_are_said(facts, said):
    assert limits.remarks({"tasks": {"boolq": facts}}) == said
