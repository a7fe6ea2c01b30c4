"""Seconds of the embedded tasks' log-likelihoods: by lm-eval's own model, and by ours, which computes what sequences begin with once.

python -m benchmarks.evaluation_speed --rows 8

Both score the same requests of the same model, task by task, one after the other in one process, in float32; each score must be lm-eval's
within 1e-3 of a nat, and the continuation the likeliest or not as there. lm-eval's batches hold --batch rows. Reads artifacts/base and
artifacts/text (`dvc repro fetch_base fetch_text`), writes benchmarks/evaluation_speed.json, a row for each model and
machine, and the table in docs/engine.md.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.markers import show_between
from stages import devices, record
from stages.bos import decide
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import PROVENANCE, Checkpoint
from stages.checkpoint.tokens import embedding_rows, load_tokenizer
from stages.errors import ComparisonError
from stages.evaluation.encoding import Encoder
from stages.evaluation.harness import WholeModel
from stages.evaluation.questions import Asking, all_requests, embedded_source
from stages.evaluation.tasks import TASKS, read_task
from stages.files import BASE, TEXT, read_json, sha256, write_json

FILE, DOCUMENT = Path("benchmarks/evaluation_speed.json"), Path("docs/engine.md")
START, END = "<!-- evaluation speed: python -m benchmarks.evaluation_speed -->", "<!-- end of evaluation speed -->"
NAMES = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "lambada", "piqa")
CONTEXT, WITHIN = 2048, 1e-3  # tokens; nats: sums over a continuation, in float32
CPU = torch.device("cpu")


def timed(model: HFLM, requests: list[Any]) -> tuple[list[tuple[float, bool]], float]:
    """Scores, and seconds."""
    start = perf_counter()
    found = model.loglikelihood(requests, disable_tqdm=True)
    return found, perf_counter() - start


def compared(name: str, model: HFLM, stock: HFLM, requests: list[Any]) -> dict[str, Any]:
    """Both on the requests of one task.

    Raises:
        ComparisonError: scores differ.
    """
    (theirs, slow), (ours, fast) = timed(stock, requests), timed(model, requests)
    for (score, greedy), (wanted, wanted_greedy) in zip(ours, theirs, strict=True):
        if abs(score - wanted) > WITHIN or greedy != wanted_greedy:
            raise ComparisonError(f"{name}: found {score} and {greedy}, wanted lm-eval's {wanted} and {wanted_greedy}")
    difference = max(abs(one[0] - other[0]) for one, other in zip(ours, theirs, strict=True))
    return {"task": name, "requests": len(requests), "stock": slow, "ours": fast, "difference": difference}


def table(facts: list[dict[str, Any]]) -> str:
    """Markdown: a row for each task, and the sums, of each model."""
    lines = ["| model | task | requests | lm-eval, s | ours, s | ratio | largest difference, nats |", "|---" * 7 + "|"]
    for model in facts:
        rows = model["tasks"]
        total = {key: sum(row[key] for row in rows) for key in ("requests", "stock", "ours")}
        for row in [*rows, {"task": "all", "difference": max(row["difference"] for row in rows), **total}]:
            cells = f"{row['stock']:.1f} | {row['ours']:.1f} | {row['stock'] / row['ours']:.2f} | {row['difference']:.1e}"
            lines.append(f"| {model['model']} | {row['task']} | {row['requests']} | {cells} |")
    said = "; ".join(
        f"{model['model']}: {model['rows']} rows a task, batches of {model['batch']}, {model['device']}, commit {model['code'][:7]}"
        for model in facts
    )
    return "\n".join([*lines, "", f"{said}. float32."])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time lm-eval's log-likelihoods against ours on the embedded tasks.")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    base = Checkpoint(BASE)
    tokenizer, loaded = load_tokenizer(base.directory), load_model(base, None, dtype=torch.float32, device=CPU)
    bos = decide("auto", tokenizer, "evaluation.bos")
    shape = {"tokenizer": tokenizer, "batch_size": arguments.batch, "max_length": CONTEXT}
    ours = WholeModel(bos, pretrained=loaded, **shape)
    stock = HFLM(pretrained=loaded, add_bos_token=bos.token is not None, **shape)
    tasks = []
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Encoder(tokenizer, bos, CONTEXT)
        asking = Asking(
            encoder=encoder,
            limit=None,
            examples=0,
            system_prompt="",
            embedding_rows=embedding_rows(base),
            scratch=Path(scratch),
        )
        for name in NAMES:
            path = TEXT / f"evaluation/{name}.jsonl"
            asked = read_task(TASKS[name], path, arguments.rows)
            source = embedded_source(TASKS[name], asked, [], few_shot=0, sha256=sha256(path), scratch=Path(scratch))
            ((_, requests),) = all_requests([asking.build(source, "raw")])
            tasks.append(compared(name, ours, stock, requests))
            print(tasks[-1], flush=True)
    model, device = read_json(BASE / PROVENANCE)["name"], devices.device_name(CPU)
    facts = {"rows": arguments.rows, "batch": arguments.batch, "code": record.code_revision()}
    row = {"model": model, "device": device, **facts, "tasks": tasks}
    known = read_json(FILE) if FILE.is_file() else []
    write_json(FILE, rows := [*(other for other in known if (other["model"], other["device"]) != (model, device)), row])
    show_between(DOCUMENT, START, END, table(rows))


if __name__ == "__main__":
    main()
