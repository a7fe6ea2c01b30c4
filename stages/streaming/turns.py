"""Functions that take turns: each runs in a thread of its own, one thread at a time, and may pause in the middle of any call.

A function that pauses keeps its whole stack, so that code which knows nothing of pauses, such as the forward method of a module, waits in
the middle. Threads, not generators or greenlets, since torch keeps state for each thread: whether gradients are recorded, autocast,
function and dispatch modes, the current GPU. A function that pauses inside such a context leaves it as it was for all others.
"""

from collections.abc import Callable
from threading import Semaphore, Thread


class Cancelled(BaseException):
    """Raised in a paused function that is not to go on; no Exception, so that the code in which it pauses does not catch it."""


class Turns:
    """One function that runs in turns; it begins at the first call of `resume`.

    Attributes:
        ended: whether it returned, raised or was cancelled.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.ended = False
        self._function, self._cancelled = function, False
        self._error: BaseException | None = None
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._function()
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by resume
            self._error = error
        self.ended = True
        self._stopped.release()

    def resume(self) -> None:
        """Let the function run until it pauses or ends; raises what it raises."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
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
        """End the function where it pauses, or where it does so next; returns once its thread has ended."""
        self._cancelled = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
