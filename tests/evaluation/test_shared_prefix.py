import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig

from stages.evaluation import shared_prefix
from stages.evaluation.shared_prefix import SharedPrefixes
from tests import architectures, tiny

LENGTH = 64


def requests(vocabulary: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Questions with answers of several lengths, some of one token, some with examples before them, one twice, one too long."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    made, examples = [], draw(20)
    for question in range(6):
        context = (examples if question % 2 else []) + draw(9 + 3 * question)
        made += [(context, draw(1 if question == 2 else 1 + answer + question)) for answer in range(4)]
    option = draw(12)
    made += [(option + draw(2), [7, 8, 9]), (option + draw(4), [7, 8, 9])]
    return [*made, made[0], (draw(3), draw(2)), (draw(LENGTH), draw(9))]


def stock(model, asked):
    """lm-eval's own code on the same requests."""
    lm = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=1, max_length=LENGTH)
    return lm._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in asked], disable_tqdm=True)


def made(kind: str):
    return architectures.model(kind).float()


SHARING = ("llama", "mistral", "gemma3_text", "gpt2", "opt", "mixtral", "deepseek_v3", "gpt_oss")
APART = ("mamba", "jamba", "mpt", "bloom")


@pytest.mark.parametrize("kind", [*SHARING, *APART])
@pytest.mark.parametrize("tokens_at_once", [1, 150, 10_000])
def test_scores_are_those_of_lm_eval(kind, tokens_at_once):
    model = made(kind)
    asked = requests(model.config.vocab_size)
    ours = SharedPrefixes(model, LENGTH, tokens_at_once)
    found = dict(ours.scores(asked))
    assert ours.shares is (None if tokens_at_once == 1 else kind in SHARING)
    assert sorted(found) == list(range(len(asked)))
    for number, (likelihood, greedy) in enumerate(stock(model, asked)):
        assert found[number].likelihood == pytest.approx(likelihood, abs=1e-4)
        assert found[number].greedy == greedy


def test_a_model_that_fails_with_a_cache_reads_every_sequence_by_itself(monkeypatch):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    forward = model.forward

    def failing(input_ids=None, use_cache=None, **options):
        if use_cache:
            raise ValueError("a state has the wrong shape")
        return forward(input_ids, use_cache=use_cache, **options)

    monkeypatch.setattr(model, "forward", failing)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    found = dict(ours.scores(asked))
    assert ours.shares is False
    assert [found[number].likelihood for number in range(len(asked))] == pytest.approx([one for one, _ in stock(model, asked)], abs=1e-4)


def test_every_request_has_a_score_whatever_was_tried_first():
    model = made("llama")
    generator = torch.Generator().manual_seed(2)
    questions = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in (30, 12, 20)]
    asked = [(question, torch.randint(3, 90, (answer,), generator=generator).tolist()) for question in questions for answer in (2, 3, 5)]
    ours = SharedPrefixes(model, LENGTH, 10_000)
    for _ in range(2):  # the second time nothing is tried
        found = dict(ours.scores(asked))
        assert [found[number].likelihood for number in range(len(asked))] == pytest.approx(
            [one for one, _ in stock(model, asked)], abs=1e-4
        )
    assert ours.shares


def test_what_is_shared_is_computed_once(monkeypatch):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    tokens, forward = [], model.forward

    def counted(input_ids=None, **options):
        tokens.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    ours.shares = True
    monkeypatch.setattr(ours, "_equal_apart", lambda *_: {})
    list(ours.scores(asked))
    assert sum(tokens) < 0.6 * sum(len(context) + len(continuation) - 1 for context, continuation in asked)


def model_of(kind: str, **settings):
    return architectures.made(AutoConfig.for_model(kind, **{**architectures.CONFIGS.get(kind, architectures.SIZES), **settings})).float()


OTHERS = {  # models of which short sequences do not tell how they take long ones
    "which attends to the last places": ("gpt_neo", {"window_size": 16}),
    "whose positions depend on the longest row": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "with several windows": ("llama4_text", {"attention_chunk_size": 16}),
}


@pytest.mark.parametrize("which", OTHERS)
def test_long_rows_of_a_model_are_right_though_short_ones_shared_what_they_begin_with(which):
    kind, settings = OTHERS[which]
    model = model_of(kind, **settings)
    generator = torch.Generator().manual_seed(0)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    for length in (9, 40):
        questions = [torch.randint(3, 90, (length,), generator=generator).tolist() for _ in range(3)]
        asked = [
            (question, torch.randint(3, 90, (4 + answer,), generator=generator).tolist()) for question in questions for answer in range(3)
        ]
        found = dict(ours.scores(asked))
        wanted = [one for one, _ in stock(model, asked)]
        assert [found[number].likelihood for number in range(len(asked))] == pytest.approx(wanted, abs=1e-4)
    assert ours.shares is False


def test_rows_of_other_lengths_are_not_padded_where_what_follows_changes_a_prediction():
    model = model_of("bert", is_decoder=False)
    asked = requests(model.config.vocab_size)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    found = dict(ours.scores(asked))
    assert [found[number].likelihood for number in range(len(asked))] == pytest.approx([one for one, _ in stock(model, asked)], abs=1e-4)


def test_a_model_that_gives_other_scores_is_not_asked_to_share(monkeypatch, caplog):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    plain = shared_prefix._mask
    monkeypatch.setattr(shared_prefix, "_mask", lambda branches, *others: plain(torch.zeros_like(branches), *others))
    ours = SharedPrefixes(model, LENGTH, 10_000)
    found = dict(ours.scores(asked))
    assert ours.shares is False
    assert "gives other scores of several sequences in one" in caplog.text
    assert [found[number].likelihood for number in range(len(asked))] == pytest.approx([one for one, _ in stock(model, asked)], abs=1e-4)


def test_a_model_that_takes_no_such_mask_is_not_asked_to_share(monkeypatch, caplog):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    forward = model.forward

    def refusing(input_ids=None, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None:
            raise ValueError("two dimensions wanted")
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", refusing)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    with caplog.at_level("INFO"):
        found = dict(ours.scores(asked))
    assert ours.shares is False
    assert "takes no mask for several sequences in one (two dimensions wanted)" in caplog.text
    assert [found[number].likelihood for number in range(len(asked))] == pytest.approx([one for one, _ in stock(model, asked)], abs=1e-4)


def test_few_tokens_of_a_pass_are_padding_and_it_is_no_larger_than_asked(monkeypatch):
    model = made("llama")
    generator = torch.Generator().manual_seed(1)
    lengths = [12, 60, 61, 30, 14, 59, 33, 60]
    asked = [(torch.randint(3, 96, (length,), generator=generator).tolist(), [5]) for length in lengths]
    passes, forward = [], model.forward

    def noted(input_ids=None, **options):
        passes.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", noted)
    monkeypatch.setattr(shared_prefix, "PADDING_AT_MOST", 8)
    ours = SharedPrefixes(model, LENGTH, 200)
    ours.shares = True
    monkeypatch.setattr(ours, "_equal_apart", lambda *_: {})
    list(ours.scores(asked))
    assert passes == [(3, 61), (1, 59), (2, 33), (2, 14)]
