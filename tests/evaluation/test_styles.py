import pytest

from stages.errors import TextError
from stages.evaluation.styles import Style, refusal, template
from tests import tiny


@pytest.mark.parametrize("style", Style)
def test_a_template_that_prints_every_role_renders_every_style(style):
    assert refusal(style, tiny.tokenizer(), "Be brief.") is None


@pytest.mark.parametrize(
    ("made", "refused", "why"),
    [
        (None, ("chat", "system"), "the base's tokenizer has no chat template"),
        ("{{ raise_exception('no chat') }}", ("chat", "system"), r"the base's chat template refuses this dialogue \(no chat\)"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}",
            ("system",),
            "no system",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ("system",), "leaves out the system prompt"),
    ],
)
def test_a_style_that_the_template_cannot_render_says_why(made, refused, why):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = made
    for style in Style:
        reason = refusal(style, tokenizer, "Be brief.")
        if style in refused:
            with pytest.raises(TextError, match=why):
                raise TextError(reason)
        else:
            assert reason is None


def test_an_answer_that_is_begun_is_continued():
    messages = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]
    assert template(tiny.tokenizer())(messages, add_generation_prompt=False).endswith("stone")
    assert template(tiny.tokenizer())(messages[:1]).endswith("<|assistant|>\n")
