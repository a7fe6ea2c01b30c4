"""BOS: when windows and prompts begin with it, and that none ever begins with two."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.whole_model import window_losses
from stages.bos import Bos, decide
from stages.calibration.samplers import Window, packed
from stages.errors import ConfigError
from stages.evaluation.generation import generate
from stages.evaluation.harness import WholeModel
from stages.evaluation.scoring import StreamedModels
from stages.evaluation.streamed import SharedScores, StreamedHarness
from stages.evaluation.windows import cut_corpus
from tests import tiny
from tests.evaluation.test_harness import CPU, dense

BOS, END = 1, 2
BEGUN = Bos(token=BOS, reason="of the tests")


def tokenizer(*, adds: bool = False, template: str | None = None, **settings):
    """The tiny tokenizer, which adds no BOS, or one whose post-processor does, as Llama's and Gemma's."""
    made = tiny.tokenizer()
    if adds:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.chat_template = template
    for name, value in settings.items():
        setattr(made, name, value)
    return made


ONCE = "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
EVERY_TURN = "{% for message in messages %}{{ bos_token + message['role'] + ': ' + message['content'] }}{% endfor %}"
NEVER = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
REFUSES = "{{ bos_token }}{{ raise_exception('only one message') }}"


@pytest.mark.parametrize(
    ("made", "token", "reason"),
    [
        (tokenizer(adds=True), BOS, "the tokenizer adds it to plain text"),
        (tokenizer(template=ONCE), BOS, "the chat template puts it once before a conversation"),
        (tokenizer(template=EVERY_TURN), None, "neither the tokenizer nor its chat template begins a text with it"),
        (tokenizer(template=NEVER), None, "neither the tokenizer nor its chat template begins a text with it"),
        (tokenizer(template=REFUSES), None, "neither the tokenizer nor its chat template begins a text with it"),
        (tokenizer(), None, "neither the tokenizer nor its chat template begins a text with it"),
        (tokenizer(init_kwargs={"add_bos_token": True}), BOS, "add_bos_token is set in the tokenizer's configuration"),
        (tokenizer(bos_token=None, template=NEVER), None, "the tokenizer has no BOS token"),
    ],
)
def test_auto_does_what_tokenizer_and_template_do(made, token, reason):
    assert decide("auto", made, "bos") == Bos(token=token, reason=reason)


def test_always_and_never_do_not_ask_the_tokenizer():
    assert decide("always", tokenizer(), "bos").token == BOS
    assert decide("never", tokenizer(adds=True), "bos").token is None
    with pytest.raises(ConfigError, match="evaluation.bos: found 'always', wanted auto or never: this tokenizer has no BOS token"):
        decide("always", tokenizer(bos_token=None), "evaluation.bos")


def test_bos_stands_once_and_only_where_it_is_decided_for():
    assert BEGUN.begin([5, 6]) == BEGUN.begin([BOS, 5, 6]) == BEGUN.begin([BOS, BOS, 5, 6]) == [BOS, 5, 6]
    assert tiny.NO_BOS.begin([BOS, 5]) == [BOS, 5]
    assert (BEGUN.words, tiny.NO_BOS.words) == (", each begun with BOS", ", none begun with BOS")


# Calibration windows.


def test_a_window_begun_with_bos_keeps_its_length_and_says_where_its_documents_lie():
    window = Window(tokens=[5, 6, END, 7], spans=[(3, 10, 2), (4, 0, 1)], starts=[0, 3])
    assert window.begun_with(BEGUN) == Window(tokens=[BOS, 5, 6, END], spans=[(3, 10, 2)], starts=[1])
    assert window.begun_with(tiny.NO_BOS) == window
    whole = Window(tokens=[5, 6, 7, 8], spans=[(3, 10, 4)], starts=[0])
    assert whole.begun_with(BEGUN) == Window(tokens=[BOS, 5, 6, 7], spans=[(3, 10, 3)], starts=[1])
    begun = Window(tokens=[BOS, 6, 7, 8], spans=[(3, 0, 4)], starts=[0])
    assert begun.begun_with(BEGUN) == begun


def test_no_document_ends_twice():
    (window,) = packed([[5, END], [5, END]], 1, 4, 0, END)
    assert window.tokens == [5, END, 5, END]


# Perplexity windows.


def test_windows_of_perplexity_begin_with_bos_and_score_every_token_of_the_text():
    texts, length = tiny.sentences(4, seed=0), 16
    plain = tiny.tokenizer()("\n\n".join(texts))["input_ids"]
    for made in (tokenizer(), tokenizer(adds=True)):
        windows = cut_corpus("news", texts, made, length, None, BEGUN).windows
        assert windows[:, 0].tolist() == [BOS] * len(windows)
        assert windows[:, 1:].flatten().tolist() == plain[: len(windows) * (length - 1)]
    as_published = cut_corpus("news", texts, tokenizer(adds=True), length, None, tiny.NO_BOS).windows
    assert as_published.flatten().tolist() == [BOS, *plain][: as_published.numel()]


def test_a_window_whose_text_begins_with_bos_has_no_second_one():
    made, length = tokenizer(), 8
    texts = [f"{made.bos_token}{text}" for text in tiny.sentences(12, seed=0, length=5)]  # as chat templates write them
    plain = made("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    windows = cut_corpus("chat", texts, made, length, None, BEGUN, rendered=True).windows.tolist()
    assert {len(window) for window in windows} == {length}
    assert all(window[0] == BOS != window[1] for window in windows)
    text = iter(plain)
    for window in windows:
        first = next(text)
        begun = [first] if first == BOS else [BOS, first]
        assert window == begun + [next(text) for _ in range(length - len(begun))]


@pytest.mark.parametrize("adds", [False, True])
def test_the_loss_with_bos_is_lm_evals_rolling_likelihood(base, adds):
    """lm-eval scores a text in pieces, the first after its prefix token: with one piece, our window."""
    model, text = dense(base), tiny.sentences(1, seed=3)[0]
    harness = WholeModel(BEGUN, pretrained=model, tokenizer=tokenizer(adds=adds), batch_size=1)
    tokens = tiny.tokenizer()(text)["input_ids"]
    assert harness.prefix_token_id == BOS
    assert len(tokens) < harness.max_length
    (rolling,) = harness.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    (loss,) = window_losses(model, torch.tensor([BEGUN.begin(tokens)]))
    assert loss * len(tokens) == pytest.approx(-rolling, rel=1e-5)


class Request:
    def __init__(self, *args: str) -> None:
        self.args = args


# Tasks and generations.


@pytest.mark.parametrize("adds", [False, True])
def test_tasks_are_encoded_with_one_bos_whole_and_streamed(base, tmp_path, adds):
    from stages.streaming.decoder import Decoder

    whole = WholeModel(BEGUN, pretrained=dense(base), tokenizer=tokenizer(adds=adds), batch_size=1)
    streamed = StreamedModels(decoder=Decoder(base, torch.float32, CPU), variants={"scored": None}, scratch=tmp_path)
    plain = tiny.tokenizer()("river stone")["input_ids"]
    for harness in (whole, StreamedHarness(SharedScores(streamed, 1), "scored", tokenizer(adds=adds), BEGUN, lambda: whole)):
        assert harness.tok_encode("river stone") == [BOS, *plain]
        assert harness.tok_encode("<s>river stone") == [BOS, *plain]
        assert harness.tok_encode("river stone", add_special_tokens=False) == plain
        context, continuation = harness._encode_pair("river", " stone")
        assert [*context, *continuation] == [BOS, *plain]


@pytest.mark.parametrize("adds", [False, True])
def test_a_prompt_begins_with_one_bos(base, monkeypatch, adds):
    received = []
    model = dense(base)
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: received.append(input_ids[0].tolist()) or input_ids)
    generate(model, tokenizer(adds=adds, template=ONCE), BEGUN, ["river"], new_tokens=1)
    assert [prompt[:2].count(BOS) for prompt in received] == [1, 1]
