import pytest
import torch
from lm_eval.models.huggingface import HFLM

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
APART = ("mamba", "jamba")


@pytest.mark.parametrize("kind", [*SHARING, *APART])
@pytest.mark.parametrize("tokens_at_once", [1, 150, 10_000])
def test_scores_are_those_of_lm_eval(kind, tokens_at_once):
    model = made(kind)
    asked = requests(model.config.vocab_size)
    ours = SharedPrefixes(model, LENGTH, tokens_at_once)
    found = dict(ours.scores(asked))
    assert ours.shares is (kind in SHARING)
    assert sorted(found) == list(range(len(asked)))
    for number, (likelihood, greedy) in enumerate(stock(model, asked)):
        assert found[number].likelihood == pytest.approx(likelihood, abs=1e-4)
        assert found[number].greedy == greedy


def test_what_is_shared_is_computed_once(monkeypatch):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    tokens, forward = [], model.forward

    def counted(input_ids=None, **options):
        tokens.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    ours.keeps_logits, ours.shares = True, True
    list(ours.scores(asked))
    assert sum(tokens) < 0.6 * sum(len(context) + len(continuation) - 1 for context, continuation in asked)


def test_a_model_whose_cache_gives_other_scores_is_not_asked_to_share(monkeypatch, caplog):
    model = made("llama")
    asked = requests(model.config.vocab_size)
    select = shared_prefix.SharedPrefixes._cache

    def wrong(self, batch):
        cache = select(self, batch)
        for layer in cache.layers:
            layer.values = -layer.values
        return cache

    monkeypatch.setattr(shared_prefix.SharedPrefixes, "_cache", wrong)
    ours = SharedPrefixes(model, LENGTH, 10_000)
    found = dict(ours.scores(asked))
    assert ours.shares is False
    assert "gives other scores from a cache" in caplog.text
    assert [found[number].likelihood for number in range(len(asked))] == pytest.approx([one for one, _ in stock(model, asked)], abs=1e-4)
