import json
from dataclasses import asdict, replace

import pytest

from stages.errors import ComparisonError
from stages.evaluation.protocol import (
    CorpusProtocol,
    Protocol,
    TaskProtocol,
    compared,
    differences,
    read_protocol,
    require_same,
    versions,
    write_protocol,
)

ARTICLES = CorpusProtocol(sha256="c" * 64, window_length=64, windows=4, tokens=256, windows_sha256="f" * 64)
PROTOCOL = Protocol(
    base="b" * 64,
    tokenizer_sha256="e" * 64,
    bos=None,
    corpora={"articles": ARTICLES},
    metrics=["perplexity"],
    tasks={"boolq": TaskProtocol(rows=4, sha256="d" * 64, few_shot=0, metrics=["acc"])},
    prompts=["river stone"],
    new_tokens=3,
    dtype="float32",
    versions={"torch": "2"},
)


def require(one: Protocol, other: Protocol) -> None:
    require_same(one, other, names=("results/dense", "this one"), remedy="run it again")


def test_differences_are_named_by_their_dotted_keys():
    one, other = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}, {"a": 1, "b": {"c": 5, "d": 3}, "g": None}
    assert differences(one, other) == {"b.c": (2, 5), "e": ({"f": 4}, None)}
    assert differences(one, one) == {}


def test_equal_protocols_pass():
    require(PROTOCOL, replace(PROTOCOL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "a"}, f"base: '{'b' * 64}' against 'a'"),
        ({"tokenizer_sha256": None}, f"tokenizer_sha256: '{'e' * 64}' against None"),
        ({"corpora": {"pages": ARTICLES}}, r"corpora.articles: {.*} against None; corpora.pages: None against {.*}"),
        (
            {"corpora": {"articles": replace(ARTICLES, window_length=32, windows=8)}},
            "corpora.articles.window_length: 64 against 32; corpora.articles.windows: 4 against 8",
        ),
        ({"metrics": []}, r"metrics: \['perplexity'\] against \[\]"),
        ({"tasks": {}}, r"tasks.boolq: {'rows': 4, .*} against None"),
        (
            {"tasks": {"boolq": TaskProtocol(rows=3, sha256="a", few_shot=0, metrics=["acc"])}},
            f"tasks.boolq.rows: 4 against 3; tasks.boolq.sha256: '{'d' * 64}' against 'a'",
        ),
        ({"prompts": ["lamp"]}, r"prompts: \['river stone'\] against \['lamp'\]"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' against 'bfloat16'"),
        ({"versions": {"torch": "3"}}, "versions.torch: '2' against '3'"),
    ],
)
def test_every_difference_is_named_with_both_values_and_what_to_do(changes, message):
    wanted = f"results/dense and this one are not of the same protocol, wanted equal values of {message}; run it again"
    with pytest.raises(ComparisonError, match=wanted):
        require(PROTOCOL, replace(PROTOCOL, **changes))


def test_a_protocol_is_read_as_it_was_written(tmp_path):
    write_protocol(tmp_path / "protocol.json", PROTOCOL, evaluation={"name": "tiny"}, delta=None)
    assert read_protocol(tmp_path / "protocol.json") == PROTOCOL
    written = json.loads((tmp_path / "protocol.json").read_text())
    assert written == {**asdict(PROTOCOL), "evaluation": {"name": "tiny"}, "delta": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "protocol.json: not found; has the stage that writes it run?"),
        ("{", "protocol.json: not JSON"),
        ("[]", r"protocol.json: found a protocol of \[\], wanted base, bos, corpora"),
        ('{"corpus": "a", "tokens": 8}', "protocol.json: found a protocol of corpus, tokens, wanted base, bos, corpora"),
        (
            json.dumps({**asdict(PROTOCOL), "evaluation": {}, "delta": None, "tasks": {"boolq": {"rows": 4}}}),
            r'protocol.json: protocol.tasks.boolq: found "rows", wanted the keys of a TaskProtocol; missing: few_shot, metrics',
        ),
        (
            json.dumps({**asdict(PROTOCOL), "evaluation": {}, "delta": None, "tasks": ["boolq"]}),
            r'protocol.json: protocol.tasks: found \["boolq"\], wanted dict',
        ),
        (
            json.dumps({**asdict(PROTOCOL), "evaluation": {}, "delta": None, "corpora": {"articles": 7}}),
            "protocol.json: protocol.corpora.articles: found 7, wanted CorpusProtocol",
        ),
    ],
)
def test_a_file_that_is_no_protocol_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "protocol.json").write_text(content)
    with pytest.raises(ComparisonError, match=message):
        read_protocol(tmp_path / "protocol.json")


def test_what_was_left_out_is_no_difference_of_two_protocols(tmp_path):
    """Older results do not say how many rows and windows there are; they are of the same text all the same."""
    tasks = {"boolq": replace(PROTOCOL.tasks["boolq"], available=3270, asked=4, parts=1, context=512)}
    newer = replace(PROTOCOL, corpora={"articles": replace(ARTICLES, available=300)}, tasks=tasks)
    require(PROTOCOL, newer)
    assert compared(asdict(newer)) == compared(asdict(PROTOCOL))
    older = asdict(newer)
    for key in ("available", "asked", "parts", "context"):
        del older["tasks"]["boolq"][key]
    del older["corpora"]["articles"]["available"]
    (tmp_path / "protocol.json").write_text(json.dumps({**older, "evaluation": {}, "delta": None}))
    assert read_protocol(tmp_path / "protocol.json") == PROTOCOL
    assert compared(older) == compared(asdict(PROTOCOL))


def test_versions_are_of_the_packages_that_compute():
    assert set(versions()) == {"torch", "transformers", "tokenizers", "lm-eval"}
