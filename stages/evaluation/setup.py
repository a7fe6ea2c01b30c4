"""What the evaluations of the dense, the pruned and the quantised model share: text, windows, questions, protocol. No weight is read."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from stages import devices, record
from stages.bos import Bos, decide
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.checkpoint.tokens import embedding_rows, load_tokenizer, require_embedded
from stages.errors import TextError
from stages.evaluation.documents import read_corpus
from stages.evaluation.encoding import Encoder
from stages.evaluation.generation import require_prompts
from stages.evaluation.journal import Journal
from stages.evaluation.manifest import read_manifest
from stages.evaluation.metric import Corpus
from stages.evaluation.protocol import CorpusProtocol, Protocol, TaskProtocol, versions
from stages.evaluation.questions import KEY, Asking, Questions, Source, embedded_source, fetched_source
from stages.evaluation.section import Evaluation
from stages.evaluation.styles import RENDERED, Style, StyleProtocol, refusal
from stages.evaluation.tasks import TASKS, count_rows, read_examples, read_task
from stages.files import BASE, BENCHMARKS, TEXT, sha256
from stages.schema import require

log = logging.getLogger(__name__)
STAGES = ("evaluate.py", "evaluate_quantised.py", "evaluate_float8.py")
CODE = ("checkpoint", "evaluation", "quantisation", "streaming", "bos.py", "groups.py", *STAGES)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The common setup of the evaluations of the dense and the pruned model; no weight is read yet.

    corpora: the windows of each. questions: style -> task -> its questions. styles: how the others than raw are asked.
    scratch: a directory for temporary files.
    """

    evaluation: Evaluation
    base: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    bos: Bos
    corpora: list[Corpus]
    questions: dict[str, dict[str, Questions]]
    styles: dict[str, StyleProtocol]
    device: torch.device
    dtype: torch.dtype
    scratch: Path

    @property
    def tasks(self) -> dict[str, TaskProtocol]:
        return {name: questions.protocol() for name, questions in self.questions[Style.RAW].items()}

    def protocol(self) -> Protocol:
        prompts = self.evaluation.generations.prompts
        return Protocol(
            base=self.base.fingerprint,
            tokenizer_sha256=self.base.tokenizer_sha256,
            bos=self.bos.token,
            corpora={
                corpus.name: CorpusProtocol(
                    sha256=sha256(rows_file(corpus.name)),
                    window_length=corpus.windows.shape[1],
                    windows=len(corpus.windows),
                    tokens=corpus.windows.numel(),
                    windows_sha256=hashlib.sha256(corpus.windows.numpy().tobytes()).hexdigest(),
                    available=corpus.available,
                )
                for corpus in self.corpora
            },
            metrics=self.evaluation.metrics,
            tasks=self.tasks,
            styles=self.styles,
            prompts=prompts,
            new_tokens=self.evaluation.generations.new_tokens if prompts else 0,
            dtype=str(self.dtype).removeprefix("torch."),
            versions=versions(),
            settings_sha256=self.base.settings_sha256(answers=bool(prompts)),
        )

    def waiting(self, journal: Journal) -> list[Questions]:
        """The questions that no interrupted run scored."""
        return [
            questions
            for style, of_style in self.questions.items()
            for name, questions in of_style.items()
            if not journal.has("answers", style, name)
        ]

    def is_finished(self, journal: Journal) -> bool:
        """Whether interrupted runs scored everything."""
        return journal.has_observed and not self.waiting(journal) and journal.has("generations")

    def fingerprint(self, delta: str | None) -> dict[str, Any]:
        """What determines the scores; `delta` is the delta's fingerprint, None for the dense model."""
        device, streamed = str(self.device), self.evaluation.streamed
        code = record.code_sha256(*CODE)
        described = {path.name: sha256(path) for path in sorted(BASE.glob("*.json")) if path.name != PROVENANCE}
        return {
            "protocol": asdict(self.protocol()),
            "delta": delta,
            "base": described,  # its fingerprint, in the protocol, is of the weights alone
            "device": device,
            "streamed": streamed,
            "code": code,
        }


def rows_file(name: str) -> Path:
    """The path of the rows of a corpus or a task."""
    return TEXT / "evaluation" / f"{name}.jsonl"


def prepare(evaluation: Evaluation, scratch: Path) -> Setup:
    """Read the text, cut it into windows, and make all requests of all tasks.

    Raises:
        ConfigError: the device does not exist, the model or a corpus does not allow the windows, or a task asks for what is not done here.
        TextError: a row of a corpus or of a task has the wrong form; names file and line, or task and row. Or a prompt has no token.
        CheckpointError: a token of a corpus, of a task or of a prompt is beyond the base's embedding.
    """
    device = devices.choose_device("evaluation.device", evaluation.device)
    base, tokenizer = Checkpoint(BASE), load_tokenizer(BASE)
    bos = decide(evaluation.bos, tokenizer, "evaluation.bos")
    log.info("windows and prompts %s with BOS: %s", "are not begun" if bos.token is None else "begin", bos.reason)
    corpora = []
    for name, windows in evaluation.corpora.items():
        key = f"evaluation.corpora.{name}"
        base.require_context(windows.window_length, f"{key}.window_length")
        corpora.append(read_corpus(name, rows_file(name), windows, tokenizer, bos))
        require_embedded(corpora[-1].windows.unique().tolist(), embedding_rows(base), tokenizer, key)
    generations, context = evaluation.generations, base.context_length
    require_prompts(tokenizer, bos, generations.prompts, embedding_rows(base), new_tokens=generations.new_tokens, context_length=context)
    styles = {style: asked_in(evaluation, style, tokenizer) for style in evaluation.styles if style != Style.RAW}
    asking = Asking(
        encoder=Encoder(tokenizer, bos, base.context_length),
        limit=evaluation.rows,
        examples=evaluation.examples,
        system_prompt=evaluation.system_prompt,
        embedding_rows=embedding_rows(base),
        scratch=scratch,
    )
    asked = [Style.RAW, *(style for style, made in styles.items() if made.skipped is None)]
    sources = sources_of(evaluation, scratch, examples=evaluation.examples if Style.FEW_SHOT in asked else 0)
    questions: dict[str, dict[str, Questions]] = {}
    for style in map(str, asked):
        try:
            questions[style] = {source.name: asking.build(source, style) for source in sources}
        except TextError as error:
            if style not in RENDERED:
                raise
            log.warning("evaluation.styles: %s is skipped: %s", style, error)
            styles[style] = replace(styles[style], skipped=str(error))
    for name, of_task in questions[Style.RAW].items():
        warn_of_rows(name, of_task.protocol())
    dtype = devices.choose_dtype(evaluation.dtype, device)
    require_memory(evaluation, questions, base, dtype, device)
    return Setup(
        evaluation=evaluation,
        base=base,
        tokenizer=tokenizer,
        bos=bos,
        corpora=corpora,
        questions=questions,
        styles=styles,
        device=device,
        dtype=dtype,
        scratch=scratch,
    )


def require_memory(
    evaluation: Evaluation, questions: dict[str, dict[str, Questions]], base: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse what needs a whole model where its weights do not fit into the memory that is free.

    Raises:
        ConfigError: names the key, the memory that the weights take and what is free.
    """
    generating = next((name for of in questions.values() for name, asked in of.items() if asked.generates), None)
    needed, free = base.size_in(dtype), free_memory(device)
    if needed <= free:
        return
    facts = f"in {dtype} all weights take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}".replace("torch.", "")
    prompts = evaluation.generations.prompts
    require(not prompts, "evaluation.generations.prompts", prompts, f"none: {facts}, and text is generated by a whole model")
    require(generating is None, KEY, generating, f"no task that generates text: {facts}, and text is generated by a whole model")
    require(evaluation.streamed or not any(questions.values()), "evaluation.streamed", evaluation.streamed, f"true: {facts}")


def free_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, or of the system with its swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.swap_memory().free


def asked_in(evaluation: Evaluation, style: str, tokenizer: PreTrainedTokenizerBase) -> StyleProtocol:
    """How a style other than raw is asked; a style that the base's chat template refuses is skipped, and the protocol says why."""
    skipped = refusal(style, tokenizer, evaluation.system_prompt)
    if skipped is not None:
        log.warning("evaluation.styles: %s is skipped: %s", style, skipped)
    text = str(tokenizer.chat_template) if style in RENDERED and tokenizer.chat_template else None
    return StyleProtocol(
        few_shot=evaluation.examples if style == Style.FEW_SHOT else None,
        system_prompt=evaluation.system_prompt if style == Style.SYSTEM else None,
        template_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        skipped=skipped,
    )


def sources_of(evaluation: Evaluation, scratch: Path, examples: int) -> list[Source]:
    """The tasks that are asked for: rows of text.evaluation, or what the fetch stage wrote of lm-eval's.

    Args:
        examples: those of the style few_shot; 0: it is not used.

    Raises:
        TextError: see read_task and read_examples. ConfigError: see questions.embedded_source; or a task is there twice.
    """
    embedded = [name for name in evaluation.tasks if name in TASKS and rows_file(name).is_file()]
    fetched = read_manifest(BENCHMARKS) if set(evaluation.tasks) - set(embedded) else {}
    sources: list[Source] = []
    for name in evaluation.tasks:
        if name in embedded:
            shots = evaluation.few_shot or 0
            rows = read_task(TASKS[name], rows_file(name), evaluation.rows)
            needed = max(shots, examples)
            shown = read_examples(TASKS[name], rows_file(name), evaluation.rows, needed) if needed else []
            hashed, available = sha256(rows_file(name)), count_rows(TASKS[name], rows_file(name))
            sources.append(embedded_source(TASKS[name], rows, shown, few_shot=shots, sha256=hashed, scratch=scratch, available=available))
        elif name in fetched:
            for benchmark in fetched[name]:
                recorded = json.dumps([asdict(subtask) for subtask in benchmark.subtasks], sort_keys=True)
                hashed = hashlib.sha256(recorded.encode()).hexdigest()
                sources.append(fetched_source(benchmark, evaluation.few_shot, hashed, scratch))
        else:
            raise TextError(
                f"{BENCHMARKS}: found {', '.join(fetched) or 'no task'}, wanted {name}; run `python -m stages.fetch part=tasks`"
            )
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "evaluation.tasks", evaluation.tasks, f"{twice} once: another name brings it, too")
    return sources


def warn_of_rows(name: str, protocol: TaskProtocol) -> None:
    """Say where a task has fewer rows than asked for, or only one."""
    if protocol.asked is not None and protocol.rows < protocol.asked:
        log.warning("evaluation.rows: found %d rows of %s, wanted %d; all of them are scored", protocol.rows, name, protocol.asked)
    if protocol.rows == 1:
        log.warning("evaluation.tasks: found 1 row of %s: its scores have no standard error", name)
