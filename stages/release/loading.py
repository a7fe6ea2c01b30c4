"""Does stock transformers load the release, and does the release say what base + delta says?

Whole: where the weights take at most half of the memory that is free, stock transformers loads the release, and its logits are compared
with those of base + delta in memory. Streamed: else transformers loads it without memory for weights (on the meta device), which shows
missing, unexpected and misshapen tensors and ties; and the logits of the release and of base + delta are both computed here, one block
in memory at a time. A release in float8, whose config names the format, is checked likewise: it says what base + delta, rounded, says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoConfig, PreTrainedModel

from stages.checkpoint.model import Apply, empty_model, load_model
from stages.checkpoint.model_class import auto_class_of, joined_parts
from stages.checkpoint.reader import Checkpoint
from stages.errors import ReleaseError
from stages.evaluation.scoring import StreamedModels
from stages.streaming.decoder import Decoder
from stages.streaming.host_memory import release_free_memory

PROBE_TOKENS = 32
SHARE = 0.5  # of the free memory that weights may take where they are loaded whole
CPU = torch.device("cpu")

Loading = Literal["whole", "streamed"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """How stock transformers loads a release.

    loading: which check was made. auto_class: name of the class that loads it. model_class: of which it is.
    joined: the parts of a multimodal model other than its text decoder, such as a vision encoder, by their paths in the model.
    """

    loading: Loading
    auto_class: str
    model_class: str
    joined: list[str]


@torch.no_grad()
def check_loading(written: Checkpoint, base: Checkpoint, apply: Apply, *, rounded: bool = False, free_memory: int | None = None) -> Loaded:
    """Load the release and compare its logits with those of base + delta.

    Args:
        written: the release, with the values that clients compute with. apply: what makes these of the base's.
        rounded: whether the release is in float8, so that its config names a format. free_memory: bytes; None: what is free now.

    Raises:
        ReleaseError: names the check that failed.
    """
    release = written.directory
    free = psutil.virtual_memory().available if free_memory is None else free_memory
    whole = _bytes_loaded(base) <= SHARE * free
    auto_class = require_auto_class(release)
    stock = load_stock(auto_class, release, **({} if whole else {"device_map": "meta"}))
    if not rounded:
        _require_plain(release, stock)
    _require_ties(release, stock, empty_model(base.directory, stock.dtype))
    loaded = Loaded(
        loading="whole" if whole else "streamed",
        auto_class=auto_class.__name__,
        model_class=type(stock).__name__,
        joined=joined_parts(stock),
    )
    probe, dtype = torch.arange(1, PROBE_TOKENS + 1)[None] % stock.config.get_text_config().vocab_size, stock.dtype
    if whole:
        logits = stock(input_ids=probe, use_cache=False).logits
        del stock  # two models of 7B do not fit where one does
        ours = load_model(base, apply, dtype=dtype, device=CPU)(input_ids=probe, use_cache=False).logits
    else:
        logits = _streamed(written, None, probe, dtype, release)
        ours = _streamed(base, apply, probe, dtype, release)
    if not torch.equal(logits, ours):
        by = "in stock transformers" if whole else "of the release, block by block,"
        raise ReleaseError(f"{release}: logits {by} differ from those of base + delta{', rounded to float8' if rounded else ''}")
    return loaded


def require_auto_class(release: Path) -> Any:
    """The auto class of transformers that loads the release as the class that its config names.

    Raises:
        ReleaseError: there is none.
    """
    config = AutoConfig.from_pretrained(release, trust_remote_code=False, local_files_only=True)
    auto_class = auto_class_of(config)
    if auto_class is None:
        raise ReleaseError(f"{release}: transformers lists no class that generates text for {config.architectures}")
    return auto_class


def load_stock(auto_class: Any, release: Path, **options: Any) -> PreTrainedModel:
    """A release in stock transformers; its parameters want no gradient, as ours.

    torch.matmul computes otherwise where a weight wants a gradient, by the last bit.

    Args:
        auto_class: see require_auto_class. options: of from_pretrained.

    Raises:
        ReleaseError: a tensor is missing, unknown or misshapen.
    """
    stock: PreTrainedModel
    stock, report = auto_class.from_pretrained(
        release, dtype="auto", output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    problems = {key: sorted(names) for key, names in report.items() if names and key.endswith("_keys")}
    if problems:
        raise ReleaseError(f"{release}: stock transformers reports {problems}")
    return stock.eval().requires_grad_(False)


def _require_plain(release: Path, stock: PreTrainedModel) -> None:
    """Refuse a model whose config names a format."""
    if getattr(stock.config, "quantization_config", None) or getattr(stock.config, "sparsity_config", None):
        raise ReleaseError(f"{release}: its config names a quantisation or sparsity format, wanted the base's plain config")


def _require_ties(release: Path, stock: PreTrainedModel, base: PreTrainedModel) -> None:
    """Refuse a model of which what the base ties is no longer tied. Args: base: without weights."""
    if _ties(base) and not _ties(stock):
        raise ReleaseError(f"{release}: the output embedding is no longer tied to the input's")


def _ties(model: PreTrainedModel) -> bool:
    """Whether the output embedding is the input's: some models tie them only where their code does, whatever their config says."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and output.weight is inputs.weight


def _bytes_loaded(base: Checkpoint) -> int:
    """Bytes of all weights as transformers loads them: in the dtype that config.json names, which those stored may be smaller than."""
    named = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True).dtype
    stored = sum(base.stored(name).nbytes for name in base)
    return max(stored, base.size_in(named)) if isinstance(named, torch.dtype) else stored


def _streamed(checkpoint: Checkpoint, apply: Apply | None, probe: torch.Tensor, dtype: torch.dtype, scratch: Path) -> torch.Tensor:
    """Logits, [tokens, vocabulary], with one block in memory at a time."""
    models = StreamedModels(decoder=Decoder(checkpoint, dtype, CPU), variants={"": apply}, scratch=scratch)
    (hidden,) = models.hidden([probe], batch=1)[""]
    with models.head() as logits:
        computed: torch.Tensor = logits(hidden[0])
    release_free_memory()
    return computed
