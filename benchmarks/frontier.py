"""The picture of the frontier in the README: a sweep of five sparsities by three methods through the pipeline itself, and its page.

python -m benchmarks.frontier

Each point is one `dvc exp run`, so a point that was run before costs seconds. Runs the ruler of quantised models once, writes the page of
comparison into comparison/, and docs/frontier.svg of it. Leaves the default in the workspace. Takes an hour on two cores.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import arguments
from benchmarks.table import command, the_default_afterwards
from stages.files import COMPARISON

PICTURE = Path("docs/frontier.svg")
PLOT = "frontier-corpus-wikipedia-perplexity-1.svg"  # of the protocol with the most experiments
SPARSITIES = (0.5, 0.3, 0.4, 0.6, 0.7)
METHODS = ("wanda", "sparsegpt", "admm_short")
RULER = "ruler.types=[Q8_0,Q4_0,Q2_K]"


def points() -> list[str]:
    """The overrides of each experiment."""
    return [f"evaluation=sweep {RULER} method={method} pattern.sparsity={sparsity}" for sparsity in SPARSITIES for method in METHODS]


def main() -> None:
    with the_default_afterwards():
        for overrides in points():
            print("$", *command(overrides), flush=True)
            subprocess.run([*command(overrides), "--quiet", "evaluate_sparse"], check=True, stdout=sys.stderr)
        subprocess.run([*command(points()[0]), "--quiet", "evaluate_sparse", "evaluate_quantised"], check=True, stdout=sys.stderr)
        subprocess.run([sys.executable, "-m", "stages.compare"], check=True)
        shutil.copyfile(COMPARISON / PLOT, PICTURE)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
