"""Functions that take turns."""

import gc
import threading
import weakref

import pytest

from stages.pruning.turns import Turns


def test_functions_go_on_where_they_paused():
    said = []

    def counting(name: str) -> Turns:
        def count() -> None:
            for number in range(3):
                said.append(f"{name}{number}")
                turns.pause()

        turns = Turns(count)
        return turns

    first, second = counting("a"), counting("b")
    while not (first.ended and second.ended):
        for turns in (first, second):
            if not turns.ended:
                turns.resume()
    assert said == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_thread_whose_function_has_ended_takes_the_next_one():
    threads = []
    for _ in range(5):
        Turns(lambda: threads.append(threading.current_thread())).resume()
    assert len(set(threads)) <= 2  # the first may not have come back when the second is asked for


def test_what_a_function_raises_is_raised_where_it_is_resumed():
    def failing() -> None:
        raise KeyError("found none")

    turns = Turns(failing)
    with pytest.raises(KeyError, match="found none"):
        turns.resume()
    assert turns.ended


@pytest.mark.parametrize("resumed", [0, 1, 2])
def test_a_cancelled_function_ends_where_it_pauses(resumed):
    said = []

    def endless() -> None:
        try:
            while True:
                turns.pause()
                said.append("on")
        finally:
            said.append("cleaned up")

    turns = Turns(endless)
    for _ in range(resumed):
        turns.resume()
    turns.cancel()
    assert said == ["on"] * max(0, resumed - 1) + ["cleaned up"] * (resumed > 0)
    assert turns.ended


class Held:
    turns: Turns


def run_to_the_end(*, by_cancelling: bool) -> weakref.ref:
    """Of a function that holds the object that runs it."""
    held = Held()
    held.turns = Turns(lambda: held.turns.pause())
    held.turns.resume()
    (held.turns.cancel if by_cancelling else held.turns.resume)()
    return weakref.ref(held)


@pytest.mark.parametrize("by_cancelling", [False, True])
def test_what_a_function_holds_is_freed_when_it_ends(by_cancelling):
    gc.collect()
    gc.disable()
    try:
        assert run_to_the_end(by_cancelling=by_cancelling)() is None
    finally:
        gc.enable()
