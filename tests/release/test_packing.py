import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.errors import ReleaseError
from stages.files import sha256
from stages.release.packing import pack, write_sums
from tests import deltas


@pytest.fixture()
def delta(base, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    change = Change(mask=torch.rand(base.shape(name), generator=torch.Generator().manual_seed(0)) > 0.5)
    return deltas.write(tmp_path / "delta", deltas.recipe(base=base.fingerprint), {name: change}, [deltas.row(name, change.mask)])


def test_the_same_model_is_the_same_bytes(base, delta, tmp_path):
    for directory in ("release", "again"):
        (tmp_path / directory).mkdir()
        pack(base, delta, tmp_path / directory)
    for path in (tmp_path / "release").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_are_those_that_safetensors_itself_writes(base, delta, tmp_path):
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    for shard, stored in base.headers.items():
        tensors = {name: delta.apply(name, base.tensor(name)) for name in stored}
        save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "release" / shard).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_release_has_the_files_that_were_fetched_with_the_base_and_no_others(base, delta, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base.directory, copy)
    (copy / "notes.txt").write_text("mine")
    facts = json.loads((copy / "provenance.json").read_text())
    (copy / "LICENSES").mkdir()
    (copy / "LICENSES/MIT.txt").write_text("MIT")
    facts["files"]["LICENSES/MIT.txt"] = sha256(copy / "LICENSES/MIT.txt")
    (copy / "provenance.json").write_text(json.dumps(facts))
    (tmp_path / "release").mkdir()
    pack(Checkpoint(copy), delta, tmp_path / "release")
    names = {path.relative_to(tmp_path / "release").as_posix() for path in (tmp_path / "release").rglob("*") if path.is_file()}
    assert names == set(facts["files"])


@pytest.mark.parametrize(
    ("damage", "found"), [(lambda path: path.write_text("{}"), "[0-9a-f]{64}"), (lambda path: path.unlink(), "no file")]
)
def test_a_file_that_is_not_the_one_that_was_fetched_is_refused(base, delta, tmp_path, damage, found):
    copy = tmp_path / "base"
    shutil.copytree(base.directory, copy)
    damage(copy / "config.json")
    (tmp_path / "release").mkdir()
    with pytest.raises(ReleaseError, match=f"config.json: found {found}, wanted SHA-256 [0-9a-f]{{64}}; run the fetch stage again"):
        pack(Checkpoint(copy), delta, tmp_path / "release")


def test_checksums_are_those_of_sha256sum_over_every_file(base, delta, tmp_path):
    release = tmp_path / "release"
    (release / "LICENSES").mkdir(parents=True)
    (release / "LICENSES/MIT.txt").write_text("MIT")
    pack(base, delta, release)
    write_sums(release)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=release, check=True)
    named = {line.split("  ")[1] for line in (release / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()} - {"SHA256SUMS"}
