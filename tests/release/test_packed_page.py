"""docs/packed.md suffices to write a reader of packed releases; see page_reader.py."""

import re
from pathlib import Path

import pytest
import torch

from stages.checkpoint.delta import Change
from stages.files import SUMS
from stages.release.packed import pack_release
from stages.release.packing import pack, write_sums
from tests import deltas
from tests.project import ROOT
from tests.release import page_reader


def contents(directory: Path) -> dict[str, bytes]:
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    files.pop(SUMS, None)
    return files


def changed(base, *, values: bool) -> dict[str, Change]:
    """Random masks; with `values` the kept weights are others, one of them -0."""
    changes = {}
    for name in deltas.matrices(base):
        mask = torch.rand(base.shape(name)) > 0.5
        kept = 1.5 * base.tensor(name)[mask]
        kept[0] = -0.0
        changes[name] = Change(mask=mask, values=kept if values else None)
    return changes


@pytest.mark.parametrize("masks_only", [False, True])
def test_a_reader_that_was_written_from_the_page_restores_every_byte(base, tmp_path, masks_only):
    changes, release = changed(base, values=not masks_only), tmp_path / "release"
    delta = deltas.write(
        tmp_path / "delta",
        deltas.recipe(base=base.fingerprint),
        changes,
        [deltas.row(name, change.mask) for name, change in changes.items()],
    )
    (release / "sub").mkdir(parents=True)
    pack(base, delta, release)
    (release / "README.md").write_text("A card.\n")
    (release / "sub/NOTICE").write_text("A notice.\n")
    plain = contents(release)
    pack_release(release, base if masks_only else None)
    write_sums(release)
    assert not list(release.glob("*.safetensors"))
    page_reader.unpack(release, tmp_path / "restored", base.directory if masks_only else None)
    assert contents(tmp_path / "restored") == plain


def test_the_reader_has_nothing_of_the_code_that_packs():
    source = Path(page_reader.__file__).read_text()
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) (\S+)", source, re.M)}
    assert imported == {"hashlib", "json", "math", "shutil", "pathlib", "typing", "numpy", "zstandard"}


def test_the_page_names_what_the_reader_reads():
    page = (ROOT / "docs/packed.md").read_text().split("## The format")[1].split("## What is refused")[0]
    for word in (
        "sparsesweep-packed/1",
        "`packed.json`",
        "`packed/SHARD`",
        "`shards`",
        "`files`",
        "`base`",
        "`header`",
        "`NAME.mask`",
        "`NAME.0`",
    ):
        assert word in page
