"""What of an experiment other trackers of experiments are sent, and how their clients are found."""

import hashlib
import importlib
import importlib.util
import json
import os
from dataclasses import dataclass
from typing import Any

from stages import limits
from stages.errors import ConfigError
from stages.evaluation.measurement import as_rows, metrics
from stages.evaluation.protocol import compared
from stages.experiments.reading import Experiment, Missing
from stages.experiments.table import base_name, line

MODULES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}  # extra -> what it brings
DEFAULTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}  # which clients read when they are imported


@dataclass(frozen=True, kw_only=True)
class Run:
    """An experiment as other trackers have it.

    name: of the experiment. result: sha256 of its parameters, numbers and protocol, whatever the experiment is called.
    params: the sections of params.yaml. metrics: section -> name -> metric, as in metrics.json, and the section "prune".
    facts: what tells runs apart, by name; "protocol" is the sha256 of what must be equal before two runs are compared.
    command: the line that runs it again.
    """

    name: str
    result: str
    params: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, str]
    command: str


def client(tracker: str) -> Any:
    """Import the client of a tracker, "mlflow" or "wandb". It reports nothing to its maker unless the environment says so.

    Raises:
        ConfigError: it is not installed, or a library is not that it needs; names the command that installs them.
    """
    absent = [module for module in MODULES[tracker] if importlib.util.find_spec(module) is None]
    if absent:
        advice = f"pip install -c constraints.txt -e '.[{tracker}]' brings what is missing"
        raise ConfigError(f"found no package {' and no '.join(absent)}, wanted the client of {tracker}: {advice}")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    return importlib.import_module(tracker)


def selected(experiments: list[Experiment], missing: list[Missing], names: list[str]) -> list[Experiment]:
    """The experiments of these names; all of them if no name is given.

    Raises:
        ConfigError: an experiment is not there or was not evaluated.
    """
    reasons = {one.name: f" ({one.reason})" for one in missing}
    known = sorted({one.name for one in experiments})
    for name in names:
        if name not in known:
            raise ConfigError(f"experiment {name!r}: not found{reasons.get(name, '')}, wanted one of {', '.join(known) or '(none)'}")
    return [one for one in experiments if not names or one.name in names]


def runs(experiments: list[Experiment]) -> list[Run]:
    """What is sent of experiments; each result once, by the first experiment that has it."""
    by_result: dict[str, Run] = {}
    for experiment in experiments:
        result = digest([experiment.params, as_rows(experiment.measurements), experiment.prune_metrics, experiment.protocol])
        if result not in by_result:
            by_result[result] = _run(experiment, result)
    return list(by_result.values())


def digest(data: Any) -> str:
    """The sha256 of plain data, whatever the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def cut(value: str, characters: int) -> str:
    """A value in at most so many characters; one that is cut ends with its own length."""
    ending = f"… ({len(value)} characters)"
    return value if len(value) <= characters else value[: characters - len(ending)] + ending


def _scored(protocol: dict[str, Any]) -> list[str]:
    """What metrics are of: each text and task, with how much of it."""
    tasks = [f"{task} ({limits.rows_of(facts)})" for task, facts in protocol["tasks"].items()]
    return [*(limits.scored_text(protocol, corpus) for corpus in protocol["corpora"]), *tasks]


def _run(experiment: Experiment, result: str) -> Run:
    facts = {
        "result": result,
        "method": experiment.method,
        "pattern": experiment.pattern,
        "revision": experiment.revision or "workspace",
        "base": base_name(experiment),
        "base_fingerprint": experiment.protocol["base"],
        "protocol": digest(compared(experiment.protocol)),
        "scored": "; ".join(_scored(experiment.protocol)),
    }
    return Run(
        name=experiment.name,
        result=result,
        params=experiment.params,
        metrics={**metrics(experiment.measurements), "prune": experiment.prune_metrics},
        facts=facts,
        command=line(experiment),
    )
