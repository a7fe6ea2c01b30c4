"""Read every experiment that DVC keeps in this clone, of all commits, and the workspace."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from dvc.repo.experiments.collect import collect_active, collect_failed, collect_queued

from stages.errors import SparsesweepError
from stages.evaluation.measurement import Kind, Measurement, from_rows
from stages.evaluation.protocol import compared, differences
from stages.experiments.command_output import output
from stages.experiments.files import Files, Unreadable, cache_directory
from stages.experiments.lock import LOCK, PARAMS, Loader, no_release, other_run, read_lock, read_yaml
from stages.files import BASE, CALIBRATION, DENSE_RESULTS, PRUNE_RESULTS, RELEASE, SPARSE, SPARSE_RESULTS, read_json
from stages.recipe import SECTIONS, fingerprint

METRICS, PRUNE_METRICS = (directory / "metrics.json" for directory in (SPARSE_RESULTS, PRUNE_RESULTS))
PROTOCOL, MEASUREMENTS = (SPARSE_RESULTS / "details" / name for name in ("protocol.json", "measurements.json"))
DENSE_MEASUREMENTS = DENSE_RESULTS / "details" / "measurements.json"
DENSE_PROTOCOL = DENSE_RESULTS / "details" / "protocol.json"
POINT = SPARSE_RESULTS / "frontier.json"
EVALUATION = "evaluate_sparse"  # the stage that writes these
FETCH = "fetch_base"
EXPERIMENTS = "refs/exps/"  # REF: its commit's first two digits / the others / the experiment's name
REFERENCE = re.compile(rf"{EXPERIMENTS}([0-9a-f]{{2}})/([0-9a-f]{{38}})/([^/]+)")  # others are DVC's own, such as those of its queue
NO_RESULTS = "it has no results of prune and evaluate: it has not come that far, or they are on no remote"
WORKSPACE = "workspace"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A pruned model that was evaluated.

    name: of the experiment; "workspace" for what lies in the workspace. revision: what git knows it by; None for the workspace.
    params: the sections of params.yaml. measurements, prune_metrics: as the evaluate and the prune stage wrote them.
    protocol: of its scores, with the keys that are not compared. method, pattern: what they are called in plots.
    dense: the dense model's measurements on the same text; none where these cannot be read.
    published: whether it has a release.
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
    published: bool = True

    @property
    def apply(self) -> str | None:
        """The line that brings it into the workspace; None for what lies there."""
        return None if self.revision is None else f"dvc exp apply {shlex.quote(self.name)}"

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
    """Read the experiments of the project in the current directory, the newest first, the workspace last.

    Results that are nowhere but on a remote are read from there.

    Raises:
        SparsesweepError: this is no DVC project, or git or dvc fails; with their words.
    """
    cache, references = cache_directory(), _references()
    read = [_read(one.name, one.commit, cache) for one in references]
    if PRUNE_METRICS.is_file() or METRICS.is_file():
        read.append(_read(WORKSPACE, None, cache))
    baselines = dict.fromkeys([*output("git", "rev-parse", "--revs-only", "HEAD").split(), *(one.baseline for one in references)])
    missing = [*_unfinished(list(baselines)), *(one for one in read if isinstance(one, Missing))]
    return [one for one in read if isinstance(one, Experiment)], missing


def _read(name: str, revision: str | None, cache: Path) -> Experiment | Missing:
    """Read an experiment, or say why it cannot be compared."""
    try:
        return _experiment(name, revision, Files(revision, cache))
    except Unreadable as error:
        return Missing(name=name, reason=str(error))


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """An experiment as git knows it. baseline: the commit from which it started. seconds: when it was made [seconds since 1970]."""

    name: str
    commit: str
    baseline: str
    seconds: int


def _references() -> list[_Reference]:
    """The experiments of this clone, the newest first, whatever commit they started from."""
    lines = output("git", "for-each-ref", "--format=%(objectname) %(committerdate:unix) %(refname)", EXPERIMENTS)
    found = []
    for commit, seconds, path in (line.split(maxsplit=2) for line in lines.splitlines()):
        if match := REFERENCE.fullmatch(path):
            found.append(_Reference(name=match[3], commit=commit, baseline=match[1] + match[2], seconds=int(seconds)))
    return sorted(found, key=lambda one: (one.seconds, one.commit), reverse=True)


def _unfinished(baselines: Sequence[str]) -> Iterator[Missing]:
    """What DVC runs, has queued, or ran and failed, from these commits: experiments that git does not know yet."""
    with Repo() as repo:
        for collected, reason in ((collect_active, "it is running"), (collect_queued, NO_RESULTS), (collect_failed, NO_RESULTS)):
            for one in chain.from_iterable(collected(repo, baselines).values()):
                yield Missing(name=one.name or one.revs[0].name or one.revs[0].rev, reason=reason)


def _experiment(name: str, revision: str | None, files: Files) -> Experiment:
    try:
        params, prune_metrics = _params(revision), files.json(PRUNE_METRICS)
    except (Unreadable, SparsesweepError, OSError, yaml.YAMLError):
        raise Unreadable(NO_RESULTS) from None
    if not files.has(METRICS):
        raise Unreadable(NO_RESULTS)
    point, *_ = files.json(POINT)
    try:
        measurements = from_rows(files.json(MEASUREMENTS))
    except ValueError as error:
        raise Unreadable(f"{MEASUREMENTS} is of another version of this project ({error}); run it again") from None
    protocol = files.json(PROTOCOL)
    if revision is None:
        params, published = _workspace(params, protocol, files.cache), RELEASE.is_dir()
    else:
        lock = read_lock(revision)
        _require_of_experiment(lock, params, files.cache)
        published = no_release(lock, params) is None
    return Experiment(
        name=name,
        revision=revision,
        params=params,
        measurements=measurements,
        prune_metrics=prune_metrics,
        protocol=protocol,
        method=point["method"],
        pattern=point["pattern"],
        dense=_dense(files, protocol),
        published=published,
    )


def _params(revision: str | None) -> dict[str, Any]:
    """The sections of a revision's params.yaml."""
    sections: dict[str, Any]
    sections = yaml.load(Path(PARAMS).read_text(encoding="utf8"), Loader=Loader) if revision is None else read_yaml(revision, PARAMS)
    return sections


def _dense(files: Files, protocol: dict[str, Any]) -> list[Measurement]:
    """The dense model's measurements, as far as they can be read: a table without them says less, and is right all the same.

    None if they are of another protocol: that model was evaluated again since.
    """
    try:
        same = not differences(compared(files.json(DENSE_PROTOCOL)), compared(protocol))
        return from_rows(files.json(DENSE_MEASUREMENTS)) if same else []
    except (Unreadable, ValueError, TypeError, KeyError):
        return []


def _require_of_experiment(stages: dict[str, Any], params: dict[str, Any], cache: Path) -> None:
    """Refuse scores that a run of other stages left in an experiment; see `read_lock`."""
    if EVALUATION in stages and (reason := other_run(stages, params, EVALUATION, cache)):
        raise Unreadable(f"its scores are of another run ({reason}); `dvc exp run {EVALUATION}` with its overrides scores it")


def _workspace(params: dict[str, Any], protocol: dict[str, Any], cache: Path) -> dict[str, Any]:
    """See _as_recorded. Raises: Unreadable: as there, or what lies here is of an earlier version, or was cut off."""
    try:
        return _as_recorded(params, protocol, cache)
    except (LookupError, TypeError, AttributeError, SparsesweepError, OSError, yaml.YAMLError) as error:
        raise Unreadable(f"what lies in the workspace is of another version or not whole ({error!r}); `dvc repro {EVALUATION}`") from None


def _as_recorded(params: dict[str, Any], protocol: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The sections of the workspace's params.yaml as they were when its stages ran: values may have changed since.

    Args:
        protocol: of the scores; its "delta" is SparseDelta.fingerprint.  cache: DVC's.

    Raises:
        Unreadable: what lies here is of several runs: it was pruned, or its windows were drawn, again since.
    """
    manifest = SPARSE / "delta.json"
    if not manifest.is_file():  # it was pruned elsewhere
        _require_of_experiment(_locked(), params, cache)
        return params
    facts = read_json(manifest)
    recipe = facts["recipe"]
    if fingerprint(recipe, facts["shards"]) != protocol["delta"]:
        raise Unreadable("what was pruned last is not evaluated yet; `dvc repro evaluate_sparse` does that")
    recorded = {**params, **{name: recipe[name] for name in SECTIONS}, "evaluation": protocol["evaluation"]}
    recorded["prune"] = {**params["prune"], **recipe["prune"]}
    for name, directory, key in (("base", BASE, "fingerprint"), ("calibration", CALIBRATION, "windows_sha256")):
        path = directory / "provenance.json"
        if path.is_file():
            written = read_json(path)
            if written[key] != recipe[name]:
                raise Unreadable(f"{directory} was made again since it was pruned; `dvc repro {EVALUATION}` does the rest")
            recorded[name] = written["section"]
    if params["base"] == _fetched():
        recorded["base"] = params["base"]  # a record leaves out a path on this machine, and pins a branch
    return recorded


def _fetched() -> Any:
    """The section by which DVC fetched the base that lies here; None where the lock does not say."""
    return _locked().get(FETCH, {}).get("params", {}).get(PARAMS, {}).get("base")


def _locked() -> dict[str, Any]:
    """The stages that the workspace's lock names; none without one."""
    content = yaml.load(Path(LOCK).read_text(encoding="utf8"), Loader=Loader) if Path(LOCK).is_file() else None
    return (content or {}).get("stages", {})
