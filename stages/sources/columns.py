"""The one form of a corpus: {"text"} for prose, {"messages": [{"role", "content"}, …]} for dialogues.

Columns go by the names that the source's section states. ShareGPT's "conversations" of "from" and "value" are known, too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stages import schema
from stages.errors import TextError
from stages.rows import Row, shown

ROLES = {  # as people's files name them -> as chat templates do
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
CONVERSATIONS, FROM, VALUE = "conversations", "from", "value"  # ShareGPT's
PAIRS = (  # columns of questions and answers, which are no prose
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
CALLS = ("tool_calls", "function_call")


def _column(what: str) -> Any:
    return schema.checked(lambda name: isinstance(name, str) and bool(name.strip()), f"the name of {what}")


@dataclass(kw_only=True, slots=True)
class Columns:
    """The columns of a data file.

    text: of prose; null: not read. messages: of the list of a dialogue's messages; null: not read.
    role, content: the keys of a message.
    """

    text: str | None = _column("the column of prose")
    messages: str | None = _column("the column of dialogues")
    role: str = _column("the key of a message's role")
    content: str = _column("the key of a message's text")

    @property
    def read(self) -> list[str]:
        """The columns of a row that may be read."""
        return [name for name in (self.text, self.messages, CONVERSATIONS) if name is not None]


CANONICAL = Columns(text="text", messages="messages", role="role", content="content")


class Corpus:
    """The rows of a source in the one form.

    Args:
        columns: those of the source. key: of the source, such as "text.calibration.pages", for what the errors advise.
        adjustable: whether the source's section has the columns as settings.
        prose: whether dialogues are refused.
    """

    def __init__(self, columns: Columns, key: str, *, adjustable: bool, prose: bool) -> None:
        self.columns, self.key, self.adjustable, self.prose = columns, key, adjustable, prose

    def canonical(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Row]:
        """Yield each row in the one form.

        Args:
            rows: location, for the errors, and row.

        Raises:
            TextError: names the location, the column, what was found, what was wanted, and the way out.
        """
        first, count, blank = None, 0, True
        for location, row in rows:
            column = self._column(row, location)
            kind = "text" if column == self.columns.text else "messages"
            if first not in (None, kind):
                advice = "; make two sources of it, one of prose and one of dialogues"
                raise TextError(f'{location}: found "{column}", wanted rows of "{first}" as before{advice}')
            if kind == "text":
                text = _string(row[column], f'{location}, "{column}"')
                blank = blank and not text.strip()
                yield {"text": text}
            else:
                if self.prose:
                    raise TextError(f'{location}, "{column}": found a dialogue, wanted prose: perplexity is measured on plain text')
                yield {"messages": self._messages(row[column], f'{location}, "{column}"')}
                blank = False
            first, count = kind, count + 1
        if count and blank:
            raise TextError(f"found blank text in every row of {count}, wanted words; is it the right file, and the right column?")

    def _column(self, row: Row, location: str) -> str:
        """The column that is read of a row."""
        text, messages = self.columns.text, self.columns.messages
        filled = [name for name in (text, messages) if name is not None and row.get(name) is not None]
        if messages is not None and messages not in filled and row.get(CONVERSATIONS) is not None:
            filled.append(CONVERSATIONS)
        if len(filled) == 1:
            return filled[0]
        if len(filled) == 2:
            advice = self._set("messages=null", " to read the text") + self._set("text=null", " to read the dialogue", " or ")
            raise TextError(f'{location}: found both "{text}" and "{filled[1]}", wanted one of them{advice}')
        null = next((name for name in (text, messages, CONVERSATIONS) if name is not None and name in row), None)
        if null is not None:
            wanted = "a string" if null == text else "a list of messages"
            raise TextError(f'{location}, "{null}": found null, wanted {wanted}; leave such rows out')
        wanted = " or ".join(
            [f'"{name}" for {kind}' for name, kind in ((text, "prose"), (messages, "a dialogue")) if name is not None] or ["a column"]
        )
        raise TextError(f"{location}: found {_keys(row)}, wanted {wanted}{self._advice(row)}")

    def _advice(self, row: Row) -> str:
        """What to set, or to do, where a row has no column that is read."""
        for name, value in row.items():
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                return self._set(f"messages={name}", " if it holds dialogues")
        pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
        if pair is not None:
            asked, answered = map(shown, pair)
            return f"; write {asked} and {answered} as two messages, of the user and of the assistant"
        strings = {name: value for name, value in row.items() if isinstance(value, str)}
        longest = max(strings, key=lambda name: len(strings[name]), default=None)
        return self._set(f"text={longest}", " if it holds the prose") if longest is not None else "; write the text of each row as a string"

    def _set(self, setting: str, purpose: str, before: str = "; ") -> str:
        if not self.adjustable:
            return ""
        name, _, value = setting.partition("=")
        plain = value.replace("_", "").replace("-", "").isalnum()
        return f"{before}set {self.key}.{name}={value if plain else shown(value)}{purpose}"

    def _messages(self, messages: Any, location: str) -> list[dict[str, str]]:
        if not isinstance(messages, list) or not messages:
            raise TextError(f"{location}: found {shown(messages)}, wanted a list of messages")
        result = [self._message(message, f"{location}, message {number}") for number, message in enumerate(messages, start=1)]
        if not any(message["content"].strip() for message in result):
            raise TextError(f"{location}: found {len(result)} messages without a word, wanted text in them; leave such rows out")
        return result

    def _message(self, message: Any, location: str) -> dict[str, str]:
        role, content = self.columns.role, self.columns.content
        if not isinstance(message, dict):
            raise TextError(f'{location}: found {shown(message)}, wanted an object with "{role}" and "{content}"')
        if message.get(role) is None and message.get(FROM) is not None:
            role, content = FROM, VALUE
        for name, setting in ((role, "role"), (content, "content")):
            if name not in message:
                advice = self._set(f"{setting}=NAME", " as the file names it")
                raise TextError(f'{location}: found {_keys(message)}, wanted "{name}"{advice}')
        call = next((name for name in CALLS if message.get(name)), None)
        if call is not None:
            raise TextError(f'{location}: found "{call}", which is not read, wanted text alone; write the call into "{content}"')
        spoken = message[role]
        known = isinstance(spoken, str) and spoken.strip().lower() in ROLES
        if not known:
            raise TextError(f'{location}, "{role}": found {shown(spoken)}, wanted one of {", ".join(ROLES)}')
        return {"role": ROLES[spoken.strip().lower()], "content": _content(message[content], f'{location}, "{content}"')}


def _content(value: Any, location: str) -> str:
    """The text of a message; that of a list of parts, [{"type": "text", "text": …}, …], is joined by line feeds."""
    if not isinstance(value, list):
        return _string(value, location)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise TextError(f'{location}: found {shown(part)}, wanted a string, or parts of {{"type": "text", "text": …}} alone')
    return "\n".join(_string(part.get("text"), f"{location}, a part") for part in value)


def _string(value: Any, location: str) -> str:
    """
    Raises:
        TextError: the value is no string, or has half of a surrogate pair, which is no character.
    """
    if not isinstance(value, str):
        advice = "leave such rows out" if value is None else "write it as one"
        raise TextError(f"{location}: found {shown(value)}, wanted a string; {advice}")
    try:
        value.encode("utf8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):X} at character {error.start + 1}"
        raise TextError(f"{location}: found half of a surrogate pair, {half}, wanted text; write the whole character, or none") from None
    return value


def _keys(row: Row) -> str:
    """The names of a row's columns."""
    names = [shown(name) if not str(name).isidentifier() else str(name) for name in row]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "no keys"
