"""The windows of a corpus: the published way to cut a text for its perplexity, and the document that each window is of.

The documents are joined by an empty line, as WikiText's rows are, tokenised once and cut; the remainder is dropped. Dialogues are
rendered by the chat template, whose marks separate them. Windows may begin with BOS, see stages/bos.py; published ones do not.
"""

from bisect import bisect_right
from collections import Counter
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.errors import ConfigError
from stages.evaluation.metric import Corpus

BETWEEN = "\n\n"  # documents


def cut_corpus(
    name: str,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None,
    bos: Bos,
    *,
    evenly: bool = False,
    between: str = BETWEEN,
    rendered: bool = False,
) -> Corpus:
    """Join the documents and cut them into windows.

    Windows that begin with BOS hold one token of the text less, and all of these are scored.

    Args:
        name: of the corpus, for errors as well. texts: documents in order. between: what they are joined by.
        length: tokens in a window.
        limit: number of windows, from the first on; None for all.
        bos: whether every window begins with BOS.
        evenly: whether they are spread evenly over all windows instead, the first among them.
        rendered: whether a chat template has put the special tokens into the texts, so that the tokenizer adds none.

    Returns:
        Its windows, and the number of the document that most tokens of each are of; where the tokenizer does not say which
        characters its tokens are of, every window counts as a document of its own.

    Raises:
        ConfigError: the corpus gives fewer windows than `limit`, or fewer than two; says how many tokens there are.
    """
    encoded = tokenizer(between.join(texts), add_special_tokens=not rendered, return_offsets_mapping=tokenizer.is_fast)
    begin = [] if bos.token is None else [bos.token]
    ids = encoded["input_ids"]
    tokens = bos.begin(ids)[len(begin) :]
    cuts = _cuts(tokens, length, begin)
    available = len(cuts)
    if available < (limit or 2):
        key = f"evaluation.corpora.{name}"
        raise ConfigError(f"{key}: the corpus has {len(tokens)} tokens, wanted {limit or 2} windows of {length}")
    count = available if limit is None else limit
    chosen = [cuts[index * available // count] for index in range(count)] if evenly else cuts[:count]
    windows = torch.tensor([begin * (cut.stop - cut.start < length) + tokens[cut] for cut in chosen])
    if not tokenizer.is_fast:
        return Corpus(name=name, windows=windows, clusters=list(range(count)), available=available)
    starts = list(accumulate((len(text) + len(between) for text in texts), initial=0))[:-1]
    first = encoded["offset_mapping"][len(ids) - len(tokens) :]  # BOS that the tokenizer added went
    documents = [bisect_right(starts, start) - 1 for start, _ in first]
    clusters = [Counter(documents[cut]).most_common(1)[0][0] for cut in chosen]
    return Corpus(name=name, windows=windows, clusters=clusters, available=available)


def _cuts(tokens: list[int], length: int, begin: list[int]) -> list[slice]:
    """Where windows of `length` tokens lie one after another, each with what it begins with, unless the text has that there itself."""
    cuts, start = [], 0
    while (stop := start + length - len(begin) * (tokens[start : start + 1] != begin)) <= len(tokens):
        cuts.append(slice(start, stop))
        start = stop
    return cuts
