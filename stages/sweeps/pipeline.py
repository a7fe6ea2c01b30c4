"""Which stages of dvc.yaml a point needs, and what tells their results apart."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.experiments.lock import other_run, value_at

DVC_YAML = Path("dvc.yaml")
OUTPUTS = ("outs", "metrics", "plots")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of dvc.yaml.

    parameters: keys of params.yaml that it is handed. code: the paths it depends on that no stage writes. inputs: paths that it reads,
    each with the stage that writes it. outputs: paths that it writes, and that are removed before it runs.
    """

    name: str
    parameters: tuple[str, ...]
    code: tuple[str, ...]
    inputs: dict[str, str]
    outputs: tuple[str, ...]

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """What these sections say of its parameters; None for what is not there."""
        return {key: value_at(params, key) for key in self.parameters}


def stages_of(target: str, dvc_yaml: Path = DVC_YAML) -> list[Stage]:
    """The stages that a target needs, itself included, each after those that it reads from, else in the order of dvc.yaml.

    That has fetch_text first: text that cannot be used is refused before the base is downloaded.
    """
    described = yaml.safe_load(dvc_yaml.read_text(encoding="utf8"))["stages"]
    order = list(described)
    writers = {path: name for name, stage in described.items() for kind in OUTPUTS for path in _paths(stage.get(kind, []))}
    found: dict[str, Stage] = {}

    def add(name: str) -> None:
        if name not in found:
            stage = _stage(name, described[name], writers)
            for writer in sorted(set(stage.inputs.values()), key=order.index):
                add(writer)
            found[name] = stage

    add(target)
    return list(found.values())


def keys(stages: list[Stage], params: dict[str, Any], besides: Callable[[Stage], list[Any]] | None = None) -> dict[str, str]:
    """Of each stage, a hash of all the parameters on which its result depends, those of the stages that it reads from included.

    Args:
        besides: what else a stage's result depends on, as plain data.
    """
    made: dict[str, str] = {}
    for stage in stages:
        facts = [stage.name, stage.values(params), sorted(made[writer] for writer in set(stage.inputs.values()))]
        facts += [] if besides is None else besides(stage)
        made[stage.name] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return made


def has_result(target: Stage, params: dict[str, Any], stages: dict[str, Any], cache: Path | None = None) -> bool:
    """Whether the result of a stage is of these parameters, and of what the other stages wrote. Args: see lock.other_run."""
    return target.name in stages and other_run(stages, params, target.name, cache) is None


def _stage(name: str, described: dict[str, Any], writers: dict[str, str]) -> Stage:
    dependencies = list(described.get("deps", []))
    inputs = {path: writer for path in dependencies if (writer := _writer(path, writers)) is not None}
    return Stage(
        name=name,
        parameters=tuple(described.get("params", [])),
        code=tuple(path for path in dependencies if path not in inputs),
        inputs=inputs,
        outputs=tuple(_paths([entry for kind in OUTPUTS for entry in described.get(kind, []) if not _persists(entry)])),
    )


def _writer(path: str, writers: dict[str, str]) -> str | None:
    """The stage that writes a path, or what lies above it."""
    return next((name for output, name in writers.items() if Path(path).is_relative_to(output)), None)


def _persists(entry: Any) -> bool:
    """Whether an output stays when its stage runs again."""
    return isinstance(entry, dict) and any(options.get("persist") for options in entry.values())


def _paths(entries: list[Any]) -> list[str]:
    """The paths of a list of dvc.yaml, in which an entry may be a mapping of a path to its options."""
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]
