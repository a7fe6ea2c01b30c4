"""Receive the experiments that the team has shared: their numbers, and a page that compares them. No stage is executed.

python -m stages.receive                     all of them; writes comparison/index.html
python -m stages.receive wanda-50 wanda-60   these
python -m stages.receive --apply wanda-50    all, and this one's parameters, lock and results into the workspace, to go on from there
python -m stages.receive --release wanda-50  the same, and its release
"""

import argparse
import sys
from collections.abc import Iterator

from stages.compare import write_page
from stages.errors import NotReceivedError, SparsesweepError
from stages.files import COMPARISON
from stages.sharing.receiving import apply, receive, require_release


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.receive", description="Receive the experiments that the team has shared.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which; default: all that were shared")
    applied = parser.add_mutually_exclusive_group()
    applied.add_argument("--apply", metavar="EXPERIMENT", help="bring its parameters, lock and results into the workspace")
    applied.add_argument("--release", metavar="EXPERIMENT", help="the same, and its release")
    try:
        for line in _lines(parser.parse_args()):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


def _lines(arguments: argparse.Namespace) -> Iterator[str]:
    name = arguments.apply or arguments.release
    names = arguments.experiments
    rest: NotReceivedError | None = None
    try:
        yield from receive([*names, name] if names and name else names)
    except NotReceivedError as error:
        rest = error
    came = name and (rest is None or name not in rest.names)
    try:
        if arguments.release and came:
            require_release(name)
        yield write_page(COMPARISON)
        if came:
            yield from apply(name, release=name == arguments.release)
    except SparsesweepError as error:
        raise error if rest is None else SparsesweepError(f"{error}; {rest}") from None
    if rest is not None:
        raise rest


if __name__ == "__main__":
    main()
