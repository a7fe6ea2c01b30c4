from dataclasses import replace

import yaml
from huggingface_hub import parse_eval_result_entries

from stages.release.benchmarks import write_eval_results
from tests.release.test_card import PROTOCOL, RECORDS, SPARSE, measured

ROW = {"task": "gsm8k", "metric": "exact_match", "rows": 1319}


def records(rows: int):
    tasks = {**PROTOCOL["tasks"], "gsm8k": {"few_shot": 5, "rows": rows, "available": 1319, "parts": 1, "cut": 0}}
    sparse = [*SPARSE, measured("task", "gsm8k", "exact_match", 0.25, 0.0125)]
    return replace(RECORDS, sparse=sparse, tasks=[*RECORDS.tasks, ROW], protocol={**PROTOCOL, "tasks": tasks})


def test_a_benchmark_that_was_scored_whole_is_an_entry_that_the_client_reads(tmp_path):
    write_eval_results(tmp_path, records(1319), records(1319).sparse)
    (file,) = (tmp_path / ".eval_results").iterdir()  # boolq has no leaderboard
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (file.name, entry.dataset_id, entry.task_id, entry.value) == ("gsm8k.yaml", "openai/gsm8k", "gsm8k", 25.0)
    assert entry.notes == "exact_match in percent, standard error 1.25, all 1,319 rows, 5 few-shot, lm-eval 0.4.13"


def test_an_entry_says_of_rows_that_were_cut(tmp_path):
    cut = records(1319)
    cut.protocol["tasks"]["gsm8k"]["cut"] = 7
    write_eval_results(tmp_path, cut, cut.sparse)
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/gsm8k.yaml").read_text()))
    assert "5 few-shot, 7 of them longer than the model's context and without their beginning, lm-eval" in entry.notes


def test_the_score_is_that_of_the_weights_that_are_released(tmp_path):
    write_eval_results(tmp_path, records(1319), [measured("task", "gsm8k", "exact_match", 0.125, 0.0125)])
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/gsm8k.yaml").read_text()))
    assert entry.value == 12.5


def test_a_benchmark_of_some_rows_is_no_entry(tmp_path):
    write_eval_results(tmp_path, records(20), records(20).sparse)
    assert list(tmp_path.iterdir()) == []
