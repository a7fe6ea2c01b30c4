"""The pruned model in llama.cpp: its perplexity by GGUF files of several types, beside ours by the checkpoint, on the same tokens.

python -m benchmarks.gguf

Needs the extra `llama-cpp`, which pip compiles: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install -c constraints.txt -e '.[llama-cpp]'.

The windows are those of `evaluation=perplexity`, BOS by auto, and the same ids go to both: no text is tokenised by llama.cpp. The second
half of each window is what llama.cpp's own llama-perplexity scores; so both perplexities stand in the table. Reads artifacts/base,
artifacts/text and artifacts/sparse as the stages left them, writes benchmarks/gguf.json and the table in docs/release.md. Takes minutes.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from benchmarks import arguments
from benchmarks.markers import show_between
from stages import devices
from stages.bos import decide
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import load_tokenizer
from stages.config.compose import read
from stages.evaluation.documents import read_corpus
from stages.evaluation.statistics import difference
from stages.files import BASE, SPARSE, TEXT, read_json, write_json
from stages.release.llama_cpp.writing import GgufWriter, write_checked

FILE, DOCUMENT = Path("benchmarks/gguf.json"), Path("docs/release.md")
START, END = "<!-- gguf: python -m benchmarks.gguf -->", "<!-- end of gguf -->"
TYPES = ("F16", "BF16", "Q8_0")
WINDOWS = 4
PROMPT = "The capital of France is"
NEW_TOKENS = 12
CPU = torch.device("cpu")


def losses(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the tokens but the first, [tokens - 1], nats. Args: logits: [tokens, vocabulary]. window: [tokens]."""
    return cross_entropy(logits[:-1].float(), window[1:], reduction="none")


@torch.no_grad()
def by_transformers(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """[windows, tokens - 1], nats."""
    return torch.stack([losses(model(input_ids=window[None], use_cache=False).logits[0], window) for window in windows])


def by_llama_cpp(path: Path, windows: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Score each window on its own, from an empty cache, and continue a prompt: [windows, tokens - 1], nats, and the text."""
    from llama_cpp import Llama

    length = windows.shape[1]
    sizes = {"n_ctx": length, "n_batch": length, "n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    model = Llama(model_path=str(path), **sizes, logits_all=True, verbose=False)
    try:
        scored = []
        for window in windows:
            model.reset()
            model.eval(window.tolist())
            scored.append(losses(torch.from_numpy(np.array(model.scores[:length])), window))
        said = model.create_completion(PROMPT, max_tokens=NEW_TOKENS, temperature=0)["choices"][0]["text"]
    finally:
        model.close()
    return torch.stack(scored), said


def row(form: str, bytes_: int, scored: torch.Tensor, ours: torch.Tensor, said: str) -> dict[str, Any]:
    """A row of the table. Args: scored, ours: [windows, tokens - 1], nats."""
    half = scored.shape[1] // 2  # logits of the tokens from the middle on: the window has one token more
    apart = difference(scored.mean(dim=1).tolist(), ours.mean(dim=1).tolist())
    return {
        "form": form,
        "bytes": bytes_,
        "perplexity": round(math.exp(scored.mean().item()), 3),
        "second_half": round(math.exp(scored[:, half + 1 :].mean().item()), 3),
        "ratio": round(math.exp(apart.value), 4),
        "ratio_stderr": round(math.exp(apart.value) * (apart.stderr or 0.0), 4),
        "said": said,
    }


def table(known: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| model | by | bytes | perplexity | of second halves | over ours | says |", "|---|---|---|---|---|---|---|"]
    for name, facts in known.items():
        for one in facts["rows"]:
            said = " ".join(one["said"].split()).replace("|", "\\|")
            over = f"{one['ratio']:.4f} ± {one['ratio_stderr']:.4f}" if said else "1"
            numbers = f"{one['bytes']:,} | {one['perplexity']:.3f} | {one['second_half']:.3f} | {over}"
            lines.append(f"| {name} | {one['form']} | {numbers} | {said} |")
    facts = next(iter(known.values()))
    windows = "; ".join(f"{name}: {facts['recipe']}, {facts['windows']}" for name, facts in known.items())
    versions = f"llama-cpp-python {facts['llama_cpp_python']}, on {facts['device']}"
    said = f'Says: greedy continuation of "{PROMPT}" by llama.cpp. ± is one standard error over windows.'
    return "\n".join([*lines, "", f"{windows}. {said} {versions}."])


def main() -> None:
    import llama_cpp

    base = Checkpoint(BASE)
    delta = SparseDelta(SPARSE, base.fingerprint)
    settings, tokenizer = read("evaluation=perplexity")["evaluation"], load_tokenizer(BASE)
    name, section = next(iter(settings.corpora.items()))
    bos = decide(settings.bos, tokenizer, "evaluation.bos")
    windows = read_corpus(name, TEXT / f"evaluation/{name}.jsonl", section, tokenizer, bos).windows[:WINDOWS]
    ours = by_transformers(load_model(base, delta.apply, dtype=torch.float32, device=CPU), windows)
    rows = [row("ours, float32", sum((BASE / shard).stat().st_size for shard in base.headers), ours, ours, "")]
    for of in TYPES:
        with tempfile.TemporaryDirectory(dir=BASE.parent) as directory:
            (counted,) = write_checked([GgufWriter(base, delta, of)], Path(directory), "model")
            scored, said = by_llama_cpp(Path(directory) / counted.file, windows)
        rows.append(row(f"llama.cpp, {of}", counted.bytes, scored, ours, said))
    known = read_json(FILE) if FILE.is_file() else {}
    begun = "begun with BOS" if bos.token is not None else "without BOS"
    known[base.provenance["name"]] = {
        "recipe": f"{delta.recipe.label}, {delta.recipe.pattern_label} {delta.summary['sparsity']:g}",
        "windows": f"{len(windows)} windows of {windows.shape[1]} tokens of {name}, {begun}",
        "rows": rows,
        "llama_cpp_python": llama_cpp.__version__,
        "device": devices.device_name(CPU),
    }
    write_json(FILE, known)
    show_between(DOCUMENT, START, END, table(known))


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
