"""The sweep file, and what is refused of it."""

import pytest

from stages.errors import ConfigError
from stages.sweeps.file import MOST, Resources, read_sweep
from tests.project import ROOT

SEARCH = "{parameter: pattern.sparsity, low: 0.3, high: 0.8, metric: perplexity, limit: 1.5, points: 6}"


@pytest.fixture()
def sweep(tmp_path):
    """A sweep file of this text, read."""

    def read(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return read_sweep(path)

    return read


def test_a_grid_is_every_combination_and_points_follow(sweep):
    made = sweep("overrides: [evaluation=sweep]\ngrid: {method: [wanda, ria], pattern.sparsity: [0.5, 0.25]}\npoints: [[pattern=nm_2_4]]\n")
    assert (made.name, made.target, made.shared) == ("mine", "evaluate_sparse", ("evaluation=sweep",))
    assert made.varied == (
        ("method=wanda", "pattern.sparsity=0.5"),
        ("method=wanda", "pattern.sparsity=0.25"),
        ("method=ria", "pattern.sparsity=0.5"),
        ("method=ria", "pattern.sparsity=0.25"),
        ("pattern=nm_2_4",),
    )
    assert made.resources == Resources(gpus=None, cpus=1, memory_gib=None, threads=None)


def test_values_are_written_in_the_grammar_of_overrides(sweep):
    made = sweep("grid: {publish.name: [null, 'a, b', plain], evaluation.tasks: [[boolq, piqa]]}\n")
    assert [point[0] for point in made.varied] == ["publish.name=null", "publish.name='a, b'", "publish.name=plain"]
    assert made.varied[0][1] == "evaluation.tasks=[boolq,piqa]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "mine.yaml: found 'no points', wanted a grid, or points, or a search"),
        ("[]", "mine.yaml: found list, wanted a mapping"),
        ("grd: {method: [wanda]}", "mine.yaml: found 'grd', wanted only the keys target, overrides, grid, points, search, resources"),
        ("target: prune\ngrid: {method: [wanda]}", "mine.yaml: target: found 'prune', wanted one of evaluate_sparse, publish"),
        ("grid: {method: []}", "mine.yaml: grid.method: found .., wanted a list of at least one option or value"),
        ("grid: {method: wanda}", "mine.yaml: grid.method: found 'wanda', wanted a list of at least one"),
        ("grid: {}", "mine.yaml: grid: found {}, wanted a mapping of groups or keys to lists"),
        ("grid: {method: [wanda, ria, wanda]}", "mine.yaml: grid.method: found 'wanda', wanted each value once"),
        ("grid: {'a b': [1]}", "mine.yaml: grid.a b: found 'a b=1', wanted KEY=VALUE"),
        ("points: []", "mine.yaml: points: found .., wanted a list of 1 to 10000 lists"),
        ("points: [[]]", r"mine.yaml: points\[0\]: found .., wanted at least one override, such as method=wanda"),
        ("points: [method=wanda]", r"mine.yaml: points\[0\]: found 'method=wanda', wanted a list of overrides"),
        ("points: [[pattern.sparsity]]", r"mine.yaml: points\[0\]: found 'pattern.sparsity', wanted KEY=VALUE"),
        ("overrides: [{a: 1}]\npoints: [[a=1]]", "mine.yaml: overrides: found .*, wanted a list of overrides"),
        ("overrides: ['pattern.sparsity=0.3,0.5']\npoints: [[a=1]]", "overrides: found 'pattern.sparsity=0.3,0.5', wanted a single value"),
        ("points: [['a=${oc.env:HOME}']]", "mine.yaml: points: found .*, wanted a plain value"),
        ("points: [[a=1]]\nresources: {cpu: 2}", "mine.yaml: resources: found 'cpu', wanted only the keys gpus, cpus, memory_gib, threads"),
        ("points: [[a=1]]\nresources: {cpus: 0}", "mine.yaml: resources.cpus: found 0, wanted a whole number, 1 or more"),
        ("points: [[a=1]]\nresources: {gpus: 0.5}", "mine.yaml: resources.gpus: found 0.5, wanted null or a whole number, 0 or more"),
        (f"points: [[a=1]]\nsearch: {SEARCH}", "mine.yaml: found 'a search beside points', wanted one of them"),
        ("search: {parameter: a.b}", "mine.yaml: search: found 'no low, high, metric, limit, points', wanted all of parameter, low"),
        (f"search: {SEARCH.replace('low: 0.3', 'low: 0.9')}", "mine.yaml: search.low: found 0.9, wanted less than high, 0.8"),
        (f"search: {SEARCH.replace('points: 6', 'points: 0')}", "mine.yaml: search.points: found 0, wanted 1 to 20"),
        (f"search: {SEARCH.replace('limit: 1.5', 'limit: .nan')}", "mine.yaml: search.limit: found nan, wanted a finite number"),
        (f"search: {SEARCH.replace('pattern.sparsity', 'a b')}", "mine.yaml: search.parameter: found 'a b=0.3', wanted KEY=VALUE"),
        ("points: [[a=1]]\nresources: {memory_gib: .nan}", "mine.yaml: resources.memory_gib: found nan, wanted null or more than 0"),
    ],
)
def test_what_is_wrong_is_named_with_the_file_and_the_key(sweep, text, message):
    with pytest.raises(ConfigError, match=message):
        sweep(text)


def test_a_grid_that_is_too_large_is_refused_before_it_is_made(sweep):
    values = ", ".join(map(str, range(1000)))
    with pytest.raises(ConfigError, match=f"mine.yaml: grid: found '1000000000 combinations', wanted at most {MOST}"):
        sweep(f"grid: {{a: [{values}], b: [{values}], c: [{values}]}}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.yaml: not found, wanted a sweep file"):
        read_sweep(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "sweeps").iterdir()))
def test_every_file_of_ours_is_read(name):
    made = read_sweep(ROOT / "sweeps" / name)
    assert made.varied or made.search
