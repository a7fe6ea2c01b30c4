"""Send the evaluated experiments of this clone to MLflow or to Weights & Biases.

python -m stages.export mlflow                       all of them, to where MLflow itself writes: ./mlflow.db, or MLFLOW_TRACKING_URI
python -m stages.export wandb --online wanda-50      one of them, to the server of Weights & Biases; without --online into ./wandb
"""

import argparse
import sys
from collections.abc import Iterator

from stages.errors import SparsesweepError
from stages.experiments import mlflow_runs, wandb_runs
from stages.experiments.exporting import client, runs, selected
from stages.experiments.reading import read_experiments


def main() -> None:
    arguments = _parser().parse_args()
    try:
        for line in _lines(arguments):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


def _lines(arguments: argparse.Namespace) -> Iterator[str]:
    library = client(arguments.tracker)
    experiments, missing = read_experiments()
    sent = runs(selected(experiments, missing, arguments.experiments))
    if not sent:
        yield "no experiment was evaluated yet; `dvc exp run` runs one"
    elif arguments.tracker == "mlflow":
        yield from mlflow_runs.send(library, sent, to=arguments.to, project=arguments.project)
    else:
        yield from wandb_runs.send(library, sent, to=arguments.to, project=arguments.project, online=arguments.online)
    if not arguments.experiments:
        yield from (f"left out {one.name}: {one.reason}" for one in missing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.export", description="Send the evaluated experiments of this clone elsewhere.")
    trackers = parser.add_subparsers(dest="tracker", required=True)
    mlflow = trackers.add_parser("mlflow", help="to MLflow")
    wandb = trackers.add_parser("wandb", help="to Weights & Biases")
    mlflow.add_argument("--to", metavar="URI_OR_DIRECTORY", help="a tracking URI, or a directory for a database mlflow.db")
    wandb.add_argument("--to", metavar="DIRECTORY", help="the directory in which wandb/ is made")
    wandb.add_argument("--online", action="store_true", help="upload at once, with the key that the client finds")
    for tracker in (mlflow, wandb):
        tracker.add_argument("--project", default="sparsesweep", metavar="NAME", help="default: %(default)s")
        tracker.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which; default: all that were evaluated")
    return parser


if __name__ == "__main__":
    main()
