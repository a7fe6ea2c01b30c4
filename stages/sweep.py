"""Run a sweep: every point of a sweep file, each computed once, here, on a Ray cluster or under SLURM.

python -m stages.sweep sweeps/example.yaml --dry-run             what would run, what is there, how long it takes
python -m stages.sweep sweeps/example.yaml --jobs 2              two points at once on this machine
python -m stages.sweep sweeps/example.yaml --together            all pruned, then evaluated side by side
python -m stages.sweep sweeps/example.yaml --ray                 on a Ray cluster on this machine, for this sweep alone
python -m stages.sweep sweeps/example.yaml --address HOST:PORT   on a Ray cluster that is there
python -m stages.sweep sweeps/example.yaml --slurm sweep.sbatch  writes a script for sbatch
python -m stages.sweep sweeps/example.yaml --point 3             one point, as that script runs it
"""

import argparse
import sys
from pathlib import Path

from stages.errors import SparsesweepError
from stages.sweeps.command import JOBS, NODE_DIRECTORY, run


def main() -> None:
    try:
        code = run(_parser().parse_args())
    except SparsesweepError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.sweep", description="Run every point of a sweep file, each computed once.")
    parser.add_argument("file", type=Path, metavar="FILE", help="such as sweeps/example.yaml")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="only say what would run, what is there, and how long it takes")
    where.add_argument("--ray", action="store_true", help="on a Ray cluster on this machine, started and ended by this command")
    where.add_argument("--address", metavar="HOST:PORT", help="on a Ray cluster that is there")
    where.add_argument("--slurm", type=Path, metavar="OUT", help="write a script for sbatch")
    where.add_argument("--point", metavar="N", help="run one point, by its number or name in --dry-run")
    parser.add_argument("--jobs", "-j", type=int, metavar="N", help=f"points at once on this machine, default: {JOBS}")
    parser.add_argument("--together", action="store_true", help="prune all points, then evaluate them side by side: the base is read once")
    parser.add_argument("--share", action="store_true", help="push each point to the git remote and the DVC remote when it is done")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of each point; default: the file's, or as many as processes")
    parser.add_argument("--cpus", type=int, metavar="N", help="processors of each point; default: the file's, or 1")
    parser.add_argument("--memory", type=float, metavar="GIB", help="host memory of each point; default: the file's, or not declared")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each process; default: the file's, or as many as processors")
    parser.add_argument("--revision", metavar="COMMIT", help="of the code that the points run; default: the current commit")
    parser.add_argument(
        "--node-directory",
        metavar="DIR",
        help=f"with --address: for each node's cache and clones, default: {NODE_DIRECTORY}",
    )
    return parser


if __name__ == "__main__":
    main()
