"""Points are started when what they wait for is over, and what is lost is said."""

from concurrent.futures import Future

import pytest

from stages.sweeps import running
from stages.sweeps.plan import Plan, Point
from stages.sweeps.worker import Outcome


def planned(after: dict[str, set[str]]) -> Plan:
    points = tuple(Point(index=i, name=name, overrides=(), varied=(), params={}) for i, name in enumerate(after))
    return Plan(sweep=None, points=points, results={}, after={name: frozenset(names) for name, names in after.items()}, seconds={})


def finished(result: Outcome | Exception) -> "Future[Outcome]":
    future: Future[Outcome] = Future()
    if isinstance(result, Outcome):
        future.set_result(result)
    else:
        future.set_exception(result)
    return future


def test_a_point_starts_when_all_that_it_waits_for_is_over_even_if_it_failed():
    started = []

    def submit(point: Point) -> "Future[Outcome]":
        started.append(point.name)
        return finished(Outcome(name=point.name, error="no" if point.name == "a" else None))

    outcomes = list(running.run(planned({"d": {"b", "c"}, "a": set(), "b": {"a"}, "c": {"a"}}), submit))
    assert started[0] == "a"
    assert started[-1] == "d"
    assert sorted(outcome.name for outcome in outcomes if outcome.error is None) == ["b", "c", "d"]


def test_a_point_that_was_lost_failed_and_any_other_error_is_raised():
    (outcome,) = running.run(planned({"a": set()}), lambda _: finished(OSError("no  space\nleft")), (OSError,))
    assert outcome == Outcome(name="a", error="OSError: no space left")
    with pytest.raises(KeyError):
        list(running.run(planned({"a": set()}), lambda _: finished(KeyError("x")), (OSError,)))


def test_each_point_is_said_with_what_it_ran_and_the_time_left():
    said = []
    outcomes = [
        Outcome(name="a", error=None, stages=("prune",), seconds=120),
        Outcome(name="b", error=None, seconds=2),
        Outcome(name="c", error="x"),
    ]
    assert running.progress(planned({"a": set(), "b": set(), "c": set()}), iter(outcomes), say=said.append) == outcomes
    assert said == [
        "1/3 a: done in 2 min, ran prune; about 0 s left",
        "2/3 b: done in 2 s, computed nothing; about 0 s left",
        "3/3 c: failed",
    ]
