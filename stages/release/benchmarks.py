"""Scores of benchmarks that a hub keeps leaderboards of, as files that it reads: .eval_results/TASK.yaml.

Format: https://huggingface.co/docs/hub/eval-results. The names of tasks are those of such files on the hub. A score of some rows only is no
entry of a leaderboard, and is left out.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from stages import limits
from stages.evaluation.measurement import Kind, Measurement
from stages.release.records import Records

BENCHMARKS = {  # a task of lm-eval -> the data set and the task there
    "gsm8k": ("openai/gsm8k", "gsm8k"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "diamond"),
    "gpqa_diamond_n_shot": ("Idavidrein/gpqa", "diamond"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
}


def write_eval_results(directory: Path, records: Records, scored: Sequence[Measurement]) -> None:
    """Write a file for each benchmark whose rows were all scored; nothing where there is none.

    Args:
        scored: measurements of the weights that are released.
    """
    measured = {one.key: one for one in scored if one.style == "raw"}
    for row in records.tasks:
        facts, known = records.protocol["tasks"][row["task"]], BENCHMARKS.get(row["task"])
        if known is None or facts["rows"] != facts.get("available"):
            continue
        one = measured.get((Kind.TASK, row["task"], row["metric"]))
        if one is None:
            continue
        error = "not known" if one.stderr is None else f"{100 * one.stderr:.2f}"
        shots = facts["few_shot"]
        asked = f"{limits.rows_of(facts)}, {shots if isinstance(shots, int) else 'task by task'} few-shot"
        if facts.get("cut"):
            asked += f", {facts['cut']} of them longer than the model's context and without their beginning"
        notes = f"{row['metric']} in percent, standard error {error}, {asked}, lm-eval {records.run['versions']['lm-eval']}"
        entry = EvalResultEntry(dataset_id=known[0], task_id=known[1], value=round(100 * one.value, 2), notes=notes)
        path = directory / EVAL_RESULTS_FOLDER / f"{row['task']}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf8")
