"""What is said of the rows of a task before it is scored."""

import pytest

from stages.evaluation.protocol import TaskProtocol
from stages.evaluation.setup import warn_of_rows

FEWER = "evaluation.rows: found 15 rows of rte, wanted 20; all of them are scored"
SINGLE = "evaluation.tasks: found 1 row of rte: its scores have no standard error"


@pytest.mark.parametrize(
    ("rows", "asked", "messages"),
    [
        (20, 20, []),
        (15, 20, [FEWER]),
        (15, None, []),
        (1, 1, [SINGLE]),
        (1, 20, [FEWER.replace("15", "1"), SINGLE]),
    ],
)
def test_fewer_rows_than_asked_for_and_a_single_one_are_said(rows, asked, messages, caplog):
    warn_of_rows("rte", TaskProtocol(rows=rows, sha256="", few_shot=0, metrics=["acc"], asked=asked))
    assert caplog.messages == messages
