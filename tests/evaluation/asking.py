"""Tasks asked of a model without the evaluate stage."""

from pathlib import Path

from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.evaluation.encoding import Encoder
from stages.evaluation.harness import answers, ask
from stages.evaluation.questions import Asking, Questions, embedded_source
from stages.evaluation.results import Samples
from stages.evaluation.tasks import TASKS
from stages.rows import Row
from tests import tiny


def asking(
    scratch: Path, *, tokenizer: PreTrainedTokenizerBase | None = None, bos: Bos = tiny.NO_BOS, embedding_rows: int | None = None
) -> Asking:
    return Asking(
        encoder=Encoder(tiny.tokenizer() if tokenizer is None else tokenizer, bos, 512),
        limit=None,
        examples=2,
        system_prompt="Be brief.",
        embedding_rows=embedding_rows,
        scratch=scratch,
    )


def questions(
    rows: dict[str, list[Row]],
    scratch: Path,
    *,
    examples: dict[str, list[Row]] | None = None,
    few_shot: int = 0,
    style: str = "raw",
    tokenizer: PreTrainedTokenizerBase | None = None,
    bos: Bos = tiny.NO_BOS,
    embedding_rows: int | None = None,
) -> list[Questions]:
    """The questions of this project's tasks on some rows."""
    shown = examples or {}
    asked = asking(scratch, tokenizer=tokenizer, bos=bos, embedding_rows=embedding_rows)
    return [
        asked.build(embedded_source(TASKS[name], of, shown.get(name, []), few_shot=few_shot, sha256="", scratch=scratch), style)
        for name, of in rows.items()
    ]


def samples(model: LM, rows: dict[str, list[Row]], scratch: Path, **options: object) -> Samples:
    """What a model answers."""
    asked = questions(rows, scratch, **options)
    ask(model, asked)
    return {each.name: answers(each).rows for each in asked}
