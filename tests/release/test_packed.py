import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.errors import ReleaseError, SourceError, SparsesweepError
from stages.files import sha256
from stages.release.__main__ import main
from stages.release.packed import MANIFEST, pack_release, read_manifest, unpack_release
from stages.release.packing import pack, write_sums
from tests import deltas
from tests.hub_server import COMMIT


@pytest.fixture()
def plain(base, tmp_path):
    """A release as publish leaves it before its checksums."""
    changes = {name: Change(mask=torch.rand(base.shape(name)) > 0.5) for name in deltas.matrices(base)}
    rows = [deltas.row(name, change.mask) for name, change in changes.items()]
    delta = deltas.write(tmp_path / "delta", deltas.recipe(base=base.fingerprint), changes, rows)
    (tmp_path / "plain").mkdir()
    pack(base, delta, tmp_path / "plain")
    (tmp_path / "plain/README.md").write_text("A card.\n")
    return tmp_path / "plain"


def packed_from(plain, base=None):
    """A packed copy; plain has its checksums afterwards."""
    packed = plain.with_name("packed")
    write_sums(plain)
    shutil.copytree(plain, packed)
    pack_release(packed, base)
    write_sums(packed)
    return packed


@pytest.fixture()
def packed(plain):
    return packed_from(plain)


def contents(directory) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit(packed, change) -> None:
    data = json.loads((packed / MANIFEST).read_text())
    change(data)
    (packed / MANIFEST).write_text(json.dumps(data))


def test_a_release_comes_back_with_every_file(plain, packed, tmp_path, capsys):
    assert sum(map(len, contents(packed / "packed").values())) < sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    main(["unpack", str(packed), "--out", str(tmp_path / "restored")])
    assert contents(tmp_path / "restored") == contents(plain)
    assert "shards, 0.000 GB, each with the SHA-256 that it had" in capsys.readouterr().out


def test_masks_alone_come_back_with_the_base_from_a_directory(plain, base, tmp_path):
    packed = packed_from(plain, base)
    unpack_release(packed, tmp_path / "restored", base.directory)
    assert contents(tmp_path / "restored") == contents(plain)


def test_masks_alone_of_a_base_that_is_on_no_hub_need_a_directory(plain, base, tmp_path):
    packed = packed_from(plain, base)
    wanted = "wanted --base, a directory with the shards of tests/tiny, which the source local gives"
    with pytest.raises(ReleaseError, match=f"found masks alone, of a base that is on no hub, {wanted}"):
        unpack_release(packed, tmp_path / "restored", None)


def test_the_wrong_base_is_refused_before_anything_is_written(plain, base, tmp_path):
    packed, other = packed_from(plain, base), tmp_path / "other"
    shutil.copytree(base.directory, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(ReleaseError, match=f"{shard.name}: found [0-9a-f]{{64}}, wanted SHA-256 [0-9a-f]{{64}} of the base tests/tiny"):
        unpack_release(packed, tmp_path / "restored", other)
    with pytest.raises(ReleaseError, match="safetensors: found no file, wanted SHA-256"):
        unpack_release(packed, tmp_path / "restored", tmp_path / "nowhere")
    assert not (tmp_path / "restored").exists()


# From the hub.


def put(hub_repository, name: str, directory) -> None:
    hub_repository(name, contents(directory))


def test_a_packed_release_and_the_base_of_its_masks_come_from_the_hub_at_their_commits(plain, base, tmp_path, hub_repository):
    directory = tmp_path / "hub-base"
    shutil.copytree(base.directory, directory)
    facts = json.loads((directory / "provenance.json").read_text()) | {"source": "hub", "name": "org/base", "revision": COMMIT}
    (directory / "provenance.json").write_text(json.dumps(facts))
    packed = packed_from(plain, Checkpoint(directory))
    put(hub_repository, "org/base", directory)
    put(hub_repository, "org/packed", packed)
    main(["unpack", "org/packed", "--revision", COMMIT, "--out", str(tmp_path / "restored")])
    assert contents(tmp_path / "restored") == contents(plain)
    assert not list(tmp_path.glob(".restored*"))


def test_a_repository_without_a_revision_or_that_is_not_packed_is_refused(plain, tmp_path, hub_repository, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: --revision: found none, wanted the commit of org/packed, which is no directory here"):
        main(["unpack", "org/packed"])
    with pytest.raises(SystemExit, match="error: no/such/thing: found no directory, and it is no repository's name"):
        main(["unpack", "no/such/thing"])
    put(hub_repository, "org/plain", plain)
    with pytest.raises(SystemExit, match="error: hub model org/plain: found no file 'packed.json'"):
        main(["unpack", "org/plain", "--revision", COMMIT])


def test_a_single_shard_of_the_hub_is_found_under_its_own_name(plain, base, tmp_path, hub_repository):
    """The fetch stage names it anew."""
    tensors = {name: base.tensor(name) for name in base}
    for directory in ("theirs", "ours", "release"):
        (tmp_path / directory).mkdir()
    save_file(tensors, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "ours" / shard)
    facts = {"source": "hub", "name": "org/single", "revision": COMMIT}
    hashes = {"files": {shard: sha256(tmp_path / "ours" / shard)}}
    (tmp_path / "ours/provenance.json").write_text(json.dumps(facts | hashes))
    (tmp_path / "ours/model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    for name in (shard, "model.safetensors.index.json"):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "release" / name)
    pack_release(tmp_path / "release", Checkpoint(tmp_path / "ours"))
    put(hub_repository, "org/single", tmp_path / "theirs")
    unpack_release(tmp_path / "release", tmp_path / "restored", None)
    assert (tmp_path / "restored" / shard).read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()


# Refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="x"), "packed.json: found the format 'x', wanted 'sparsesweep-packed/1'"),
        (lambda data: data.update(more=1), "packed.json: packed.json: found .*more.*, wanted the keys of a Manifest"),
        (lambda data: data["shards"].update({"../x.safetensors": {"size": 1, "sha256": ""}}), "found the shard '../x.safetensors', wanted"),
        (lambda data: data["shards"].update({"x.bin": {"size": 1, "sha256": ""}}), "found the shard 'x.bin', wanted the name of a"),
        (
            lambda data: data["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
            "found the file '/etc/passwd', wanted a path inside",
        ),
        (lambda data: data["files"].update({"a/../../x": {"size": 1, "sha256": ""}}), "found the file 'a/../../x', wanted a path inside"),
        (lambda data: data["files"].update({"README.md": {"size": 1, "sha256": ""}}), "found the file 'README.md', wanted a path inside"),
        (lambda data: data["files"]["config.json"].update(size=-1), "found a size of -1 for config.json, wanted 0 to"),
        (lambda data: data["files"]["config.json"].update(size=10**400), "found a size of 1000.* for config.json, wanted 0 to"),
        (lambda data: data["files"]["config.json"].update(size=2**62), "found .* GB free on its disk, wanted 461168.* GB"),
        (lambda data: data["files"]["config.json"].update(sha256="0"), "config.json: found [0-9a-f]{64}, wanted SHA-256 0"),
        (lambda data: data["files"].update({"gone.json": {"size": 1, "sha256": "0"}}), "gone.json: found no file, wanted SHA-256 0"),
        (lambda data: next(iter(data["shards"].values())).update(sha256="0"), "of what it unpacks to, wanted 0; is it damaged"),
        (lambda data: next(iter(data["shards"].values())).update(size=100), "packed file .*: found .* bytes|stream header"),
        (
            lambda data: data["shards"].update({"y.safetensors": {"size": 100, "sha256": ""}}),
            "y.safetensors: shard .*y.safetensors: not found",
        ),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused_and_nothing_is_left(packed, tmp_path, change, message):
    edit(packed, change)
    with pytest.raises(SparsesweepError, match=message):
        unpack_release(packed, tmp_path / "restored", None)
    assert not list(tmp_path.glob("*restored*"))


def test_a_directory_that_is_not_packed_or_a_target_that_is_there_is_refused(plain, packed, tmp_path):
    with pytest.raises(ReleaseError, match="plain: found no packed.json, wanted a packed release"):
        read_manifest(plain)
    with pytest.raises(SystemExit, match="plain: found something there, wanted a path for the unpacked release"):
        main(["unpack", str(packed), "--out", str(plain)])


def test_a_hub_that_does_not_answer_for_the_base_is_named(plain, base, tmp_path):
    packed = packed_from(plain, base)
    edit(packed, lambda data: data["base"].update(source="hub", name="org/gone", revision=COMMIT))
    with pytest.raises(SourceError, match="hub model org/gone: not found"):
        unpack_release(packed, tmp_path / "restored", None)
