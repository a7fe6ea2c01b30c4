"""The section `evaluation`: the text that the dense and the pruned model are scored on, and how."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stages.bos import bos_field
from stages.devices import device_field, dtype_field
from stages.evaluation.metrics import METRICS
from stages.evaluation.styles import Style
from stages.evaluation.tasks import TASKS, is_embedded
from stages.files import is_plain_name
from stages.schema import choices, number, require, require_one_of, text


@dataclass(kw_only=True, slots=True)
class Windows:
    """The windows of a corpus of text.evaluation.

    window_length: tokens per window. windows: number of windows; null: all windows of the corpus.
    evenly: whether these windows are spread evenly over the corpus, so that few of them see many documents; else they are the first.
    """

    window_length: int = number(minimum=2, unit="tokens")
    windows: int | None = number(minimum=2, unit="windows, for a standard error")
    evenly: bool


@dataclass(kw_only=True, slots=True)
class Generations:
    """The prompts that both models continue greedily.

    new_tokens: upper bound of generated tokens per prompt.
    """

    new_tokens: int = number(minimum=1)
    prompts: list[str]


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """The settings of an evaluation.

    dtype: that of weights and arithmetic; auto: float32 on a CPU, the best half precision on a GPU.
    bos: whether every window, every row of a task and every prompt begins with the BOS token, see stages/bos.py.
    corpora: corpus of text.evaluation -> its windows. The first is the one by which tables and plots are ordered.
    metrics: what is measured on the windows, see stages/evaluation/metrics.
    tasks: those whose rows text.evaluation has, and any other that lm-eval knows, by its own name; see docs/extending.md.
    rows: number of rows of each task, and of each task of a group, from the first on; null: all.
    few_shot: examples in the prompt; null: none with rows of text.evaluation, else the task's own number.
    styles: forms in which the tasks are asked, see stages/evaluation/styles.py; raw is always one of them.
    examples: number of examples of the style few_shot. system_prompt: of the style system.
    batch_size: sequences per forward pass of the tasks.
    streamed: whether one block is in memory at a time, for models larger than memory.
    """

    name: str
    device: str = device_field()
    dtype: str = dtype_field()
    bos: str = bos_field()
    corpora: dict[str, Any] = choices(Windows)
    metrics: list[str]
    tasks: list[str]
    rows: int | None = number(minimum=1, unit="row")
    few_shot: int | None = number(minimum=0, unit="examples")
    styles: list[str]
    examples: int = number(minimum=1, unit="example")
    system_prompt: str = text("what the system says")
    batch_size: int = number(minimum=1)
    streamed: bool
    generations: Generations

    def check(self, key: str) -> None:
        require(bool(self.corpora), f"{key}.corpora", self.corpora, "at least one corpus")
        allowed: dict[str, Collection[str]] = {"metrics": METRICS, "styles": list(Style)}
        for name in ("tasks", "metrics", "styles"):
            chosen = getattr(self, name)
            for choice in chosen if name in allowed else []:
                require_one_of(f"{key}.{name}", choice, allowed[name])
            require(len(set(chosen)) == len(chosen), f"{key}.{name}", chosen, f"each of the {name} once")
        for task in self.tasks:
            require(is_plain_name(task), f"{key}.tasks", task, "the name of a task")
        require(Style.RAW in self.styles, f"{key}.styles", self.styles, "raw among them, with which the others are compared")
        wanted = "perplexity among them, by which models are compared"
        require("perplexity" in self.metrics, f"{key}.metrics", self.metrics, wanted)
        prompts = self.generations.prompts
        wanted = f"none with {key}.streamed: text comes token by token, and every token would read the whole model"
        require(not (self.streamed and prompts), f"{key}.generations.prompts", prompts, wanted)


@dataclass(kw_only=True, slots=True)
class Ruler:
    """The base quantised, as a ruler for what pruning does to it.

    types: of llama.cpp, see stages/evaluation/quantisation.py; none: nothing is scored.
    tasks: whether the quantised models answer the tasks, too; else they are scored on the corpora alone.
    """

    types: list[str]
    tasks: bool

    def check(self, key: str) -> None:
        require(len(set(self.types)) == len(self.types), f"{key}.types", self.types, "each type once")


def check_text(evaluation: Evaluation, columns: Mapping[str, Collection[str] | None]) -> None:
    """Refuse a corpus that is not fetched, or rows that lack a column that is read, before anything is downloaded.

    Args:
        columns: corpus of text.evaluation -> columns that its reader returns; None if they depend on the file.

    Raises:
        ConfigError: names the key and the corpus or task.
    """
    fetched = list(columns) or ["(text.evaluation is empty)"]
    for task in evaluation.tasks:
        if not is_embedded(task, columns):
            continue
        reader_columns = columns[task]
        missing = [] if reader_columns is None else [column for column in TASKS[task].columns if column not in reader_columns]
        require(not missing, "evaluation.tasks", task, f"a task whose reader in text.evaluation gives {', '.join(missing)}")
    for corpus in evaluation.corpora:
        require_one_of("evaluation.corpora", corpus, fetched)
        reader_columns = columns[corpus]
        if reader_columns is None and corpus in TASKS:
            reader_columns = TASKS[corpus].columns
        has_text = reader_columns is None or "text" in reader_columns or "messages" in reader_columns
        wanted = f'a corpus of rows with "text" or "messages", not with {", ".join(reader_columns or ())}'
        require(has_text, "evaluation.corpora", corpus, wanted)
