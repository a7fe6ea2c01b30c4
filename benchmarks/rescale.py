"""The same function written with other weights: what pruning makes of it must not depend on how it is written.

python -m benchmarks.rescale DIRECTORY                       measure what is missing (SmolLM2: about half an hour on two cores)
python -m benchmarks.rescale DIRECTORY --base gemma3_270m    on one model
python -m benchmarks.rescale --table                         measure nothing, write the table

Writes a base again with weights at other scales, in the same file format: rows of the value matrix divided, and columns of the
output matrix multiplied, by the same powers of two; likewise rows of the up-projection and columns of the down-projection; likewise the
gains of norms and the columns of the matrices that read them, where a norm multiplies by its gain alone. Powers of two are exact in every
float dtype, so that the function is the same to the last bit but for the order of sums. `experiment=best_50` prunes both, and both are
scored on the development text (benchmarks.development). DIRECTORY gets the projects. Writes benchmarks/rescale.json and the table in
docs/methods.md.
"""

import argparse
import json
import random
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import behaviour, development
from benchmarks.contenders import MODELS, Model
from benchmarks.markers import show_between
from benchmarks.on_gpu import FLOAT32, bring_model, windows_of
from benchmarks.quality import write_whole
from stages import record
from stages.checkpoint.reader import fingerprint
from stages.config.compose import read
from stages.devices import device_name
from stages.files import BASE, CALIBRATION, PRUNE_JOURNAL, read_json, remove, sha256, write_json

RESULTS, DOCUMENT = Path("benchmarks/rescale.json"), Path("docs/methods.md")
START, END = "<!-- rescale: python -m benchmarks.rescale -->", "<!-- end of rescale -->"
EXPERIMENT = "best_50"
WAYS = ("as published", "at other scales")
LARGEST = 3  # exponent of the scales
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def scales(count: int, seed: int) -> torch.Tensor:
    """Powers of two, [count], float32."""
    generator = random.Random(seed)
    return torch.tensor([2.0 ** generator.randint(-LARGEST, LARGEST) for _ in range(count)])


def rescaled(tensors: dict[str, torch.Tensor], *, query_heads: int, value_heads: int, norms: bool) -> dict[str, torch.Tensor]:
    """The tensors of a Llama-like decoder at other scales.

    Args:
        query_heads, value_heads: of the attention. norms: whether norms multiply by their gains, as Llama's do and Gemma's do not.
    """
    result = {name: tensor.clone() for name, tensor in tensors.items()}

    def multiply(name: str, factors: torch.Tensor) -> None:
        result[name] = (result[name].float() * factors).to(tensors[name].dtype)

    prefixes = sorted({name.partition("self_attn.")[0] for name in tensors if "self_attn.v_proj" in name})
    for seed, block in enumerate(prefixes):
        value, width = tensors[f"{block}self_attn.v_proj.weight"], tensors[f"{block}self_attn.v_proj.weight"].shape[1]
        factors = scales(len(value), 3 * seed)
        by_query_head = factors.view(value_heads, -1).repeat_interleave(query_heads // value_heads, dim=0).flatten()
        multiply(f"{block}self_attn.v_proj.weight", 1 / factors[:, None])
        multiply(f"{block}self_attn.o_proj.weight", by_query_head)
        factors = scales(len(tensors[f"{block}mlp.up_proj.weight"]), 3 * seed + 1)
        multiply(f"{block}mlp.up_proj.weight", 1 / factors[:, None])
        multiply(f"{block}mlp.down_proj.weight", factors)
        for number, (norm, readers) in enumerate(READERS.items()):
            if norms:
                factors = scales(width, 1000 * (number + 1) + seed)
                multiply(f"{block}{norm}.weight", 1 / factors)
                for reader in readers:
                    multiply(f"{block}{reader}.weight", factors)
    return result


def rescale(directory: Path) -> None:
    """Write a fetched checkpoint again at other scales, with its new hashes."""
    config = json.loads((directory / "config.json").read_text())
    heads = {"query_heads": config["num_attention_heads"], "value_heads": config["num_key_value_heads"]}
    provenance = read_json(directory / "provenance.json")
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    result = rescaled(tensors, **heads, norms=not config["model_type"].startswith("gemma"))
    for shard in shards:
        save_file({name: result[name] for name in load_file(shard)}, shard, metadata={"format": "pt"})
        provenance["files"][shard.name] = sha256(shard)
    write_json(directory / "provenance.json", provenance | {"fingerprint": fingerprint(provenance["files"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", help="gets the projects")
    parser.add_argument("--base", choices=[model.base for model in MODELS], help="measure on this model alone")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    rows = read_json(RESULTS) if RESULTS.is_file() else []
    if not arguments.table:
        if arguments.directory is None:
            parser.error("found no DIRECTORY, wanted one for the projects")
        for model in MODELS:
            for way in WAYS:
                known = any((row["base"], row["written"]) == (model.base, way) for row in rows)
                if not known and arguments.base in (None, model.base):
                    rows.append({"base": model.base, "written": way, **measure(model, way, arguments.directory)})
                    write_whole(RESULTS, rows)
    show_between(DOCUMENT, START, END, table(rows))


def measure(model: Model, way: str, directory: Path) -> dict[str, Any]:
    """Prune a model as it is written in one of WAYS; its perplexities on the development text."""
    project = directory / model.base / way.replace(" ", "_")
    project.mkdir(parents=True, exist_ok=True)
    with chdir(project):
        remove(BASE)
        bring_model(model)
        if way != WAYS[0]:
            rescale(BASE)
        remove(PRUNE_JOURNAL)
        remove(CALIBRATION)
        shutil.copytree(windows_of(0), CALIBRATION)
        behaviour.run_prune(read(f"base={model.base}", f"experiment={EXPERIMENT}", *FLOAT32))
        dense, pruned = development.perplexities().values()
    facts = {"device": device_name(torch.device("cpu")), "code": record.code_revision()}
    return {"dense": round(dense.value, 3), "perplexity": round(pruned.value, 3), **facts}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row of every model that was measured in both ways, and what the numbers are."""
    shown = [row for row in rows if len([other for other in rows if other["base"] == row["base"]]) == len(WAYS)]
    if not shown:
        return "Not measured yet."
    titles = ("", "dense", *(f"`{EXPERIMENT}`, {way}" for way in WAYS), "ratio")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for model in MODELS:
        of_way = {row["written"]: row for row in shown if row["base"] == model.base}
        if set(of_way) == set(WAYS):
            published, other = (of_way[way] for way in WAYS)
            numbers = (published["dense"], published["perplexity"], other["perplexity"], other["perplexity"] / published["perplexity"])
            lines.append(f"| {model.label} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    devices = " and ".join(sorted({row["device"] for row in shown}))
    codes = ", ".join(sorted({row["code"].partition("-")[0][:7] for row in shown}))
    note = f"Perplexity on the development text, BOS by auto; one seed each, in float32 on {devices}, commit {codes}."
    return "\n".join(lines) + f"\n\n{note}"


if __name__ == "__main__":
    main()
