"""Wikipedia articles in full from a MediaWiki dump, whose markup mwparserfromhell reads."""

import bz2
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Tag, Template, Wikilink
from mwparserfromhell.wikicode import Wikicode

from stages.rows import Row
from stages.sources.bounds import read_whole

SHORTEST_ARTICLE = 3000  # characters
SHORTEST_PARAGRAPH = 60  # characters; what is shorter is a caption or an item of a list
NOT_PROSE = {"gallery", "imagemap", "math", "pre", "ref", "score", "source", "syntaxhighlight", "table", "timeline"}  # tags
APPENDICES = re.compile(
    r"\s*(bibliography|citations|discography|external links|filmography|footnotes|further reading|gallery|notes|publications|references|"
    r"see also|selected works|sources|works cited)(\s+and\s+\w+)*\s*$",
    re.I,
)
# Templates whose text stands in the sentence, by the number of the argument that holds it, the last if negative; others leave nothing.
PRINTED = {
    "abbr": 0,
    "iast": 0,
    "ipa": 0,
    "lang": -1,
    "nihongo": 0,
    "nobr": 0,
    "nowrap": 0,
    "quote": 0,
    "small": 0,
    "transl": -1,
    "unicode": 0,
}
RANGES = ("-", "–", "and", "by", "or", "to", "x")  # between two amounts of a conversion
DASHES = {"mdash": "—", "emdash": "—", "ndash": "–", "endash": "–", "snd": " – ", "spaced ndash": " – ", "nbsp": " "}
RESIDUE = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|</?\w|__\w+__|thumb\||https?://")
SENTENCE_END = re.compile(r"""[.!?]["”’')\]]*$""")


def mediawiki_dump(data: bytes) -> list[Row]:
    """The long articles of a dump in XML, compressed by bzip2: the title, an empty line, the paragraphs of prose, appendices left out.

    Raises:
        ValueError: the data are something else.
    """
    try:
        articles = (_article(title, source) for title, source in _pages(_decompressed(data)))
        return [{"text": text} for text in articles if len(text) >= SHORTEST_ARTICLE]
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise ValueError(f"not a MediaWiki dump compressed by bzip2: {error}") from error


def _decompressed(data: bytes) -> bytes:
    with bz2.BZ2File(io.BytesIO(data)) as stream:
        return read_whole(stream, "its decompressed XML")


def _pages(xml: bytes) -> Iterator[tuple[str, str]]:
    """Title and wikitext of every article; no redirect, no list, no page of another namespace."""
    for _, page in ElementTree.iterparse(io.BytesIO(xml)):
        if page.tag.rpartition("}")[2] != "page":
            continue
        title, namespace, source = (page.findtext(f".//{{*}}{name}") or "" for name in ("title", "ns", "text"))
        redirects = page.find("{*}redirect") is not None
        if namespace == "0" and not redirects and not title.startswith("List of ") and "(disambiguation)" not in title:
            yield title, source
        page.clear()


def _article(title: str, source: str) -> str:
    code = mwparserfromhell.parse(source)
    for section in code.get_sections(levels=[2, 3], matches=lambda heading: APPENDICES.match(str(heading)) is not None):
        _remove(code, section)
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in NOT_PROSE):
        _remove(code, tag)
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() == "br"):
        code.replace(tag, " ")
    _print_templates(code)
    for link in code.filter_wikilinks(matches=_is_no_text):
        _remove(code, link)
    paragraphs = (_tidy(line) for line in code.strip_code(normalize=True, collapse=True).split("\n"))
    kept = [line for line in paragraphs if len(line) >= SHORTEST_PARAGRAPH and SENTENCE_END.search(line) and not RESIDUE.search(line)]
    return "\n".join([title, "", *kept])


def _remove(code: Wikicode, node: Wikicode | Tag | Wikilink) -> None:
    """Remove a node, unless it went with another that held it."""
    if code.contains(node):
        code.remove(node)


def _is_no_text(link: Wikilink) -> bool:
    """Whether a link shows an image, or stands for a category or another language."""
    return re.match(r"\s*:?((?i:file|image|category|media)|[a-z]{2,3}):", str(link.title)) is not None


def _print_templates(code: Wikicode) -> None:
    """Put the text of every template in its place, the inner ones first."""
    for template in reversed(code.filter_templates()):
        if code.contains(template):
            code.replace(template, _printed(template))


def _printed(template: Template) -> str:
    name = str(template.name).strip().lower()
    arguments = [str(argument.value).strip() for argument in template.params if not argument.showkey]
    if name in DASHES:
        return DASHES[name]
    if name in ("convert", "cvt") and len(arguments) > 1:
        amount = 3 if arguments[1] in RANGES else 1
        return " ".join([*arguments[:amount], *arguments[amount : amount + 1]])
    if name in PRINTED and arguments:
        return arguments[PRINTED[name]]
    return ""


def _tidy(line: str) -> str:
    """Remove the marks of lists, and the brackets and spaces that removed markup leaves."""
    line = re.sub(r"[\xa0\u200b]", " ", line).lstrip("*#:; ")
    line = re.sub(r" ?\([\s,;:–]*\)", "", line)
    line = re.sub(r"\(\s*[,;:]?\s*", "(", line)
    line = re.sub(r"(?<!\s)\s+([,.;:)])", r"\1", line)
    return re.sub(r" {2,}", " ", line).strip()
