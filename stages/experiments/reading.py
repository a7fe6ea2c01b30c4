"""Read every experiment that DVC keeps in this clone, of all commits, and the workspace."""

import json
from dataclasses import dataclass, field
from typing import Any

import dvc.api
from dvc.exceptions import DvcException

from stages.evaluation.measurement import Kind, Measurement, from_rows
from stages.experiments.command_output import output
from stages.experiments.lock import PARAMS, other_run, read_lock
from stages.files import DENSE_RESULTS, PRUNE_RESULTS, SPARSE, SPARSE_RESULTS, parsed_json, read_json
from stages.recipe import fingerprint

METRICS, PRUNE_METRICS = (str(directory / "metrics.json") for directory in (SPARSE_RESULTS, PRUNE_RESULTS))
PROTOCOL, MEASUREMENTS = (str(SPARSE_RESULTS / "details" / name) for name in ("protocol.json", "measurements.json"))
DENSE_MEASUREMENTS = str(DENSE_RESULTS / "details" / "measurements.json")
POINT = str(SPARSE_RESULTS / "frontier.json")
EVALUATION = "evaluate_sparse"  # the stage that writes these
EXPERIMENTS = "refs/exps/"  # REF: its commit's first two digits / the others / the experiment's name
DIGITS = 40  # of a commit


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A pruned model that was evaluated.

    name: of the experiment; "workspace" for what lies in the workspace. revision: what git knows it by; None for the workspace.
    params: the sections of params.yaml. measurements, prune_metrics: as the evaluate and the prune stage wrote them.
    protocol: of its scores, with the keys that are not compared. method, pattern: what they are called in plots.
    dense: the dense model's measurements on the same text; none where these cannot be read.
    """

    name: str
    revision: str | None
    params: dict[str, Any]
    measurements: list[Measurement]
    prune_metrics: dict[str, float]
    protocol: dict[str, Any]
    method: str
    pattern: str
    dense: list[Measurement] = field(default_factory=list)

    @property
    def apply(self) -> str | None:
        """The line that brings it into the workspace; None for what lies there."""
        return None if self.revision is None else f"dvc exp apply {self.name}"

    def measured(self, metric: str) -> Measurement | None:
        """The measurement of a metric on the first corpus, or of the mean of the tasks; None if it was not made."""
        return self._of(self.measurements, metric)

    def measured_dense(self, metric: str) -> Measurement | None:
        """The same of the dense model."""
        return self._of(self.dense, metric)

    def _of(self, measurements: list[Measurement], metric: str) -> Measurement | None:
        corpus = next(iter(self.protocol["corpora"]))
        keys = ((Kind.CORPUS, corpus, metric), (Kind.MEAN, "tasks", metric))
        return next((measured for measured in measurements if measured.key in keys and measured.style == "raw"), None)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """An experiment that cannot be compared. reason: why, and what to do."""

    name: str
    reason: str


def read_experiments() -> tuple[list[Experiment], list[Missing]]:
    """Read the experiments of the project in the current directory, newest commit first, the workspace last.

    Results that are nowhere but on a remote are read from there.

    Raises:
        SparsesweepError: this is no DVC project, or git or dvc fails; with their words.
    """
    commits = list(dict.fromkeys(ref.removeprefix(EXPERIMENTS).rpartition("/")[0].replace("/", "") for ref in _references()))
    revisions = [argument for commit in commits if len(commit) == DIGITS for argument in ("--rev", commit)]
    shown = json.loads(output("dvc", "exp", "show", "--json", *revisions))
    found, missing = [], []
    entries = [(state["name"] or state["rev"], state) for commit in shown for state in _experiments(commit)]
    entries += [("workspace", commit) for commit in shown if commit["rev"] == "workspace"]
    for name, state in entries:
        try:
            found.append(_experiment(name, state))
        except Unreadable as error:
            missing.append(Missing(name=name, reason=str(error)))
    return found, missing


class Unreadable(Exception):
    """A state of the project that is not an evaluated experiment, or not all of one; says why."""


def _experiments(commit: dict[str, Any]) -> list[dict[str, Any]]:
    """The last states of the experiments that started from a commit, each with its experiment's name."""
    return [
        {**experiment["revs"][0], "name": experiment["name"], "executor": experiment.get("executor")}
        for experiment in commit["experiments"] or []
    ]


def _experiment(name: str, state: dict[str, Any]) -> Experiment:
    data, revision = state["data"], None if state["rev"] == "workspace" else state["rev"]
    if (state.get("executor") or {}).get("state") == "running":
        raise Unreadable("it is running")
    if data is None:
        raise Unreadable(f"DVC cannot read it: {_reason((state['error'] or {}).get('msg', 'no reason given'))}")
    try:
        params, _, prune_metrics = (
            data[kind][path]["data"] for kind, path in (("params", PARAMS), ("metrics", METRICS), ("metrics", PRUNE_METRICS))
        )
    except KeyError:
        raise Unreadable("it has no results of prune and evaluate: it has not come that far, or they are on no remote") from None
    point, *_ = _read(POINT, revision)
    try:
        measurements = from_rows(_read(MEASUREMENTS, revision))
    except ValueError as error:
        raise Unreadable(f"{MEASUREMENTS} is of another version of this project ({error}); run it again") from None
    protocol = _read(PROTOCOL, revision)
    if revision is None:
        _require_of_delta(protocol)
    else:
        _require_of_experiment(read_lock(revision), params)
    return Experiment(
        name=name,
        revision=revision,
        params=params,
        measurements=measurements,
        prune_metrics=prune_metrics,
        protocol=protocol,
        method=point["method"],
        pattern=point["pattern"],
        dense=_dense(revision),
    )


def _dense(revision: str | None) -> list[Measurement]:
    """The dense model's measurements, as far as they can be read: a table without them says less, and is right all the same."""
    try:
        return from_rows(_read(DENSE_MEASUREMENTS, revision))
    except (Unreadable, TypeError, KeyError):
        return []


def _reason(message: str) -> str:
    """Why DVC cannot read an experiment. It reads the configuration of the experiment's commit, and lays this clone's own over it."""
    if not message.startswith("config file error"):
        return message
    advice = "a remote was set after it ran: `dvc remote modify --local REMOTE url URL` repeats its url beside your own settings"
    return f"{message}; {advice}"


def _require_of_experiment(stages: dict[str, Any], params: dict[str, Any]) -> None:
    """Refuse scores that a run of other stages left in an experiment; see `read_lock`."""
    if EVALUATION in stages and (reason := other_run(stages, params, EVALUATION)):
        raise Unreadable(f"its scores are of another run ({reason}); `dvc exp run {EVALUATION}` with its overrides scores it")


def _require_of_delta(protocol: dict[str, Any]) -> None:
    """Refuse scores in the workspace that are of another delta than the one there: it was pruned again since.

    Args:
        protocol: of the scores; its "delta" is SparseDelta.fingerprint.
    """
    manifest = SPARSE / "delta.json"
    if not manifest.is_file():
        return
    facts = read_json(manifest)
    if fingerprint(facts["recipe"], facts["shards"]) != protocol["delta"]:
        raise Unreadable("what was pruned last is not evaluated yet; `dvc repro evaluate_sparse` does that")


def _read(path: str, revision: str | None) -> Any:
    """A JSON file of a revision, from the workspace, the cache or a remote."""
    try:
        return parsed_json(dvc.api.read(path, rev=revision))
    except (DvcException, OSError, ValueError) as error:
        raise Unreadable(f"{path} is not there ({' '.join(str(error).split())}); `make receive` brings it") from None


def _references() -> list[str]:
    return output("git", "for-each-ref", "--format=%(refname)", "--sort=-creatordate", EXPERIMENTS).split()
