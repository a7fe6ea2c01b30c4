"""Tasks as lm-eval's, with all requests that they make of a model, built and checked before any weight is read.

A task is a small YAML that includes lm-eval's own definition and replaces its data source.
"""

import hashlib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy
import torch
import yaml
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from stages.checkpoint.tokens import require_embedded
from stages.errors import ConfigError, TextError
from stages.evaluation.encoding import Encoder, new_tokens
from stages.evaluation.manifest import Benchmark
from stages.evaluation.measurement import Better
from stages.evaluation.protocol import EMBEDDED, TaskProtocol
from stages.evaluation.styles import RENDERED, Style, template
from stages.evaluation.tasks import Task
from stages.files import BENCHMARKS, write_lines
from stages.rows import Row

log = logging.getLogger(__name__)

KEY = "evaluation.tasks"
STOCK = Path(lm_eval.tasks.__file__).parent
GENERATES = "generate_until"  # lm-eval's output type of tasks whose answers are generated
CHOOSES = "multiple_choice"  # and of those that choose one of several
SHARED_COLUMNS = ("passage", "context", "article", "story", "paragraph", "document")
LONG = 80  # characters: shorter texts, such as an instruction that all rows repeat, are not what a question is about
EXAMPLES = "examples"  # name of their split
BROKEN = (TemplateError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, SyntaxError, TypeError, ValueError)

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about the defaults that we override


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is asked under one name.

    tasks: lm-eval's name of each task -> its YAML, as plain data.
    documents: of the rows of each what they share with others; None: the text of one of SHARED_COLUMNS, if they have such a column.
    few_shot: examples in the prompt; None: the task's own number.
    metrics: lm-eval's names of those that are reported, in order; None: all of the task.
    available: number of rows that there are to score; None: those of the tasks' split.
    aggregated: see manifest.Benchmark. is_group: whether rows say which task they are of. sha256: of the rows. source: where they are from.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    documents: Mapping[str, Sequence[Hashable] | None]
    few_shot: int | None
    metrics: tuple[str, ...] | None
    aggregated: dict[str, bool]
    is_group: bool
    sha256: str
    source: str
    available: int | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A task or a group in one style, with its requests.

    tasks: lm-eval's, each with its instances. available: number of rows that there are to score. context: of the model [tokens].
    cut: task -> numbers of the rows that are longer than the context.
    """

    source: Source
    style: str
    limit: int | None
    tasks: dict[str, ConfigurableTask]
    available: int
    context: int
    cut: dict[str, set[int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def generates(self) -> bool:
        """Whether answers are generated."""
        return any(task.OUTPUT_TYPE == GENERATES for task in self.tasks.values())

    @property
    def instances(self) -> list[Instance]:
        return [instance for task in self.tasks.values() for instance in task.instances]

    @cached_property
    def requests_sha256(self) -> str:
        """Hash of all that is asked, in order, and of the answers that are right: what some tasks draw at random is in no file."""
        facts = [
            [name, instance.doc_id, instance.idx, instance.request_type, instance.args, task.doc_to_target(instance.doc)]
            for name, task in self.tasks.items()
            for instance in task.instances
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def shared(self, task: str) -> Sequence[Hashable]:
        """What each question of a task shares with others, such as the passage that it is about; its number where it shares nothing."""
        stated = self.source.documents[task]
        return shared_texts([row for _, row in self.documents(task)]) if stated is None else stated

    def documents(self, task: str) -> list[tuple[int, Any]]:
        """Number and row of each question of a task."""
        return list(self.tasks[task].doc_iterator(limit=self.limit))

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """lm-eval's metric and filter of every score of all tasks: those by which a group is aggregated first."""
        shared = [key for key in _metrics(next(iter(self.tasks.values()))) if all(key in _metrics(task) for task in self.tasks.values())]
        reported = self.source.metrics
        if reported is not None:
            return sorted((key for key in shared if key[0] in reported), key=lambda key: reported.index(key[0]))
        return sorted(shared, key=lambda key: key[0] not in self.source.aggregated)

    def protocol(self) -> TaskProtocol:
        """How it is scored."""
        tasks = list(self.tasks.values())
        shots = {name: int(task.get_config("num_fewshot") or 0) for name, task in self.tasks.items()}
        better = {metric_name(*key): _better(tasks[0], key[0]) for key in self.metrics}
        return TaskProtocol(
            rows=sum(len({instance.doc_id for instance in task.instances}) for task in tasks),
            sha256=self.source.sha256,
            few_shot=shots if len(set(shots.values())) > 1 else next(iter(shots.values())),
            metrics=[metric_name(*key) for key in self.metrics if is_mean(tasks, key[0])],
            source=self.source.source,
            better=better,
            macro=[metric_name(*key) for key in self.metrics if not self.source.aggregated.get(key[0], True)],
            cut=sum(map(len, self.cut.values())),
            available=self.available,
            asked=None if self.limit is None else self.limit * len(tasks),
            parts=len(tasks),
            context=self.context,
            requests_sha256=self.requests_sha256,
        )


def seed_as_lm_eval() -> None:
    """Start all generators that tasks draw from as lm-eval does: some shuffle the choices of answers, or sample answers."""
    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
    torch.manual_seed(DEFAULT_OTHER_SEED)


def shared_texts(rows: Sequence[Mapping[str, Any]]) -> Sequence[Hashable]:
    """The texts that rows are about, by which errors are clustered: of the first of SHARED_COLUMNS that holds long texts in every row."""
    for column in SHARED_COLUMNS:
        texts = [row.get(column) for row in rows]
        if rows and all(isinstance(text, str) for text in texts) and sum(map(len, map(str, texts))) >= LONG * len(rows):
            return texts
    return range(len(rows))


def metric_name(metric: str, filtered_by: str) -> str:
    """Our name of a score, such as "exact_match (strict-match)"."""
    return metric if filtered_by == "none" else f"{metric} ({filtered_by})"


def is_mean(tasks: Sequence[ConfigurableTask], metric: str) -> bool:
    """Whether lm-eval's value of a metric is the mean of its rows' values."""
    return all(task.aggregation().get(metric) is mean for task in tasks)


def _metrics(task: ConfigurableTask) -> list[tuple[str, str]]:
    return [(metric, each.name) for each in task._filters for metric in task.aggregation() if metric != "bypass"]


def _better(task: ConfigurableTask, metric: str) -> str | None:
    return {True: Better.HIGHER.value, False: Better.LOWER.value}.get(task.higher_is_better().get(metric))


def embedded_source(
    task: Task, rows: list[Row], examples: list[Row], *, few_shot: int, sha256: str, scratch: Path, available: int | None = None
) -> Source:
    """A task of this project on rows of text.evaluation.

    Args:
        examples: rows that serve as examples, in order. few_shot: examples in the prompt. scratch: a directory for the rows.
        available: number of rows that there are to score; None: `rows` are all.

    Raises:
        ConfigError: this version of lm-eval has no such task.
    """
    tasks, documents = {}, {}
    subsets, of_examples = task.subsets(rows), task.subsets(examples)
    for stock, members in subsets.items():
        shown = of_examples.get(stock, [])
        files = {task.split: scratch / f"{stock}.jsonl"} | ({EXAMPLES: scratch / f"{stock}-examples.jsonl"} if shown else {})
        for split, path in files.items():
            write_lines(path, members if split == task.split else shown)
        definition = _replaced(stock_definition(task, stock), "json", files, scratch)
        definition |= {f"{kind}_split": None for kind in ("training", "validation", "test", "fewshot")} | {
            f"{task.split}_split": task.split
        }
        tasks[stock] = definition | ({"fewshot_split": EXAMPLES, "fewshot_config": {"sampler": "first_n"}} if shown else {})
        documents[stock] = task.documents(members)
    return Source(
        name=task.name,
        tasks=tasks,
        documents=documents,
        few_shot=few_shot,
        metrics=task.metrics,
        aggregated=dict.fromkeys(task.metrics, True) if task.subset else {},
        is_group=task.subset is not None,
        sha256=sha256,
        source=EMBEDDED,
        available=available,
    )


def fetched_source(benchmark: Benchmark, few_shot: int | None, sha256: str, scratch: Path) -> Source:
    """A task or a group that the fetch stage wrote; see embedded_source."""
    tasks = {}
    for subtask in benchmark.subtasks:
        path = (BENCHMARKS if subtask.own else STOCK) / subtask.definition
        files = {split: BENCHMARKS / data.file for split, data in subtask.data.items()}
        tasks[subtask.name] = {**subtask.overrides, **_replaced(path, "parquet", files, scratch)}
    return Source(
        name=benchmark.name,
        tasks=tasks,
        documents=dict.fromkeys(tasks),
        few_shot=few_shot,
        metrics=None,
        aggregated=benchmark.aggregated,
        is_group=benchmark.is_group,
        sha256=sha256,
        source=f"lm-eval {version('lm-eval')}",
    )


def _replaced(definition: Path, builder: str, files: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """The YAML that includes a definition and reads these files."""
    return {
        "include": str(definition.absolute()),
        "tag": None,
        "dataset_path": builder,
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path.absolute()) for split, path in files.items()},
            "cache_dir": str(scratch.absolute() / "cache"),
        },
    }


def stock_definition(task: Task, stock: str) -> Path:
    """Find lm-eval's own YAML of a task without reading its other tasks.

    Raises:
        ConfigError: this version of lm-eval has no such task.
    """
    entry = TaskManager(include_defaults=False, include_path=str(STOCK / task.folder)).task_index.get(stock)
    if entry is None or entry.yaml_path is None:
        raise ConfigError(f"{KEY}: lm-eval {version('lm-eval')} has no task {stock!r} in its folder {task.folder}")
    return Path(entry.yaml_path)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked.

    encoder: of the base's tokenizer. rows: see evaluation.rows. examples: those of the style few_shot. embedding_rows: see
    tokens.embedding_rows.
    """

    encoder: Encoder
    limit: int | None
    examples: int
    system_prompt: str
    embedding_rows: int | None
    scratch: Path

    def build(self, source: Source, style: str) -> Questions:
        """Make all requests of a task in a style, and check their tokens; the same in every process, whatever it asked before.

        Raises:
            ConfigError: a task asks for what cannot be done here; or its definition cannot be read.
            TextError: a row cannot be asked; names task and row. CheckpointError: a token is beyond the base's embedding.
        """
        seed_as_lm_eval()
        tasks = self._load(source, style)
        available = sum(len(task.eval_docs) for task in tasks.values()) if source.available is None else source.available
        context = self.encoder.max_length
        questions = Questions(source=source, style=style, limit=self.limit, tasks=tasks, available=available, context=context)
        for name, task in tasks.items():
            self._require_possible(name, task)
            self._require_examples(name, task, style)
            self._make_requests(name, task, style)
            require_answers(name, task, self.limit)
            longest = self._checked(name, task, questions.cut.setdefault(name, set()))
            if questions.cut[name]:
                facts = (KEY, name, style, len(questions.cut[name]), self.encoder.max_length, longest)
                words = "%s: %s (%s): %d rows with their answers are longer than the context of %d tokens and lose their beginning"
                log.warning(words + "; the longest has %d", *facts)
        return questions

    def _load(self, source: Source, style: str) -> dict[str, ConfigurableTask]:
        """lm-eval's tasks, by its names."""
        directory = self.scratch / f"{style}-{source.name}"
        directory.mkdir()
        ours = {name: f"sparsesweep_{number}" for number, name in enumerate(source.tasks)}
        for name, definition in source.tasks.items():
            text = yaml.safe_dump({**definition, "task": ours[name]}, sort_keys=False)
            (directory / f"{ours[name]}.yaml").write_text(text, encoding="utf8")
        manager = TaskManager(include_defaults=False, include_path=str(directory))
        loaded = {}
        for name, our_name in ours.items():
            try:
                loaded[name] = manager.load([our_name])["tasks"][our_name]
            except BROKEN as error:
                raise ConfigError(f"{KEY}: {name}: lm-eval cannot read its definition, or its first row ({words_of(error)})") from error
        for task in loaded.values():
            asked = self.examples if style == Style.FEW_SHOT else source.few_shot
            if asked is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", asked)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return loaded

    def _require_possible(self, name: str, task: ConfigurableTask) -> None:
        if task.OUTPUT_TYPE == GENERATES and (bound := new_tokens(task.config.generation_kwargs)) >= self.encoder.max_length:
            raise ConfigError(f"{KEY}: {name} generates {bound} tokens, wanted fewer than the model's context of {self.encoder.max_length}")

    def _require_examples(self, name: str, task: ConfigurableTask, style: str) -> None:
        if style == Style.FEW_SHOT and not task.get_config("num_fewshot"):
            words = f"wanted tasks with examples in the style {style}; leave out the task or the style"
            raise ConfigError(f"{KEY}: found {name}, whose definition says num_fewshot: 0, {words}")
        wanted, found = int(task.get_config("num_fewshot")), len(task.sampler.df) if hasattr(task, "sampler") else 0
        if wanted > found:
            raise ConfigError(f"{KEY}: {name}: found {found} rows for examples, wanted {wanted}")

    def _make_requests(self, name: str, task: ConfigurableTask, style: str) -> None:
        try:
            task.build_all_requests(limit=self.limit, **self._options(style))
        except (TextError, *BROKEN) as error:
            number, reason = self._first_broken(task, style) or ("?", error)
            why = str(reason) if isinstance(reason, TextError) else f"lm-eval cannot ask it ({words_of(reason)})"
            raise TextError(f"{KEY}: {name}, row {number}: {why}") from error

    def _options(self, style: str) -> dict[str, Any]:
        """Arguments of build_all_requests."""
        if style not in RENDERED:
            return {}
        return {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": template(self.encoder.tokenizer),
            "system_instruction": self.system_prompt if style == Style.SYSTEM else None,
        }

    def _first_broken(self, task: ConfigurableTask, style: str) -> tuple[int, Exception] | None:
        for number, _ in enumerate(task.doc_iterator(limit=self.limit)):
            try:
                task.build_all_requests(samples=[number], **self._options(style))
            except (TextError, *BROKEN) as error:
                return number + 1, error
        return None

    def _checked(self, name: str, task: ConfigurableTask, cut: set[int]) -> int:
        """Check all tokens, add the numbers of the rows that do not fit into the context to `cut`, and return the longest row's tokens."""
        longest, highest = 0, 0
        try:
            encoded = self.encoder.encoded(task.instances)
        except BROKEN as error:
            raise TextError(f"{KEY}: {name}: a request cannot be made tokens ({words_of(error)})") from error
        for instance, (context, scored, limit) in zip(task.instances, encoded, strict=True):
            where = f"{KEY}: {name}, row {instance.doc_id + 1}"
            if instance.request_type == "loglikelihood" and not scored:
                raise TextError(f"{where}: found an answer without a token, wanted at least one to score")
            if instance.request_type == "loglikelihood" and len(scored) > self.encoder.max_length:
                raise TextError(
                    f"{where}: found an answer of {len(scored)} tokens, wanted at most the context of {self.encoder.max_length}"
                )
            if not (context or (scored and instance.request_type == "loglikelihood_rolling")):
                raise TextError(f"{where}: found a prompt without a token, wanted at least one to continue")
            generated = 0 if limit is None else max(0, self.encoder.max_length - limit)
            highest, longest = max(highest, *context, *scored), max(longest, len(context) + len(scored) + generated)
            if limit is not None and len(context) + len(scored) > limit:
                cut.add(instance.doc_id)
        require_embedded([highest], self.embedding_rows, self.encoder.tokenizer, f"{KEY}: {name}")
        return longest


def require_answers(name: str, task: ConfigurableTask, limit: int | None) -> None:
    """Refuse rows whose right answer is none that a model can give, which lm-eval scores as wrong, whatever is answered, or breaks at.

    What a task's own function makes of a row is its own affair.

    Raises:
        TextError: names task and row.
    """
    own = callable(task.config.process_results) or type(task).process_results is not ConfigurableTask.process_results
    if own or "bypass" in task.aggregation():
        return
    for index, row in task.doc_iterator(limit=limit):
        where = f"{KEY}: {name}, row {index + 1}"
        try:
            found, wanted = _wrong_answer(task, row)
        except BROKEN as error:
            raise TextError(f"{where}: lm-eval cannot read its answer ({words_of(error)})") from error
        if wanted:
            raise TextError(f"{where}: found the answer {found}, wanted {wanted}")


def _wrong_answer(task: ConfigurableTask, row: Mapping[str, Any]) -> tuple[str, str]:
    """The right answer of a row and what it should be; the latter is empty where the answer can be given."""
    chooses = task.OUTPUT_TYPE == CHOOSES
    right = task.doc_to_text(row) if chooses and task.multiple_input else task.doc_to_target(row)
    if chooses or (task.OUTPUT_TYPE == GENERATES and task.config.doc_to_choice is not None):
        choices = list(task.doc_to_choice(row))
        several = chooses and bool(task.multiple_target)
        by_text = chooses and not several
        answers = right if isinstance(right, list) else [right]
        known = all(_is_number(each) or (by_text and isinstance(each, str)) for each in answers)
        fine = known and several == isinstance(right, list) and any(_is_choice(each, choices, by_text=by_text) for each in answers)
        wanted = f"{'a list of numbers' if several else 'the number'} of {len(choices)} choices, from 0{', or the text of one' * by_text}"
        return repr(right), "" if fine else wanted
    if right is None or right == [] or (isinstance(right, list) and None in right) or _prints_null(task, row, right):
        return "null", "a text"
    return repr(right), ""


def _is_choice(answer: Any, choices: list[Any], *, by_text: bool) -> bool:
    return answer in choices if isinstance(answer, str) and by_text else _is_number(answer) and 0 <= answer < len(choices)


def _is_number(answer: Any) -> bool:
    """Whether it can be that of a choice: also numpy's."""
    return hasattr(answer, "__index__")


def _prints_null(task: ConfigurableTask, row: Mapping[str, Any], right: Any) -> bool:
    """Whether the word "None" in an answer is a column of the row that holds nothing."""
    if not isinstance(right, str) or "None" not in right or None not in row.values():
        return False
    try:
        without = str(task.doc_to_target({key: "" if value is None else value for key, value in row.items()}))
    except BROKEN:  # of a definition that knows null, and no empty text
        return False
    return right.count("None") > without.count("None")


def words_of(error: Exception) -> str:
    """An exception of lm-eval or of a task's definition in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def grouped(instances: Sequence[Instance]) -> dict[int, list[Instance]]:
    """The requests of each row, in order."""
    rows: dict[int, list[Instance]] = defaultdict(list)
    for instance in sorted(instances, key=lambda each: each.idx):
        rows[instance.doc_id].append(instance)
    return rows


def all_requests(questions: Sequence[Questions]) -> Iterator[tuple[str, list[Instance]]]:
    """All requests by lm-eval's kind of them, each as often as its task repeats it."""
    kinds: dict[str, list[Instance]] = defaultdict(list)
    for instance in (instance for each in questions for instance in each.instances):
        kinds[instance.request_type] += [instance] * instance.repeats
    yield from kinds.items()
