"""Our pruning beside its peers: seconds, peak memory and perplexity, on the same model and calibration windows.

python -m benchmarks.speed

Runs on what `dvc repro sample` left, Wanda and SparseGPT at 50% unstructured: the published procedure on a whole model
(benchmarks.peers.plain), llm-compressor in an environment of its own, and `python -m stages.prune`. One process at a time, on
the CPU, in float32. Prints the table and writes it between the markers in README.md. A finished measurement is kept in the
scratch directory, so a second call goes on where the first one stopped; after a change of code, remove that directory.
"""

import argparse
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.markers import show_between
from benchmarks.measure import imports, measure
from benchmarks.whole_model import window_losses
from stages.bos import BosSetting, decide
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.checkpoint.tokens import load_tokenizer
from stages.config.compose import composed, read
from stages.devices import cpu_name
from stages.evaluation.documents import read_corpus
from stages.evaluation.section import Evaluation
from stages.files import BASE, CALIBRATION, PRUNE_RESULTS, SPARSE, TEXT, read_json, remove, sha256, write_json

ROOT = Path(__file__).parents[1]
README = Path("README.md")
START, END = "<!-- speed: python -m benchmarks.speed -->", "<!-- end of speed -->"
PEERS = ROOT / "benchmarks/peers"
WINDOWS = CALIBRATION / "windows.safetensors"
METHODS = ("wanda", "sparsegpt")
PACKAGES = ("llmcompressor", "torch", "transformers")
FIXED = ("pattern.sparsity=0.5", "prune.device=cpu", "prune.dtype=float32")  # as the peers have it
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A script that takes METHOD BASE WINDOWS OUT and writes a dense checkpoint and seconds.json.

    command: starts with its interpreter.
    """

    name: str
    command: list[str]

    def prepare(self, project: Path, method: str) -> list[str]:
        """What to run in the project directory."""
        return [*self.command, method, str(BASE), str(WINDOWS), "out"]

    def run(self, project: Path) -> dict[str, Any]:
        """Its own "seconds" and "versions"."""
        return read_json(project / "out/seconds.json")

    def model(self, project: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(project / "out", dtype=torch.float32, trust_remote_code=False, local_files_only=True)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our prune stage with an option of the group `prune`."""

    option: str

    @property
    def name(self) -> str:
        return f"prune={self.option}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "stages.prune"]

    def prepare(self, project: Path, method: str) -> list[str]:
        """Write params.yaml into the project directory; what to run there."""
        OmegaConf.save(composed(f"method={method}", self.name, *FIXED), project / "params.yaml")
        return self.command

    def run(self, project: Path) -> dict[str, Any]:
        return read_json(project / PRUNE_RESULTS / "provenance.json")

    def model(self, project: Path) -> PreTrainedModel:
        base = Checkpoint(BASE)
        delta = SparseDelta(project / SPARSE, base.fingerprint)
        return load_model(base, delta.apply, dtype=torch.float32, device=torch.device("cpu"))


Contender = Peer | Ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender; the table has medians")
    parser.add_argument(
        "--venv", type=Path, default=Path(".cache/llmcompressor-venv"), help="environment of llm-compressor, made if need be"
    )
    parser.add_argument("--scratch", type=Path, default=Path(".cache/speed"), help="keeps finished measurements")
    parser.add_argument("overrides", nargs="*", help="of the evaluation, such as evaluation.corpora.wikipedia.windows=2")
    arguments = parser.parse_args()

    evaluation = read(*arguments.overrides)["evaluation"]
    contenders: tuple[Contender, ...] = (
        Peer(name="plain", command=[sys.executable, "-m", "benchmarks.peers.plain"]),
        Peer(name="llm-compressor", command=[str(llm_compressor(arguments.venv)), str(PEERS / "llm_compressor.py")]),
        Ours(option="exact"),
        Ours(option="one_pass"),
        Ours(option="sequential"),
    )
    rows = []
    for repeat, method, contender in product(range(arguments.repeats), METHODS, contenders):
        asked = {"contender": contender.name, "method": method, "repeat": repeat, **inputs(), "overrides": arguments.overrides}
        done = arguments.scratch / f"{method}-{contender.name}-{repeat}.json"
        if not done.is_file() or read_json(done)["asked"] != asked:
            print(f"{method}, {contender.name}, run {repeat + 1}", file=sys.stderr, flush=True)
            found = measurement(contender, method, arguments.scratch / "project", evaluation if repeat == 0 else None)
            write_json(done, {"asked": asked, **found})
        rows.append(read_json(done))
    show_between(README, START, END, f"{table(rows, [contender.name for contender in contenders])}\n\n{note(rows, evaluation)}")


def inputs() -> dict[str, Any]:
    """What must be the same for two measurements to stand in one table."""
    return {"base": Checkpoint(BASE).fingerprint, "windows": sha256(WINDOWS), "threads": torch.get_num_threads()}


def llm_compressor(venv: Path) -> Path:
    """The interpreter of llm-compressor's environment, which is made where it is not there yet."""
    python, ready = venv.absolute() / "bin/python", venv / "ready"
    if not ready.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        # torch first, alone: the second step then keeps the build that is installed.
        for package in ("torch", "llmcompressor"):
            print(f"installing {package} into {venv}", file=sys.stderr, flush=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "-c", PEERS / "constraints.txt", package], check=True, stdout=sys.stderr)
        ready.touch()
    return python


def measurement(contender: Contender, method: str, project: Path, evaluation: Evaluation | None) -> dict[str, Any]:
    """Run a contender in an empty project directory; score its model where an evaluation is given.

    Raises:
        SystemExit: it failed; names its log.
    """
    remove(project)
    for artifact in (BASE, CALIBRATION):
        (project / artifact).parent.mkdir(parents=True, exist_ok=True)
        (project / artifact).symlink_to(artifact.absolute())
    command, log = contender.prepare(project, method), project / "log.txt"
    floor = imports(command[0], ENVIRONMENT)
    cost = measure(command, directory=project, environment=ENVIRONMENT, log=log)
    if cost.exit_code:
        raise SystemExit(f"{contender.name}, {method}: exit code {cost.exit_code}; see {log}")
    run = contender.run(project)
    return {
        "seconds": run["seconds"],
        "process_seconds": cost.seconds,
        "peak_anonymous": cost.peak_anonymous,
        "peak_resident": cost.peak_resident,
        "imports_anonymous": floor.peak_anonymous,
        "imports_resident": floor.peak_resident,
        "perplexity": evaluation and perplexity(contender.model(project), evaluation),
        "versions": run["versions"],
    }


def perplexity(model: PreTrainedModel, evaluation: Evaluation) -> float:
    """Of a model whoever pruned it, by our own protocol."""
    name, windows = next(iter(evaluation.corpora.items()))
    tokenizer = load_tokenizer(BASE)
    bos = decide(BosSetting.AUTO, tokenizer, "bos")
    corpus = read_corpus(name, TEXT / "evaluation" / f"{name}.jsonl", windows, tokenizer, bos)
    return math.exp(mean(window_losses(model.eval(), corpus.windows)))


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: a line for each method and contender."""
    lines = ["| method | contender | seconds | over ours | peak memory | perplexity |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        runs = {name: [row for row in rows if (row["asked"]["method"], row["asked"]["contender"]) == (method, name)] for name in names}
        seconds = {name: median(run["seconds"] for run in runs[name]) for name in names}
        for name in names:
            memory = median(run["peak_anonymous"] - run["imports_anonymous"] for run in runs[name]) / 2**20
            ratio = seconds[name] / seconds["prune=exact"]
            shown = f"ours, `{name}`" if "=" in name else name
            lines.append(
                f"| {method} | {shown} | {seconds[name]:.0f} | {ratio:.2f} | {memory:.0f} MiB | {runs[name][0]['perplexity']:.2f} |"
            )
    return "\n".join(lines)


def note(rows: list[dict[str, Any]], evaluation: Evaluation) -> str:
    """What the numbers are, in a line."""
    base = Checkpoint(BASE).provenance
    name = Path(base.get("file", base["name"])).name
    windows, length = load_file(WINDOWS)["windows"].shape
    held_out = read_json(CALIBRATION / "provenance.json")["section"]["held_out"]
    runs = max(row["asked"]["repeat"] for row in rows) + 1
    text, scored = next(iter(evaluation.corpora.items()))
    return (
        f"{name}, 50% unstructured; calibration of {windows} windows of {length} tokens; perplexity on {scored.windows or 'all'} "
        f"windows of {scored.window_length} tokens of {text.title()}. Seconds are those of loading, pruning and "
        f"writing, without imports; ours runs {held_out} windows more, held out, on which errors are measured. Peak memory is anonymous "
        "memory (not mapped files) above that of a process that only imports torch and transformers. "
        f"{'One run' if runs == 1 else f'Medians of {runs} runs'} on {cpu_name()}, {torch.get_num_threads()} threads, in "
        f"float32; {stacks(rows)}."
    )


def stacks(rows: list[dict[str, Any]]) -> str:
    """Who ran on which versions."""
    who: dict[str, list[str]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {row['versions'][name]}" for name in PACKAGES if name in row["versions"])
        names, name = who.setdefault(versions, []), "ours" if "=" in row["asked"]["contender"] else row["asked"]["contender"]
        names += [name] if name not in names else []
    return "; ".join(f"{' and '.join(names)} with {versions}" for versions, names in who.items())


if __name__ == "__main__":
    main()
