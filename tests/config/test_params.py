"""params.yaml is plain data; the command line chooses values and groups."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.config import params
from stages.config.compose import composed
from stages.config.params import CONF, read_params
from stages.errors import ConfigError
from tests.project import ENVIRONMENT, commands

ROOT = CONF.parent
SHOW = Path(__file__).with_name("show_sections.py")


def written(directory: Path, text: str) -> Path:
    path = directory / "params.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hydra: {callbacks: {a: {_target_: os.system}}}", "found the key 'hydra', wanted sections alone"),
        ("defaults: [a]", "found the key 'defaults', wanted sections alone"),
        ("publish: {name: '${oc.env:HOME}'}", r"params.yaml: publish.name: found '\$\{oc.env:HOME\}', wanted a plain value"),
        ("evaluation: {tasks: ['${a}']}", r"found '\$\{a\}', wanted a plain value"),
        ("publish: {'${a}': 1}", r"found '\$\{a\}', wanted a plain value"),
        ("publish: {name: '???'}", r"found '\?\?\?', wanted a plain value"),
        ("publish: !!python/object/apply:os.system [id]", "not plain YAML"),
        ("a: [", "not plain YAML"),
        ("pattern: {sparsity: 0.5}\npattern: {sparsity: 0.9}", "found the key 'pattern' twice in one mapping"),
        ("[1, 2]", "found list, wanted a mapping of sections"),
    ],
)
def test_what_is_not_plain_data_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_params(written(tmp_path, text))


def test_a_date_is_text(tmp_path):
    assert read_params(written(tmp_path, "publish: {name: 2024-01-01}")) == {"publish": {"name": "2024-01-01"}}


def test_a_directory_without_params_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="not found, wanted in the current directory; `dvc exp run` writes it"):
        read_params(tmp_path / "params.yaml")


def run(directory: Path, *arguments: str, fails: bool = False) -> str:
    """What a stage prints that is handed all sections."""
    command = [str(commands() / "python"), "-m", f"tests.config.{SHOW.stem}", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "SECRET": "hunter2"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def given(directory: Path, *arguments: str) -> dict:
    (line,) = [line for line in run(directory, *arguments).splitlines() if line.startswith("GIVEN ")]
    return json.loads(line.removeprefix("GIVEN "))


@pytest.fixture()
def directory(tmp_path) -> Path:
    """Where params.yaml has a sparsity of its own."""
    data = _plain(composed())
    data["pattern"]["sparsity"], data["evaluation"]["rows"] = 0.6, 7
    written(tmp_path, yaml.safe_dump(data))
    return tmp_path


def test_a_value_replaces_that_of_params_yaml_and_the_others_stay(directory):
    sections = given(directory, "pattern.sparsity=0.7")
    assert (sections["pattern"]["sparsity"], sections["evaluation"]["rows"], sections["method"]["name"]) == (0.7, 7, "wanda")


def test_a_group_replaces_its_section_whole_and_the_others_stay(directory):
    sections = given(directory, "method=sparsegpt", "pattern=nm_2_4", "method.update.block_size=64")
    assert sections["method"] == {
        "name": "sparsegpt",
        "score": {"name": "obs"},
        "comparison_group": "matrix",
        "update": {"name": "sparsegpt", "block_size": 64},
        "damping": {"share": 0.01, "limit": 1.0, "shrinkage": False},
    }
    assert sections["pattern"] == {"name": "nm", "kept": 2, "group": 4, "permutation_rounds": None}
    assert sections["evaluation"]["rows"] == 7


def test_a_part_of_a_method_can_be_chosen_alone(directory):
    method = given(directory, "method/score=ria")["method"]
    assert (method["name"], method["score"], method["update"]) == ("wanda", {"name": "ria", "power": 0.5}, {"name": "none"})


def test_a_part_and_its_method_can_be_chosen_together(directory):
    method = given(directory, "method=sparsegpt", "method/score=ria")["method"]
    assert (method["name"], method["score"]["name"], method["update"]["name"]) == ("sparsegpt", "ria", "sparsegpt")


def test_a_calibration_brings_the_corpora_that_it_names(directory):
    sections = given(directory, "calibration=embedded_chat")
    assert set(sections["text"]["calibration"]) == {"gsm8k_chat", "mbpp_chat", "coqa_chat"}
    assert "wikipedia" in sections["text"]["evaluation"]


def test_an_experiment_chooses_groups_and_values(directory):
    sections = given(directory, "experiment=best_70")
    assert (sections["method"]["name"], sections["allocation"]["name"], sections["pattern"]["sparsity"]) == ("admm_short", "loss", 0.7)
    assert sections["evaluation"]["rows"] == 7


@pytest.mark.parametrize("choice", ["experiment=best_2_4", "method=dsnot", "evaluation=full", "base=zephyr_7b_beta"])
def test_what_is_chosen_by_hand_is_what_an_experiment_composes(tmp_path, choice):
    written(tmp_path, yaml.safe_dump(yaml.safe_load(yaml.safe_dump(_plain(composed())))))
    by_hand, swept = given(tmp_path, choice), _plain(composed(choice))
    swept.pop("environment")
    assert by_hand == swept


def _plain(cfg: object) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=guess"], "Could not find 'method/guess'"),
        (["pattern.sparsty=0.5"], "Could not override 'pattern.sparsty'"),
        (["pattern.sparsity=1.5"], "ConfigError: pattern.sparsity: found 1.5"),
        (["pattern=nm_2_4", "allocation=owl"], "ConfigError: allocation.name: found 'owl', wanted uniform"),
        (["publish.name=${oc.env:SECRET}"], "ConfigError: command line: found 'publish.name=${oc.env:SECRET}', wanted a plain value"),
        (["pattern"], "missing EQUAL"),
        (["pattern.sparsity=["], "ConfigError: command line: "),
        (["-m", "pattern.sparsity=0.5,0.6"], "ConfigError: command line: found --multirun, wanted one run"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_as_in_a_sweep(directory, arguments, message):
    output = run(directory, *arguments, fails=True)
    assert message in output
    assert "hunter2" not in output


def test_a_section_that_is_none_is_refused_where_a_part_of_it_is_chosen(directory):
    written(directory, "method: wanda\n")
    assert "ConfigError: params.yaml: method: found 'wanda', wanted a section of keys" in run(directory, "method/score=ria", fails=True)


def test_other_versions_than_params_yaml_names_are_refused(directory):
    path = directory / "params.yaml"
    path.write_text(path.read_text().replace("torch: ", "torch: 1."))
    script = SHOW.read_text().replace("entry.stage(*names)", "entry.stage('pattern', 'environment.torch')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ConfigError: environment.torch: found '2." in done.stdout
    assert "wanted 1.2." in done.stdout


def test_params_is_read_from_the_current_directory():
    assert Path("params.yaml") == params.PARAMS


LAUGHS = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 5000, "in more than 100 levels"),
        (LAUGHS, "more than 100,000 values"),
        ("a: " + "9" * 6000, "digits"),
        ("? [1, 2]\n: 3", "not plain YAML"),
        ("a: !!timestamp 99999-99-99", "not plain YAML"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"params.yaml: not plain YAML .*{message}|params.yaml: {message}"):
        read_params(written(tmp_path, text))
