"""Show all experiments of this clone in the terminal, best first.

python -m stages.show              what was pruned and how it scores
python -m stages.show --commands   with the line that runs each again
"""

import argparse
import sys

from stages.errors import SparsesweepError
from stages.experiments.reading import read_experiments
from stages.experiments.table import text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.show", description="Show all experiments of this clone, best first.")
    parser.add_argument("--commands", action="store_true", help="with the line that runs each again")
    arguments = parser.parse_args()
    try:
        print(text(*read_experiments(), commands=arguments.commands))
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
