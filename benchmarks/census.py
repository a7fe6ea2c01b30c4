"""Every type of causal language model of the installed transformers: pruned, refused and why, or not built small.

python -m benchmarks.census

Small random checkpoints, made from the real configurations, are pruned by several methods on a CPU. Writes docs/census.md. Outcomes are
kept in the scratch directory as they come, so that a run that was killed goes on; after a change of code, remove it.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from stages.config.compose import method
from stages.errors import ArchitectureError, CheckpointError, SparsesweepError
from stages.files import read_json, write_json
from stages.pruning.block_loop import MatrixResult, prune_blocks
from stages.pruning.method import Method
from stages.pruning.patterns import Unstructured
from stages.pruning.plan import Plan
from stages.pruning.reconstruction import Reconstruction
from stages.pruning.section import Propagation
from stages.streaming.architecture import Matrix
from stages.streaming.decoder import Decoder
from stages.streaming.stream import Stream
from tests.streaming.test_every_model_type import BATCH, CPU, NOT_SMALL, TYPES, WINDOWS, small, write

DOCUMENT = Path("docs/census.md")
HALF = Unstructured(sparsity=0.5, comparison_group="row")
BLOCK = Reconstruction(epochs=1, learning_rate=1e-3, search=False)
METHODS: dict[str, tuple[str, Reconstruction | None]] = {
    "Wanda": ("wanda", None),
    "SparseGPT": ("sparsegpt", None),
    "ADMM": ("admm_short", None),
    "block reconstruction": ("wanda", BLOCK),
}
ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
NOT_BUILT = "its sizes depend on each other in more ways than the table of small sizes knows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(".cache/census"), help="keeps the outcomes")
    scratch = parser.parse_args().scratch / transformers.__version__
    scratch.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of models at their small sizes
    outcomes = {}
    for kind in sorted(TYPES):
        done = scratch / f"{kind}.json"
        if not done.is_file():
            write_json(done, outcome(kind))
        outcomes[kind] = read_json(done)
        print(kind, outcomes[kind], flush=True)
    DOCUMENT.write_text(page(outcomes), encoding="utf8")


def outcome(kind: str) -> dict[str, str]:
    """What becomes of a type: "state", and "reason" or the outcome of each method."""
    if kind in NOT_SMALL:
        return {"state": "not built", "reason": NOT_BUILT}
    with tempfile.TemporaryDirectory() as directory:
        try:
            checkpoint = write(Path(directory), small(TYPES[kind]))
            decoder = Decoder(checkpoint, torch.float32, CPU)
            matrices = decoder.matrices
        except (ArchitectureError, CheckpointError) as error:
            reason = str(error).replace(directory, "checkpoint").removesuffix("; this architecture is not supported")
            other = "transformers knows no decoder language model" in reason
            return {"state": "not a decoder" if other else "refused", "reason": reason.removeprefix(f"{kind}: ")}
        names = [matrix.name for of_block in matrices for matrix in of_block]
        by_method = {label: pruned(decoder, names, method(name), training) for label, (name, training) in METHODS.items()}
        if by_method["Wanda"] != "yes":
            return {"state": "refused", "reason": by_method["Wanda"].removeprefix("refused: ")}
        return {"state": "pruned", **by_method}


def pruned(decoder: Decoder, names: list[str], by: Method, training: Reconstruction | None) -> str:
    """ "yes" where every matrix has half of its weights, else why not."""
    plan = Plan(
        method=by,
        patterns=dict.fromkeys(names, HALF),
        propagate=Propagation.PRUNED,
        error_tokens=60,
        expert_tokens=8,
        reconstruction=training,
    )
    try:
        with torch.no_grad():
            with decoder.before_blocks():
                stream = Stream(decoder, WINDOWS, batch=BATCH, held_out=1)
            results = [result for block in prune_blocks(stream, plan) for result in block.matrices]
    except SparsesweepError as error:
        return f"refused: {error}"
    except ERRORS as error:  # what a census is to find
        return f"fails: {type(error).__name__}: {error}"
    halves = {name: matrix.size - matrix.shape[0] * (matrix.shape[1] // 2) for name, matrix in _by_name(results).items()}
    wrong = [result.matrix.name for result in results if result.kept != halves[result.matrix.name]]
    return f"fails: {len(wrong)} matrices of another sparsity" if wrong or len(results) != len(names) else "yes"


def _by_name(results: list[MatrixResult]) -> dict[str, Matrix]:
    return {result.matrix.name: result.matrix for result in results}


def page(outcomes: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    of_state = {
        state: [kind for kind in outcomes if outcomes[kind]["state"] == state]
        for state in ("pruned", "refused", "not built", "not a decoder")
    }
    counts = ", ".join(f"{len(kinds)} {state}" for state, kinds in of_state.items())
    lines = [
        "# Every causal language model of transformers",
        "",
        f"`make census` made this page: of the {len(outcomes)} types of causal language models that transformers "
        f"{transformers.__version__} knows, {counts}. A small random checkpoint of each type, made from its real configuration class, was "
        "pruned to 50% by each "
        "method, and every matrix has exactly half of its weights; `tests/streaming/test_every_model_type.py` compares the streamed "
        "logits with the whole model's.",
        "",
        f"| pruned | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    lines += [f"| `{kind}` | {' | '.join(outcomes[kind][label] for label in METHODS)} |" for kind in of_state["pruned"]]
    for state, title in (
        ("refused", "refused"),
        ("not built", "not built small, so not tried"),
        ("not a decoder", "no decoder language model"),
    ):
        lines += ["", f"| {title} | why |", "|---|---|"]
        lines += [f"| `{kind}` | {outcomes[kind]['reason']} |" for kind in of_state[state]]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    main()
