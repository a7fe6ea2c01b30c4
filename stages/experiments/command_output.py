"""Commands of git and dvc."""

import subprocess

from stages.errors import SparsesweepError


def output(*command: str) -> str:
    """What a command of git or dvc prints.

    Raises:
        SparsesweepError: it fails, with its words; or it is not installed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise SparsesweepError(f"{command[0]}: not found on PATH; is the project's virtual environment active?") from None
    if done.returncode:
        raise SparsesweepError(f"{' '.join(command[:3])} failed: {' '.join(done.stderr.split())}")
    return done.stdout
