"""What stands in for a stage: python stage.py NAME OUT ... waits, and writes plausible results. See stand_in.py."""

import json
import os
import sys
import time
from pathlib import Path

import yaml

NAME, *OUTS = sys.argv[1:]
JOURNAL = Path("artifacts/.journal", NAME)
SPARSITY = yaml.safe_load(Path("params.yaml").read_text())["pattern"].get("sparsity", 0.5)
DENSE = 10.0
PERPLEXITY = {
    "kind": "corpus",
    "name": "text",
    "metric": "perplexity",
    "label": "perplexity",
    "value": DENSE / (1 - SPARSITY),
    "stderr": 1.0,
    "low": 18.0,
    "high": 22.0,
    "count": 99,
    "counted": "tokens",
    "clusters": 9,
    "unit": "",
    "better": "lower",
    "dense": DENSE,
    "difference": None,
    "style": "raw",
}
PROTOCOL = {
    "base": "f" * 64,
    "bos": None,
    "corpora": {"text": {"window_length": 9, "tokens": 99}},
    "tasks": {},
    "evaluation": {},
    "delta": "0",
}
CONTENTS = {
    "results/prune/metrics.json": {"sparsity": 0.5, "seconds": 1.0},
    "results/sparse/metrics.json": {"perplexity": 20.0},
    "results/sparse/run.json": {"seconds": 2.0},
    "results/sparse/frontier.json": [{"method": "m", "pattern": "unstructured", "sparsity": 0.5, "perplexity": 20.0}],
}
DETAILS = {"protocol.json": PROTOCOL, "measurements.json": [PERPLEXITY]}

resumed = JOURNAL.exists()
JOURNAL.parent.mkdir(parents=True, exist_ok=True)
JOURNAL.touch()
time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
while os.environ.get("STAND_IN_HOLDS") == NAME and Path(os.environ["STAND_IN_HELD"]).exists():
    time.sleep(0.1)
if NAME == "prune" and f"sparsity: {os.environ.get('STAND_IN_FAILS')}" in Path("params.yaml").read_text():
    sys.exit("asked to fail")
for out in map(Path, OUTS):
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        out.write_text(json.dumps(CONTENTS.get(str(out), {"resumed": resumed, "cards": os.environ.get("CUDA_VISIBLE_DEVICES")})))
    else:
        (out / "evaluation").mkdir(parents=True, exist_ok=True)
        (out / "provenance.json").write_text("{}")
        (out / "evaluation" / "data.json").write_text("{}")
        made = Path("params.yaml").read_text() if NAME == "prune" else NAME
        for name, content in (DETAILS if out.name == "details" else {"data.json": made}).items():
            (out / name).write_text(json.dumps(content))
JOURNAL.unlink()
