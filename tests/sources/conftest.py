import zipfile
from pathlib import Path

import pytest

from stages.files import sha256

FILES = {"tinydata/rows.txt": "one\n", "tinydata/LICENSE/MIT.txt": "MIT", "tinydata/x.gguf": "no GGUF"}


def write_wheel(directory: Path) -> Path:
    """tinydata 1.0, a package of data files."""
    path = directory / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture()
def index(tmp_path_factory, monkeypatch) -> str:
    """A directory of wheels that pip searches, and no other; gives the hash of the wheel inside."""
    wheel = write_wheel(tmp_path_factory.mktemp("wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return sha256(wheel)
