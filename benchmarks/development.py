"""The development text: what defaults were chosen on, apart from calibration and from everything reported.

python -m benchmarks.development

Prints the perplexity of the dense model and of what the prune stage made last, on windows of C4 pages from which no calibration
window of the embedded default, with a seed from 0 to 9, is drawn nor held out; and writes both into benchmarks/development.json, with
the code that made them. Takes a minute.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import arguments
from stages import record
from stages.bos import BosSetting, decide
from stages.calibration.documents import Documents
from stages.calibration.samplers import document, packed
from stages.checkpoint.delta import SparseDelta
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.evaluation.measurement import Measurement
from stages.evaluation.metric import Corpus
from stages.evaluation.metrics import METRICS
from stages.evaluation.scoring import StreamedModels
from stages.files import BASE, CALIBRATION, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE, TEXT, read_json, write_json
from stages.rows import Rows
from stages.sample import SPARE
from stages.streaming.decoder import Decoder

PAGES = TEXT / "calibration/c4_pages.jsonl"
CALIBRATION_SEEDS, CALIBRATION_WINDOWS, HELD_OUT = range(10), 32, 4
WINDOWS, LENGTH, ORDER = 24, 512, 123
FILE = Path("benchmarks/development.json")


@dataclass(frozen=True)
class Others:
    """Some of the documents."""

    documents: Documents
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> list[int]:
        return self.documents[self.numbers[index]]


def windows() -> torch.Tensor:
    """[24, 512], int64."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False, local_files_only=True)
    pages, bos = Documents(Rows(PAGES), tokenizer), decide(BosSetting.AUTO, tokenizer, "bos")
    drawn = {
        number
        for seed in CALIBRATION_SEEDS
        for window in document(pages, CALIBRATION_WINDOWS + SPARE * HELD_OUT, LENGTH, seed, None)
        for number, _, _ in window.spans
    }
    others = Others(pages, [number for number in range(len(pages)) if number not in drawn])
    return torch.tensor([window.begun_with(bos).tokens for window in packed(others, WINDOWS, LENGTH, ORDER, pages.end)])


def differences(prune: dict[str, Any]) -> list[str]:
    """What the label does not tell: other windows, damping, allocation and training than the presets have."""
    number = read_json(CALIBRATION / "provenance.json")["section"]["windows"]
    words = [f", {number} calibration windows"] if number != CALIBRATION_WINDOWS else []
    words += [", damping by shrinkage"] if prune["method"]["damping"]["shrinkage"] else []
    for group in ("allocation", "reconstruction"):
        defaults = asdict(read(f"{group}={prune[group]['name']}")[group])
        if prune[group].keys() != defaults.keys():
            raise SystemExit(f"{PRUNE_RESULTS}: {group} has other keys than this version's; prune anew")
        words += [f", {key} {value}" for key, value in prune[group].items() if value != defaults[key]]
    return words


def perplexities() -> dict[str, Measurement]:
    """Of the dense model and of what the prune stage made last, in this order, each by its label."""
    base, text, prune = Checkpoint(BASE), windows(), read_json(PRUNE_RESULTS / "provenance.json")
    delta = SparseDelta(SPARSE, base.fingerprint)
    pruned = f"{prune['label']}, {prune['pattern_label']}, sparsity {delta.summary['sparsity']:.3g}{''.join(differences(prune))}"
    metric, corpus = METRICS["perplexity"], Corpus(name="development", windows=text, clusters=list(range(len(text))))
    decoder = Decoder(base, torch.float32, torch.device("cpu"))
    models = StreamedModels(decoder=decoder, variants={"dense": None, pruned: delta.apply}, scratch=PRUNE_JOURNAL.parent)
    observed = models.observe([corpus], [metric])
    return {label: metric.measure(corpus, observed[label][corpus.name], None)[0] for label in ("dense", pruned)}


def main() -> None:
    prune = read_json(PRUNE_RESULTS / "provenance.json")
    known = read_json(FILE) if FILE.is_file() else {}
    of_model = known.setdefault(Checkpoint(BASE).provenance["name"], {})
    for label, perplexity in perplexities().items():
        of_model[label] = {"perplexity": round(perplexity.value, 2), "code": record.code_revision() if label == "dense" else prune["code"]}
        if label != "dense" and prune["allocation_judged"]:
            of_model[label]["allocation_judged"] = prune["allocation_judged"]
        print(f"{label}: perplexity {perplexity.shown(2)}")
    write_json(FILE, known)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
