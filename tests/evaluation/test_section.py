import re

import pytest

from stages import schema
from stages.errors import ConfigError
from stages.evaluation.section import Evaluation, Generations, Windows, check_text
from stages.evaluation.tasks import TASKS

WINDOWS = Windows(window_length=64, windows=4, evenly=False)


def evaluation(**changes) -> Evaluation:
    facts = {
        "name": "t",
        "device": "cpu",
        "dtype": "auto",
        "bos": "auto",
        "tasks": ["boolq"],
        "rows": 4,
        "few_shot": None,
        "styles": ["raw"],
        "examples": 5,
        "system_prompt": "Be brief.",
        "batch_size": 2,
        "streamed": False,
    }
    facts |= {"corpora": {"articles": WINDOWS}, "metrics": ["perplexity"]}
    return Evaluation(**{**facts, "generations": Generations(new_tokens=3, prompts=["a"]), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "evaluation.device: found 'tpu', wanted auto, cpu or cuda[:N]"),
        ({"device": "cuda:x"}, "evaluation.device: found 'cuda:x', wanted auto, cpu or cuda[:N]"),
        ({"dtype": "int8"}, "evaluation.dtype: found 'int8', wanted one of auto, bfloat16, float16, float32"),
        ({"tasks": ["a/b"]}, "evaluation.tasks: found 'a/b', wanted the name of a task"),
        ({"tasks": ["boolq", "boolq"]}, "evaluation.tasks: found ['boolq', 'boolq'], wanted each of the tasks once"),
        ({"rows": 0}, "evaluation.rows: found 0, wanted null or at least 1 row"),
        ({"few_shot": -1}, "evaluation.few_shot: found -1, wanted null or 0 or more examples"),
        ({"styles": ["loud", "raw"]}, "evaluation.styles: found 'loud', wanted one of raw, chat, system, few_shot"),
        ({"styles": ["chat"]}, "evaluation.styles: found ['chat'], wanted raw among them, with which the others are compared"),
        ({"examples": 0}, "evaluation.examples: found 0, wanted at least 1 example"),
        ({"system_prompt": ""}, "evaluation.system_prompt: found '', wanted what the system says"),
        ({"batch_size": 0}, "evaluation.batch_size: found 0, wanted at least 1"),
        ({"corpora": {}}, "evaluation.corpora: found {}, wanted at least one corpus"),
        ({"metrics": ["guess"]}, "evaluation.metrics: found 'guess', wanted one of divergence, perplexity"),
        ({"metrics": ["divergence"]}, "evaluation.metrics: found ['divergence'], wanted perplexity among them"),
        (
            {"corpora": {"a": Windows(window_length=1, windows=4, evenly=False)}},
            "evaluation.corpora.a.window_length: found 1, wanted at least 2 tokens",
        ),
        (
            {"corpora": {"a": Windows(window_length=2, windows=1, evenly=False)}},
            "evaluation.corpora.a.windows: found 1, wanted null or at least 2 windows, for a standard error",
        ),
        ({"generations": Generations(new_tokens=0, prompts=[])}, "evaluation.generations.new_tokens: found 0, wanted at least 1"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        schema.check(evaluation(**changes), "evaluation")


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda:3"},
        {"rows": None},
        {"rows": 1},
        {"tasks": ["gsm8k", "a_task_of_ones_own"]},
        {"styles": ["raw", "chat", "system", "few_shot"], "few_shot": 0},
        {"tasks": list(TASKS)},
        {"tasks": []},
        {"streamed": True},
    ],
)
def test_what_is_in_range_is_taken(changes):
    schema.check(evaluation(**changes), "evaluation")


@pytest.mark.parametrize(
    ("corpus", "columns"),
    [
        ("articles", {"articles": None, "boolq": None}),
        ("articles", {"articles": ("text",), "boolq": ("passage", "question", "idx", "label")}),
        ("chat", {"chat": ("messages",), "boolq": None}),
        ("lambada", {"lambada": None, "boolq": None}),  # a task whose rows are texts, too
    ],
)
def test_a_corpus_of_texts_is_taken(corpus, columns):
    check_text(evaluation(corpora={corpus: WINDOWS}), columns)


@pytest.mark.parametrize(
    ("corpus", "columns", "message"),
    [
        ("boolq", {"boolq": None}, 'a corpus of rows with "text" or "messages", not with passage, question, label'),
        (
            "boolq",
            {"boolq": ("passage", "question", "idx", "label")},
            'a corpus of rows with "text" or "messages", not with passage, question, idx, label',
        ),
        ("articles", {"boolq": None}, "one of boolq"),
    ],
)
def test_a_corpus_without_texts_is_refused(corpus, columns, message):
    wanted = f"evaluation.corpora: found {corpus!r}, wanted {message}"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        check_text(evaluation(corpora={corpus: WINDOWS}), columns)


def test_a_task_without_the_columns_that_it_reads_is_refused():
    wanted = "evaluation.tasks: found 'boolq', wanted a task whose reader in text.evaluation gives passage, question, label"
    with pytest.raises(ConfigError, match=wanted):
        check_text(evaluation(), {"articles": None, "boolq": ("text",)})


@pytest.mark.parametrize("task", ["boolq", "gsm8k"])
def test_a_task_whose_rows_text_evaluation_has_not_is_left_to_lm_eval(task):
    check_text(evaluation(tasks=[task]), {"articles": None})
