"""The tasks that need no hub: lm-eval's own definitions, and the rows of text.evaluation that they are scored on."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

from stages.errors import TextError
from stages.files import is_plain_name
from stages.rows import Row, Rows, require_columns, shown
from stages.schema import Citation, Entry, Table


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that lm-eval's definition of a task reads.

    accepts: whether a value can be read, given the value and its row. wanted: description of such values, for the error.
    """

    accepts: Callable[[Any, Row], bool]
    wanted: str


@dataclass(frozen=True, kw_only=True)
class Task(Entry):
    """A benchmark of questions; it has no parameters.

    name: our name, also that of its rows in text.evaluation.
    stock: its name in lm-eval. folder: the folder under lm_eval/tasks that defines it.
    split: the split that is scored. columns: the columns of every row, named as in the hub's data set.
    document: the column by whose value rows are clustered, for they ask about the same text; None: each row has a text of its own.
    subset: the column by whose value the rows are split over tasks of lm-eval, in whose names and in `stock` it stands for {}; or None.
    examples: the column and its value of rows that are not scored but serve as examples; None: examples are the rows after those scored.
    metrics: lm-eval's names of what is measured. The first is the one that is reported as accuracy: the fraction of rows whose likeliest
        choice is right, without length normalisation.
    """

    stock: str
    folder: str
    split: str
    columns: dict[str, Column]
    document: str | None = None
    subset: str | None = None
    examples: tuple[str, str] | None = None
    metrics: tuple[str, ...] = ("acc",)
    parameters: type = NoneType

    def documents(self, rows: list[Row]) -> list[Hashable]:
        """Of each row what it shares with others: the value of the document's column; without one, the row's own number."""
        return [number if self.document is None else row[self.document] for number, row in enumerate(rows)]

    def subsets(self, rows: list[Row]) -> dict[str, list[Row]]:
        """The rows by lm-eval's name of the task that they are of."""
        named: dict[str, list[Row]] = {}
        for row in rows:
            named.setdefault(self.stock.format(row[self.subset]) if self.subset else self.stock, []).append(row)
        return named

    def is_example(self, row: Row) -> bool:
        """Whether a row is not scored but serves as an example."""
        return self.examples is not None and row[self.examples[0]] == self.examples[1]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _choices(value: Any, row: Row) -> bool:
    lists = [value.get(key) for key in ("text", "label")] if isinstance(value, dict) else [None]
    return all(map(_strings, lists)) and len(lists[0] or []) == len(lists[1] or [])


TEXT = Column(accepts=lambda value, row: isinstance(value, str), wanted="a string")
GAP = Column(accepts=lambda value, row: isinstance(value, str) and "_" in value, wanted="a string with a gap, _")
BINARY = Column(accepts=lambda value, row: isinstance(value, int) and value in (0, 1), wanted="0 or 1")
NOUN = Column(accepts=lambda value, row: value in ("1", "2"), wanted='"1" or "2"')
ENDINGS = Column(accepts=lambda value, row: _strings(value), wanted="a list of strings")
ENDING = Column(
    accepts=lambda value, row: str(value).isdecimal() and int(value) < len(row["endings"]), wanted="the number of an ending, from 0"
)
CHOICES = Column(accepts=_choices, wanted='an object with "text" and "label", two lists of strings of one length')
FOUR = Column(accepts=lambda value, row: _strings(value) and len(value) == 4, wanted="a list of 4 strings")
LETTER = Column(accepts=lambda value, row: type(value) is int and 0 <= value < 4, wanted="the number of a choice, 0 to 3")
SUBJECT = Column(accepts=lambda value, row: isinstance(value, str) and is_plain_name(value), wanted="the name of a subject")
SPLIT = Column(accepts=lambda value, row: value in ("dev", "test"), wanted='"dev" or "test"')
KEY = Column(accepts=lambda value, row: value in row["choices"]["label"], wanted='a label of "choices"')


ARC = Citation(text="Clark et al. 2018", url="https://arxiv.org/abs/1803.05457")

TASKS = Table(
    [
        Task(
            name="boolq",
            stock="boolq",
            folder="super_glue/boolq",
            split="validation",
            columns={"passage": TEXT, "question": TEXT, "label": BINARY},
            document="passage",
            summary="yes-no questions on a passage",
            citation=Citation(text="Clark et al. 2019", url="https://arxiv.org/abs/1905.10044"),
        ),
        Task(
            name="rte",
            stock="rte",
            folder="glue/rte",
            split="validation",
            columns={"sentence1": TEXT, "sentence2": TEXT, "label": BINARY},
            document="sentence1",
            summary="whether one sentence entails another",
            citation=Citation(text="Wang et al. 2019", url="https://arxiv.org/abs/1804.07461"),
        ),
        Task(
            name="hellaswag",
            stock="hellaswag",
            folder="hellaswag",
            split="validation",
            columns={"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": ENDINGS, "label": ENDING},
            metrics=("acc", "acc_norm"),
            summary="the ending of an everyday scene, of four",
            citation=Citation(text="Zellers et al. 2019", url="https://arxiv.org/abs/1905.07830"),
        ),
        Task(
            name="winogrande",
            stock="winogrande",
            folder="winogrande",
            split="validation",
            columns={"sentence": GAP, "option1": TEXT, "option2": TEXT, "answer": NOUN},
            summary="which of two nouns a gap stands for",
            citation=Citation(text="Sakaguchi et al. 2020", url="https://arxiv.org/abs/1907.10641"),
        ),
        Task(
            name="arc_easy",
            stock="arc_easy",
            folder="arc",
            split="test",
            columns={"question": TEXT, "choices": CHOICES, "answerKey": KEY},
            metrics=("acc", "acc_norm"),
            summary="science questions of school exams, the easy ones",
            citation=ARC,
        ),
        Task(
            name="arc_challenge",
            stock="arc_challenge",
            folder="arc",
            split="test",
            columns={"question": TEXT, "choices": CHOICES, "answerKey": KEY},
            metrics=("acc", "acc_norm"),
            summary="science questions of school exams, the hard ones",
            citation=ARC,
        ),
        Task(
            name="openbookqa",
            stock="openbookqa",
            folder="openbookqa",
            split="test",
            columns={"question_stem": TEXT, "choices": CHOICES, "answerKey": KEY},
            metrics=("acc", "acc_norm"),
            summary="questions on elementary science",
            citation=Citation(text="Mihaylov et al. 2018", url="https://arxiv.org/abs/1809.02789"),
        ),
        Task(
            name="lambada",
            stock="lambada_openai",
            folder="lambada",
            split="test",
            columns={"text": TEXT},
            summary="the last word of a passage",
            citation=Citation(text="Paperno et al. 2016", url="https://arxiv.org/abs/1606.06031"),
        ),
        Task(
            name="piqa",
            stock="piqa",
            folder="piqa",
            split="validation",
            columns={"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": BINARY},
            metrics=("acc", "acc_norm"),
            summary="which of two ways reaches an everyday goal",
            citation=Citation(text="Bisk et al. 2020", url="https://arxiv.org/abs/1911.11641"),
        ),
        Task(
            name="mmlu",
            stock="mmlu_{}",
            folder="mmlu/default",
            split="test",
            columns={"question": TEXT, "subject": SUBJECT, "choices": FOUR, "answer": LETTER, "split": SPLIT},
            subset="subject",
            examples=("split", "dev"),
            summary="questions of exams in 57 subjects",
            citation=Citation(text="Hendrycks et al. 2021", url="https://arxiv.org/abs/2009.03300"),
        ),
    ]
)


def is_embedded(name: str, texts: Collection[str]) -> bool:
    """Whether a task is one of these tasks with its rows in text.evaluation, `texts`; else it is lm-eval's by that name."""
    return name in TASKS and name in texts


def read_task(task: Task, path: Path, limit: int | None) -> list[Row]:
    """Read the rows that a task is scored on, with the columns that it reads.

    Args:
        path: JSON Lines. limit: number of rows, of each subset if there are any, from the first on; None for all.

    Raises:
        TextError: a row lacks a column or has a wrong value in it; names file and line. Or none is scored.
    """
    rows = Rows(path)
    read: list[Row] = []
    counts: Counter[str] = Counter()
    for index, row in enumerate(rows if task.subset else islice(rows, limit)):
        checked = _checked(task, row, rows.location(index))
        subset = str(row[task.subset]) if task.subset else ""
        if not task.is_example(checked) and (limit is None or counts[subset] < limit):
            read.append(checked)
            counts[subset] += 1
    if not read:
        raise TextError(f"{path}: found no row that is scored, wanted at least one")
    return read


def count_rows(task: Task, path: Path) -> int:
    """The number of rows of a file that can be scored: all but those that serve as examples. Rows that are not scored are not checked."""
    rows = Rows(path)
    return len(rows) if task.examples is None else sum(not task.is_example(row) for row in rows)


def read_examples(task: Task, path: Path, after: int | None, count: int) -> list[Row]:
    """Read the rows that serve as examples: those that the data set keeps for it, `count` of each subset, or the rows after those scored.

    Args:
        after: number of rows that are scored; None: all of them. count: examples in a prompt.

    Raises:
        TextError: there are too few; names the file. Or see read_task.
    """
    rows = Rows(path)
    checked = [_checked(task, row, rows.location(index)) for index, row in enumerate(rows)]
    if task.examples is not None:
        found = [row for row in checked if task.is_example(row)]
        counts = {name: len(members) for name, members in task.subsets(found).items()}
        names = task.subsets([row for row in checked if not task.is_example(row)])
        fewest = min(counts.get(name, 0) for name in names)
        kept = [row for members in task.subsets(found).values() for row in members[:count]]
    else:
        kept = checked[after : after + count] if after is not None else []
        fewest = len(kept)
    if fewest < count:
        where = "for each subset" if task.examples else "after the rows that are scored (evaluation.rows)"
        raise TextError(f"{path}: found {fewest} examples {where}, wanted {count}")
    return kept


def _checked(task: Task, row: Row, location: str) -> Row:
    """The columns of a row that the task reads."""
    require_columns(row, task.columns, location)
    for name, column in task.columns.items():
        if not column.accepts(row[name], row):
            raise TextError(f'{location}, "{name}": found {shown(row[name])}, wanted {column.wanted}')
    return {name: row[name] for name in task.columns}
