"""Feed the readers of benchmarks.fuzz with inputs that are led by the code that they reach: atheris steers what hypothesis chooses.

python -m benchmarks.fuzz_coverage                             2,000 inputs for each reader
python -m benchmarks.fuzz_coverage --inputs 50000 --reader deltas

It needs atheris, which is in no extra: `pip install atheris`. Inputs, guards and properties are those of benchmarks.fuzz; of stages/ the
Python code is instrumented, so libraries written in C are not. Prints of each reader how its inputs ended, and fails where a property does
not hold. Writes nothing: which inputs are made depends on the processor's speed, too.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INPUTS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help="for each reader; default: %(default)s")
    parser.add_argument("--reader", metavar="NAME", help="one alone; default: all")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # in this process, which atheris ends; where that writes
    arguments = parser.parse_args()
    if arguments.here:
        feed_here(arguments.reader, arguments.inputs, arguments.here)
        return
    from benchmarks.fuzz import READERS

    if arguments.reader not in (None, *(names := [reader.name for reader in READERS])):
        sys.exit(f"found no reader {arguments.reader!r}, wanted one of: {'; '.join(names)}")
    failed = [name for name in names if arguments.reader in (None, name) and not passed(name, arguments.inputs)]
    if failed:
        sys.exit(f"inputs for which a property does not hold: {'; '.join(failed)}")


def passed(name: str, inputs: int) -> bool:
    """Feed a reader in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.fuzz_coverage", "--here", directory, "--reader", name, "--inputs", str(inputs)]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0


def feed_here(name: str, inputs: int, directory: Path) -> None:
    """Feed a reader until as many inputs have been tried; ends the process, with 1 where a property did not hold.

    Args:
        directory: for what atheris writes.
    """
    import atheris

    with atheris.instrument_imports(include=["stages"], enable_loader_override=False):
        from benchmarks.fuzz import READERS
    from hypothesis import given

    from benchmarks.fuzz.tally import SETTINGS, Tally, guarded, watching

    reader = next(one for one in READERS if one.name == name)
    tally, kinds = Tally(), set[str]()
    with guarded(reader) as guard:
        one_input = SETTINGS(given(reader.inputs)(watching(reader, guard, tally, kinds, "led by coverage"))).hypothesis.fuzz_one_input

        def test(data: bytes) -> None:
            one_input(data)
            if tally.inputs >= inputs:
                ended = f"{tally.refused} refused with a message, {tally.accepted} accepted, {tally.faults} faults"
                print(f"{name}: {tally.inputs} inputs, {ended}", flush=True)
                shutil.rmtree(guard.root.parent)  # nothing else is left of the process to do it
                os._exit(bool(tally.faults))

        unhandled = [f"-handle_{signal}=0" for signal in ("segv", "bus", "abrt", "fpe", "ill")]  # libraries have handlers of their own
        artifacts = f"-artifact_prefix={directory}/"  # slow inputs, and those that end the process
        atheris.Setup([sys.argv[0], artifacts, "-verbosity=0", "-len_control=0", "-max_len=4096", *unhandled], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
