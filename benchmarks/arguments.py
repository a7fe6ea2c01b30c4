"""The command line of a benchmark that has no options."""

import argparse


def none(doc: str) -> None:
    """Answer --help with the first line of a module's docstring, and refuse whatever else is given.

    Raises:
        SystemExit: anything was given; before a benchmark begins, which may take most of an hour.
    """
    argparse.ArgumentParser(description=doc.splitlines()[0]).parse_args()
