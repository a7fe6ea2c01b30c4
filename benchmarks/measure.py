"""What a command costs: wall seconds, and the memory of its process (not of its children) as Linux counts it."""

import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks at the memory


@dataclass(kw_only=True, frozen=True)
class Cost:
    """What a command cost.

    seconds: wall time from start to end.
    exit_code: 0 where it succeeded, -N where signal N ended it.
    peak_resident: bytes, VmHWM: the most that was in memory at once, mapped files included.
    peak_anonymous: bytes, the most seen of RssAnon: what no file backs, such as tensors that were computed or copied.
    """

    seconds: float
    exit_code: int
    peak_resident: int
    peak_anonymous: int


def measure(
    command: list[str], *, directory: Path | None = None, environment: dict[str, str] | None = None, log: Path | None = None
) -> Cost:
    """Run a command to its end, whatever that is.

    Args:
        directory: to run in; None: the current one.
        environment: all its variables; None: those of this process.
        log: takes its output; None: the output goes where this process's goes.
    """
    started = time.perf_counter()
    resident = anonymous = 0
    with (
        log.open("wb") if log else nullcontext() as output,
        subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None:
                memory = _memory(process.pid)
                resident = max(resident, memory.get("VmHWM", 0))
                anonymous = max(anonymous, memory.get("RssAnon", 0))
                time.sleep(INTERVAL)
        finally:
            process.kill()  # where this process is interrupted; nothing where the command has ended
    seconds = time.perf_counter() - started
    return Cost(seconds=seconds, exit_code=process.returncode, peak_resident=resident, peak_anonymous=anonymous)


def _memory(pid: int) -> dict[str, int]:
    """The memory lines of a process's status, in bytes; none where it has ended but nobody asked for its exit code."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def imports(python: str = sys.executable, environment: dict[str, str] | None = None) -> Cost:
    """What a process costs that has only imported torch and transformers: the floor of all that is built on them.

    Raises:
        RuntimeError: this interpreter does not have them.
    """
    wait = f"time.sleep({5 * INTERVAL})"  # so that its full size is seen
    cost = measure([python, "-c", f"import time, torch, transformers; {wait}"], environment=environment)
    if cost.exit_code:
        raise RuntimeError(f"{python}: importing torch and transformers ended with exit code {cost.exit_code}")
    return cost
