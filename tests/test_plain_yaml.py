import time

import pytest
import yaml

from stages.plain_yaml import require_bounded

LAUGHS = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize("text", ["a: 1", "", "a: &x [1, {b: c}]\nd: *x", "- - - 1"])
def test_a_plain_document_is_taken(text):
    require_bounded(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "in more than 100 levels"),
        ("- " * 100_000, "in more than 100 levels"),
        (LAUGHS, "more than 100,000 values with its aliases written out"),
        ("a: &a [*a]", "the alias 'a' of what has not ended or is not there"),
        ("a: *b", "the alias 'b' of what has not ended or is not there"),
        ("a: [", "expected the node content"),
    ],
)
def test_what_would_exhaust_stack_or_memory_is_refused_at_once(text, message):
    started = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=message):
        require_bounded(text)
    assert time.perf_counter() - started < 10
