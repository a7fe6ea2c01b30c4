"""The protocol of a result: everything that must be equal before two results are compared."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stages.config.environment import installed
from stages.errors import ComparisonError, SparsesweepError
from stages.evaluation.styles import StyleProtocol
from stages.files import read_json, write_json
from stages.plain_data import of_type
from stages.rows import shown

PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval")  # whose version may change a score
EMBEDDED = "text.evaluation"  # where the rows of the tasks of stages/evaluation/tasks.py are from
SETTINGS = "settings_sha256"  # absent in older files
NOT_COMPARED = ("evaluation", "delta")  # keys of the file that are not compared
LEFT_OUT = ("available", "asked", "parts", "context")  # of a corpus or a task: what was not scored; not compared, absent in older files


@dataclass(frozen=True, kw_only=True)
class CorpusProtocol:
    """The windows of a corpus.

    sha256: hash of the file of its rows. window_length: tokens per window. windows: number of windows. tokens: number of tokens in all.
    windows_sha256: hash of the windows' token ids, start tokens included.
    available: number of windows of the whole corpus; None: not known.
    """

    sha256: str
    window_length: int
    windows: int
    tokens: int
    windows_sha256: str
    available: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskProtocol:
    """How a task was scored.

    rows: number of rows, from the first on. sha256: hash of the file of rows, or of all that the fetch stage recorded of it.
    few_shot: examples in the prompt, by task where those of a group differ.
    metrics: their names in lm-eval, the task's own first: those whose score is the mean of its rows' values.
    source: "text.evaluation", or lm-eval with its version, which says where the rows are from.
    better: score -> "higher", "lower", or None where lm-eval does not say. macro: scores of a group in which tasks weigh alike, not rows.
    cut: number of rows that are longer than the model's context and lose their beginning.
    available: number of rows that there are to score; None: not known. asked: number of rows asked for; None: all.
    parts: number of lm-eval's tasks that it is made of. context: of the model [tokens], for `cut`; None: not known.
    requests_sha256: of all that the model is asked and of the right answers; "": not known, of results of earlier code.
    """

    rows: int
    sha256: str
    few_shot: int | dict[str, int]
    metrics: list[str]
    source: str = EMBEDDED
    better: dict[str, str | None] = field(default_factory=dict)
    macro: list[str] = field(default_factory=list)
    cut: int = 0
    available: int | None = None
    asked: int | None = None
    parts: int = 1
    context: int | None = None
    requests_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The text that a model was scored on, and the software that scored it.

    base: fingerprint of the base checkpoint. tokenizer_sha256: hash of its tokenizer.json; None if its tokenizer is of another kind.
    bos: id of the token that every window and prompt begins with; None: text is as the tokenizer makes it.
    corpora: corpus -> its windows. metrics: what is measured on them. tasks: task -> how it was scored.
    styles: style other than raw -> how the same tasks were asked in it.
    prompts: texts that the model continues. new_tokens: upper bound of generated tokens per prompt; 0 without prompts.
    dtype: that of weights and arithmetic. versions: package -> version, for the packages that compute.
    settings_sha256: of what config.json says of the model and, where prompts are continued, of the other files that say how it answers,
        see Checkpoint.settings_sha256; "": not known, of results of earlier code.
    """

    base: str
    tokenizer_sha256: str | None
    bos: int | None
    corpora: dict[str, CorpusProtocol]
    metrics: list[str]
    tasks: dict[str, TaskProtocol]
    prompts: list[str]
    new_tokens: int
    dtype: str
    versions: dict[str, str]
    styles: dict[str, StyleProtocol] = field(default_factory=dict)
    settings_sha256: str = ""


def versions() -> dict[str, str]:
    """The installed versions of the packages that compute, without a build such as +cpu."""
    return {package: installed(package) for package in PACKAGES}


def write_protocol(path: Path, protocol: Protocol, *, evaluation: dict[str, Any], delta: str | None) -> None:
    """Write a protocol, and in the same file two entries that are not compared.

    Args:
        evaluation: the section as plain data. delta: the delta's fingerprint; None for the dense model.
    """
    write_json(path, {**asdict(protocol), "evaluation": evaluation, "delta": delta})


def read_protocol(path: Path) -> Protocol:
    """Read a protocol that `write_protocol` wrote.

    Raises:
        ComparisonError: the file is missing, is not JSON, or has other keys or values of another type.
    """
    try:
        data = read_json(path)
    except SparsesweepError as error:
        raise ComparisonError(str(error)) from None
    field_names = [entry.name for entry in fields(Protocol)]
    if not isinstance(data, dict) or {SETTINGS, *data} != {*field_names, *NOT_COMPARED}:
        keys = ", ".join(sorted(data))[:200] if isinstance(data, dict) else shown(data)
        raise ComparisonError(f"{path}: found a protocol of {keys}, wanted {', '.join(sorted([*field_names, *NOT_COMPARED]))}")
    try:
        protocol: Protocol = of_type(Protocol, {name: data[name] for name in field_names if name in data}, "protocol")
    except ValueError as error:
        raise ComparisonError(f"{path}: {error}") from None
    return protocol


def compared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal before two results are compared, of a protocol as plain data."""
    kept = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    for key in ("corpora", "tasks"):
        kept[key] = {
            name: {key: value for key, value in facts.items() if key not in LEFT_OUT} for name, facts in protocol.get(key, {}).items()
        }
    return kept


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the differences of two mappings: dotted key -> both values; None stands for a missing key."""
    differing: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*first, *second]):
        left, right = first.get(key), second.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differing |= {f"{key}.{inner}": values for inner, values in differences(left, right).items()}
        elif left != right:
            differing[key] = left, right
    return differing


def _follows(key: str, differing: Mapping[str, Any]) -> bool:
    """Whether a key is the hash of a task's requests, and something else of the task differs, too."""
    task, _, field_name = key.rpartition(".")
    return field_name == "requests_sha256" and any(other != key and other.startswith(f"{task}.") for other in differing)


def require_same(first: Protocol, second: Protocol, *, names: tuple[str, str], remedy: str) -> None:
    """Refuse to compare results of different protocols.

    Args:
        names: names of the two results. remedy: the command that makes them comparable.

    Raises:
        ComparisonError: the protocols differ; names each differing key with both values.
    """
    differing = differences(compared(asdict(first)), compared(asdict(second)))
    if differing:
        telling = {key: values for key, values in differing.items() if not _follows(key, differing)}
        listed = "; ".join(f"{key}: {left!r} against {right!r}" for key, (left, right) in telling.items())
        raise ComparisonError(f"{names[0]} and {names[1]} are not of the same protocol, wanted equal values of {listed}; {remedy}")
