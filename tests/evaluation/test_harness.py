from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedModel

from stages.bos import Bos
from stages.checkpoint.model import Apply, load_model
from stages.checkpoint.reader import Checkpoint
from stages.comparison.paired import paired_generations
from stages.errors import CheckpointError, ConfigError, TextError
from stages.evaluation.generation import encodings, generate, require_prompts
from stages.evaluation.harness import WholeModel
from stages.evaluation.questions import stock_definition
from stages.evaluation.results import Results
from stages.evaluation.scoring import StreamedModels
from stages.evaluation.streamed import SharedScores, StreamedHarness
from stages.evaluation.tasks import TASKS
from stages.streaming.decoder import Decoder
from tests import tiny
from tests.evaluation import delta as deltas
from tests.evaluation.asking import questions
from tests.evaluation.asking import samples as asked
from tests.evaluation.rows import GOOD

CPU = torch.device("cpu")

UNBOUNDED = {"new_tokens": 5, "context_length": None}  # prompts


def dense(base: Checkpoint) -> PreTrainedModel:
    return load_model(base, None, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def rows():
    words = tiny.sentences(6, seed=3, length=8)
    return {
        "boolq": [{"question": words[i], "passage": words[-1], "label": i % 2} for i in range(3)],
        "piqa": [{"goal": words[i], "sol1": "lamp", "sol2": "river", "label": i % 2} for i in range(3)],
        "lambada": [{"text": sentence} for sentence in words[:3]],
    }


def test_stock_tasks_run_on_our_rows(base, rows, tmp_path):
    model = load_model(base, None, dtype=torch.float32, device=CPU)
    whole = WholeModel(tiny.NO_BOS, pretrained=model, tokenizer=tiny.tokenizer(), batch_size=2)
    samples = asked(whole, rows, tmp_path)
    assert list(samples) == ["boolq", "piqa", "lambada"]
    for task, answers in samples.items():
        assert [row["row"] for row in answers] == [0, 1, 2]
        assert all(tuple(row["values"]) == TASKS[task].metrics for row in answers)
    assert [row["cluster"] for row in samples["boolq"]] == [0, 0, 0]  # one passage
    assert [row["cluster"] for row in samples["piqa"]] == [0, 1, 2]


def test_every_task_runs_on_the_columns_of_the_table(base, tmp_path):
    whole = WholeModel(tiny.NO_BOS, pretrained=dense(base), tokenizer=tiny.tokenizer(), batch_size=2)
    samples = asked(whole, {name: [GOOD[name]] * 2 for name in TASKS}, tmp_path)
    assert list(samples) == list(TASKS)
    assert {row["task"] for row in samples["mmlu"]} == {"mmlu_anatomy"}
    assert all(len(rows) == 2 for rows in samples.values())


@pytest.mark.parametrize(("disabled", "shown"), [("1", False), ("", True)])
def test_the_switch_for_progress_bars_holds_for_lm_evals(base, rows, tmp_path, monkeypatch, capfd, disabled, shown):
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    whole = WholeModel(tiny.NO_BOS, pretrained=dense(base), tokenizer=tiny.tokenizer(), batch_size=2)
    asked(whole, {"lambada": rows["lambada"]}, tmp_path)
    assert ("continuations" in capfd.readouterr().err) == shown


def test_a_task_that_lm_eval_does_not_have_is_named():
    with pytest.raises(ConfigError, match=r"evaluation.tasks: lm-eval [\d.]+ has no task 'guess' in its folder super_glue/boolq"):
        stock_definition(TASKS["boolq"], "guess")


@pytest.mark.parametrize("pruned", [False, True])
def test_a_streamed_model_scores_as_the_whole_model_does(base, rows, tmp_path, pruned):
    apply = deltas.write(tmp_path / "sparse", base).apply if pruned else None
    whole = load_model(base, apply, dtype=torch.float32, device=CPU)
    streamed = models(base, apply, tmp_path)
    samples = []
    for name, model in (
        ("whole", WholeModel(tiny.NO_BOS, pretrained=whole, tokenizer=tiny.tokenizer(), batch_size=2)),
        ("streamed", harness_of(streamed)),
    ):
        (tmp_path / name).mkdir()
        samples.append(asked(model, rows, tmp_path / name))
    by_whole, by_stream = samples
    for task in rows:
        for row, other in zip(by_whole[task], by_stream[task], strict=True):
            assert row["values"] == other["values"]
            for (score, greedy), (same_score, same_greedy) in zip(row["scores"], other["scores"], strict=True):
                assert score == pytest.approx(same_score, rel=1e-4)
                assert greedy == same_greedy


def models(base: Checkpoint, apply: Apply | None, scratch: Path) -> StreamedModels:
    return StreamedModels(decoder=Decoder(base, torch.float32, CPU), variants={"scored": apply}, scratch=scratch)


def harness_of(streamed: StreamedModels) -> StreamedHarness:
    return StreamedHarness(SharedScores(streamed, 2), "scored", tiny.tokenizer(), tiny.NO_BOS, no_model)


def no_model() -> LM:
    raise AssertionError("a whole model is asked for")


def test_a_streamed_model_that_cannot_be_scored_takes_no_scores_from_the_others(base, tmp_path):
    def damaged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        raise CheckpointError(f"{name}: damaged")

    decoder = Decoder(base, torch.float32, CPU)
    variants = {"damaged": damaged, "first": None, "second": None}
    shared = SharedScores(StreamedModels(decoder=decoder, variants=variants, scratch=tmp_path), 2)
    asked = [([5, 6, 7], 1), ([5, 8, 9, 10], 2)]
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            shared.of("damaged", asked)
    assert shared.of("first", asked) == shared.of("second", asked) == SharedScores(models(base, None, tmp_path), 2).of("scored", asked)


@pytest.mark.parametrize("bos", [tiny.NO_BOS, Bos(token=1, reason="a test")])
def test_whole_texts_have_the_same_scores_streamed_window_by_window(base, tmp_path, bos):
    texts = [*tiny.sentences(2, seed=4, length=90), "lamp", ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    whole = WholeModel(bos, pretrained=dense(base), tokenizer=tiny.tokenizer(), batch_size=2, max_length=32)
    streamed = StreamedHarness(SharedScores(models(base, None, tmp_path), 2), "scored", tiny.tokenizer(), bos, no_model)
    streamed.max_length = 32
    expected = whole.loglikelihood_rolling(requests, disable_tqdm=True)
    assert streamed.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)
    assert expected[0] < 3 * expected[2] < 0 == expected[3]


def test_text_is_generated_by_the_whole_model(base, tmp_path):
    whole = WholeModel(tiny.NO_BOS, pretrained=dense(base), tokenizer=tiny.tokenizer(), batch_size=2, max_length=64)
    requests = [Instance("generate_until", {}, ("river stone", {"until": ["\n"], "max_gen_toks": 4}), 0)]
    expected = whole.generate_until(requests, disable_tqdm=True)
    streamed = StreamedHarness(SharedScores(models(base, None, tmp_path), 2), "scored", tiny.tokenizer(), tiny.NO_BOS, lambda: whole)
    assert streamed.generate_until(requests) == expected
    assert expected[0]


def test_generations_are_greedy_and_both_raw_and_through_the_template(base):
    model = load_model(base, None, dtype=torch.float32, device=CPU)
    (row,), tokens = generate(model, tiny.tokenizer(), tiny.NO_BOS, ["river stone"], new_tokens=3)
    assert set(row) == {"prompt", "raw", "chat"}
    assert 2 <= tokens <= 6  # at most three of each form
    ids = tiny.tokenizer()("river stone", return_tensors="pt")["input_ids"]
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert row["raw"] == tiny.tokenizer().decode(ids[0, -3:], skip_special_tokens=True)


def test_a_token_beyond_the_embedding_is_named_before_a_task_is_scored(base, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(400)])
    token = tokenizer.convert_ids_to_tokens(400)
    rows = {"piqa": [{"goal": token, "sol1": "lamp", "sol2": "river", "label": 0}] * 2}
    streamed = models(base, None, tmp_path)
    for name, model in (
        ("whole", WholeModel(tiny.NO_BOS, pretrained=dense(base), tokenizer=tokenizer, batch_size=2)),
        ("streamed", StreamedHarness(SharedScores(streamed, 2), "scored", tokenizer, tiny.NO_BOS, no_model)),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=f"evaluation.tasks: found the token '{token}' with id 400, wanted ids below 400"):
            asked(model, rows, tmp_path / name, tokenizer=tokenizer)


def test_a_token_beyond_the_embedding_is_named_before_there_is_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="evaluation.tasks: piqa: found the token .* with id .*, wanted ids below 9"):
        questions({"piqa": [GOOD["piqa"]]}, tmp_path, embedding_rows=9)


def test_prompts_that_the_model_cannot_continue_are_refused():
    tokenizer = tiny.tokenizer()
    require_prompts(tokenizer, tiny.NO_BOS, ["river stone"], 400, **UNBOUNDED)
    with pytest.raises(CheckpointError, match='evaluation.generations.prompts, "river stone": found the token .*, wanted ids below 5'):
        require_prompts(tokenizer, tiny.NO_BOS, ["river stone"], 5, **UNBOUNDED)
    with pytest.raises(TextError, match=r'evaluation.generations.prompts, "": found no token \(raw\), wanted at least one to continue'):
        require_prompts(tokenizer, tiny.NO_BOS, ["river", ""], 400, **UNBOUNDED)
    raw, chat = (len(tokens) for tokens in encodings(tokenizer, tiny.NO_BOS, "river stone")[0].values())
    assert raw < chat
    require_prompts(tokenizer, tiny.NO_BOS, ["river stone"], 400, new_tokens=5, context_length=chat + 5)
    found = rf"found {chat} tokens \(chat\) and evaluation.generations.new_tokens=6"
    with pytest.raises(TextError, match=f"{found}, wanted at most the model's context of {chat + 5} together"):
        require_prompts(tokenizer, tiny.NO_BOS, ["river stone"], 400, new_tokens=6, context_length=chat + 5)


def test_a_prompt_that_the_chat_template_refuses_is_continued_raw_and_says_why_not_the_other(base, caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    require_prompts(tokenizer, tiny.NO_BOS, ["river"], 400, **UNBOUNDED)
    why = "the base's chat template refuses this dialogue (no user)"
    assert f'evaluation.generations.prompts, "river": {why}; it is continued raw alone' in caplog.messages
    (row,), _ = generate(load_model(base, None, dtype=torch.float32, device=CPU), tokenizer, tiny.NO_BOS, ["river"], new_tokens=3)
    assert (set(row), row["chat_refused"]) == ({"prompt", "raw", "chat_refused"}, why)
    results = Results(windows={}, samples={}, generations=[row], measurements=[])
    (paired,) = paired_generations(results, results)
    assert paired == {"prompt": "river", "raw_dense": row["raw"], "raw_sparse": row["raw"], "chat_refused": why}
