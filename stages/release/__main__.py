"""What is done with a release after it was made.

python -m stages.release unpack DIR                                     a packed release as the plain checkpoint it was, in DIR-unpacked
python -m stages.release unpack ORG/NAME --revision COMMIT --out DIR    the same, from the hub
python -m stages.release check DIR --against RELEASE                    which zeros of the release a checkpoint has lost
python -m stages.release check DIR --against RELEASE --apply            sets them to zero again
python -m stages.release kernel DIR macko                               whether a GPU kernel's layout takes a release, and its bytes
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.errors import ConfigError, ReleaseError, SparsesweepError
from stages.files import remove
from stages.release.kernels.converting import KERNELS
from stages.release.kernels.converting import check as check_kernel
from stages.release.naming import is_legal
from stages.release.packed import download_release, unpack_release
from stages.release.zeros import Kept, apply, compare


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parsed = _parser().parse_args(arguments)
    try:
        for line in parsed.lines(parsed):
            print(line, flush=True)
    except SparsesweepError as error:
        sys.exit(f"error: {error}")


def _unpack(arguments: argparse.Namespace) -> Iterator[str]:
    """Unpack a directory, or a repository of the hub that is downloaded first."""
    directory = Path(arguments.release)
    target = arguments.out or Path(f"{directory.name}-unpacked")
    if target.exists():
        raise ReleaseError(f"{target}: found something there, wanted a path for the unpacked release; --out names another")
    downloads = target.with_name(f".{target.name}-downloads")
    if not directory.is_dir():
        if not is_legal(arguments.release):
            raise ReleaseError(f"{arguments.release}: found no directory, and it is no repository's name")
        if arguments.revision is None:
            raise ConfigError(f"--revision: found none, wanted the commit of {arguments.release}, which is no directory here")
        download_release(arguments.release, arguments.revision, downloads)
        directory = downloads
    manifest = unpack_release(directory, target, arguments.base)
    remove(downloads)
    size = sum(file.size for file in manifest.shards.values())
    yield f"{target}: {len(manifest.shards)} shards, {size / 1e9:.3f} GB, each with the SHA-256 that it had"


def _check(arguments: argparse.Namespace) -> Iterator[str]:
    """Count the zeros that are left; put them back where that is asked for."""
    directory, release = arguments.checkpoint, arguments.against
    if arguments.apply and release is None:
        raise ConfigError("--apply: found no --against, wanted the release whose zeros are set again")
    if arguments.out is not None and not arguments.apply:
        raise ConfigError("--out: found it without --apply, wanted both or neither")
    kept = list(compare(directory, release))
    yield from (_line(tensor) for tensor in kept if tensor.lost != 0)
    lost, wanted = sum(tensor.lost or 0 for tensor in kept), sum(tensor.wanted for tensor in kept)
    elsewhere = sum(tensor.lost is None for tensor in kept)
    yield f"{directory}: {wanted - lost} of {wanted} zeros in {len(kept)} tensors are there, {sum(tensor.more for tensor in kept)} more"
    if arguments.apply:
        target = arguments.out or directory
        apply(directory, release, target)
        yield f"{target}: all {wanted} zeros are set"
    elif lost or elsewhere:
        found = f"{lost} zeros lost, and {elsewhere} tensors with as many zeros elsewhere"
        raise ReleaseError(f"{directory}: found {found}, wanted none")


def _kernel(arguments: argparse.Namespace) -> Iterator[str]:
    """Convert a release in memory, and compare its logits."""
    found = check_kernel(arguments.release, arguments.kernel)
    conversion = found.conversion
    yield from (f"{name}: stays dense, {reason}" for name, reason in conversion.left.items())
    share = conversion.converted / conversion.dense
    yield f"{len(conversion.layers)} layers: {conversion.converted:,} bytes for {conversion.dense:,} dense ({share:.4f} of them)"
    if found.changed:
        yield f"{found.changed:,} weights of the release have another value in the kernel's dtype"
    if not found.equal:
        raise ReleaseError(f"{arguments.release}: found other logits after the conversion, wanted those before, bit for bit")
    yield "logits of 32 tokens: those of the dense layers in that dtype, bit for bit"


def _line(kept: Kept) -> str:
    if kept.lost is None:
        return f"{kept.tensor}: other zeros than the release's {kept.wanted}"
    return f"{kept.tensor}: {kept.lost} of {kept.wanted} zeros lost, {kept.more} more"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.release", description="What is done with a release after it was made.")
    commands = parser.add_subparsers(required=True)
    unpack = commands.add_parser("unpack", help="restore a packed release")
    unpack.add_argument("release", metavar="DIR_OR_ORG/NAME", help="a packed release here, or on the hub")
    unpack.add_argument("--revision", metavar="COMMIT", help="of the repository on the hub")
    unpack.add_argument("--base", type=Path, metavar="DIR", help="the base's shards, where masks alone are stored; default: from the hub")
    unpack.add_argument("--out", type=Path, metavar="DIR", help="default: the name and -unpacked, in this directory")
    unpack.set_defaults(lines=_unpack)
    check = commands.add_parser("check", help="compare the zeros of a checkpoint with a release's")
    check.add_argument("checkpoint", type=Path, metavar="DIR", help="any checkpoint in safetensors")
    check.add_argument("--against", type=Path, metavar="RELEASE", help="default: what DIR's own sparsity.json states")
    check.add_argument("--apply", action="store_true", help="set the zeros again, in DIR or --out")
    check.add_argument("--out", type=Path, metavar="DIR", help="where to; default: DIR, which is replaced when all is done")
    check.set_defaults(lines=_check)
    kernel = commands.add_parser("kernel", help="convert a release for a kernel in memory, and compare")
    kernel.add_argument("release", type=Path, metavar="DIR", help="a plain release")
    kernel.add_argument("kernel", choices=KERNELS)
    kernel.set_defaults(lines=_kernel)
    return parser


if __name__ == "__main__":
    main()
