"""Releases of both embedded models to a hub on loopback and back: sent, downloaded, loaded and scored by clients without sparsesweep.

make prune MODEL=smollm2_135m OUT=out/smol QUALITY=fast
make prune MODEL=gemma3_270m OUT=out/gemma QUALITY=fast
python -m benchmarks.round_trip out/smol out/gemma

(or one release alone: rows of others stay, if the libraries and the number of rows scored are the same; of the card's scores only that
of piqa is read, so that `-S 'evaluation.tasks=[piqa]'` is enough.)

Each release goes to a hub of the tests (tests/hub_server.py) by the code of the stage upload. A process that cannot import sparsesweep
fetches it with huggingface_hub's snapshot_download, and continues a prompt in stock transformers; lm-eval's own command scores it as in
stock_client.py, on the rows that the release's card was made from, and each score must be the card's within its four digits. Every file
must come back with the bytes that were sent. Reads artifacts/text (`dvc repro fetch_text`), writes benchmarks/round_trip.json and the
table in docs/release.md. Takes minutes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from benchmarks.markers import show_between
from benchmarks.stock_client import LIBRARIES, in_words, isolated, scored
from stages.config.compose import read
from stages.errors import ComparisonError
from stages.evaluation.questions import Source, embedded_source
from stages.evaluation.tasks import TASKS, read_task
from stages.files import SUMS, TEXT, read_json, sha256, write_json
from tests.hub_server import Hub

FILE, DOCUMENT = Path("benchmarks/round_trip.json"), Path("docs/release.md")
START, END = "<!-- round trip: python -m benchmarks.round_trip -->", "<!-- end of round trip -->"
TASK, METRIC = "piqa", "acc"
WITHIN = 5e-5  # of a card's four digits
PROMPT = "The capital of France is"
SEND = """
import sys
from pathlib import Path
from stages.release.section import Hub
from stages.release.uploading import send
print(send(Path(sys.argv[1]), Hub(repo=sys.argv[2], private=True, existing=False, dry_run=False)))
"""
FETCH = """
import json
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, directory, prompt, answer = sys.argv[1:]
snapshot_download(repo, local_dir=directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
facts = {"continued": tokenizer.decode(tokens[0], skip_special_tokens=True), "class": type(model).__name__}
Path(answer).write_text(json.dumps(facts), encoding="utf8")
"""


def round_trip(release: Path, hub: Hub, source: Source, scratch: Path) -> dict[str, Any]:
    """Send, fetch, load and score one release.

    Raises:
        ComparisonError: a file comes back otherwise, or a score is not the card's.
    """
    repo, fetched, answer = f"org/{release.name}", scratch / "fetched", scratch / "answer.json"
    subprocess.run([sys.executable, "-c", SEND, str(release), repo], check=True, env={**os.environ, "HF_TOKEN": hub.uploads.token})
    isolated(FETCH, repo, fetched, PROMPT, answer)
    lines = (release / SUMS).read_text(encoding="utf8").splitlines()
    for digest, _, name in (line.partition("  ") for line in lines):
        if sha256(fetched / name) != digest:
            raise ComparisonError(f"{fetched / name}: found other bytes than were sent, wanted SHA-256 {digest}")
    results = ModelCard.load(release / "README.md").data.eval_results
    (carded,) = [one.metric_value for one in results if one.dataset_type == TASK and one.metric_type == "accuracy"]
    theirs = scored(fetched, [source], scratch)[source.name].metrics[METRIC]
    if abs(theirs - carded) > WITHIN:
        raise ComparisonError(f"{release.name}, {TASK}: found {theirs} by lm-eval's command, wanted {carded} as on the card")
    model = read_json(release / "provenance.json")["base"]["name"]
    return {"model": model, "files": len(lines) + 1, "card": carded, "stock": theirs, **read_json(answer)}


def others(before: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of other models that an earlier run measured with the same libraries on as many rows."""
    same = all(before[key] == facts[key] for key in ("scored", "versions"))
    measured = {row["model"] for row in facts["rows"]}
    return [row for row in before["rows"] if same and row["model"] not in measured]


def table(facts: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| model | files, all as sent | class | {TASK} on the card | by the stock client | continues the prompt |", "|---" * 6 + "|"]
    for row in facts["rows"]:
        continued = row["continued"].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {row['model']} | {row['files']} | {row['class']} | {row['card']:.4f} | {row['stock']:.6f} | {continued} |")
    return "\n".join([*lines, "", f"{facts['scored']} rows, float32 on a CPU, with {in_words(facts['versions'])}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Send releases to a hub on loopback, fetch, load and score them.")
    parser.add_argument("releases", nargs="+", type=Path)
    releases = parser.parse_args().releases
    hub = Hub()
    os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.uploads.token}
    count, path, rows = read()["evaluation"].rows, TEXT / f"evaluation/{TASK}.jsonl", []
    for release in releases:
        with tempfile.TemporaryDirectory() as directory:
            scratch = Path(directory)
            asked = read_task(TASKS[TASK], path, count)
            source = embedded_source(TASKS[TASK], asked, [], few_shot=0, sha256=sha256(path), scratch=scratch)
            rows.append(round_trip(release.absolute(), hub, source, scratch))
    facts = {"rows": rows, "scored": count, "versions": {library: version(library) for library in (*LIBRARIES, "huggingface_hub")}}
    if FILE.is_file():
        facts["rows"] = [*others(read_json(FILE), facts), *rows]
    write_json(FILE, facts)
    show_between(DOCUMENT, START, END, table(facts))


if __name__ == "__main__":
    main()
