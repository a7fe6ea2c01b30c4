"""The sweep file: which points a sweep has, what they share, and what each may use of a machine.

target: evaluate_sparse          the stage up to which each point runs; or publish
overrides: [evaluation=sweep]    of every point, as after -S of `dvc exp run`
grid:                            every combination of these is a point
  method: [wanda, sparsegpt]
  pattern.sparsity: [0.5, 0.6]
points:                          and these, each a list of overrides
  - [method=wanda, pattern=nm_2_4]
search: {parameter: pattern.sparsity, low: 0.3, high: 0.8, metric: perplexity, limit: 1.5, points: 6}   instead of both, see search.py
resources: {gpus: null, cpus: 1, memory_gib: null, threads: null}
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from stages.config.params import read_params
from stages.errors import ConfigError
from stages.experiments.commands import in_grammar
from stages.schema import require, require_one_of

TARGETS = ("evaluate_sparse", "publish")
KEYS = ("target", "overrides", "grid", "points", "search", "resources")
MOST = 10_000  # points: a longer list is a slip of the pen
MOST_STEPS = 20  # of a search: each halves the interval, to a millionth by then


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each point may use.

    gpus: whole cards; None: where there are any, as many as prune has processes, and none if its devices are cpu. cpus: processors.
    memory_gib: host memory [GiB]; None: not declared. threads: of each process, OMP_NUM_THREADS; None: as many as cpus.
    """

    gpus: int | None = None
    cpus: int = 1
    memory_gib: float | None = None
    threads: int | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError where a value is out of range, naming it."""
        for key, lowest in (("gpus", 0), ("cpus", 1), ("threads", 1)):
            value = getattr(self, key)
            nullable, wanted = key != "cpus", f"a whole number, {lowest} or more"
            valid = value is None if value is None and nullable else type(value) is int and value >= lowest
            require(valid, f"{where}.{key}", value, f"null or {wanted}" if nullable else wanted)
        memory = self.memory_gib
        valid = memory is None or (type(memory) in (int, float) and math.isfinite(memory) and memory > 0)
        require(valid, f"{where}.memory_gib", memory, "null or more than 0")


@dataclass(frozen=True, kw_only=True)
class Search:
    """The highest value of a parameter at which the damage keeps within a limit.

    parameter: a dotted key of params.yaml. low, high: between them it lies. metric: name of a measurement of the first corpus, or of the
    mean over tasks, such as "perplexity" or "accuracy". limit: its ratio to the dense model's value: the most where lower is better, the
    least where higher is. points: how many are computed.
    """

    parameter: str
    low: float
    high: float
    metric: str
    limit: float
    points: int

    def check(self, where: str) -> None:
        """Raise ConfigError where a value is out of range, naming it."""
        for key in ("parameter", "metric"):
            value = getattr(self, key)
            require(isinstance(value, str) and bool(value), f"{where}.{key}", value, "a name")
        for key in ("low", "high", "limit"):
            value = getattr(self, key)
            require(type(value) in (int, float) and math.isfinite(value), f"{where}.{key}", value, "a finite number")
        require(self.low < self.high, f"{where}.low", self.low, f"less than high, {self.high}")
        require(self.limit > 0, f"{where}.limit", self.limit, "more than 0")
        require(type(self.points) is int and 1 <= self.points <= MOST_STEPS, f"{where}.points", self.points, f"1 to {MOST_STEPS}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file.

    name: of the file, without its ending. varied: of each point, the overrides in which it differs from the others; of a search none.
    shared: those of all points.
    """

    path: Path
    name: str
    target: str
    shared: tuple[str, ...]
    varied: tuple[tuple[str, ...], ...]
    resources: Resources
    search: Search | None = None


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Whether its points compose is not checked yet, see plan.py.

    Raises:
        ConfigError: naming the file, the key, what was found and what is wanted.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found, wanted a sweep file such as sweeps/example.yaml")
    data = read_params(path)
    _require_keys(data, KEYS, str(path))
    target = data.get("target", TARGETS[0])
    require_one_of(f"{path}: target", target, TARGETS)
    shared = _overrides(data.get("overrides", []), f"{path}: overrides")
    varied = [*_grid(data.get("grid"), f"{path}: grid"), *_points(data.get("points"), f"{path}: points")]
    search = _search(data.get("search"), f"{path}: search")
    require(bool(varied) or search is not None, str(path), "no points", "a grid, or points, or a search")
    require(not varied or search is None, str(path), "a search beside points", "one of them: a search finds its own points")
    resources = data.get("resources", {})
    _require_keys(resources, tuple(Resources.__dataclass_fields__), f"{path}: resources")
    made = Resources(**resources)
    made.check(f"{path}: resources")
    return Sweep(path=path, name=path.stem, target=target, shared=shared, varied=tuple(varied), resources=made, search=search)


def _search(data: Any, where: str) -> Search | None:
    if data is None:
        return None
    keys = tuple(Search.__dataclass_fields__)
    _require_keys(data, keys, where)
    missing = [key for key in keys if key not in data]
    require(not missing, where, f"no {', '.join(missing)}", f"all of {', '.join(keys)}")
    made = Search(**data)
    made.check(where)
    _require_single([f"{made.parameter}={made.low}"], f"{where}.parameter")
    return made


def _require_keys(data: Any, allowed: tuple[str, ...], where: str) -> None:
    require(isinstance(data, dict), where, data, f"a mapping with the keys {', '.join(allowed)}")
    for key in data:
        require(key in allowed, where, key, f"only the keys {', '.join(allowed)}")


def _grid(grid: Any, where: str) -> list[tuple[str, ...]]:
    """Every combination, the last key fastest."""
    if grid is None:
        return []
    require(isinstance(grid, dict) and bool(grid), where, grid, "a mapping of groups or keys to lists; or no grid")
    for key, values in grid.items():
        require(isinstance(values, list) and bool(values), f"{where}.{key}", values, "a list of at least one option or value")
        twice = next((value for value in values if values.count(value) > 1), None)
        require(twice is None, f"{where}.{key}", twice, "each value once")
    number = math.prod(len(values) for values in grid.values())
    require(number <= MOST, where, f"{number} combinations", f"at most {MOST}")
    axes = [[f"{key}={in_grammar(value)}" for value in values] for key, values in grid.items()]
    for key, axis in zip(grid, axes, strict=True):
        _require_single(axis, f"{where}.{key}")
    return list(product(*axes))


def _points(points: Any, where: str) -> list[tuple[str, ...]]:
    if points is None:
        return []
    require(isinstance(points, list) and 0 < len(points) <= MOST, where, points, f"a list of 1 to {MOST} lists of overrides; or no points")
    made = [_overrides(overrides, f"{where}[{index}]") for index, overrides in enumerate(points)]
    for index, overrides in enumerate(made):
        require(bool(overrides), f"{where}[{index}]", points[index], "at least one override, such as method=wanda")
    return made


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    valid = isinstance(value, list) and all(isinstance(override, str) for override in value)
    require(valid, where, value, "a list of overrides, such as [method=wanda, pattern.sparsity=0.6]")
    _require_single(value, where)
    return tuple(value)


def _require_single(overrides: list[str], where: str) -> None:
    """Refuse what is no override of Hydra's, and one that is a sweep of its own."""
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise ConfigError(f"{where}: found {override!r}, wanted KEY=VALUE ({' '.join(str(error).split())})") from None
        require(not parsed.is_sweep_override(), where, override, "a single value; lists of values belong into the grid")
