"""A script for SLURM: an array of which each task runs one point of a sweep."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stages.errors import ConfigError
from stages.sweeps.file import Resources
from stages.sweeps.local import DIRECTORY, gpus_of_each
from stages.sweeps.plan import Plan, Point

LOGS = (DIRECTORY / "slurm-%A_%a.out").as_posix()


def with_gpus(plan: Plan, resources: Resources) -> Resources:
    """The same with the number of GPUs, which must be declared where points may use one: SLURM's nodes cannot be seen from here.

    Raises:
        ConfigError: it is not declared; or see local.gpus_of_each.
    """
    if resources.gpus is None and (most := gpus_of_each(plan, resources, available=True)):
        raise ConfigError(f"resources.gpus: found null, wanted how many GPUs of SLURM's each point gets: --gpus {most}, or 0 for none")
    return replace(resources, gpus=gpus_of_each(plan, resources, available=False))


def script(plan: Plan, resources: Resources, revision: str, path: Path, *, share: bool) -> str:
    """An sbatch script that runs the points which are not there yet, by the same interpreter, in this directory.

    Args:
        resources: with a number of GPUs. revision: of the code. path: of the script. share: whether each point is pushed when done.
    """
    gpus, memory = resources.gpus, resources.memory_gib
    directives = [
        f"--job-name={_quoted(plan.sweep.name)}",
        f"--array={indices(plan.to_run)}",
        "--ntasks=1",
        f"--cpus-per-task={resources.cpus}",
        *([] if memory is None else [f"--mem={int(memory * 1024)}M"]),
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        f"--chdir={_quoted(str(Path.cwd()))}",
        f"--output={LOGS}",
        "--requeue",
    ]
    command = [sys.executable, "-m", "stages.sweep", str(plan.sweep.path), "--revision", revision, *_options(resources, share)]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in directives),
        "# Points of the first line compute what others share. Submitted so, no stage is computed twice:",
        *(f"#   {line}" for line in submission(plan, path)),
        "declare -A points=(",
        *(f"  [{point.index}]={point.name}" for point in plan.to_run),
        ")",
        f'exec {shlex.join(command)} --point "${{points[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As sbatch reads a value in a script: in double quotes if it has blanks or the like."""
    return text if re.fullmatch(r"[\w./-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def submission(plan: Plan, path: Path) -> list[str]:
    """The lines that submit a script, each wave after the one before: no point runs beside one that computes stages for it."""
    lines = []
    for number, wave in enumerate(plan.waves()):
        dependency = f"--dependency=afterany:$wave{number - 1} " if number else ""
        lines.append(f"wave{number}=$(sbatch --parsable {dependency}--array={indices(wave)} {shlex.quote(str(path))})")
    return lines


def indices(points: Sequence[Point]) -> str:
    """The numbers of points as sbatch takes them, such as "0-3,7"."""
    runs: list[list[int]] = []
    for index in sorted(point.index for point in points):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


def _options(resources: Resources, share: bool) -> list[str]:
    memory = [] if resources.memory_gib is None else ["--memory", f"{resources.memory_gib:g}"]
    threads = [] if resources.threads is None else ["--threads", str(resources.threads)]
    return ["--gpus", str(resources.gpus), "--cpus", str(resources.cpus), *memory, *threads, *(["--share"] if share else [])]
