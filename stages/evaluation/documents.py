"""The documents of a corpus, as the text that is cut into windows."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import rendered
from stages.errors import ConfigError, TextError
from stages.evaluation.metric import Corpus
from stages.evaluation.section import Windows
from stages.evaluation.windows import BETWEEN, cut_corpus
from stages.rows import Rows, messages_of, text_of


def read_corpus(name: str, path: Path, windows: Windows, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Corpus:
    """Read the rows of a corpus and cut them into windows; dialogues are rendered by the base's chat template.

    Args:
        name: of the corpus. path: JSON Lines of rows with "text", or of rows with "messages". windows: its section.
        bos: see windows.cut_corpus.

    Raises:
        TextError: a row has the wrong form, or the chat template refuses it; names file and line.
        ConfigError: the rows are dialogues, and the base has no chat template; or see windows.cut_corpus.
    """
    rows = Rows(path)
    dialogues = "messages" in rows[0] and "text" not in rows[0]
    if dialogues and not tokenizer.chat_template:
        raise ConfigError(f"evaluation.corpora.{name}: found dialogues, wanted prose: the base's tokenizer has no chat template")
    texts = []
    for index, row in enumerate(rows):
        location = rows.location(index)
        texts.append(_rendered(tokenizer, row, location) if dialogues else text_of(row, location))
    between = "" if dialogues else BETWEEN
    cut = windows.window_length, windows.windows
    return cut_corpus(name, texts, tokenizer, *cut, bos, evenly=windows.evenly, between=between, rendered=dialogues)


def _rendered(tokenizer: PreTrainedTokenizerBase, row: dict[str, object], location: str) -> str:
    try:
        return rendered(tokenizer, messages_of(row, location))
    except TextError as error:
        raise TextError(f"{location}: {error}") from None
