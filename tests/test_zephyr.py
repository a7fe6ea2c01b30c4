"""conf/experiment/zephyr_sparse05.yaml as it stands, against a loopback hub that holds a small zephyr, C4 and WikiText."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests import project as projects
from tests import tiny


def test_the_experiment_that_makes_zephyr_sparse05_runs_from_hub_to_release(hub_repository, tmp_path):
    checkpoint = tiny.write_checkpoint(tmp_path / "zephyr", max_position_embeddings=32768, sliding_window=4096)
    hub_repository("HuggingFaceH4/zephyr-7b-beta", {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    pages = [{"text": text, "url": ""} for text in tiny.sentences(30, seed=6, length=100) + tiny.sentences(10, seed=7, length=2600)]
    shard = gzip.compress("".join(json.dumps(page) + "\n" for page in pages).encode())
    hub_repository("datasets/allenai/c4", {"en/c4-train.00000-of-01024.json.gz": shard})
    articles = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in tiny.sentences(50, seed=8, length=200)]), articles)
    hub_repository("datasets/Salesforce/wikitext", {"wikitext-2-raw-v1/test-00000-of-00001.parquet": articles.getvalue()})

    project = projects.make(tmp_path / "project")
    project.run("dvc", "exp", "run", "-S", "experiment=zephyr_sparse05", "-S", "evaluation.rows=2")

    params = yaml.safe_load((project.root / "release/params.yaml").read_text())
    assert (params["calibration"]["windows"], params["calibration"]["window_length"]) == (128, 2048)
    prune = json.loads((project.root / "results/prune/sparsity.json").read_text())
    assert {row["sparsity"] for row in prune} == {0.5}
    card = (project.root / "release/README.md").read_text()
    assert "# zephyr-7b-beta_sparse05" in card
    assert "892b3d7a7b1cf10c7a701c60881cd93df615734c" in card
    metrics = json.loads((project.root / "results/sparse/metrics.json").read_text())
    assert {"boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"} <= set(metrics["tasks"])
