"""Rehash DVC's cache, and name what is damaged.

python -m stages.verify_cache          names damaged files, and the experiments that they belong to
python -m stages.verify_cache --drop   removes them, so that `dvc pull` or `dvc repro` brings them again
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.errors import SharingError, SparsesweepError
from stages.sharing import objects
from stages.sharing.remote import project


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.verify_cache", description="Rehash DVC's cache, and name what is damaged.")
    parser.add_argument("--drop", action="store_true", help="remove what is damaged; `dvc pull` or `dvc repro` brings it again")
    arguments = parser.parse_args()
    try:
        for line in _lines(drop=arguments.drop):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


def _lines(*, drop: bool) -> Iterator[str]:
    with project() as repo:
        cache = Path(repo.cache.legacy.path)
    found, count, size = objects.damaged(cache)
    named = objects.users(cache, found) if found else {}
    for one in found:
        yield f"damaged: {one.path}: found {one.found}; {', '.join(named.get(one.oid, ['in no lock of this clone']))}"
    yield f"rehashed {count} files of {cache}, {size / 1e6:.1f} MB: {len(found)} damaged"
    if found and not drop:
        advice = "`python -m stages.verify_cache --drop` removes them, then `dvc pull` or `dvc repro` brings them again"
        raise SharingError(f"{cache}: found {_files(found)} damaged, wanted none; {advice}")
    if found:
        removed = objects.drop(cache, found)
        yield f"removed {_files(found)} of the cache, and of the workspace: {', '.join(removed) or 'nothing'}"
        yield "`dvc pull` brings them from the remote, `dvc repro` computes them"


def _files(found: Sequence[objects.Damaged]) -> str:
    return f"{len(found)} file{'s' * (len(found) != 1)}"


if __name__ == "__main__":
    main()
