"""Every type of causal language model of the installed transformers: pruned, refused and why, or not built small.

python -m benchmarks.census

Small random checkpoints, made from the real configurations, go through the prune stage by every kind of method on a CPU. Writes
docs/census.md, and the counts into README.md. Outcomes are kept in the scratch directory as they come, by the code and the version of
transformers, so that a run that was killed goes on.
"""

import argparse
import hashlib
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from benchmarks.behaviour import write_rest
from benchmarks.markers import show_between
from benchmarks.refusals import TAKES
from stages import prune
from stages.config.compose import read
from stages.errors import ArchitectureError, CheckpointError, SparsesweepError
from stages.files import BASE, PRUNE_JOURNAL, PRUNE_RESULTS, read_json, remove, sha256, write_json
from stages.streaming.decoder import Decoder
from tests import small_models
from tests.small_models import small
from tests.streaming import test_every_model_type
from tests.streaming.test_every_model_type import NO_DECODER, NOT_MADE, TYPES, write

DOCUMENT, README = Path("docs/census.md"), Path("README.md")
START, END = "<!-- census: python -m benchmarks.census -->", "<!-- end of census -->"
WINDOWS = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(0))
METHODS = {  # title of a column -> what composes it
    "Wanda": "method=wanda",
    "Wanda in bfloat16": "method=wanda prune.dtype=bfloat16",
    "SparseGPT": "method=sparsegpt",
    "ADMM": "method=admm_short",
    "loss allocation": "method=sparsegpt allocation=loss",
    "block reconstruction": "method=wanda reconstruction=block",
    "distilled": "method=wanda reconstruction=distilled",
    "permuted 2:4": "method=sparsegpt pattern=nm_2_4 pattern.permutation_rounds=2",
    "sequential": "method=wanda prune=sequential",
}
STATES = {  # -> how a count of types goes on, and the title of their section
    "refused": ("are refused by name", "Refused by name"),
    "not built": ("are not built small and so not tried", "Not built small, so not tried"),
    "not a decoder": ("are no decoder language models", "No decoder language models"),
}
SECTIONS = ("method", "pattern", "allocation", "reconstruction", "prune")
ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
ADVICE = "; this architecture is not supported"
CODE = (Path(__file__), Path(small_models.__file__), Path(test_every_model_type.__file__))  # with that of the prune stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/census"), help="keeps the outcomes")
    scratch = parser.parse_args().scratch.absolute() / f"{transformers.__version__}-{code_sha256()[:16]}"
    scratch.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of models at their small sizes
    logging.disable(logging.WARNING)
    outcomes = {}
    for kind in sorted(TYPES):
        done = scratch / f"{kind}.json"
        if not done.is_file():
            write_json(done, outcome(kind))
        outcomes[kind] = read_json(done)
        print(kind, outcomes[kind], flush=True)
    DOCUMENT.write_text(page(outcomes), encoding="utf8")
    show_between(README, START, END, summary(outcomes))


def code_sha256() -> str:
    """Of the code and the choices that outcomes depend on."""
    files = [*CODE, *sorted(Path("conf").rglob("*.yaml"))]
    return hashlib.sha256("".join([prune.code_sha256(), *map(sha256, files)]).encode()).hexdigest()


def outcome(kind: str) -> dict[str, str]:
    """What becomes of a type: "state", and "reason" or the outcome of each method."""
    if kind in NO_DECODER:
        return {"state": "not a decoder", "reason": NO_DECODER[kind]}
    if kind in NOT_MADE:
        return {"state": "not built", "reason": NOT_MADE[kind]}
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        try:
            checkpoint = write(BASE, small(kind))
        except (ImportError, StrictDataclassError, *ERRORS) as error:
            return {"state": "not built", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        write_rest(WINDOWS)
        try:
            _ = Decoder(checkpoint, torch.float32, torch.device("cpu")).matrices
        except (ArchitectureError, CheckpointError) as error:
            reason = str(error).replace(str(BASE), "its checkpoint").removesuffix(ADVICE)
            return {"state": "refused", "reason": reason.removeprefix(f"{kind}: ")}
        return {"state": "pruned", **{title: pruned(kind, overrides.split()) for title, overrides in METHODS.items()}}


def pruned(kind: str, overrides: list[str]) -> str:
    """ "yes" where half of the weights in scope are zero, else why not."""
    sections = read("prune.device=cpu", "prune.dtype=float32", *overrides)
    remove(PRUNE_JOURNAL)
    try:
        prune.main.function(**{name: sections[name] for name in SECTIONS})
    except SparsesweepError as error:
        return f"refused: {str(error).removeprefix(f'{kind}: ').removesuffix(ADVICE)}"
    except ERRORS as error:  # what a census is to find
        return f"fails: {type(error).__name__}: {error}"
    sparsity = read_json(PRUNE_RESULTS / "metrics.json")["sparsity"]
    return "yes" if abs(sparsity - 0.5) < 0.001 else f"fails: found a sparsity of {sparsity}, wanted 0.5"


def of_state(outcomes: dict[str, dict[str, Any]], state: str) -> list[str]:
    """The types that have it."""
    return [kind for kind in outcomes if outcomes[kind]["state"] == state]


def pruned_by_all(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """The types that every kind of method prunes."""
    return [kind for kind in of_state(outcomes, "pruned") if all(outcomes[kind][title] == "yes" for title in METHODS)]


def counts(outcomes: dict[str, dict[str, Any]]) -> str:
    """How many types there are of each state, as a sentence without its end."""
    known = f"Of the {len(outcomes)} types of causal language models that transformers {transformers.__version__} knows"
    by_all = f"{len(pruned_by_all(outcomes))} by all of {len(METHODS)} kinds of methods"
    numbers = {words: len(of_state(outcomes, state)) for state, (words, _) in STATES.items()}
    *others, last = [f"{number} {words if number != 1 else words.replace('are', 'is', 1)}" for words, number in numbers.items()]
    return f"{known}, {len(of_state(outcomes, 'pruned'))} are pruned ({by_all}), {', '.join(others)}, and {last}"


def summary(outcomes: dict[str, dict[str, Any]]) -> str:
    """Markdown: the counts, where the page is, and the types that are pruned."""
    how = "made by `make census` from small random checkpoints with each type's real configuration class"
    saved = "Of types such as `bart`, `bert`, `marian` or `whisper` this is the decoder saved by itself (`BartForCausalLM`, with "
    saved += "`is_encoder_decoder: false`); the encoder-decoders and encoders that are published under these names are refused.\n\n"
    types = f"{saved}<details><summary>The types that are pruned</summary>\n\n{listed(of_state(outcomes, 'pruned'))}\n\n</details>"
    return f"{counts(outcomes)}: [docs/census.md](docs/census.md), {how}.\n\n{types}"


def page(outcomes: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    pruned_types = of_state(outcomes, "pruned")
    lines = [
        "# Every causal language model of transformers",
        "",
        f"{counts(outcomes)}. `make census` made this page. A small random checkpoint of each type went through the "
        "prune stage by each kind of method, on a CPU, in float32 but for the kind that says otherwise, and half of the weights in scope "
        "are zero afterwards. `tests/streaming/test_every_model_type.py` compares the streamed logits with the whole model's, bit by bit; "
        "`tests/pruning/test_every_model_type.py` compares the masks that Wanda chooses with those of a plain reference that runs the "
        "whole model, writes the release, compares all other tensors of it bit by bit, and loads it in stock transformers. Some of what "
        "a method refuses is due to the small sizes, such as two columns for a pattern of four.",
        "",
        "| kind of method | types | composed by |",
        "|---|---|---|",
        *(
            f"| {title} | {sum(outcomes[kind][title] == 'yes' for kind in pruned_types)} | `{overrides}` |"
            for title, overrides in METHODS.items()
        ),
        "",
        "## Pruned by all of them",
        "",
        listed(pruned_by_all(outcomes)),
        "",
        "## Pruned by others than those named",
        "",
        "| not by | why | types |",
        "|---|---|---|",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for title in METHODS:
        for kind in pruned_types:
            if outcomes[kind][title] != "yes":
                reason = re.sub(r"^(refused: )?(layer )?([\w.]+: |block \d+: )?", "", outcomes[kind][title])
                reasons.setdefault((title, reason), []).append(kind)
    lines += [f"| {title} | {reason} | {listed(kinds)} |" for (title, reason), kinds in reasons.items()]
    for state, (_, title) in STATES.items():
        lines += ["", f"## {title}", "", "| types | why | what it would take |", "|---|---|---|"]
        rows: dict[tuple[str, str], list[str]] = {}
        for kind in of_state(outcomes, state):
            rows.setdefault((outcomes[kind]["reason"], TAKES.get(kind, "")), []).append(kind)
        lines += [f"| {listed(kinds)} | {why} | {takes} |" for (why, takes), kinds in rows.items()]
    return "\n".join(lines) + "\n"


def listed(kinds: Iterable[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


if __name__ == "__main__":
    main()
