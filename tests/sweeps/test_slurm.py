"""The script for SLURM, and what it does where a stand-in for sbatch executes it."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.sweeps import slurm
from stages.sweeps.file import Resources
from stages.sweeps.plan import Plan, Point
from tests.sweeps.conftest import Project

# sbatch as far as the script needs it: it reads the array's numbers and executes one after the other, and prints a job's number.
SBATCH = """#!/bin/bash
set -euo pipefail
array=""; for argument in "$@"; do case "$argument" in --array=*) array="${argument#--array=}";; esac; done
script="${@: -1}"
grep -q '^#SBATCH --cpus-per-task=' "$script"
for part in ${array//,/ }; do
  for index in $(seq "${part%-*}" "${part#*-}"); do
    SLURM_ARRAY_TASK_ID=$index bash "$script" >> "$SBATCH_LOG" 2>&1
  done
done
echo "$*" >> "$SBATCH_LOG.calls"
echo 42
"""


def planned(after: dict[str, set[str]], there: tuple[str, ...] = (), device: str = "cpu", processes: int = 1) -> Plan:
    params = {"prune": {"device": device, "processes": processes}, "evaluation": {"device": device}}
    points = tuple(Point(index=i, name=name, overrides=(), varied=(), params=params) for i, name in enumerate(after))
    waiting = {name: frozenset(names) for name, names in after.items() if name not in there}
    return Plan(sweep=_Named(), points=points, results=dict.fromkeys(there), after=waiting, seconds={})


class _Named:
    name, path = "mine", Path("mine.yaml")


def test_the_directives_say_what_each_point_may_use(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    resources = Resources(gpus=2, cpus=8, memory_gib=1.5, threads=4)
    script = slurm.script(planned({"a": set(), "b": {"a"}}), resources, "c" * 40, Path("out.sbatch"), share=True)
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert {"--array=0-1", "--ntasks=1", "--cpus-per-task=8", "--mem=1536M", "--gres=gpu:2", f"--chdir={tmp_path}"} <= set(directives)
    options = "--gpus 2 --cpus 8 --memory 1.5 --threads 4 --share"
    assert f'mine.yaml --revision {"c" * 40} {options} --point "${{points[$SLURM_ARRAY_TASK_ID]}}"' in script
    assert "  [1]=b\n" in script


def test_a_directory_with_blanks_is_quoted_as_sbatch_reads_it(monkeypatch, tmp_path):
    directory = tmp_path / 'my "own" project'
    directory.mkdir()
    monkeypatch.chdir(directory)
    script = slurm.script(planned({"a": set()}), Resources(gpus=0), "c" * 40, Path("out.sbatch"), share=False)
    assert f'#SBATCH --chdir="{tmp_path}/my \\"own\\" project"\n' in script
    assert "#SBATCH --job-name=mine\n" in script


def test_what_is_not_declared_is_not_asked_for():
    script = slurm.script(planned({"a": set()}), Resources(gpus=0), "c" * 40, Path("out.sbatch"), share=False)
    assert "--mem" not in script
    assert "--gres" not in script


def test_each_wave_is_submitted_after_the_one_before():
    plan = planned({"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a", "c"}, "e": {"a"}}, there=())
    assert slurm.submission(plan, Path("my out.sbatch")) == [
        "wave0=$(sbatch --parsable --array=0 'my out.sbatch')",
        "wave1=$(sbatch --parsable --dependency=afterany:$wave0 --array=1-2,4 'my out.sbatch')",
        "wave2=$(sbatch --parsable --dependency=afterany:$wave1 --array=3 'my out.sbatch')",
    ]


def test_points_that_may_use_a_gpu_must_say_how_many():
    with pytest.raises(ConfigError, match="resources.gpus: found null, wanted how many GPUs of SLURM's each point gets: --gpus 1, or 0"):
        slurm.with_gpus(planned({"a": set()}, device="auto"), Resources())
    several = planned({"a": set()}, device="auto", processes=4)
    with pytest.raises(ConfigError, match="resources.gpus: found null, wanted .*: --gpus 4, or 0 for none"):
        slurm.with_gpus(several, Resources())
    with pytest.raises(ConfigError, match="resources.gpus: found 1, wanted null, 0, or at least 4: prune.processes of a point"):
        slurm.with_gpus(several, Resources(gpus=1))
    assert slurm.with_gpus(planned({"a": set()}), Resources()).gpus == 0
    assert slurm.with_gpus(planned({"a": set()}, device="auto"), Resources(gpus=1)).gpus == 1


def test_the_script_runs_every_point_and_no_stage_twice(project: Project, tmp_path):
    points = project.write("array.yaml", "overrides: [evaluation=sweep]\ngrid: {pattern.sparsity: [0.5, 0.6]}\n")
    script, log, sbatch = tmp_path / "out.sbatch", tmp_path / "log", tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    code, output = project.sweep(points, "--slurm", str(script), "--gpus", "0").finished()
    assert code == 0, output
    lines = [line.strip() for line in output.splitlines() if "sbatch --parsable" in line]
    environment = {"PATH": f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}", "SBATCH_LOG": str(log)}
    code, output = project.start("bash", "-euc", "\n".join(lines), **environment).finished()
    assert code == 0, output
    assert [line.split()[-2:] for line in Path(f"{log}.calls").read_text().splitlines()] == [
        ["--array=0", str(script)],
        ["--array=1", str(script)],
    ]
    assert log.read_text().count(": done, ran") == 2
    assert "done, ran prune, evaluate_sparse\n" in log.read_text()
    code, output = project.sweep(points, "--slurm", str(script)).finished()
    assert code == 0, output
    assert "2 there already, 0 to run" in output


def test_a_script_is_valid_bash(tmp_path):
    path = tmp_path / "out.sbatch"
    path.write_text(slurm.script(planned({"a": set(), "b": {"a"}}), Resources(gpus=0), "c" * 40, path, share=False))
    subprocess.run(["bash", "-n", str(path)], check=True)
