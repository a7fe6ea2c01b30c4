"""The divergence of a quantised model from the model that it was made of: ours, and what llama.cpp's own programs print.

python -m benchmarks.llama_cpp_divergence DIRECTORY VERSION     of llama.cpp's programs llama-perplexity and llama-quantize

llama-quantize makes a model of lower quality of an embedded GGUF file, `--pure` and without its embedding; on our side
stages/quantisation/ggml.py does, from the same weights. llama-perplexity --kl-divergence compares the two files twice: with all
weights dequantised to float32, as ours are, and as a user would run them, where it rounds the inputs of each product to 8 bits. It cuts
the text into windows, and scores the second half of each; ours are the same tokens, which it writes into a file. That file has the dense
model's log-probabilities in 16 bits, see as_stored; ours are computed without and with that rounding.

Reads artifacts/base and artifacts/text as the fetch stages left them, prints the columns and writes benchmarks/llama_cpp_divergence.json.
Takes minutes.
"""

import argparse
import copy
import math
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.contenders import MODELS
from stages import devices
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.files import BASE, TEXT, read_json, write_json
from stages.quantisation.ggml import Quantiser
from stages.rows import Rows
from stages.sources.base import join_parts
from stages.streaming.decoder import Decoder

FILE = Path("benchmarks/llama_cpp_divergence.json")
WINDOWS = 12
WINDOW_LENGTH = 512  # tokens
TEXT_LENGTH = 60_000  # characters, of which the windows are the first
TYPE = "Q3_K"
MIXTURE = "Q3_K_S"  # llama-quantize's name for it, where it is pure
FLOAT32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
LOWEST = -16.0  # nats: what llama-perplexity stores and sums of the dense model's log-probabilities
CPU = torch.device("cpu")
PERCENTILES = {"kld_99_9": 0.999, "kld_99": 0.99, "kld_95": 0.95, "kld_90": 0.9, "kld_10": 0.1, "kld_5": 0.05, "kld_1": 0.01}
PRINTED = {  # what llama-perplexity prints before the colon -> our name
    "Mean KLD": "mean_kld",
    "Maximum KLD": "maximum_kld",
    "99.9% KLD": "kld_99_9",
    "99.0% KLD": "kld_99",
    "95.0% KLD": "kld_95",
    "90.0% KLD": "kld_90",
    "Median KLD": "median_kld",
    "10.0% KLD": "kld_10",
    "5.0% KLD": "kld_5",
    "1.0% KLD": "kld_1",
    "Minimum KLD": "minimum_kld",
    "Mean Δp": "mean_delta_p",
    "RMS Δp": "rms_delta_p",
    "Same top p": "same_top_p",
    "Cor(ln(PPL(Q)), ln(PPL(base)))": "ln_ppl_correlation",
    "Mean ln(PPL(Q)/PPL(base))": "perplexity_ln_ratio",
    "Mean PPL(Q)/PPL(base)": "perplexity_ratio",
}


def printed_figures(output: str) -> dict[str, float]:
    """Read the last statistics that llama-perplexity prints; what stands behind ± is the figure's `_stderr`.

    Raises:
        ValueError: a figure is missing; names all that are.
    """
    printed: dict[str, float] = {}
    for line in output.splitlines():
        label, _, values = line.partition(":")
        name = PRINTED.get(" ".join(label.split()))
        if name is not None:
            value, *stderr = [float(number) for number in re.findall(r"-?\d+\.\d+", values)]
            printed |= {name: value} | {f"{name}_stderr": of for of in stderr}
    missing = [label for label, name in PRINTED.items() if name not in printed]
    if missing:
        raise ValueError(f"llama-perplexity: found no {', no '.join(missing)} in what it prints")
    return printed


def figures(
    kld: torch.Tensor, delta_p: torch.Tensor, same_top: torch.Tensor, nll: torch.Tensor, dense_nll: torch.Tensor
) -> dict[str, float]:
    """Compute llama-perplexity's figures from those of each token.

    Args:
        kld: [tokens], nats, the divergence of the model's distribution from the dense model's.
        delta_p: [tokens], the token's probability less that of the dense model.
        same_top: [tokens], bool, whether both models have the same most likely token.
        nll, dense_nll: [tokens], nats, the token's negative log-likelihood.

    Returns:
        Divergences in nats, probabilities in %; `_stderr`: the standard error, tokens taken as independent.
    """
    rms, top, ln_ratio = delta_p.square().mean().sqrt(), same_top.double().mean(), (nll - dense_nll).mean()
    ln_ratio_stderr = standard_error(nll - dense_nll)
    values = {
        "mean_kld": kld.mean(),
        "mean_kld_stderr": standard_error(kld),
        "maximum_kld": kld.max(),
        "median_kld": kld.quantile(0.5),
        "minimum_kld": kld.min(),
        **{name: kld.quantile(fraction) for name, fraction in PERCENTILES.items()},
        "mean_delta_p": 100 * delta_p.mean(),
        "mean_delta_p_stderr": 100 * standard_error(delta_p),
        "rms_delta_p": 100 * rms,
        "rms_delta_p_stderr": 100 * standard_error(delta_p.square()) / (2 * rms),
        "same_top_p": 100 * top,
        "same_top_p_stderr": 100 * (top * (1 - top) / (len(same_top) - 1)).sqrt(),
        "ln_ppl_correlation": 100 * torch.corrcoef(torch.stack([nll, dense_nll]))[0, 1],
        "perplexity_ln_ratio": ln_ratio,
        "perplexity_ln_ratio_stderr": ln_ratio_stderr,
        "perplexity_ratio": ln_ratio.exp(),
        "perplexity_ratio_stderr": ln_ratio.exp() * ln_ratio_stderr,
    }
    return {name: value.item() for name, value in values.items()}


def standard_error(values: torch.Tensor) -> torch.Tensor:
    """Of the mean of independent values."""
    return values.std() / math.sqrt(len(values))


def of_tokens(log_probabilities: torch.Tensor, dense: torch.Tensor, tokens: torch.Tensor, above: float = -math.inf) -> list[torch.Tensor]:
    """What `figures` takes, of each token.

    Args:
        log_probabilities, dense: [tokens, vocabulary], float64, nats. tokens: [tokens], int64.
        above: a divergence is the sum over what is more likely by the dense model, nats.
    """
    nll, dense_nll = (-of.gather(1, tokens[:, None])[:, 0] for of in (log_probabilities, dense))
    return [
        (dense.exp() * (dense - log_probabilities)).where(dense > above, 0).sum(dim=1),
        (-nll).exp() - (-dense_nll).exp(),
        log_probabilities.argmax(dim=1) == dense.argmax(dim=1),
        nll,
        dense_nll,
    ]


def as_stored(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Round as llama-perplexity stores the dense model's: to the nearest of 65536 values from the highest to the lowest, or to LOWEST
    below the highest, where all that is lower goes.

    Args:
        log_probabilities: [tokens, vocabulary], float64, nats.
    """
    highest = log_probabilities.amax(dim=1, keepdim=True)
    lowest = log_probabilities.amin(dim=1, keepdim=True).maximum(highest + LOWEST)
    step = (highest - lowest) / 65535
    return lowest + step * ((log_probabilities - lowest) / step).round().clamp(min=0)


@torch.no_grad()
def ours(model: PreTrainedModel, dense: PreTrainedModel, windows: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Compare a model with the dense one on the second half of each window, [windows, tokens]; exactly, and as llama-perplexity rounds."""
    first = windows.shape[1] // 2
    exact, rounded = [], []
    for window in windows:
        scored, dense_scored = (of(window[None]).logits[0, first:-1].double().log_softmax(dim=-1) for of in (model, dense))
        exact.append(of_tokens(scored, dense_scored, window[first + 1 :]))
        rounded.append(of_tokens(scored, as_stored(dense_scored), window[first + 1 :], above=LOWEST))
    columns, rounded_columns = (map(torch.cat, zip(*rows, strict=True)) for rows in (exact, rounded))
    return figures(*columns), figures(*rounded_columns)


def read_windows(path: Path, bos: int | None) -> torch.Tensor:
    """The windows in a file of --kl-divergence-base, [windows, tokens], int64.

    Args:
        bos: takes the place of each window's first token where the model is given them, as llama-perplexity does; None: it does not.

    Raises:
        ValueError: the file is of another kind, or has other windows than were asked for.
    """
    with path.open("rb") as file:
        magic, length, _, count = struct.unpack("<8siii", file.read(20))
        tokens = np.fromfile(file, dtype="<i4", count=WINDOWS * WINDOW_LENGTH).astype(np.int64)
    if (magic, length, count) != (b"_logits_", WINDOW_LENGTH, WINDOWS):
        found = f"found {magic!r} and {count} windows of {length} tokens"
        raise ValueError(f"{path}: {found}, wanted b'_logits_' and {WINDOWS} windows of {WINDOW_LENGTH}")
    windows = torch.from_numpy(tokens).view(count, length)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def run(program: Path, *arguments: object) -> str:
    """Run a program of llama.cpp; returns all that it prints."""
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(map(str, arguments))}: found exit code {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def compared(programs: Path, dense: Path, quantised: Path, text: Path, *options: str) -> str:
    """Compare two GGUF files by llama-perplexity; the log-probabilities of the first are written beside it. Returns what it prints."""
    logits = dense.with_suffix(".logits")
    sizes = ("--ctx-size", WINDOW_LENGTH, "--batch-size", WINDOW_LENGTH, "--threads", torch.get_num_threads())
    chunks = ("--file", text, "--chunks", WINDOWS, "--kl-divergence-base", logits)
    run(programs / "llama-perplexity", "--model", dense, *sizes, *chunks, *options)
    return run(programs / "llama-perplexity", "--model", quantised, *sizes, "--kl-divergence-base", logits, "--kl-divergence", *options)


def dequantised(programs: Path, file: Path) -> Path:
    """Dequantise a GGUF file into another beside it."""
    result = file.with_suffix(".float32.gguf")
    run(programs / "llama-quantize", "--allow-requantize", file, result, "F32")
    return result


def loaded(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def bos_of(file: Path) -> int | None:
    """The token that llama.cpp puts in the place of a window's first, by a GGUF file, or None.

    Raises:
        ValueError: the file does not state whether it does.
    """
    add, token = (gguf.GGUFReader(file).get_field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "bos_token_id"))
    if add is None or token is None:
        raise ValueError(f"{file.name}: found no tokenizer.ggml.add_bos_token or no bos_token_id, wanted both")
    return token.contents() if add.contents() else None


def by_llama_quantize(programs: Path, dense: Path) -> Path:
    """Quantise all matrices of a GGUF file but its embedding into another beside it."""
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(dense).tensors}
    result, kept = dense.with_name(f"{TYPE}.gguf"), ("--token-embedding-type", tensors["token_embd.weight"].lower())
    run(programs / "llama-quantize", "--allow-requantize", "--pure", *kept, dense, result, MIXTURE)
    return result


def by_quantiser(dense: PreTrainedModel, quantiser: Quantiser) -> PreTrainedModel:
    """The same on our side."""
    model = copy.deepcopy(dense)
    model.load_state_dict({name: quantiser(name, tensor) for name, tensor in dense.state_dict().items()})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our divergence with llama.cpp's.")
    parser.add_argument("programs", type=Path, help="directory of llama-perplexity and llama-quantize")
    parser.add_argument("version", help="llama.cpp's, for the record")
    parser.add_argument("--output", type=Path, help="file for all that llama-perplexity prints", default=Path(os.devnull))
    arguments = parser.parse_args()
    base, programs = Checkpoint(BASE), arguments.programs.resolve()
    sections = [read(f"base={model.base}")["base"] for model in MODELS]
    section = next(section for section in sections if section.name == base.provenance["name"])
    quantiser = Quantiser.for_decoder(Decoder(base, torch.float32, CPU), TYPE)
    corpus = next(iter(read("evaluation=perplexity")["evaluation"].corpora))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text, dense_file = directory / "text.txt", directory / section.file
        text.write_text("\n\n".join(row["text"] for row in Rows(TEXT / f"evaluation/{corpus}.jsonl"))[:TEXT_LENGTH], encoding="utf8")
        join_parts(section, dense_file, directory)
        file = by_llama_quantize(programs, dense_file)
        in_float32 = compared(programs, dequantised(programs, dense_file), dequantised(programs, file), text, *FLOAT32)
        as_run = compared(programs, dense_file, file, text)
        arguments.output.write_text(f"{in_float32}\n{as_run}", encoding="utf8")
        bos = bos_of(dense_file)
        windows = read_windows(dense_file.with_suffix(".logits"), bos)
        dense, theirs = loaded(dense_file), loaded(file).state_dict()
    model = by_quantiser(dense, quantiser)
    differ = sum(int((tensor != theirs[name]).sum()) for name, tensor in model.state_dict().items())
    exact, rounded = ours(model, dense, windows)
    columns = {"ours": exact, "ours_rounded": rounded}
    columns |= {"llama_cpp": printed_figures(in_float32), "llama_cpp_8_bit_inputs": printed_figures(as_run)}
    print(tabulate([[name, *(column.get(name) for column in columns.values())] for name in exact], headers=["", *columns]))
    print(f"weights that differ from llama-quantize's: {differ}")
    known = read_json(FILE) if FILE.is_file() else {}
    known[section.name] = {
        "file": section.file,
        "quantised": TYPE,
        "bytes_per_weight": round(quantiser.bytes_per_weight, 4),
        "weights_that_differ": differ,
        "windows": f"{len(windows)} of {windows.shape[1]} tokens of {corpus}, the second half of each",
        "begin_with_bos": bos is not None,
        **{name: {key: round(value, 6) for key, value in column.items()} for name, column in columns.items()},
        "llama_cpp_version": arguments.version,
        "device": devices.device_name(CPU),
    }
    write_json(FILE, known)


if __name__ == "__main__":
    main()
