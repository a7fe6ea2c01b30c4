"""How much of a corpus or a task was scored, in words, so that a limited result says so wherever it is shown.

All read a protocol as plain data. What an older protocol does not say is not said.
"""

from collections.abc import Collection, Mapping
from typing import Any

from stages.bos import words

Facts = Mapping[str, Any]  # a CorpusProtocol or a TaskProtocol as plain data


def windows_of(protocol: Facts, corpus: str) -> str:
    """Which windows of a corpus were scored: "the first 18 of 301 windows"; nothing where their number in all is not known."""
    facts = protocol["corpora"][corpus]
    available = facts.get("available")
    if available is None:
        return ""
    if facts["windows"] >= available:
        return f"all {available:,} windows"
    scored = f"{facts['windows']:,} of {available:,} windows"
    evenly = protocol["evaluation"].get("corpora", {}).get(corpus, {}).get("evenly")
    return scored if evenly is None else f"{scored}, spread evenly" if evenly else f"the first {scored}"


def scored_text(protocol: Facts, corpus: str) -> str:
    """The text of the perplexity: corpus, tokens, windows, which of the corpus's they are, and whether each begins with BOS."""
    windows, some = protocol["corpora"][corpus], windows_of(protocol, corpus)
    cut = f"{windows['tokens']} tokens in windows of {windows['window_length']}"
    return f"{corpus}, {cut}{some and ', '}{some}{words(protocol['bos'])}"


def rows_of(task: Facts) -> str:
    """Which rows of a task were scored: "first 20 of 3,270 rows"."""
    rows, available = task["rows"], task.get("available")
    if available is None:
        return counted(rows, "row")
    if rows >= available:
        return f"all {rows:,} rows" if rows > 1 else "its only row"
    scored = f"{rows:,} of {available:,} rows"
    return f"first {scored}" if task.get("parts", 1) == 1 else f"{scored}, the first of each of its {task['parts']} tasks"


def short(task: Facts) -> str:
    """The same in two numbers: "20 of 3270"; one where all rows were scored, or their number is not known."""
    return f"{task['rows']} of {task['available']}" if is_limited(task) else str(task["rows"])


def is_limited(task: Facts) -> bool:
    """Whether rows of a task are known to be left out."""
    return task.get("available") is not None and task["rows"] < task["available"]


def may_be_limited(task: Facts) -> bool:
    """Whether rows of a task are left out, or may be, since it is not known how many there are."""
    return task.get("available") is None or is_limited(task)


def rows_of_each(tasks: Collection[Facts]) -> str:
    """Which rows of several tasks were scored: "9 tasks, 20 rows each, the first of 277 to 10,042"."""
    each = f"{counted(len(tasks), 'task')}, {_range([task['rows'] for task in tasks])} rows each"
    if not any(map(is_limited, tasks)):
        return each
    return f"{each}, the first of {_range([task['available'] or task['rows'] for task in tasks])}"


def remarks(protocol: Facts) -> list[str]:
    """A sentence for each task with rows that were cut to the context, or with fewer rows than were asked for."""
    said = []
    for task, facts in protocol["tasks"].items():
        if facts.get("cut"):
            context = "" if facts.get("context") is None else f" of {facts['context']:,} tokens"
            verb, past = ("is", "was") if facts["cut"] == 1 else ("are", "were")
            rows = f"{facts['cut']:,} of {counted(facts['rows'], 'row')} of {task} {verb}"
            said.append(f"{rows} longer than the model's context{context} and {past} cut on the left.")
        asked = facts.get("asked")
        if asked is not None and facts["rows"] < asked:
            said.append(f"{task} has {counted(facts['rows'], 'row')}, where {asked:,} were asked for; all of them are scored.")
    return said


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _range(counts: Collection[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
