"""Show all experiments of this clone in the terminal, best first.

python -m stages.show               what was pruned and how it scores
python -m stages.show --commands    with the line that runs each again
python -m stages.show --seeds       one row for what differs in the calibration seed alone: mean ± spread between seeds
python -m stages.show --divergence  the lines of llama.cpp's `llama-perplexity --kl-divergence`, for each experiment
"""

import argparse
import sys

from stages.errors import SparsesweepError
from stages.experiments import divergence
from stages.experiments.reading import read_experiments
from stages.experiments.table import text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.show", description="Show all experiments of this clone, best first.")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--commands", action="store_true", help="with the line that runs each again")
    rows.add_argument("--seeds", action="store_true", help="one row for repeats by calibration seed, with the spread between seeds")
    rows.add_argument("--divergence", action="store_true", help="how far each lies from dense, in the lines of llama.cpp's --kl-divergence")
    arguments = parser.parse_args()
    try:
        found = read_experiments()
        print(divergence.text(*found) if arguments.divergence else text(*found, commands=arguments.commands, seeds=arguments.seeds))
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
