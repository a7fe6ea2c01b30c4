import pytest
import torch

from stages.checkpoint.delta import Change, SparseDelta, write_block, write_manifest
from stages.checkpoint.model import load_model
from stages.config import TASKS
from stages.errors import SparsesweepError
from stages.evaluation.generation import generate
from stages.evaluation.harness import STOCK, WholeModel, zero_shot
from stages.evaluation.perplexity import window_losses
from stages.evaluation.streamed import StreamedHarness, StreamedModel
from stages.streaming.decoder import Decoder
from tests import tiny

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


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
    whole = WholeModel(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=2)
    scores, samples = zero_shot(whole, ["boolq", "piqa", "lambada"], rows_in=rows_in, limit=3, scratch=tmp_path)
    assert set(scores) == set(samples) == {"boolq", "piqa", "lambada"}
    for task, score in scores.items():
        assert score["rows"] == len(samples[task]) == 3
        assert score["accuracy"] == pytest.approx(sum(row["correct"] for row in samples[task]) / 3)
    assert "accuracy_norm" in scores["piqa"]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_streamed_model_scores_as_the_whole_model_does(base, rows_in, tmp_path, pruned):
    delta = None
    if pruned:
        change = Change(mask=torch.rand(base.shape(UP), generator=torch.Generator().manual_seed(0)) > 0.5)
        write_block(tmp_path / "block-00001.safetensors", {UP: change}, base.fingerprint)
        write_manifest(tmp_path, base=base.fingerprint, recipe={}, matrices=[])
        delta = SparseDelta(tmp_path, base.fingerprint)
    whole = load_model(base, delta.apply if pruned else None, dtype=torch.float32, device=CPU)
    streamed = StreamedModel(decoder=Decoder(base, torch.float32, CPU), delta=delta, scratch=tmp_path)
    windows = torch.randint(3, 400, (3, 40), generator=torch.Generator().manual_seed(0))
    assert streamed.window_losses(windows).losses == pytest.approx(window_losses(whole, windows).losses, rel=1e-5)

    found = []
    for number, model in enumerate((WholeModel(pretrained=whole, tokenizer=tiny.tokenizer(), batch_size=2), harness_of(streamed))):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        found.append(zero_shot(model, ["boolq", "piqa", "lambada"], rows_in=rows_in, limit=3, scratch=scratch))
    (_, by_whole), (_, by_stream) = found
    for task, rows in by_whole.items():
        for one, other in zip(rows, by_stream[task], strict=True):
            assert one["correct"] == other["correct"]
            for (score, greedy), (same_score, same_greedy) in zip(one["scores"], other["scores"], strict=True):
                assert score == pytest.approx(same_score, rel=1e-4)
                assert greedy == same_greedy


def harness_of(streamed: StreamedModel) -> StreamedHarness:
    return StreamedHarness(streamed, tiny.tokenizer(), batch_size=2)


def test_what_a_streamed_model_does_not_offer_is_refused(base, tmp_path):
    model = harness_of(StreamedModel(decoder=Decoder(base, torch.float32, CPU), delta=None, scratch=tmp_path))
    with pytest.raises(SparsesweepError, match="text is not generated"):
        model.generate_until([])
    with pytest.raises(SparsesweepError, match="rolling likelihoods are not offered"):
        model.loglikelihood_rolling([])


def test_no_tasks_are_no_scores(base, rows_in, tmp_path):
    assert zero_shot(None, [], rows_in=rows_in, limit=3, scratch=tmp_path) == ({}, {})


def test_generations_are_greedy_and_both_raw_and_through_the_template(base):
    model = load_model(base, None, dtype=torch.float32, device=CPU)
    (row,) = generate(model, tiny.tokenizer(), ["river stone"], new_tokens=3)
    assert set(row) == {"prompt", "raw", "chat"}
    ids = tiny.tokenizer()("river stone", return_tensors="pt")["input_ids"]
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert row["raw"] == tiny.tokenizer().decode(ids[0, -3:], skip_special_tokens=True)
