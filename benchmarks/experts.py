"""Peak memory of pruning one block of a mixture with hundreds of experts, within a budget that does not hold the block.

python -m benchmarks.experts

Writes a random checkpoint of blocks with DeepSeek-V3's configuration (23 GB each; --scratch says where), and runs `python -m stages.prune`
with Wanda on few windows, on the CPU in float32, watching its memory. Prints the table and writes it between the markers in
docs/engine.md. --experts makes the block smaller. A finished measurement is kept in the scratch directory (after a change of code, remove
it); the checkpoint is not.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from benchmarks.markers import show_between
from benchmarks.measure import measure
from benchmarks.memory import write_windows
from benchmarks.random_checkpoint import INDEX, STANDARD_DEVIATION
from benchmarks.speed import ENVIRONMENT
from stages.config.compose import composed
from stages.devices import cpu_name
from stages.files import BASE, PRUNE_JOURNAL, PRUNE_RESULTS, read_json, remove, write_json

DOCUMENT = Path("docs/engine.md")
START, END = "<!-- experts: python -m benchmarks.experts -->", "<!-- end of experts -->"
ERROR_TOKENS = 64  # fewer than by default: no time for what says nothing of random weights
VOCABULARY = 8192  # instead of 129,280: embeddings are no part of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/experts"), help="keeps finished measurements; needs 30 GB")
    parser.add_argument("--experts", type=int, default=256, help="of a block; a multiple of 16")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens; two more are held out")
    parser.add_argument("--budget", type=float, default=14.0, help="prune.memory_budget, GiB")
    arguments = parser.parse_args()
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    asked = {"experts": arguments.experts, "blocks": arguments.blocks, "windows": arguments.windows, "budget": arguments.budget}
    done = arguments.scratch / f"{'-'.join(f'{value:g}' for value in asked.values())}.json"
    if not done.is_file():
        project = arguments.scratch / "project"
        remove(project)
        config = deepseek(arguments.experts, arguments.blocks)
        write_checkpoint(project / BASE, config)
        generator = torch.Generator().manual_seed(0)
        write_windows(project, torch.randint(3, VOCABULARY, (arguments.windows, 256), generator=generator))
        write_json(done, {"machine": machine, **asked, **measurement(project, arguments.budget)})
        remove(project)
    rows = [read_json(path) for path in sorted(arguments.scratch.glob("*.json"))]
    show_between(DOCUMENT, START, END, table(rows))


def deepseek(experts: int, blocks: int) -> DeepseekV3Config:
    """DeepSeek-V3's configuration, with so many experts and blocks (its own numbers are 256 and 61), all of them mixtures."""
    return DeepseekV3Config(
        n_routed_experts=experts,
        num_hidden_layers=blocks,
        first_k_dense_replace=0,
        vocab_size=VOCABULARY,
        architectures=["DeepseekV3ForCausalLM"],
    )


def write_checkpoint(directory: Path, config: DeepseekV3Config) -> None:
    """Write bfloat16 shards of 16 experts each, names as published; the same for the same configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".experts.")
        if not path:
            shards.setdefault("rest", {})[name] = tensor.shape
            continue
        matrices = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
        shape = torch.Size((tensor.shape[1] // len(matrices), tensor.shape[2]))
        for expert in range(len(tensor)):
            shard = shards.setdefault(f"{path.split('.')[2]}-{expert // 16}", {})
            shard.update({f"{path}.experts.{expert}.{matrix}.weight": shape for matrix in matrices})
    weight_map = {name: f"model-{shard}.safetensors" for shard, shapes in shards.items() for name in shapes}
    for number, (shard, shapes) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for name, tensor in tensors.items():
            tensor.fill_(1) if "norm" in name else tensor.normal_(0, STANDARD_DEVIATION, generator=generator)
        save_file(tensors, directory / f"model-{shard}.safetensors", metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)
    files = {f"model-{shard}.safetensors": f"random, generator {number}" for number, shard in enumerate(shards)}
    write_json(directory / "provenance.json", {"name": "random/deepseek-v3", "files": files})


def measurement(project: Path, budget: float) -> dict[str, Any]:
    """Prune at 50% by Wanda.

    Raises:
        SystemExit: it failed; names its log.
    """
    remove(project / PRUNE_JOURNAL)
    overrides = (
        "pattern.sparsity=0.5",
        f"prune.error_tokens={ERROR_TOKENS}",
        "prune.device=cpu",
        "prune.dtype=float32",
        f"prune.memory_budget={budget}",
    )
    OmegaConf.save(composed("method=wanda", *overrides), project / "params.yaml")
    log = project.parent / "log.txt"
    cost = measure([sys.executable, "-m", "stages.prune"], directory=project, environment=ENVIRONMENT, log=log)
    if cost.exit_code:
        raise SystemExit(f"exit code {cost.exit_code}; see {log}")
    run = read_json(project / PRUNE_RESULTS / "provenance.json")
    rows = read_json(project / PRUNE_RESULTS / "sparsity.json")
    return {
        "peak_anonymous": cost.peak_anonymous,
        "peak_resident": cost.peak_resident,
        "seconds": run["seconds"],
        "by_expert": run["blocks_by_expert"],
        "sparsity": read_json(project / PRUNE_RESULTS / "metrics.json")["sparsity"],
        "weights": sum(row["weights"] for row in rows),
        "on_all_tokens": sum(row["calibrated_on"] == "all tokens" for row in rows) / len(rows),
        "checkpoint": sum(path.stat().st_size for path in (project / BASE).glob("*.safetensors")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each measurement."""
    lines = [
        "| experts of a block | blocks | weights in scope | checkpoint | budget | tokens | peak anonymous memory | peak resident memory "
        "| sparsity | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['experts']} | {row['blocks']} | {row['weights'] / 1e9:.2f} B | {row['checkpoint'] / 1e9:.2f} GB "
            f"| {row['budget'] * 2**30 / 1e9:.1f} GB | {row['windows'] * 256} | {row['peak_anonymous'] / 1e9:.2f} GB "
            f"| {row['peak_resident'] / 1e9:.2f} GB | {row['sparsity']:.4f} | {row['seconds']:.0f} |"
        )
    machines = {(row["machine"]["cpu"], row["machine"]["threads"], row["machine"]["torch"]) for row in rows}
    where = "; ".join(f"{cpu}, {threads} threads, torch {version}" for cpu, threads, version in sorted(machines))
    return "\n".join(lines) + (
        "\n\nRandom checkpoints in bfloat16 with DeepSeek-V3's configuration (width 7168, experts of 2048, one shared expert, 8 chosen "
        f"for a token), its vocabulary cut to {VOCABULARY}; Wanda, 50% unstructured; random tokens in windows of 256, and two windows held "
        f"out; computed in float32 on {where}. The last block's outputs are not computed, since nothing reads them. Anonymous memory "
        "is what no file backs; importing the libraries is in it."
    )


if __name__ == "__main__":
    main()
