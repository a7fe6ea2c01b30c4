"""Fetch tasks of lm-eval by their own names: definitions are resolved, data sets downloaded at a pinned commit and written as Parquet.

lm-eval would download while it evaluates; here evaluation is offline and reads only what this stage wrote. No code of a data set is run.
"""

import difflib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
import httpx2  # the transport of huggingface_hub, whose errors `datasets` lets through
import lm_eval.tasks
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from stages.errors import ConfigError, SourceError
from stages.evaluation.manifest import OWN, Benchmark, Data, Subtask, write_manifest
from stages.files import OWN_TASKS, is_plain_name, remove, sha256
from stages.plain_yaml import require_bounded
from stages.rows import shown
from stages.sources import hub

log = logging.getLogger(__name__)

KEY = "evaluation.tasks"
PYTHON = KEY + ": {}: a Python class defines this task; wanted one that a YAML file defines"
STOCK = Path(lm_eval.tasks.__file__).parent
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of `datasets`: what reads files that are named one by one
BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    OSError,
)  # what lm-eval raises on a definition of another form
UNREADABLE = (DatasetsError, httpx2.HTTPError, RuntimeError, *BROKEN)  # what `datasets` raises on a set it cannot read
ROWS = ("*.jsonl", "*.json", "*.csv", "*.parquet", "*.gz")
GROUP_KEYS = {"group", "task", "tag", "include", "task_list", "group_alias", "task_alias", "class"}
KINDS: dict[str, tuple[type, ...]] = {  # of the keys that are read here
    **dict.fromkeys(("dataset_path", "dataset_name"), (str, NoneType)),
    **dict.fromkeys(("dataset_kwargs", "fewshot_config"), (dict, NoneType)),
    **dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"), (str, NoneType)),
}
FIELDS = {field.name for field in fields(TaskConfig)} | GROUP_KEYS


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A task of lm-eval as its YAML and its group define it, functions unresolved; in a group it stands for the task.

    path: of the YAML. config: all keys. overrides: those that its group sets.
    """

    task_name: str
    path: Path
    config: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def scored_split(self) -> str:
        """The split that lm-eval scores."""
        return str(self.config.get("test_split") or self.config.get("validation_split"))

    @property
    def splits(self) -> list[str]:
        """The splits that lm-eval reads: the scored one, and that of the examples."""
        examples = self.config.get("fewshot_config") or {}
        names = [examples.get("split"), self.config.get("fewshot_split")]
        if not examples.get("samples"):
            names += [self.config.get(f"{kind}_split") for kind in ("training", "validation", "test")]
        return list(dict.fromkeys([self.scored_split, *[str(name) for name in names if name][:1]]))


class Definitions(TaskFactory):
    """lm-eval's own resolution of groups and tags, with a Definition in place of each task, so that nothing is downloaded."""

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        changed = {key: value for key, value in (overrides or {}).items() if key not in ("task", "task_alias")}
        path = entry.yaml_path
        if path is None:
            raise ConfigError(f"{KEY}: {entry.name}: found no YAML file of this task in lm-eval {version('lm-eval')}")
        config = {**load_yaml(path, resolve_func=False), **changed}
        return Definition(task_name=entry.name, path=Path(path), config=config, overrides=changed)

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else dict(entry.cfg or {})
        return {**config, **(overrides or {}), "metadata": {}}

    def _build_group_members(self, member_list: list[Any], group_name: str, overrides: Any, registry: dict[str, Entry]) -> list[Any]:
        for member in member_list:
            name = member.get("task") if isinstance(member, dict) else member
            if not isinstance(name, str | list) or isinstance(name, str) and name not in registry:
                raise ConfigError(f"{KEY}: {group_name}: found the member {name!r}, wanted one that lm-eval defines in a file")
        return list(super()._build_group_members(member_list, group_name, overrides, registry))


def fetch(names: list[str], directory: Path, downloads: Path) -> dict[str, list[Benchmark]]:
    """Write manifest.json, and the rows of the tasks below data/, into `directory`.

    Args:
        names: of tasks, groups or tags of lm-eval, or of tasks whose YAML lies in the folder `tasks`.
        downloads: directory for what is downloaded, which a later call reuses if this one fails.

    Returns:
        What write_manifest wrote: asked name -> its benchmarks.

    Raises:
        ConfigError: before anything is downloaded: a name is unknown, or a task cannot be run here; names it, with the reason.
        SourceError: a data set cannot be fetched; names the task.
    """
    log.info("reading the definitions of lm-eval %s", version("lm-eval"))
    own = OWN_TASKS.resolve() if OWN_TASKS.is_dir() else None
    index = {**_stock_index(), **(_own_index(own) if own else {})}
    resolved = {name: list(_resolve(name, index)) for name in names}
    definitions = [definition for of_name in resolved.values() for _, _, members in of_name for definition in members]
    for definition in definitions:
        _require_runnable(definition)
    sets = {key: _Set.of(definition) for definition in definitions for key in [_key(definition)]}
    repositories: dict[tuple[str, str], hub.Repository] = {}
    for source in sets.values():
        source.pin(repositories)
    (directory / "data").mkdir()
    written: dict[tuple[str, str], Data] = {}
    for key, source in tqdm(sets.items(), desc="fetching tasks", unit="set"):
        splits = dict.fromkeys(split for definition in definitions if _key(definition) == key for split in definition.splits)
        for split, data in source.write(list(splits), directory, downloads):
            written[key, split] = data
    if own is not None and any(definition.path.is_relative_to(own) for definition in definitions):
        shutil.copytree(own, directory / OWN, ignore=shutil.ignore_patterns(*ROWS, "__pycache__"))
    benchmarks = {
        name: [
            Benchmark(
                name=reported,
                is_group=group is not None,
                aggregated={entry.metric: entry.weight_by_size for entry in (group and group.aggregate_metric_list) or []},
                subtasks=[_subtask(member, own, {split: written[_key(member), split] for split in member.splits}) for member in members],
            )
            for reported, group, members in of_name
        ]
        for name, of_name in resolved.items()
    }
    write_manifest(directory, benchmarks, [source.record for source in sets.values()])
    remove(downloads)
    return benchmarks


def _own_index(own: Path) -> dict[str, Entry]:
    """The tasks whose YAML lies in a folder, by name."""
    for path in sorted(own.rglob("*.yaml")):
        _require_bounded(path)
    try:
        index = TaskManager(include_defaults=False, include_path=str(own)).task_index
    except BROKEN as error:
        raise ConfigError(f"{KEY}: {own}: lm-eval cannot read the tasks there ({error})") from error
    for name, entry in index.items():
        if not isinstance(name, str):
            raise ConfigError(f"{KEY}: {entry.yaml_path}: found the name {shown(name)}, wanted a string")
    return index


def _require_bounded(path: Path) -> None:
    """Refuse a definition that would end the process while lm-eval loads it, before it is loaded."""
    try:
        require_bounded(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{KEY}: {path}: not YAML that lm-eval can read ({' '.join(str(error).split())})") from error


@cache
def _stock_index() -> dict[str, Entry]:
    """All of lm-eval's own tasks by name; reading their files takes seconds."""
    return TaskManager().task_index


def _resolve(name: str, index: dict[str, Entry]) -> Iterator[tuple[str, Group | None, list[Definition]]]:
    """What is reported for a name: each with the group that aggregates it, or None, and its tasks."""
    if name not in index:
        close = difflib.get_close_matches(name, list(index), n=5, cutoff=0.6)
        wanted = f"such as {', '.join(close)}" if close else "or that of a YAML file in the folder tasks/"
        raise ConfigError(f"{KEY}: found {name!r}, wanted a name that lm-eval {version('lm-eval')} knows, {wanted}")
    if index[name].kind == Kind.PY_TASK:
        raise ConfigError(PYTHON.format(name))
    try:
        built = Definitions().build(index[name], registry=index)
    except BROKEN as error:
        raise ConfigError(f"{KEY}: {name}: lm-eval cannot read its definition ({error})") from error
    yield from _reported(built)


def _reported(built: Any) -> Iterator[tuple[str, Group | None, list[Definition]]]:
    if isinstance(built, Definition):
        yield built.task_name, None, [built]
    elif isinstance(built, Group) and built.has_aggregation:
        if not all(isinstance(entry, AggMetricConfig) for entry in built.aggregate_metric_list or []):
            raise ConfigError(f"{KEY}: {built.name}: found an aggregate_metric_list of other than metrics, wanted keys and values for each")
        for entry in built.aggregate_metric_list or []:
            if not isinstance(entry.metric, str) or not isinstance(entry.weight_by_size, bool):
                actual = f"metric {shown(entry.metric)} with weight_by_size {shown(entry.weight_by_size)}"
                raise ConfigError(f"{KEY}: {built.name}: aggregate_metric_list: found {actual}, wanted a metric's name with true or false")
        yield built.name, built, list(_members(built))
    else:  # a tag, or a group that only lists tasks
        for member in built:
            yield from _reported(member)


def _members(group: Group) -> Iterator[Definition]:
    for member in group:
        if isinstance(member, Group):
            yield from _members(member)
        else:
            yield member


def _require_runnable(definition: Definition) -> None:
    """Refuse a task whose code or data would not be that of a file that is pinned."""
    name, config = f"{KEY}: {definition.task_name}", definition.config
    for key, kinds in KINDS.items():
        if not isinstance(config.get(key), kinds):
            raise ConfigError(f"{name}: {key}: found {shown(config[key])}, wanted {' or '.join(kind.__name__ for kind in kinds)}")
    if "class" in config:
        raise ConfigError(PYTHON.format(definition.task_name))
    if config.get("unsafe_code"):
        raise ConfigError(f"{name}: it runs code that the model writes (unsafe_code); such tasks are not run")
    if config.get("custom_dataset"):
        raise ConfigError(f"{name}: a Python function makes its rows (custom_dataset); wanted a data set that can be pinned")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise ConfigError(f"{name}: it asks about images or sound; wanted a task of text")
    if not config.get("dataset_path"):
        raise ConfigError(f"{name}: found no dataset_path, wanted a data set of the hub or files of rows")
    if definition.scored_split == "None":
        raise ConfigError(f"{name}: found neither test_split nor validation_split, wanted one to score")
    unknown = sorted(map(str, set(config) - FIELDS))
    if unknown:
        raise ConfigError(f"{name}: found the keys {', '.join(unknown)}, wanted those of lm-eval's task files")
    try:
        json.dumps(definition.overrides)
    except TypeError:
        raise ConfigError(f"{name}: its group changes it by a Python function; wanted plain values") from None


def _key(definition: Definition) -> str:
    """What decides which rows a task has, as a name of a folder."""
    config = definition.config
    facts = [config["dataset_path"], config.get("dataset_name"), _options(config)]
    if config["dataset_path"] in BUILDERS:
        facts.append(str(definition.path.parent))
    words = "-".join(str(fact) for fact in facts[:2] if fact)
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "-", words).strip("-.") + f"-{digest}"


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of load_dataset; data sets' own code is never run, whatever a definition asks for."""
    options = dict(config.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)
    return options


class _Set:
    """A data set of the hub at one commit, or files of rows.

    Args:
        task: one that reads it, for errors. folder: of the YAML, from which paths of files start.
    """

    def __init__(self, key: str, task: str, folder: Path, config: dict[str, Any]) -> None:
        self.key, self.task, self.path, self.name, self.options = (
            key,
            task,
            config["dataset_path"],
            config.get("dataset_name"),
            _options(config),
        )
        self.commit: str | None = None
        self.license: str | None = None
        if self.path in BUILDERS:
            self.options["data_files"] = _located(self.options.get("data_files"), folder)

    @classmethod
    def of(cls, definition: Definition) -> "_Set":
        return cls(_key(definition), definition.task_name, definition.path.parent, definition.config)

    @property
    def record(self) -> dict[str, Any]:
        origin = {"files": "named in the task's YAML"} if self.path in BUILDERS else {"repo": self.path, "config": self.name}
        return {**origin, "revision": self.commit, "license": self.license}

    def pin(self, repositories: dict[tuple[str, str], hub.Repository]) -> None:
        """Resolve the repository's commit.

        Args:
            repositories: those that are resolved already, by name and revision; this one is added.

        Raises:
            SourceError: there is none, it is gated, or only its own code could read it.
        """
        if self.path in BUILDERS:
            return
        wanted = self.path, str(self.options.pop("revision", None) or "main")
        try:
            repository = repositories.setdefault(wanted, repositories.get(wanted) or hub.resolve(*wanted, "dataset"))
        except SourceError as error:
            raise SourceError(f"{KEY}: {self.task}: {error}") from error
        script = f"{self.path.rpartition('/')[2]}.py"
        if script in repository.sizes:
            raise SourceError(f"{KEY}: {self.task}: hub dataset {self.path}: found the script {script}; code of a data set is never run")
        self.commit, self.license = repository.commit, ", ".join(repository.licenses) or None

    def write(self, splits: list[str], directory: Path, downloads: Path) -> Iterator[tuple[str, Data]]:
        """Download the set and write the splits; raises SourceError."""
        where = f"{KEY}: {self.task}: data set {self.path}" + (f", {self.name}" if self.name else "")
        pinned = {} if self.commit is None else {"revision": self.commit}
        try:
            rows = datasets.load_dataset(self.path, self.name, cache_dir=str(downloads), **pinned, **self.options)
        except UNREADABLE as error:
            raise SourceError(f"{where}: cannot be read ({' '.join(str(error).split())})") from error
        (directory / "data" / self.key).mkdir()
        for split in splits:
            if not is_plain_name(split) or split not in rows:
                raise SourceError(f"{where}: found the splits {', '.join(map(str, rows))}, wanted {split}")
            file = f"data/{self.key}/{split}.parquet"
            rows[split].to_parquet(directory / file)
            log.info("wrote %s: %d rows", file, len(rows[split]))
            yield split, Data(file=file, rows=len(rows[split]), sha256=sha256(directory / file))


def _located(files: Any, folder: Path) -> Any:
    """Paths of files from the folder of their YAML on; addresses stay."""
    if isinstance(files, dict):
        return {split: _located(inner, folder) for split, inner in files.items()}
    if isinstance(files, list):
        return [_located(file, folder) for file in files]
    return files if "://" in str(files) else str(folder / str(files))


def _folder_sha256(own: Path) -> str:
    """Of all files of one's own tasks: a definition includes others, and calls functions of modules beside it."""
    files = sorted(path for path in own.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    listed = "".join(f"{path.relative_to(own).as_posix()} {sha256(path)}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _subtask(definition: Definition, own: Path | None, data: dict[str, Data]) -> Subtask:
    is_own = own is not None and definition.path.is_relative_to(own)
    path = Path(OWN) / definition.path.relative_to(own) if own is not None and is_own else definition.path.relative_to(STOCK)
    return Subtask(
        name=definition.task_name,
        definition=path.as_posix(),
        own=is_own,
        sha256=_folder_sha256(own) if own is not None and is_own else sha256(definition.path),
        overrides=definition.overrides,
        data=data,
    )
