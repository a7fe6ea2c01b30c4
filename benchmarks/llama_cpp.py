"""The perplexity of an embedded model, ours and llama.cpp's, of the same GGUF file on the same tokens.

python -m benchmarks.llama_cpp

Needs llama-cpp-python, which pip compiles: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install llama-cpp-python. Built for the machine's own
processor it crashed in a virtual machine whose processor has AMX.

llama.cpp multiplies the 4-bit weights as they are, by inputs that it rounds to 8 bits; we dequantise them to the base's dtype and multiply
in float32. The windows are those of `evaluation=perplexity`, BOS by auto. Reads artifacts/base and artifacts/text as the fetch stages left
them, prints both and writes benchmarks/llama_cpp.json. Takes minutes.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.contenders import MODELS
from stages import devices
from stages.bos import decide
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.evaluation.perplexity import WindowLosses, cut_windows, window_loss, window_losses
from stages.files import BASE, TEXT, read_json, write_json
from stages.rows import Rows
from stages.sources.base import join_parts

FILE = Path("benchmarks/llama_cpp.json")
WINDOWS = 6


def by_llama_cpp(gguf: Path, windows: torch.Tensor) -> WindowLosses:
    """Score each window on its own, from an empty cache."""
    from llama_cpp import Llama

    model = Llama(model_path=str(gguf), n_ctx=windows.shape[1], n_batch=windows.shape[1], logits_all=True, verbose=False)
    losses = []
    for index, window in enumerate(windows):
        model.reset()
        model.eval(window.tolist())
        losses.append(window_loss(torch.from_numpy(np.array(model.scores[: len(window) - 1])), window, index))
    return WindowLosses(losses=losses)


def main() -> None:
    import llama_cpp

    base = Checkpoint(BASE)
    sections = [read(f"base={model.base}")["base"] for model in MODELS]
    section = next(section for section in sections if section.name == base.provenance["name"])
    settings = read("evaluation=perplexity")["evaluation"]
    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False, local_files_only=True)
    texts = [row["text"] for row in Rows(TEXT / f"evaluation/{settings.perplexity.corpus}.jsonl")]
    bos = decide(settings.bos, tokenizer, "evaluation.bos")
    windows = cut_windows(texts, tokenizer, settings.perplexity.window_length, WINDOWS, bos, settings.perplexity.evenly)
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / section.file
        join_parts(section, gguf, Path(directory))
        theirs = by_llama_cpp(gguf, windows)
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    ours = window_losses(model, windows)
    ratio, stderr = ours.ratio(theirs)
    known = read_json(FILE) if FILE.is_file() else {}
    known[section.name] = {
        "file": section.file,
        "windows": f"{len(windows)} of {windows.shape[1]} tokens of {settings.perplexity.corpus}",
        "begin_with_bos": bos.token is not None,
        "ours": round(ours.perplexity, 3),
        "llama_cpp": round(theirs.perplexity, 3),
        "ratio": round(ratio, 4),
        "ratio_stderr": round(stderr, 4),
        "llama_cpp_python": llama_cpp.__version__,
        "device": devices.device_name(torch.device("cpu")),
    }
    print(json.dumps(known[section.name], indent=1))
    write_json(FILE, known)


if __name__ == "__main__":
    main()
