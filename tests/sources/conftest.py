import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from stages.files import sha256
from tests import tiny

FILES = {"tinydata/rows.txt": "one\n", "tinydata/LICENSE/MIT.txt": "MIT", "tinydata/x.gguf": "no GGUF"}

Put = Callable[[str, dict[str, bytes | str]], str]


def write_wheel(directory: Path, package: str, files: dict[str, bytes | str]) -> Path:
    """Version 1.0 of a package of data files."""
    name = package.replace("-", "_")
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture()
def put_wheel(tmp_path_factory, monkeypatch) -> Put:
    """Put a package of data files into a directory of wheels that pip searches, and no other; gives the hash of the wheel."""
    directory = tmp_path_factory.mktemp("wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return lambda package, files: sha256(write_wheel(directory, package, files))


@pytest.fixture()
def index(put_wheel) -> str:
    """The hash of the wheel of tinydata 1.0, the only one that pip finds."""
    return put_wheel("tinydata", FILES)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> bytes:
    """A GGUF file of a small Llama with random weights and the tokenizer of tests/tiny.py."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**sizes)), tiny.tokenizer()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(400)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


GGUF_NAMES = {
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor of transformers' Llama."""
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name
