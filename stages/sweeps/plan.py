"""The plan of a sweep: its points, which of them are there, which wait for which, and how long the others take."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate

from stages.config.compose import composed
from stages.errors import ConfigError
from stages.experiments.commands import leaves
from stages.experiments.files import Files, Unreadable, cache_directory
from stages.experiments.lock import read_lock
from stages.experiments.reading import Experiment
from stages.files import SPARSE_RESULTS
from stages.sweeps import git
from stages.sweeps.file import Sweep
from stages.sweeps.pipeline import DVC_YAML, Stage, has_result, keys, stages_of

HASH = 8  # hexadecimal digits of a point's parameters in its name
LONGEST = 60  # characters of what a name says of its point
RUN = SPARSE_RESULTS / "run.json"
Values: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a sweep.

    index: in the order of the file, from 0. name: of its experiment. overrides: all, for `dvc exp run -S`. varied: those that the other
    points do not share. params: the sections that they compose.
    """

    index: int
    name: str
    overrides: tuple[str, ...]
    varied: tuple[str, ...]
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep has to do.

    results: name of a point -> the experiment that has its result; there: that experiment's name. after: name of a point to be run -> the
    points that compute stages which it shares, so that no stage runs twice. available: keys of stages whose results experiments of this
    clone have, see pipeline.keys. seconds: name of a point to be run -> of prune and evaluate, as measured of the nearest point; None:
    nothing like it was measured.
    """

    sweep: Sweep
    points: tuple[Point, ...]
    results: dict[str, Experiment]
    after: dict[str, frozenset[str]]
    seconds: dict[str, float | None]
    available: frozenset[str] = frozenset()

    @property
    def there(self) -> dict[str, str]:
        return {name: experiment.name for name, experiment in self.results.items()}

    @property
    def to_run(self) -> list[Point]:
        return [point for point in self.points if point.name not in self.results]

    def part(self, points: Sequence[Point]) -> "Plan":
        """The plan of some of the points to be run."""
        names = {point.name for point in points}
        return replace(self, points=tuple(points), results={}, after={name: self.after[name] & names for name in names})

    def waves(self) -> list[list[Point]]:
        """The points to be run, each in the first wave in which all that it waits for has been run."""
        waves: dict[str, int] = {}
        for point in self.to_run:
            waves[point.name] = 1 + max((waves[name] for name in self.after[point.name]), default=-1)
        return [[point for point in self.to_run if waves[point.name] == wave] for wave in range(1 + max(waves.values(), default=-1))]


@cache
def points_of(sweep: Sweep) -> tuple[Point, ...]:
    """Compose every point; two that compose the same are one.

    Raises:
        ConfigError: a point does not compose; names the file, the point, and what was wanted.
    """
    found: dict[str, Point] = {}
    for varied in sweep.varied:
        params = _params(sweep, varied)
        name = _name(sweep, varied, params)
        digest = name[-HASH:]
        if digest not in found:
            overrides = (*sweep.shared, *varied)
            found[digest] = Point(index=len(found), name=name, overrides=overrides, varied=varied, params=params)
    return tuple(found.values())


def plan(sweep: Sweep, experiments: Sequence[Experiment], revision: str = "HEAD") -> Plan:
    """Compare the points of a sweep with the experiments of this clone.

    A point is there if an experiment has its parameters, ran the same code, and came as far as the target.

    Args:
        revision: the commit whose code the points run.
    """
    points, stages = points_of(sweep), stages_of(sweep.target)
    evaluated = [experiment for experiment in experiments if experiment.revision is not None]
    current = _of_code(revision, evaluated, stages)
    results = [(experiment, _values(experiment.params, stages)) for experiment in current]
    cache = cache_directory() if results else Path()
    there = {point.name: found for point in points if (found := _found(point, results, stages, cache)) is not None}
    to_run = [point for point in points if point.name not in there]
    available = {key for point in points if point.name in there for key in keys(stages, point.params).values()}
    available |= {key for experiment in current for key in keys(stages, experiment.params).values()}
    seconds = _Seconds(evaluated)
    return Plan(
        sweep=sweep,
        points=points,
        results=there,
        after=_after(to_run, stages, available),
        available=frozenset(available),
        seconds={point.name: seconds.nearest(point.params) for point in to_run},
    )


def text(plan: Plan, *, at_once: int | None) -> str:
    """The plan as a table, and what it comes to.

    Args:
        at_once: points that run at once; None if that is not known.
    """
    rows = [[point.index, point.name, " ".join(point.varied), *_state(plan, point)] for point in plan.points]
    table = tabulate(rows, ("point", "experiment", "overrides", "state", "seconds"), disable_numparse=True)
    return f"{table}\n\n{summary(plan, at_once=at_once)}"


def summary(plan: Plan, *, at_once: int | None) -> str:
    """How many points are there, and how long the others take."""
    known = [seconds for seconds in plan.seconds.values() if seconds is not None]
    unknown = len(plan.seconds) - len(known)
    counts = f"{len(plan.points)} points: {len(plan.there)} there already, {len(plan.to_run)} to run"
    if not plan.to_run:
        return counts
    if not known:
        return f"{counts}; how long they take is unknown: no point of this base was measured in this clone"
    lasting = f"{duration(sum(known) / (at_once or 1))} of prune and evaluate" + (f", {at_once} at once" if at_once else " one by one")
    return f"{counts}; about {lasting}, by the nearest points measured" + (f"; unknown for {unknown} of them" if unknown else "")


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _state(plan: Plan, point: Point) -> tuple[str, str]:
    if point.name in plan.there:
        name = plan.there[point.name]
        return ("there" if name == point.name else f"there, as {name}"), ""
    seconds = plan.seconds[point.name]
    return "to run", "unknown" if seconds is None else f"{seconds:.0f}"


def _params(sweep: Sweep, varied: tuple[str, ...]) -> dict[str, Any]:
    try:
        params: Any = OmegaConf.to_container(composed(*sweep.shared, *varied))
    except (HydraException, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{sweep.path}: the point {' '.join(varied)} does not compose: {message}") from None
    return params


def _name(sweep: Sweep, varied: tuple[str, ...], params: dict[str, Any]) -> str:
    """The sweep, the point's own values, and a hash of its parameters and target: equal for equal points alone."""
    said = "-".join(map(_plain, [sweep.name, *(override.partition("=")[2] for override in varied)]))
    facts = json.dumps([sweep.target, params], sort_keys=True)
    return f"{said[:LONGEST].strip('._-')}-{hashlib.sha256(facts.encode()).hexdigest()[:HASH]}"


def beginning_of(sweep: Sweep) -> str:
    """With what the names of a sweep's points begin."""
    return f"{_plain(sweep.name)[:LONGEST].strip('._-')}-"


def _plain(word: str) -> str:
    """A word as it stands in a name of git's."""
    return re.sub(r"[^A-Za-z0-9.]+|\.\.+", "_", word).strip("._")


def _of_code(revision: str, experiments: Sequence[Experiment], stages: list[Stage]) -> list[Experiment]:
    """Those that ran the code of these stages as a commit has it, which their locks say, too: `dvc exp save` keeps older results."""
    paths = sorted({DVC_YAML.as_posix()} | {path for stage in stages for path in stage.code})
    same = [experiment for experiment in experiments if experiment.revision and git.same(revision, experiment.revision, paths)]
    wanted = git.md5s(revision, tuple(paths)) if same else {}
    return [experiment for experiment in same if not _ran_other(read_lock(str(experiment.revision)), stages, wanted)]


def _ran_other(lock: dict[str, Any], stages: list[Stage], wanted: dict[str, str]) -> bool:
    """Whether stages of a lock ran other code. wanted: path -> MD5."""
    entries = [entry for stage in stages for entry in lock.get(stage.name, {}).get("deps", [])]
    return any(wanted.get(entry["path"], entry["md5"]) != entry["md5"] for entry in entries)


def _found(point: Point, results: Sequence[tuple[Experiment, Values]], stages: list[Stage], cache: Path) -> Experiment | None:
    """The experiment that has a point's result. results: experiments with their values, see _values."""
    target, wanted = stages[-1], _values(point.params, stages)
    for experiment, values in results:
        if values == wanted and has_result(target, point.params, read_lock(str(experiment.revision)), cache):
            return experiment
    return None


def _values(params: dict[str, Any], stages: list[Stage]) -> Values:
    """The values of the parameters of each stage."""
    return [stage.values(params) for stage in stages]


def _after(points: Sequence[Point], stages: list[Stage], available: set[str]) -> dict[str, frozenset[str]]:
    """Of each point, the earlier ones that are the first to compute a stage that it needs, too."""
    first: dict[str, str] = {}
    after: dict[str, frozenset[str]] = {}
    for point in points:
        wanted = set(keys(stages, point.params).values()) - available
        after[point.name] = frozenset(first[key] for key in wanted if key in first)
        first |= {key: point.name for key in wanted if key not in first}
    return after


class _Seconds:
    """Measured seconds of points, of which the nearest is looked up; each is read once."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.measured = [(experiment, leaves(experiment.params)) for experiment in experiments]
        self.read: dict[str | None, float] = {}

    def nearest(self, params: dict[str, Any]) -> float | None:
        """Of the point of the same base that differs in the fewest values; None without any."""
        wanted = leaves(params)
        same_base = [(experiment, of) for experiment, of in self.measured if experiment.params["base"] == params["base"]]
        if not same_base:
            return None
        experiment, _ = min(same_base, key=lambda pair: sum(pair[1].get(key) != value for key, value in wanted.items()))
        if experiment.revision not in self.read:
            self.read[experiment.revision] = experiment.prune_metrics["seconds"] + _seconds_of_evaluation(experiment)
        return self.read[experiment.revision]


def _seconds_of_evaluation(experiment: Experiment) -> float:
    """As its record says; 0 where that is not to be had."""
    try:
        return float(Files(experiment.revision, cache_directory()).json(RUN)["seconds"])
    except (Unreadable, TypeError, KeyError):
        return 0.0
