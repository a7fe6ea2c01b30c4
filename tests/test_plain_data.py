from dataclasses import dataclass
from enum import StrEnum

import pytest

from stages.plain_data import is_finite, of_type


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    value: float
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    colours: list[Colour]
    inner: dict[str, Inner]
    few: int | dict[str, int] = 0


def test_plain_data_become_what_the_annotations_state():
    made = of_type(Outer, {"name": "a", "colours": ["red"], "inner": {"x": {"value": 1}}, "few": {"b": 2}}, "here")
    assert made == Outer(name="a", colours=[Colour.RED], inner={"x": Inner(value=1.0)}, few={"b": 2})
    assert isinstance(made.colours[0], Colour)
    assert isinstance(made.inner["x"].value, float)


GOOD = {"name": "a", "colours": [], "inner": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1}, "here.name: found 1, wanted str"),
        ({"name": None}, "here.name: found null, wanted str"),
        ({"colours": ["blue"]}, r'here.colours\[0\]: found "blue", wanted Colour'),
        ({"colours": [["red"]]}, r"here.colours\[0\]: found"),
        ({"colours": "red"}, 'here.colours: found "red", wanted list'),
        ({"inner": {"x": 7}}, "here.inner.x: found 7, wanted Inner"),
        ({"inner": {"x": {}}}, "here.inner.x: found no keys, wanted the keys of a Inner; missing: value"),
        ({"inner": {"x": {"value": 1.0, "more": 2}}}, 'here.inner.x: found "value", "more", wanted the keys of a Inner; missing: no more'),
        ({"inner": {"x": {"value": float("nan")}}}, "here.inner.x.value: found NaN, wanted float"),
        ({"inner": {"x": {"value": 10**400}}}, "here.inner.x.value: found 1000"),
        ({"inner": {"x": {"value": True}}}, "here.inner.x.value: found true, wanted float"),
        ({"inner": {"x": {"value": 1.0, "count": True}}}, "here.inner.x.count: found true, wanted int"),
        ({"few": {"b": "c"}}, 'here.few.b: found "c", wanted int'),
        ({"few": None}, "here.few: found null"),
    ],
)
def test_a_value_of_another_type_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        of_type(Outer, GOOD | changes, "here")


def test_a_number_that_no_float_holds_is_not_finite():
    assert is_finite(1)
    assert not any(map(is_finite, (10**400, float("inf"), "1", None)))
