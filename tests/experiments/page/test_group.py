"""Experiments of one protocol stand together; others apart, with what differs."""

from dataclasses import replace

from stages.experiments.page import group as module
from stages.experiments.page.content import protocol_rows
from stages.experiments.page.group import distinct, read_groups
from stages.experiments.reading import Missing
from tests.experiments import synthetic


def test_groups_are_of_one_protocol_the_largest_first(monkeypatch):
    known = {one.name: one for group in (synthetic.group(), synthetic.other_group()) for one in group.results}
    read = lambda members: ([known[one.name] for one in members], synthetic.dense_scores(), [Missing(name="x", reason="why")])  # noqa: E731
    monkeypatch.setattr(module, "read_details", read)
    groups, missing = read_groups([one.experiment for one in known.values()])
    assert [len(group.results) for group in groups] == [21, 2]
    assert [group.differs for group in groups] == [{}, {"bos": (1, None)}]
    assert protocol_rows(groups[1]) == [("bos", "1", "absent")]
    assert len(missing) == 2


def test_a_group_of_which_nothing_can_be_read_is_none(monkeypatch):
    monkeypatch.setattr(module, "read_details", lambda members: ([], None, [Missing(name="x", reason="why")]))
    assert read_groups([synthetic.group().results[0].experiment]) == ([], [Missing(name="x", reason="why")])


def test_an_experiment_whose_name_another_has_is_called_by_its_commit():
    first = synthetic.group(sparsities=(0.5,)).results[0].experiment
    second = replace(first, revision="abcdef0123456789")
    assert [one.name for one in distinct([first, second])] == ["wanda-50", "abcdef0123"]


def test_cells_hold_what_has_one_pattern_and_sparsity():
    cells = synthetic.group(sparsities=(0.5, 0.4)).cells
    assert list(cells) == ["unstructured 40%", "unstructured 50%", "2:4", "4:8"]
    assert {details.name for details in cells["2:4"]} == {"wanda-2-4", "sparsegpt-2-4", "admm-2-4"}


def test_a_group_is_called_by_base_and_text():
    group = synthetic.group(sparsities=(0.5,))
    assert group.short_name == "org/small-model, wikipedia (9 experiments)"
    assert group.size == "9 experiments: 3 methods at 3 patterns and sparsities"
    alone = replace(group, results=group.results[:1])
    assert alone.size == "1 experiment: 1 method at 1 pattern and sparsity"
    assert alone.short_name == "org/small-model, wikipedia (1 experiment)"
