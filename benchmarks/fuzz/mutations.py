"""Strategies that damage valid files: their bytes, and the values, names, types, nesting and numbers of what they hold."""

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Files = dict[str, bytes]  # path in the directory of a case -> content

DEEP = 100_000  # levels of nesting, beyond any parser's stack
NUMBERS = (0, 1, -1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
HOSTILE = (
    "../../outside",
    "/tmp/outside-of-the-case",
    "..",
    "a/../../b",
    "C:\\outside",
    "\0",
    "nul\0byte",
    "\ud800",
    "\u202egnp.exe",
    "\x1b[2J",
    "ﬁ",
    "",
    " ",
    "x" * 5000,
    "${oc.env:HF_TOKEN}",
    "???",
    "{{ ''.__class__.__mro__ }}",
    "!function canary.run",
    "__import__('os').system('touch outside')",
    "https://outside.example/x",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0.5,
    1e308,
    -0.0,
    [],
    {},
    [[]],
    {"": None},
    [None],
    ["a"],
    {"a": {"b": 1}},
    *NUMBERS,
    *HOSTILE,
)
RAW = {  # what only JSON's text can say, by the string that stands for it
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@overflow": "1e999",
    "@digits": "9" * 6000,
    "@lists": "[" * DEEP,
    "@objects": '{"a":' * DEEP,
    "@closed": "[" * 2000 + "]" * 2000,
    "@half": '"\\ud800"',
    "@comment": "// no",
    "@nothing": "",
}
FLOODS = (b"<", b">", b"(", b" ", b"\n", b"[[", b"{{", b"''", b"<<", b"<ref>", b"Question: ", b'<doc id="1" url="" title="">\n', b"\\")
PIECES = (
    b"\0",
    b"\xff",
    b"\n",
    b"\r\n",
    b'"',
    b",",
    b"{",
    b"}",
    b"[",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PK\x03\x04",
    b"PAR1",
    b"\xed\xa0\x80",
    b"\x1f\x8b",
)


@st.composite
def bytes_of(draw: DrawFn, content: bytes, most: int = 4) -> bytes:
    """Content with up to `most` pieces of it set, removed, repeated, inserted, cut off or replaced by a number."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("set", "number", "drop", "repeat", "insert", "cut", "flood"))):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                data[at : at + width] = (draw(st.sampled_from(NUMBERS)) % 2 ** (8 * width)).to_bytes(width, "little")
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.sampled_from((1, 2, 50)))
            case "insert":
                data[at:at] = draw(st.sampled_from(PIECES))
            case "cut":
                del data[at:]
            case "flood" if draw(st.integers(0, 19)) == 0:  # what takes a pattern's time with the square of the length
                data[at:at] = draw(st.sampled_from(FLOODS)) * 40_000
    return bytes(data)


@st.composite
def values_of(draw: DrawFn, value: Any, most: int = 3) -> Any:
    """Plain data with up to `most` of its values replaced, removed, repeated, nested or given another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        value = _edited(draw, value)
    return value


def _edited(draw: DrawFn, value: Any) -> Any:
    holders = list(_holders(value))
    if not holders or draw(st.integers(0, 60)) == 0:
        return draw(_value())
    holder, key = draw(st.sampled_from(holders))
    match draw(st.sampled_from(("value", "value", "value", "remove", "key", "repeat", "nest"))):
        case "value":
            holder[key] = draw(_value())
        case "remove":
            del holder[key]
        case "key" if isinstance(holder, dict):
            holder[draw(st.sampled_from(HOSTILE) | st.text(max_size=8))] = holder.pop(key)
        case "repeat" if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case _:
            holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]})))
    return value


def _value() -> SearchStrategy[Any]:
    return st.sampled_from(VALUES).map(copy.deepcopy) | st.sampled_from(tuple(RAW)) | st.integers() | st.text(max_size=12) | st.floats()


def _holders(value: Any) -> Any:
    """Every list and mapping within plain data, with every index or key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _holders(inner)


@st.composite
def json_of(draw: DrawFn, value: Any, most: int = 3, damage: bool = True) -> bytes:
    """Plain data, edited, as the bytes of JSON, seldom damaged or with a key that is there twice."""
    data = text_of(draw(values_of(value, most)))
    if draw(st.integers(0, 9)) == 0:
        data = data.replace(b'": ', b'": 0, "a": ', 1)
    if draw(st.integers(0, 9)) == 0 and b'{"' in data:
        key = data.split(b'{"', 1)[1].split(b'"', 1)[0]
        data = data.replace(b'{"', b'{"' + key + b'": null, "', 1)
    return draw(bytes_of(data)) if damage and draw(st.integers(0, 7)) == 0 else data


def text_of(value: Any) -> bytes:
    """JSON of plain data, with what only its text can say."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        if name in text:
            text = text.replace(f'"{name}"', raw)
    return text.encode()


@st.composite
def lines_of(draw: DrawFn, rows: list[Any]) -> bytes:
    """JSON Lines of edited rows, seldom damaged."""
    ends = st.sampled_from((b"\n",) * 9 + (b"\r\n", b"\n\n", b""))
    edits = draw(st.integers(0, 2))
    data = b"".join(text_of(draw(values_of(row, 1)) if number < edits else row) + draw(ends) for number, row in enumerate(rows))
    return draw(bytes_of(data)) if draw(st.integers(0, 3)) == 0 else data


@st.composite
def safetensors_of(draw: DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file with an edited header, of a length that is seldom wrong, and damaged data."""
    text = text_of(draw(values_of(header, 2)))
    length = len(text) if draw(st.integers(0, 9)) else draw(st.sampled_from(NUMBERS))
    content = struct.pack("<Q", length % 2**64) + text + data
    return draw(bytes_of(content)) if draw(st.integers(0, 2)) == 0 else content
