"""Share the evaluated experiments of this clone with the team.

python -m stages.share                    all of them: git references, files and run records
python -m stages.share wanda-50 wanda-60  these
python -m stages.share --repair           also rehashes what the remote has of them, and replaces what is damaged there
"""

import argparse
import sys

from stages.errors import SparsesweepError
from stages.experiments.reading import read_experiments
from stages.sharing.sending import share


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.share", description="Share the evaluated experiments of this clone.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which; default: all that were evaluated")
    parser.add_argument("--repair", action="store_true", help="also rehash what the remote has of them, and replace what is damaged")
    arguments = parser.parse_args()
    try:
        for line in share(*read_experiments(), arguments.experiments, repair=arguments.repair):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
