import pytest
import yaml

from stages.errors import ReleaseError
from stages.release.params import local_paths, write_params

SECTIONS = {
    "base": {"source": "local", "path": None, "name": "org/a", "parts": [{"package": "p", "version": "1.0"}]},
    "text": {"calibration": {"pages": {"source": "local", "path": None}}, "evaluation": {"news": {"source": "wheel"}}},
    "evaluation": {"prompts": ["Say $5 {or} more.", "null"], "rows": None, "share": 1e-05, "streamed": False},
}


def test_params_are_read_as_they_were_recorded(tmp_path):
    write_params(tmp_path / "params.yaml", SECTIONS)
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == SECTIONS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompts": ["a", "${oc.env:TOKEN}"]}, r"evaluation.prompts: found '\$\{' in its text, wanted plain text"),
        ({"name": {"${x}": 1}}, r"evaluation.name: found '\$\{' in its text, wanted plain text"),
        ({"name": ("a",)}, "evaluation.name: found a tuple, wanted null, a truth value, a number or text"),
    ],
)
def test_what_would_not_be_read_as_plain_data_is_refused(tmp_path, value, message):
    with pytest.raises(ReleaseError, match=message):
        write_params(tmp_path / "params.yaml", {**SECTIONS, "evaluation": value})
    assert not (tmp_path / "params.yaml").exists()


def test_a_path_of_the_machine_is_refused(tmp_path):
    with pytest.raises(ReleaseError, match="base.path: found a path of this machine, wanted null; run the fetch stage again"):
        write_params(tmp_path / "params.yaml", {**SECTIONS, "base": {"source": "local", "path": "/home/me/model"}})


def test_sources_on_a_disk_are_named_for_whoever_replays_the_release():
    assert local_paths(SECTIONS) == ["base.path", "text.calibration.pages.path"]
