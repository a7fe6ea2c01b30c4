import pytest

from stages.errors import LONGEST_MESSAGE, SourceError, SparsesweepError


@pytest.mark.parametrize("kind", [SparsesweepError, SourceError])
def test_a_message_that_quotes_a_value_of_any_length_is_cut(kind):
    assert str(kind("a.json: no")) == "a.json: no"
    assert str(kind("a.json: " + "x" * 10**6)) == "a.json: " + "x" * (LONGEST_MESSAGE - 8) + "…"
