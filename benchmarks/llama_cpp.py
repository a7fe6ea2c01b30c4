"""The perplexity of an embedded model, ours and llama.cpp's, of the same GGUF file on the same tokens.

python -m benchmarks.llama_cpp

Needs llama-cpp-python, which pip compiles: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install llama-cpp-python. Built for the machine's own
processor it crashed in a virtual machine whose processor has AMX.

llama.cpp multiplies the 4-bit weights as they are, by inputs that it rounds to 8 bits; we dequantise them to the base's dtype and multiply
in float32. The windows are those of `evaluation=perplexity`, BOS by auto. Reads artifacts/base and artifacts/text as the fetch stages left
them, prints both and writes benchmarks/llama_cpp.json. Takes minutes.
"""

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks import arguments
from benchmarks.contenders import MODELS
from benchmarks.whole_model import window_loss, window_losses
from stages import devices
from stages.bos import decide
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.evaluation.documents import read_corpus
from stages.evaluation.statistics import difference
from stages.files import BASE, TEXT, read_json, write_json
from stages.sources.base import join_parts

FILE = Path("benchmarks/llama_cpp.json")
WINDOWS = 6


def by_llama_cpp(gguf: Path, windows: torch.Tensor) -> list[float]:
    """Score each window on its own, from an empty cache."""
    from llama_cpp import Llama

    model = Llama(model_path=str(gguf), n_ctx=windows.shape[1], n_batch=windows.shape[1], logits_all=True, verbose=False)
    losses = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        losses.append(window_loss(torch.from_numpy(np.array(model.scores[: len(window) - 1])), window))
    return losses


def main() -> None:
    import llama_cpp

    base = Checkpoint(BASE)
    sections = [read(f"base={model.base}")["base"] for model in MODELS]
    section = next(section for section in sections if section.name == base.provenance["name"])
    settings = read("evaluation=perplexity")["evaluation"]
    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False, local_files_only=True)
    name, section_of_windows = next(iter(settings.corpora.items()))
    bos = decide(settings.bos, tokenizer, "evaluation.bos")
    path = TEXT / f"evaluation/{name}.jsonl"
    windows = read_corpus(name, path, replace(section_of_windows, windows=WINDOWS), tokenizer, bos).windows
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / section.file
        join_parts(section, gguf, Path(directory))
        theirs = by_llama_cpp(gguf, windows)
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    ours = window_losses(model, windows)
    apart = difference(ours, theirs)
    known = read_json(FILE) if FILE.is_file() else {}
    known[section.name] = {
        "file": section.file,
        "windows": f"{len(windows)} of {windows.shape[1]} tokens of {name}",
        "begin_with_bos": bos.token is not None,
        "ours": round(math.exp(mean(ours)), 3),
        "llama_cpp": round(math.exp(mean(theirs)), 3),
        "ratio": round(math.exp(apart.value), 4),
        "ratio_stderr": round(math.exp(apart.value) * apart.stderr, 4),
        "llama_cpp_python": llama_cpp.__version__,
        "device": devices.device_name(torch.device("cpu")),
    }
    print(json.dumps(known[section.name], indent=1))
    write_json(FILE, known)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
