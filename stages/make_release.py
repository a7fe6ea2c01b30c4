"""From a model to its pruned release by one command: the pipeline of dvc.yaml, run once, without DVC.

python -m stages.make_release ORG/NAME OUT                          a repository of a model hub
python -m stages.make_release DIR OUT --license mit                 a directory with a safetensors checkpoint
python -m stages.make_release FILE.gguf OUT --license apache-2.0    one GGUF file
python -m stages.make_release smollm2_135m OUT                      a base of conf/base
python -m stages.make_release ORG/NAME OUT --quality best --sparsity 0.6
"""

import argparse
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from stages.errors import SparsesweepError
from stages.release.making import PATTERNS, QUALITIES, Order, make


def main() -> None:
    try:
        print(make(Order(**vars(_parser().parse_args()))))
    except (SparsesweepError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.make_release", description="From a model to its pruned release.")
    parser.add_argument("model", metavar="MODEL", help="ORG/NAME of a model hub, a directory, a GGUF file, or a base of conf/base")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of the release, which must not be there")
    parser.add_argument("--quality", choices=QUALITIES, default="fast", help="fast, or the strongest known; default: %(default)s")
    parser.add_argument(
        "--sparsity", default="0.5", metavar="S", help=f"fraction of zeros, or one of {', '.join(PATTERNS)}; default: %(default)s"
    )
    parser.add_argument("--revision", metavar="COMMIT", help="of a repository; default: its newest")
    parser.add_argument("--license", metavar="NAME", help="of a directory or file, or of a repository whose card states none")
    parser.add_argument("--name", metavar="ORG/NAME", help="of a directory's or file's model; default: of the directory or file")
    parser.add_argument(
        "-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="any other choice, as for `dvc exp run`"
    )
    return parser


if __name__ == "__main__":
    main()
