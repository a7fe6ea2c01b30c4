import zipfile

import pytest

from stages.errors import SourceError
from stages.files import sha256
from stages.sources import wheel


@pytest.fixture()
def index(tmp_path, monkeypatch):
    """A directory of wheels that pip looks in, and nowhere else; gives the hash of the one inside."""
    path = tmp_path / "wheels" / "tinydata-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinydata/rows.txt", "one\n")
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return sha256(path)


def test_a_file_inside_a_pinned_wheel_is_read(index):
    with wheel.opened("tinydata", "1.0", index) as archive:
        assert archive.read(wheel.member(archive, "tinydata/rows.txt")) == b"one\n"


def test_a_wheel_with_another_hash_is_refused(index):
    with (
        pytest.raises(SourceError, match=r"wheel tinydata==1.0 with hash 000000000000….*(?i:hash)"),
        wheel.opened("tinydata", "1.0", "0" * 64),
    ):
        pass


def test_a_release_that_does_not_exist_is_named(index):
    with pytest.raises(SourceError, match="wheel tinydata==9.9"), wheel.opened("tinydata", "9.9", index):
        pass


def test_a_file_that_the_wheel_lacks_is_named(index):
    with wheel.opened("tinydata", "1.0", index) as archive, pytest.raises(SourceError, match="tinydata-1.0.*found no file 'x.gguf'"):
        wheel.member(archive, "x.gguf")
