"""The tokens of lm-eval's requests, as every model here makes them: begun with BOS as decided, cut on the left at the model's context."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from stages.bos import Bos
from stages.checkpoint.tokens import prompt_ids

CONTEXT_LENGTH = 2048  # tokens, where the checkpoint states none
NEW_TOKENS = 256  # lm-eval's bound of a generated answer, where the task states none


def encode(tokenizer: PreTrainedTokenizerBase, bos: Bos, text: str) -> list[int]:
    """The tokens of a prompt, see prompt_ids; what begins with BOS as text, as rendered chats do, is given no other."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return bos.begin(tokenizer.encode(text, add_special_tokens=False) if begun else prompt_ids(tokenizer, text))


class Encoder(TemplateLM):
    """lm-eval's interface to a tokenizer alone: `loglikelihood` keeps what a model would be handed, and scores nothing.

    Attributes:
        requests: strings, tokens of the context and of the continuation, of each request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: Bos, context_length: int | None) -> None:
        super().__init__()
        self.tokenizer, self.bos, self.max_length = tokenizer, bos, context_length or CONTEXT_LENGTH
        self.requests: list[tuple[tuple[str, str], list[int], list[int]]] = []

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_special_tokens=False)
        return encode(self.tokenizer, self.bos, string)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        self.requests = requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError

    def encoded(self, instances: Sequence[Instance]) -> list[tuple[list[int], list[int], int | None]]:
        """Of each request the tokens of the context, those that are scored, and how many of all fit; None: a text of any length does."""
        kind = instances[0].request_type
        if kind == "loglikelihood":
            self.loglikelihood(list(instances), disable_tqdm=True)
            return [(context, continuation, self.max_length + 1) for _, context, continuation in self.requests]
        if kind == "loglikelihood_rolling":
            return [([], self.tok_encode(instance.args[0]), None) for instance in instances]
        return [(self.tok_encode(text), [], self.max_length - new_tokens(options)) for text, options in (each.args for each in instances)]


def new_tokens(options: dict[str, Any]) -> int:
    """The bound of the tokens of a generated answer, of a task's generation_kwargs."""
    return int(normalize_gen_kwargs(options, NEW_TOKENS)["max_gen_toks"])
