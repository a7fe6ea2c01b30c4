from dataclasses import asdict, replace

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import meta

from stages.config.compose import read
from stages.config.params import CONF
from stages.evaluation.measurement import Difference, Kind, Measurement
from stages.release.card import Others, bibtex, exceptions, loaded, origin, write_card
from stages.release.float8 import CountedFloat8
from stages.release.llama_cpp.writing import Counted
from stages.release.loading import Loaded
from stages.release.naming import default_name
from stages.release.records import Records
from stages.release.verification import Verified
from stages.schema import Citation
from tests import deltas


def measured(kind: str, name: str, metric: str, value: float, stderr: float | None = None, **more: object) -> Measurement:
    facts = {"label": metric, "count": 20, "counted": "rows", "clusters": 20, **more}
    return Measurement(kind=Kind(kind), name=name, metric=metric, value=value, stderr=stderr, **facts)


MEAN = {"label": "mean accuracy, every task alike"}
DENSE = [
    measured("corpus", "news", "perplexity", 20.0, 1.0),
    measured("task", "boolq", "acc", 0.5, 0.1),
    measured("mean", "tasks", "accuracy", 0.5, 0.1, **MEAN),
]
SPARSE = [
    measured("corpus", "news", "perplexity", 45.0, 1.0, dense=20.0),
    measured("corpus", "news", "perplexity_ratio", 2.25, 0.05, low=2.15, high=2.355),
    measured("corpus", "news", "perplexity_ln_ratio", 0.811, 0.022, unit="nats"),
    measured("corpus", "news", "mean_kld", 0.7, 0.03, unit="nats"),
    measured("corpus", "news", "same_top_p", 61.2, 1.4, unit="%"),
    measured("task", "boolq", "acc", 0.5, 0.1, dense=0.5),
    measured("mean", "tasks", "accuracy", 0.5, 0.1, dense=0.5, difference=Difference(value=0.05, stderr=0.06), **MEAN),
]
ANSWERS = {"count": 3, "counted": "answers", "clusters": 3}
PROTOCOL = {
    "corpora": {"news": {"window_length": 1024, "windows": 18, "tokens": 18432, "available": 301}},
    "bos": None,
    "tasks": {"boolq": {"few_shot": 0, "rows": 20, "available": 3270, "parts": 1, "cut": 0}},
    "evaluation": {"tasks": ["boolq"], "rows": 20, "corpora": {"news": {"evenly": False}}},
    "prompts": ["Hi", "Go"],
}
RECORDS = Records(
    base={"name": "org/big-7b", "license": "mit", "source": "hub", "revision": "f00d", "fingerprint": "x", "documents": []},
    text={
        "files": {
            "calibration/pages.jsonl": {"license": "cc0-1.0"},
            "evaluation/news.jsonl": {"license": "CC-BY-SA"},
            "evaluation/boolq.jsonl": {"license": "CC-BY-SA-3.0"},
            "evaluation/piqa.jsonl": {"license": "AFL-3.0"},
        }
    },
    calibration={"sources": {"pages": {}}, "bos": {"token": None}},
    prune={
        "seconds": 7200.0,
        "peak_memory_gib": 1.5,
        "device": "a CPU",
        "dtype": "float32",
        "code": "abc123",
        "versions": {"lm-eval": "0.4.13"},
        "hidden_states": "a file of 2 GB in /home/me",
    },
    dense=DENSE,
    sparse=SPARSE,
    dense_protocol=PROTOCOL,
    protocol=PROTOCOL,
    tasks=[
        {"task": "boolq", "metric": "acc", "rows": 20, "sparse": 0.5, "difference": -0.05, "low": -0.2, "high": 0.1, "lost": 3, "gained": 2}
    ],
    generations=[
        {"prompt": "Hi", "raw_dense": "a|b", "raw_sparse": "<x>", "chat_dense": "c", "chat_sparse": ""},
        {"prompt": "Go", "raw_dense": "on", "raw_sparse": "on", "chat_refused": "no user"},
    ],
    dense_run={"device": "a CPU", "generation": {"tokens": 96, "seconds": 8.0, "tokens_per_second": 12.0, "peak_memory_gib": 1.25}},
    sparse_run={"device": "a CPU", "generation": {"tokens": 90, "seconds": 7.2, "tokens_per_second": 12.5}},
    sensitivity=[],
)
SUMMARY = {"sparsity": 0.5, "relative_error": 0.2, "relative_error_held_out": 0.3}
MATRICES = [
    {"block": 0, "calibrated_on": "its tokens", "damping": None, "trained": None, "refined": True},
    {"block": 0, "calibrated_on": "all tokens", "damping": 0.01, "trained": True, "refined": True},
    {"block": 1, "calibrated_on": "its tokens", "damping": 1.0, "trained": True, "refined": True},
]
LOADED = Loaded(loading="whole", auto_class="AutoModelForCausalLM", model_class="MistralForCausalLM", joined=[])
VERIFIED = Verified(matrices=21, changed=0, other_tensors=9, sparsity=0.501, share=0.75, loaded=LOADED)
NO_OTHERS = Others(gguf=[], float8=None, float8_results=[], packed=False)
NM = {"name": "nm", "kept": 2, "group": 4, "permutation_rounds": None}


class Delta:
    """What a card reads of a delta."""

    def __init__(self, **changes: object) -> None:
        self.recipe, self.matrices, self.summary, self.fingerprint = deltas.recipe(**changes), MATRICES, SUMMARY, "de17a"


@pytest.fixture()
def written(tmp_path):
    """A function that writes the card of a recipe and reads it."""

    def write(
        records: Records = RECORDS,
        verified: Verified = VERIFIED,
        others: Others = NO_OTHERS,
        to_be_set: tuple[str, ...] = (),
        name: str = "small",
        **changes: object,
    ) -> ModelCard:
        path = tmp_path / "README.md"
        made = {"delta": Delta(**changes), "records": records, "verified": verified, "others": others, "to_be_set": list(to_be_set)}
        write_card(path, name=name, **made)
        return ModelCard.load(path)

    return write


def test_the_card_has_valid_metadata_and_the_measured_numbers(written):
    card = written()
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("org/big-7b", "mit", "transformers")
    assert card.data.base_model_relation in ("adapter", "finetune", "merge", "quantized")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"perplexity": 45.0, "accuracy": 0.5}
    for fact in (
        "45.00 ± 1.00",
        "20.00 ± 1.00",
        "× 2.250 ± 0.050 [2.150, 2.355], ln 0.811 ± 0.022 nats",
        "| mean KL divergence from dense, news |  | 0.700 ± 0.030 nats |  |",
        "| same likeliest token as dense, news |  | 61.2 ± 1.4 % |  |",
        "-0.050 [-0.200, +0.100]; 3 lost, 2 gained",
        "| +0.050 ± 0.060 (no interval) |",
        "7200 s on a CPU",
        "git checkout abc123\n",
        "a\\|b",
        "&lt;x>",
        "that its pruned predecessors give it",
        "Method: wanda.",
        "[Sun et al. 2024](https://arxiv.org/abs/2306.11695)",
        "Comparison group: the weights of an output row.",
        "Kept weights: the base's values, bit for bit.",
        "every matrix as sparse as the pattern says",
        "1 matrices of experts that too few calibration tokens chose",
        "1 matrices needed more damping than 0.01, up to 1.",
        "each of 21 matrices",
        "| Go | chat | not generated: no user | |",
        "0.501000",
    ):
        assert fact in card.content, fact
    for section in ("What was done", "Results", "Intended use", "Limitations and risks", "How to load it", "How to reproduce it"):
        assert f"## {section}" in card.content


def test_the_card_says_what_was_not_scored(written):
    content, card = written().content, written()
    assert "| perplexity, news, 18432 tokens in windows of 1024, the first 18 of 301 windows, none begun with BOS |" in content
    assert "| boolq, first 20 of 3,270 rows, zero-shot, accuracy |" in content
    assert "Only the first 20 rows of each task were scored: the error bars are wide.\n" in content
    assert "\nOf news, the first 18 of 301 windows were scored.\n" in content
    assert {result.dataset_name for result in card.data.eval_results} == {
        "news, 18432 tokens in windows of 1024, the first 18 of 301 windows, none begun with BOS",
        "boolq, first 20 of 3,270 rows, zero-shot",
    }


def test_a_card_of_all_rows_and_windows_says_so(written):
    tasks = {"boolq": {**PROTOCOL["tasks"]["boolq"], "available": 20}}
    whole = {**PROTOCOL, "tasks": tasks, "corpora": {"news": {**PROTOCOL["corpora"]["news"], "available": 18}}}
    content = written(records=replace(RECORDS, protocol=whole)).content
    assert "all 18 windows" in content and "boolq, all 20 rows" in content
    assert "were scored" not in content


def test_the_card_says_how_far_generations_degenerate(written):
    apart = Difference(value=0.25, stderr=0.125, low=-0.1, high=0.6)
    sparse = [
        measured("generation", "raw", "repeated_4_grams", 0.5, 0.1, dense=0.25, difference=apart, **ANSWERS),
        measured("generation", "raw", "distinct_1", 0.5, dense=0.75, difference=Difference(value=-0.25), **ANSWERS),
        measured("generation", "chat", "empty", 0.0, 0.0, **ANSWERS),
    ]
    dense = [measured("generation", "raw", "repeated_4_grams", 0.25, 0.1, **ANSWERS)]
    content = written(records=replace(RECORDS, sparse=[*SPARSE, *sparse], dense=[*DENSE, *dense])).content
    assert "| raw | repeated_4_grams | 0.250 ± 0.100 | 0.500 ± 0.100 | +0.250 ± 0.125 [-0.100, +0.600] | 3 |" in content
    assert "| raw | distinct_1 |  | 0.500 | -0.250 (no interval) | 3 |" in content
    assert "| chat | empty |  | 0.000 ± 0.000 | not paired | 3 |" in content
    assert "whether a model has collapsed" not in written().content


def test_the_card_says_bytes_and_tokens_a_second_and_claims_no_speed_up(written):
    facts = {"count": 210, "counted": "matrices", "clusters": 1}
    sizes = [measured("size", "matrices", metric, value, **facts) for metric, value in (("dense_bytes", 2e6), ("packed_bytes", 1.125e6))]
    content = written(records=replace(RECORDS, sparse=[*SPARSE, *sizes])).content
    assert "| of 210 matrices | bytes | of dense |" in content
    assert "| packed_bytes | 1,125,000 | 0.562 |" in content
    assert (
        "Greedy continuation of 2 prompts, one run: dense 12.00 tokens a second (96 tokens in 8.0 s on a CPU, at most 1.25 GiB); "
        "sparse 12.50 tokens a second (90 tokens in 7.2 s on a CPU)." in content
    )
    assert "no speed-up was measured or is claimed" in content
    silent = written(records=replace(RECORDS, sparse_run={"device": "a CPU", "generation": None})).content
    assert "Tokens a second were not measured." in silent
    assert "(not measured in this evaluation)" in silent


def test_the_card_says_how_far_the_models_drift_apart_by_style(written):
    facts = {"style": "chat", "raw": -0.25, "styled": -0.75, "stderr": 0.25}
    rows = [
        {**facts, "task": "boolq", "metric": "acc", "count": 20, "counted": "rows", "drift": -0.5, "low": -0.9, "high": -0.1},
        {**facts, "task": None, "metric": "accuracy", "count": 1, "counted": "tasks", "drift": -0.5, "low": None, "high": None},
    ]
    styles = {"chat": {"skipped": None}, "system": {"skipped": "no system prompt"}}
    content = written(records=replace(RECORDS, sensitivity=rows, protocol={**PROTOCOL, "styles": styles})).content
    assert "| chat | boolq | -0.250 | -0.750 | -0.500 [-0.900, -0.100] | 20 rows |" in content
    assert "| chat | mean, every task alike | -0.250 | -0.750 | -0.500 (no interval) | 1 tasks |" in content
    assert "The style system was skipped: no system prompt." in content
    assert "Prompt sensitivity" not in written().content


def test_the_card_says_which_rows_were_cut_or_are_missing(written):
    tasks = {"boolq": {**PROTOCOL["tasks"]["boolq"], "cut": 3, "context": 2048, "asked": 25}}
    content = written(records=replace(RECORDS, protocol={**PROTOCOL, "tasks": tasks})).content
    assert "\n3 of 20 rows of boolq are longer than the model's context of 2,048 tokens and were cut on the left.\n" in content
    assert "\nboolq has 20 rows, where 25 were asked for; all of them are scored.\n" in content
    assert "longer than" not in written().content


def test_a_licence_that_the_hub_does_not_list_is_named_as_other(written):
    card = written(records=replace(RECORDS, base={**RECORDS.base, "license": "my own", "documents": ["LICENSE"]}))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "my own", "LICENSE")


def test_a_licence_that_the_hub_lists_is_named_as_there_whatever_its_case(written):
    card = written(records=replace(RECORDS, base={**RECORDS.base, "license": "Apache-2.0"}))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("apache-2.0", None, None)


@pytest.mark.parametrize(("source", "name"), [("local", "my-7b"), ("gguf", "my-7b.Q8_0"), ("gguf", "a b/c d"), ("local", "/models/big")])
def test_a_base_whose_name_is_that_of_a_file_or_directory_is_not_linked(written, source, name):
    base = {**RECORDS.base, "source": source, "name": name, "file": "a.gguf", "file_sha256": "f00d"}
    card = written(records=replace(RECORDS, base=base))
    assert not [key for key in card.data.to_dict() if key.startswith("base_model")]
    assert "huggingface.co" not in card.content
    assert f"\n{name} with 50% of the weights" in card.content
    assert "\nits own card, where it has one, names those that are known." in card.content


@pytest.mark.parametrize(("source", "name"), [("hub", "gpt2"), ("local", "org/my-7b"), ("gguf", "org/my-7b"), ("wheel", "org/big")])
def test_a_base_whose_name_is_that_of_a_repository_is_linked(written, source, name):
    base = {**RECORDS.base, "source": source, "name": name, "file": "a.gguf", "file_sha256": "f00d", "packages": ["p 1.0"]}
    card = written(records=replace(RECORDS, base=base))
    assert (card.data.base_model, card.data.base_model_relation) == (name, "finetune")
    assert card.content.count(f"](https://huggingface.co/{name})") == 2


def test_the_card_names_the_documents_of_the_licence(written):
    card = written(records=replace(RECORDS, base={**RECORDS.base, "license": "gemma", "documents": ["GEMMA_TERMS.html", "NOTICE"]}))
    assert (card.data.license, card.data.license_name) == ("gemma", None)
    licence = "Licence: gemma, inherited from the base; its terms and notices: [GEMMA_TERMS.html](GEMMA_TERMS.html), [NOTICE](NOTICE).\n"
    assert licence in card.content


def test_a_base_without_licence_documents_names_none(written):
    assert "Licence: mit, inherited from the base.\n" in f"{written().content}\n"


def test_the_card_says_which_texts_were_read_with_their_licences_and_guesses_no_language(written):
    content = written().content
    assert "Calibration: pages (cc0-1.0); windows with SHA-256 `c0ffee`" in content
    assert "news (CC-BY-SA), boolq (CC-BY-SA-3.0)." in content
    assert "piqa" not in content
    assert "English" not in content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the weights of an output row"),
        ({"method": {**deltas.WANDA, "comparison_group": "matrix"}}, "all weights of a matrix"),
        ({"pattern": NM}, "every 4 consecutive input columns of a row, of which 2 are kept"),
        ({"pattern": NM, "method": {**deltas.WANDA, "comparison_group": "matrix"}}, "every 4 consecutive input columns of a row"),
    ],
)
def test_the_card_says_which_weights_compete(written, changes, words):
    assert f"Comparison group: {words}" in written(**changes).content


def test_the_card_says_where_kept_weights_changed(written):
    changed = written(verified=replace(VERIFIED, changed=7)).content
    assert "Kept weights: changed in 7 tensors, of the base's values elsewhere." in changed


def test_the_card_names_the_paths_that_a_stranger_has_to_set(written):
    assert "Set base.path to copies of your own" in written(to_be_set=("base.path",)).content
    assert "copies of your own" not in written().content


def test_the_card_says_when_the_code_is_in_no_commit(written):
    dirty = replace(RECORDS, prune={**RECORDS.prune, "code": "abc-dirty"})
    assert "# made by code that is in no commit (abc-dirty)\n" in written(records=dirty).content


def test_the_card_says_nothing_of_the_machines_disks(written):
    assert "/home/me" not in written().content


def test_a_pruning_without_exceptions_mentions_none():
    assert exceptions(MATRICES[:1], deltas.WANDA, {}) == ""
    assert exceptions(MATRICES[:1], deltas.WANDA, {"distillation": {"rate": 0.0025}}) == ""


def test_the_card_says_what_could_not_be_learned_without_harm():
    matrices = [{**row, "trained": False, "refined": False, "damping": None, "calibrated_on": "its tokens"} for row in MATRICES]
    said = exceptions(matrices, deltas.WANDA, {"distillation": {"rate": None}})
    assert "- 3 matrices have the mask of their score: the update left more error on the windows held out.\n" in said
    assert "- 2 blocks are as the method left them: no learning rate lowered their error on the windows held out.\n" in said
    assert "- The last blocks are not distilled: no learning rate lowered the divergence on the windows held out.\n" in said


def test_the_card_says_which_allocation_was_taken():
    tried = [{"gradient_weights": [0.5], "loss": 4.1}, {"gradient_weights": [1.0], "loss": 4.0}]
    taken = {"allocation_judged": {"taken": True, "tried": tried}}
    said = "- Of 2 allocations the one with gradient_weights 1 left the least loss on the windows held out.\n"
    assert exceptions(MATRICES[:1], deltas.WANDA, taken) == said
    assert exceptions(MATRICES[:1], deltas.WANDA, {"allocation_judged": {"taken": True, "tried": tried[:1]}}) == ""
    assert exceptions(MATRICES[:1], deltas.WANDA, {"allocation_judged": {"taken": True}}) == ""
    refused = "- All matrices have equal sparsities: the allocation was no better than these on the windows held out.\n"
    assert exceptions(MATRICES[:1], deltas.WANDA, {"allocation_judged": {"taken": False, "tried": tried}}) == refused


def test_the_card_has_the_errors_on_calibration_tokens_and_on_windows_held_out(written):
    assert "||: 0.2000 on calibration tokens, 0.3000 on windows held out.\n" in written().content
    counted = written(prune={"propagate": "pruned", "error_tokens": 256}).content
    assert "||: 0.2000 on about 256 calibration tokens, 0.3000 on windows held out.\n" in counted


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"source": "hub", "revision": "f00d"}, "revision `f00d`"),
        ({"source": "local"}, "a local checkpoint"),
        ({"source": "gguf", "file": "a.Q4.gguf", "file_sha256": "f00d"}, "converted from the GGUF file `a.Q4.gguf` with SHA-256 `f00d`"),
        (
            {"source": "wheel", "file": "a.Q4.gguf", "file_sha256": "f00d", "packages": ["p 1.0"]},
            "converted from the GGUF file `a.Q4.gguf` of package p 1.0,",
        ),
        (
            {"source": "wheel", "file": "a.Q4.gguf", "file_sha256": "f00d", "packages": ["p 1.0", "q 2.0"]},
            "converted from the GGUF file `a.Q4.gguf` of packages p 1.0, q 2.0,",
        ),
    ],
)
def test_the_card_says_where_the_weights_came_from(base, said):
    assert origin(base).startswith(said)


def choices(*groups: str) -> list[str]:
    """Every option of some groups of conf/, as an override."""
    return [f"{group}={path.stem}" for group in groups for path in sorted((CONF / group).glob("*.yaml"))]


def of(override: str) -> dict[str, dict]:
    """The sections of a composition, as a recipe has them."""
    sections = read(override, "method.comparison_group=matrix")
    return {name: asdict(sections[name]) for name in ("method", "pattern", "allocation", "reconstruction", "prune")}


@pytest.mark.parametrize("override", choices("method", "method/score", "method/update", "pattern", "allocation", "reconstruction"))
def test_the_card_and_the_name_know_every_choice_and_say_its_numbers(written, override):
    sections = of(override)
    content = written(**sections).content
    for section in (sections["method"]["score"], sections["method"]["update"], sections["allocation"], sections["reconstruction"]):
        assert f" {section['name']}: " in content
        for key, value in section.items():
            if key != "name":
                numbers = " and ".join(f"{number:g}" for number in (value if isinstance(value, list) else [value]))
                assert f"{key} {numbers}" in content, key
    assert default_name("org/a", deltas.recipe(**sections))


def test_the_card_says_when_the_errors_were_measured_where_blocks_were_trained_together(written):
    content = written(**of("reconstruction=distilled")).content
    assert "||(W - W')X|| / ||WX||, before the last blocks were trained together: 0.2000" in content
    assert "share 0.5, epochs 1" in content


def test_the_template_is_handed_every_fact_that_it_names(written, monkeypatch):
    """The client's own rendering leaves out what it is not handed, and does not say so."""
    handed = {}
    render = ModelCard.from_template.__func__

    def noted(cls: type, data: object, **facts: object) -> ModelCard:
        handed.update(facts)
        return render(cls, data, **facts)

    monkeypatch.setattr(ModelCard, "from_template", classmethod(noted))
    written()
    template = handed.pop("template_str")
    assert meta.find_undeclared_variables(jinja2.Environment().parse(template)) == {"card_data", *handed}
    assert "stages/release/templates" in yaml.safe_load((CONF.parent / "dvc.yaml").read_text())["stages"]["publish"]["deps"]


def test_the_card_cites_what_the_method_is_made_of(written):
    content = written(**of("method=sparsegpt")).content
    assert "The method is of [Frantar & Alistarh 2023](https://arxiv.org/abs/2301.00774)." in content
    entry = "@misc{frantar2023_230100774,\n  author = {Frantar and Alistarh},\n  year = {2023},\n  eprint = {2301.00774},\n"
    assert entry + "  archiveprefix = {arXiv},\n  url = {https://arxiv.org/abs/2301.00774},\n}" in content
    assert content.count("@misc") == 1
    assert "author = {Sun and others}" in written().content


def test_a_publication_that_is_not_on_arxiv_has_no_number():
    entry = bibtex(Citation(text="Author 1989", url="https://example.org/paper"))
    assert entry == "@misc{author1989,\n  author = {Author},\n  year = {1989},\n  url = {https://example.org/paper},\n}"


def test_the_card_counts_the_documents_of_the_calibration(written):
    source = {"windows": [[[3, 0, 32], [4, 0, 32]], [[3, 64, 64]]]}
    content = written(records=replace(RECORDS, calibration={**RECORDS.calibration, "sources": {"pages": source}})).content
    assert "- Calibration: pages (cc0-1.0), 2 documents; windows with SHA-256" in content


def test_the_card_has_the_hashes_of_what_made_it(written):
    assert "| delta, fingerprint | `de17a` |\n" in written().content
    assert "| code, git commit | `abc123` |\n" in written().content


def test_the_files_for_llama_cpp_stand_with_the_zeros_that_were_counted_in_them(written):
    assert "llama.cpp" not in written().content
    counted = Counted(type="Q3_K", file="small-Q3_K.gguf", bytes=12345, zeros=51, weights=100, otherwise=2)
    card = written(others=replace(NO_OTHERS, gguf=[counted])).content
    cell = "`small-Q3_K.gguf` (2 matrices of another type, since their rows do not divide into its blocks)"
    assert f"| {cell} | 12,345 | 51 | 100 |" in card
    assert "The results above are those of the checkpoint, not of these files." in card


def test_a_release_in_float8_says_so_and_has_its_results_beside_those_before_rounding(written):
    assert "any client loads them" in written().content
    scores = [replace(measured, value=measured.value * 1.5) for measured in RECORDS.sparse]
    float8 = CountedFloat8(bytes=1234, zeros=51, weights=100, loaded=replace(LOADED, loading="streamed"))
    card = written(others=replace(NO_OTHERS, float8=float8, float8_results=scores)).content
    assert "any client loads them" not in card
    assert "bit for bit, then rounded to float8 with a scale for each output channel." in card
    assert "Fraction of zeros in these matrices' bytes: 0.510000 " in card
    section = card[card.index("## Float8") :]
    measured = next(one for one in RECORDS.sparse if one.metric == "perplexity")
    assert f"| {measured.name}, perplexity | {measured.shown(2)} | {scores[RECORDS.sparse.index(measured)].shown(2)} |" in section
    assert "51 of 100 weights in scope are zero in the written bytes, among them all pruned ones." in section
    assert "The tensors have 1,234 bytes." in section


@pytest.mark.parametrize(
    ("loading", "said"),
    [("whole", "loads it without missing tensors and gives the\nlogits of base + delta."), ("streamed", "It was not loaded whole: memory")],
)
def test_the_card_says_which_check_of_loading_was_made(loading, said):
    assert said in loaded(replace(VERIFIED, loaded=replace(LOADED, loading=loading)), None)


@pytest.mark.parametrize(("loading", "said"), [("whole", "loads it without missing tensors"), ("streamed", "It was not loaded whole")])
def test_the_card_of_a_release_in_float8_says_how_that_release_was_loaded(loading, said):
    otherwise = replace(LOADED, loading="whole" if loading == "streamed" else "streamed")
    float8 = CountedFloat8(bytes=1, zeros=1, weights=1, loaded=replace(LOADED, loading=loading))
    words = loaded(replace(VERIFIED, loaded=otherwise), float8)
    assert said in words and "base + delta, rounded to float8." in words


def test_the_card_says_what_of_the_blocks_was_out_of_scope(written):
    assert "Out of scope" not in written().content
    shares = {"mixer.conv1d": 0.01, **{f"norm_{number}": 0.0005 for number in range(7)}}
    content = written(records=replace(RECORDS, prune={**RECORDS.prune, "out_of_scope": shares})).content
    assert "- Out of scope: 1.35% of the weights in the blocks, of the tensors `mixer.conv1d`, `norm_0`," in content
    assert "`norm_4` and 2 kinds more.\n" in content


def test_the_card_of_a_packed_release_loads_what_was_unpacked(written):
    assert 'from_pretrained("org/small")' in written(name="org/small").content
    card = written(name="org/small", others=replace(NO_OTHERS, packed=True)).content
    assert "unpack org/small --revision COMMIT --out small\n" in card
    assert card.count('from_pretrained("small")') == 2
    assert 'from_pretrained("org/small")' not in card
