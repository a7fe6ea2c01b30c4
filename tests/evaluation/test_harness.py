import pytest
import torch

from stages.checkpoint.model import load_model
from stages.config import TASKS
from stages.evaluation.generation import generate
from stages.evaluation.harness import STOCK, zero_shot
from tests import tiny

CPU = torch.device("cpu")


def test_every_task_of_the_configuration_has_a_stock_definition():
    assert set(STOCK) == set(TASKS)


@pytest.fixture(scope="module")
def rows_in(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    words = tiny.sentences(6, seed=3, length=8)
    tiny.write_lines(directory / "boolq.jsonl", [{"question": words[i], "passage": words[-1], "idx": i, "label": i % 2} for i in range(4)])
    tiny.write_lines(directory / "piqa.jsonl", [{"goal": words[i], "sol1": "lamp", "sol2": "river", "label": i % 2} for i in range(4)])
    tiny.write_lines(directory / "lambada.jsonl", [{"text": sentence} for sentence in words])
    return directory


def test_stock_tasks_run_on_our_rows(base, rows_in, tmp_path):
    model = load_model(base, None, dtype=torch.float32, device=CPU)
    scores, samples = zero_shot(
        model, tiny.tokenizer(), ["boolq", "piqa", "lambada"], rows_in=rows_in, limit=3, batch_size=2, scratch=tmp_path
    )
    assert set(scores) == set(samples) == {"boolq", "piqa", "lambada"}
    for task, score in scores.items():
        assert score["rows"] == len(samples[task]) == 3
        assert score["accuracy"] == pytest.approx(sum(row["correct"] for row in samples[task]) / 3)
    assert "accuracy_norm" in scores["piqa"]


def test_no_tasks_are_no_scores(base, rows_in, tmp_path):
    assert zero_shot(None, None, [], rows_in=rows_in, limit=3, batch_size=2, scratch=tmp_path) == ({}, {})


def test_generations_are_greedy_and_both_raw_and_through_the_template(base):
    model = load_model(base, None, dtype=torch.float32, device=CPU)
    (row,) = generate(model, tiny.tokenizer(), ["river stone"], new_tokens=3)
    assert set(row) == {"prompt", "raw", "chat"}
    ids = tiny.tokenizer()("river stone", return_tensors="pt")["input_ids"]
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert row["raw"] == tiny.tokenizer().decode(ids[0, -3:], skip_special_tokens=True)
