"""The section `evaluation`: the text that the dense and the pruned model are scored on, and how."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stages.bos import bos_field
from stages.devices import device_field, dtype_field
from stages.evaluation.tasks import TASKS
from stages.schema import number, require, require_one_of


@dataclass(kw_only=True, slots=True)
class Perplexity:
    """The windows of a corpus of text.evaluation.

    window_length: tokens per window. windows: number of windows; null: all windows of the corpus.
    evenly: whether these windows are spread evenly over the corpus, so that few of them see many documents; else they are the first.
    """

    corpus: str
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
    rows: number of rows of each task, from the first on; null: all.
    batch_size: sequences per forward pass of the tasks.
    streamed: whether one block is in memory at a time, for models larger than memory.
    """

    name: str
    device: str = device_field()
    dtype: str = dtype_field()
    bos: str = bos_field()
    perplexity: Perplexity
    tasks: list[str]
    rows: int | None = number(minimum=2, unit="rows, for a standard error")
    batch_size: int = number(minimum=1)
    streamed: bool
    generations: Generations

    def check(self, key: str) -> None:
        for task in self.tasks:
            require_one_of(f"{key}.tasks", task, TASKS)
        require(len(set(self.tasks)) == len(self.tasks), f"{key}.tasks", self.tasks, "each task once")
        prompts = self.generations.prompts
        wanted = f"none with {key}.streamed: text comes token by token, and every token would read the whole model"
        require(not (self.streamed and prompts), f"{key}.generations.prompts", prompts, wanted)


def check_text(evaluation: Evaluation, columns: Mapping[str, Collection[str] | None]) -> None:
    """Refuse a corpus or a task that is not fetched, or whose rows lack a column that is read, before anything is downloaded.

    Args:
        columns: corpus of text.evaluation -> columns that its reader returns; None if they depend on the file.

    Raises:
        ConfigError: names the key and the corpus or task.
    """
    fetched = list(columns) or ["(text.evaluation is empty)"]
    for task in evaluation.tasks:
        require_one_of("evaluation.tasks", task, fetched)
        reader_columns = columns[task]
        missing = [] if reader_columns is None else [column for column in TASKS[task].columns if column not in reader_columns]
        require(not missing, "evaluation.tasks", task, f"a task whose reader in text.evaluation gives {', '.join(missing)}")
    corpus = evaluation.perplexity.corpus
    require_one_of("evaluation.perplexity.corpus", corpus, fetched)
    reader_columns = columns[corpus]
    if reader_columns is None and corpus in TASKS:
        reader_columns = TASKS[corpus].columns
    has_text = reader_columns is None or "text" in reader_columns
    require(has_text, "evaluation.perplexity.corpus", corpus, f'a corpus of rows with "text", not with {", ".join(reader_columns or ())}')
