"""A small random checkpoint with zephyr's architecture, and text it can read: real files, made in a second."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from stages.bos import Bos
from stages.checkpoint.reader import Checkpoint
from stages.sources import base as checkpoints
from stages.sources.base import LocalBase

NO_BOS = Bos(token=None, reason="of the tests")
WORDS = [
    "river",
    "stone",
    "lamp",
    "winter",
    "garden",
    "engine",
    "paper",
    "silver",
    "cloud",
    "window",
    "market",
    "letter",
    "bridge",
    "forest",
    "candle",
    "harbour",
    "music",
    "number",
    "table",
    "wheel",
    "summer",
    "ocean",
    "mirror",
    "village",
    "apple",
    "copper",
    "thunder",
    "silent",
    "yellow",
    "narrow",
    "ancient",
    "gentle",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def sentences(count: int, seed: int, length: int = 60) -> list[str]:
    """Documents of `length` random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(length)) for _ in range(count)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(sentences(20, seed=1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


def config(**changes: object) -> MistralConfig:
    """zephyr-7b-beta's configuration, every size divided."""
    sizes: dict[str, object] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "sliding_window": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return MistralConfig(**{**sizes, **changes})


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: object) -> MistralForCausalLM:
    torch.manual_seed(seed)
    made = MistralForCausalLM(config(**changes)).to(dtype)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.dim() == 2:
            parameter.data *= 5
    return made


def write_checkpoint(directory: Path, seed: int = 0, shard: str = "40KB", **changes: object) -> Path:
    """A sharded safetensors checkpoint with tokenizer and chat template, as a hub repository would hold it."""
    model(seed, **changes).save_pretrained(directory, max_shard_size=shard)
    tokenizer().save_pretrained(directory)
    return directory


def fetched(source: Path, directory: Path) -> Checkpoint:
    """A checkpoint of a directory as the fetch stage writes it, in `directory`/base."""
    local = LocalBase(source="local", path=str(source), name=f"tests/{source.name}", fingerprint=None, license="mit")
    (directory / "base").mkdir()
    if not (source / "tokenizer.json").exists():
        (source / "tokenizer.json").write_text("{}")  # of models whose text is not read
    checkpoints.fetch(local, directory / "base", downloads=directory / "unused")
    return Checkpoint(directory / "base")
