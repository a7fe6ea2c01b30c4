"""Search for the highest value of a parameter, such as the sparsity, at which the damage keeps within a limit.

    next = (highest value within the limit + lowest value beyond it) / 2

Damage rises with sparsity, so that each point halves the interval: six points tell 0.3 to 0.8 apart to 0.01. A sampler that assumes
nothing, such as Optuna's TPE, draws its first ten points at random. Where the damage of neighbours is noise, the answer is one of the
places where it crosses the limit.

A point is an experiment like any other of a sweep, and the experiments are the state: a search that was stopped goes on, and one that is
done computes nothing. Optuna's study is made of them, point by point, by its ask and tell, and lies in a file that its dashboard reads:
the highest value within the limit is its best trial, and values beyond are pruned trials.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from stages.errors import ConfigError, SparsesweepError
from stages.evaluation.measurement import Better
from stages.experiments.reading import Experiment
from stages.sweeps.file import Search, Sweep
from stages.sweeps.local import DIRECTORY
from stages.sweeps.plan import Plan, plan

DIGITS = 7  # of the interval, in the values that are tried: MOST_STEPS halve it to a millionth
Run = Callable[[Plan], Sequence[Experiment]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A point of a search.

    value: of the parameter. plan: of this point alone. ratio: of the metric to the dense model's; None: it is not there yet.
    within: whether that keeps within the limit.
    """

    value: float
    plan: Plan
    ratio: float | None = None
    within: bool = False


def client() -> Any:
    """Import Optuna.

    Raises:
        ConfigError: it is not installed; names the command that installs it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("found no package optuna, wanted it for a search: pip install -c constraints.txt -e '.[search]' brings it")
    return importlib.import_module("optuna")


def steps(sweep: Sweep, search: Search, experiments: Sequence[Experiment], run: Run | None, revision: str = "HEAD") -> Iterator[Step]:
    """The points of a search, one after another; where one is not there it is run.

    Args:
        run: runs the plan of a point, and reads the experiments anew; None: the first point that is not there ends the search.
        revision: the commit whose code the points run.

    Raises:
        SparsesweepError: a point failed, or has not the metric.
    """
    low, high = search.low, search.high
    decimals = DIGITS - math.floor(math.log10(high - low))
    for _ in range(search.points):
        value = round((low + high) / 2, decimals)
        made = _planned(sweep, search, value, experiments, revision)
        if made.to_run and run is None:
            yield Step(value=value, plan=made)
            return
        if made.to_run and run is not None:
            experiments = run(made)
            made = _planned(sweep, search, value, experiments, revision)
        ratio, within = _damage(search, made)
        yield Step(value=value, plan=made, ratio=ratio, within=within)
        low, high = (value, high) if within else (low, value)


def _planned(sweep: Sweep, search: Search, value: float, experiments: Sequence[Experiment], revision: str) -> Plan:
    return plan(replace(sweep, varied=((f"{search.parameter}={value}",),)), experiments, revision)


def _damage(search: Search, made: Plan) -> tuple[float, bool]:
    """The ratio of a point's metric to the dense model's, and whether it keeps within the limit."""
    (point,) = made.points
    experiment = made.results.get(point.name)
    if experiment is None:
        raise SparsesweepError(f"{point.name}: found no result of it, wanted one to go on from; the line above says why it failed")
    measured = experiment.measured(search.metric)
    if measured is None or measured.dense is None or measured.dense <= 0:
        known = ", ".join(dict.fromkeys(one.metric for one in experiment.measurements if one.dense))
        wanted = f"one that {experiment.name} has beside the dense model's: {known}"
        raise ConfigError(f"search.metric: found {search.metric!r}, wanted {wanted}")
    ratio = measured.value / measured.dense
    return ratio, ratio >= search.limit if measured.better == Better.HIGHER else ratio <= search.limit


def record(optuna: Any, sweep: Sweep, search: Search, found: Sequence[Step]) -> Path:
    """Write Optuna's study of the points that are there, anew, into a file.

    Returns:
        The file, a journal of Optuna's.
    """
    path = DIRECTORY / f"{sweep.name}.optuna"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=sweep.name, direction="maximize")
    between = {search.parameter: optuna.distributions.FloatDistribution(search.low, search.high)}
    for step in (step for step in found if step.ratio is not None):
        study.enqueue_trial({search.parameter: step.value}, user_attrs={f"{search.metric} over dense": step.ratio})
        trial = study.ask(between)
        if step.within:
            study.tell(trial, step.value)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return path


def text(search: Search, found: Sequence[Step]) -> str:
    """The points that are there as a table, and what they say."""
    rows = [
        [step.value, f"{step.ratio:.4g}", "yes" if step.within else "no", *step.plan.there.values()]
        for step in found
        if step.ratio is not None
    ]
    table = tabulate(rows, (search.parameter, f"{search.metric} over dense", "within", "experiment"), disable_numparse=True)
    return f"{table}\n\n{answer(search, found)}" if rows else answer(search, found)


def answer(search: Search, found: Sequence[Step]) -> str:
    """The highest value within the limit so far, and how many points are left."""
    there = [step for step in found if step.ratio is not None]
    within = [step.value for step in there if step.within]
    beyond = [step.value for step in there if not step.within]
    limit = f"{search.metric} at {search.limit:g} of the dense model's"
    said = f"highest {search.parameter} within {limit}: {max(within)}" if within else f"no {search.parameter} is known within {limit}"
    said += f"; beyond it from {min(beyond)}" if beyond else f"; up to {search.high} none is known beyond it"
    left = search.points - len(there)
    following = [step.value for step in found if step.ratio is None]
    return said + f"; {left} of {search.points} points left" + (f", next {following[0]}" if following else "") if left else said
