"""Share the evaluated experiments of this clone with the team.

python -m stages.share                    all of them: git references, files and run records
python -m stages.share wanda-50 wanda-60  these
"""

import argparse
import sys

from stages.errors import SparsesweepError
from stages.experiments.reading import read_experiments
from stages.sharing.sending import share


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.share", description="Share the evaluated experiments of this clone.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which; default: all that were evaluated")
    names = parser.parse_args().experiments
    try:
        for line in share(*read_experiments(), names):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
