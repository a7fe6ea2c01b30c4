"""What the README says exists, exists."""

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import choices, quality, refusals, table
from benchmarks.contenders import SMOLLM2
from stages import prune
from stages.config.compose import read
from stages.files import read_json
from tests.architectures import CONFIGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SPANS = re.findall(r"`([^`\n]+)`", README)
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("path", sorted({span for span in SPANS if re.fullmatch(r"(conf|stages|tests|benchmarks)/[\w/.]*", span)}))
def test_every_path_exists(path):
    assert (ROOT / path).exists()


def test_every_option_of_every_group_is_listed_and_no_other():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", README, re.M)
    listed = {group: set(re.findall(r"`(\w+)`", options)) for group, options in rows}
    groups = [path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "text"]
    assert listed == {group.name: {path.stem for path in group.glob("*.yaml")} for group in groups}


@pytest.mark.parametrize("command", [c for c in [*COMMANDS, *SPANS] if c.startswith("dvc exp run") and "--queue" not in c])
def test_every_experiment_composes(command):
    overrides = [override.strip("'") for override in re.findall(r"-S (\S+)", command)]
    assert read(*overrides)


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(target):
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "subcommand", sorted({" ".join(c.split()[1:3]) for c in COMMANDS if re.match(r"dvc (exp|queue|remote|metrics|plots) ", c)})
)
def test_every_dvc_command_exists(subcommand):
    subprocess.run(["dvc", *subcommand.split(), "--help"], check=True, capture_output=True)


def test_the_architectures_listed_are_those_tested():
    listed = README.split("<!-- architectures: checked by tests/test_readme.py -->")[1].split("<!-- end of architectures -->")[0]
    assert " ".join(listed.split()) == ", ".join(f"`{kind}`" for kind in CONFIGS)


def test_the_census_is_that_of_its_page_which_has_every_architecture_listed():
    counts = README.split("<!-- census: python -m benchmarks.census -->")[1].split(": [docs/census.md]")[0].strip()
    page = (ROOT / "docs/census.md").read_text()
    assert counts in page
    pruned = page.split("## Pruned by all of them")[1].split("## Refused by name")[0]
    assert [kind for kind in CONFIGS if f"`{kind}`" not in pruned] == []
    assert f"that transformers {version('transformers')} knows" in counts


def test_the_census_says_of_each_refused_type_what_it_would_take():
    refused = (ROOT / "docs/census.md").read_text().split("## Refused by name")[1].split("## Not built small")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \| (.*) \|$", refused, re.M)
    assert set(re.findall(r"`([^`]+)`", " ".join(types for types, *_ in rows))) <= set(refusals.TAKES)
    assert all(takes for *_, takes in rows)
    assert len(rows) >= 5


@pytest.mark.parametrize("name", ["memory", "speed"])
def test_a_benchmarks_table_was_generated(name):
    text = README.split(f"<!-- {name}: python -m benchmarks.{name} -->")[1].split(f"<!-- end of {name} -->")[0]
    assert text.count("\n| wanda |") >= 2
    assert text.count("\n| sparsegpt |") >= 1


def test_the_results_were_generated():
    text = README.split("<!-- results: python -m benchmarks.table -->")[1].split("<!-- end of results -->")[0]
    rows = read_json(ROOT / table.RESULTS)
    assert [row["command"] for row in rows] == [" ".join(table.command(point)) for point in table.POINTS]
    assert text.strip() == table.table(rows)


def test_the_leaderboard_is_what_was_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = quality.load()
    text = README.split("<!-- quality: python -m benchmarks.quality -->")[1].split("<!-- end of quality -->")[0]
    assert all(f"\n| {name} |" in text for name in ("Wanda", *(one.name for one in SMOLLM2.contenders if one.leads)))
    assert text.strip() == quality.tables(rows)
    assert Path("benchmarks/QUALITY.md").read_text(encoding="utf8") == quality.full_table(rows)


def test_every_result_is_labelled_as_its_model_is():
    rows = re.findall(r"^\| ([^|]*) \| .*\| `dvc exp run ?([^`]*)` \|$", README, re.M)
    assert len(rows) == len(table.POINTS)
    for label, overrides in rows:
        sections = read(*(override for override in overrides.split() if override != "-S"))
        assert label == prune.label(*(sections[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune")))


@pytest.mark.parametrize("name", choices.TABLES)
def test_the_choices_are_those_of_the_code(name):
    start, end = choices.markers(name)
    text = (ROOT / choices.DOCUMENT).read_text()
    assert text.split(start)[1].split(end)[0].strip() == choices.markdown(choices.TABLES[name])


def test_the_library_is_used_as_the_readme_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "tensor(0.5000) torch.Size([64, 128])\n"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_page_is_linked_and_every_path_in_it_exists(page):
    text = (ROOT / "docs" / page).read_text()
    linked = README + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md") if path.name != page)
    assert page in linked
    for path in re.findall(r"`((?:conf|stages|tests|benchmarks)/[\w/.]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path or "mine" in path, path
