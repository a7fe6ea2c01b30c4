"""Functions that take turns: each runs in a thread of its own, one thread at a time, and may pause in the middle of any call.

A function that pauses keeps its whole stack, so that code which knows nothing of pauses, such as the forward method of a module, waits in
the middle. Threads, not generators or greenlets, since torch keeps state for each thread: whether gradients are recorded, autocast,
function and dispatch modes, the current GPU. A function that pauses inside such a context leaves it as it was for all others.

A thread whose function has ended takes the next one: libraries of a GPU prepare anew what they do in a thread that they have not seen,
which takes longer than a block's products.
"""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Semaphore, Thread

NAME = "turns"  # of the threads


class Cancelled(BaseException):
    """Raised in a paused function that is not to go on; no Exception, so that the code in which it pauses does not catch it."""


def _nothing() -> None: ...


class _Worker:
    """A thread that runs one function after another."""

    idle: "list[_Worker]" = []

    def __init__(self) -> None:
        self._functions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        Thread(target=self._work, name=NAME, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._functions.get()()
            self.idle.append(self)

    @classmethod
    def run(cls, function: Callable[[], None]) -> None:
        """Let a thread run a function that raises nothing."""
        try:
            worker = cls.idle.pop()
        except IndexError:
            worker = cls()
        worker._functions.put(function)


class Turns:
    """One function that runs in turns; it begins at the first call of `resume`.

    Attributes:
        ended: whether it returned, raised or was cancelled.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.ended = self._began = self._cancelled = False
        self._function = function
        self._error: BaseException | None = None
        self._go, self._stopped = Semaphore(0), Semaphore(0)

    def _run(self) -> None:
        function, self._function = self._function, _nothing  # it may hold this object, and both are to be freed when it ends
        try:
            function()
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by resume
            self._error = error
        del function
        self.ended = True
        self._stopped.release()

    def resume(self) -> None:
        """Let the function run until it pauses or ends; raises what it raises."""
        if self._began:
            self._go.release()
        else:
            self._began = True
            _Worker.run(self._run)
        self._stopped.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def pause(self) -> None:
        """Called by the function: wait until it is resumed.

        Raises:
            Cancelled: it is not to go on.
        """
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise Cancelled

    def cancel(self) -> None:
        """End the function where it pauses; returns once it has ended."""
        self._cancelled = True
        if not self._began:
            self._function, self.ended = _nothing, True
        while not self.ended:
            self._go.release()
            self._stopped.acquire()
