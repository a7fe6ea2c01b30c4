"""Ranges of keys, and tables of choices."""

import types
from dataclasses import dataclass

import pytest

from stages import schema
from stages.errors import ConfigError
from stages.schema import Citation, Entry, Table, check, checked, number, one_of, sha256, text


@dataclass(kw_only=True, slots=True)
class Inner:
    steps: int = number(minimum=1, unit="step")


@dataclass(kw_only=True, slots=True)
class Section:
    share: float = number(above=0, maximum=1)
    least: float = number(minimum=0)
    above: float = number(above=0, unit="GiB")
    bounded: float = number(minimum=0, below=1)
    optional: int | None = number(minimum=1)
    word: str = one_of("row", "matrix")
    name: str | None = text("a name")
    digest: str | None = sha256("the file")
    even: int = checked(lambda value: value % 2 == 0, "an even number")
    inner: Inner
    several: dict[str, Inner]
    listed: list[Inner]

    def check(self, key: str) -> None:
        schema.require(self.least <= 9, f"{key}.least", self.least, "at most 9")


GOOD = {
    "share": 1.0,
    "least": 0.0,
    "above": 0.5,
    "bounded": 0.0,
    "optional": None,
    "word": "row",
    "name": "a",
    "digest": "0" * 64,
    "even": 2,
    "inner": Inner(steps=1),
    "several": {"a": Inner(steps=1)},
    "listed": [Inner(steps=1)],
}


def test_a_section_in_range_passes():
    check(Section(**GOOD), "s")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("share", 0.0, r"s.share: found 0.0, wanted a number in \(0, 1\]"),
        ("share", 1.1, r"s.share: found 1.1, wanted a number in \(0, 1\]"),
        ("least", -1.0, "s.least: found -1.0, wanted 0 or more"),
        ("least", 10.0, "s.least: found 10.0, wanted at most 9"),
        ("above", 0.0, "s.above: found 0.0, wanted more than 0 GiB"),
        ("bounded", 1.0, r"s.bounded: found 1.0, wanted a number in \[0, 1\)"),
        ("least", float("inf"), "s.least: found inf, wanted 0 or more"),
        ("optional", 0, "s.optional: found 0, wanted null or at least 1"),
        ("word", "column", "s.word: found 'column', wanted one of row, matrix"),
        ("name", None, "s.name: found None, wanted a name"),
        ("name", "", "s.name: found '', wanted a name"),
        ("digest", None, "s.digest: found None, wanted the SHA-256 of the file, 64 hexadecimal digits"),
        ("digest", "abc", "s.digest: found 'abc'"),
        ("even", 3, "s.even: found 3, wanted an even number"),
        ("inner", Inner(steps=0), "s.inner.steps: found 0, wanted at least 1 step"),
        ("several", {"a": Inner(steps=0)}, "s.several.a.steps: found 0, wanted at least 1 step"),
        ("listed", [Inner(steps=1), Inner(steps=0)], r"s.listed\[1\].steps: found 0, wanted at least 1 step"),
    ],
)
def test_a_value_out_of_range_names_its_key_what_was_found_and_what_is_wanted(key, value, message):
    with pytest.raises(ConfigError, match=message):
        check(Section(**{**GOOD, key: value}), "s")


def entry(name: str, citation: Citation | None = None) -> Entry:
    return Entry(name=name, parameters=Inner, summary=f"what {name} is", citation=citation)


def test_a_table_is_a_mapping_in_the_order_of_its_entries():
    table = Table([entry("b"), entry("a")])
    assert (list(table), len(table), "a" in table, "c" in table) == (["b", "a"], 2, True, False)
    assert table["a"] == entry("a")


def test_a_table_finds_the_entry_that_a_section_names_under_its_key():
    table = Table([entry("a")], key="source")
    assert table.of(types.SimpleNamespace(source="a")) == entry("a")


def test_two_entries_of_one_name_are_refused():
    with pytest.raises(ValueError, match="found two entries named 'a', wanted one"):
        Table([entry("a"), entry("a")])


def test_an_entry_refers_to_its_source_where_it_has_one():
    assert entry("a").reference == "what a is"
    cited = entry("a", Citation(text="Sun et al. 2024", url="https://arxiv.org/abs/2306.11695"))
    assert cited.reference == "what a is ([Sun et al. 2024](https://arxiv.org/abs/2306.11695))"


def test_the_entries_of_a_packages_modules_are_collected_by_name(tmp_path, monkeypatch):
    package = tmp_path / "collected_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("second", "first"):
        lines = ["from stages.schema import Entry", f"ENTRY = Entry(name={name!r}, parameters=object, summary='')"]
        (package / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    import collected_here

    assert list(Table.collected(collected_here, Entry)) == ["first", "second"]
    (package / "third.py").write_text("from stages.schema import Entry\nTHIRD = Entry(name='first', parameters=dict, summary='another')\n")
    with pytest.raises(ValueError, match="found two entries named 'first', wanted one"):
        Table.collected(collected_here, Entry)
