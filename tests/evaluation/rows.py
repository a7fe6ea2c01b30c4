"""A row of each task, with the columns that its definition reads and no other."""

CHOICES = {"text": ["river", "stone"], "label": ["A", "B"]}

GOOD = {
    "boolq": {"passage": "river stone", "question": "lamp", "label": 1},
    "rte": {"sentence1": "river stone", "sentence2": "river", "label": 0},
    "hellaswag": {"activity_label": "winter", "ctx_a": "river stone.", "ctx_b": "the", "endings": ["lamp", "river"], "label": "1"},
    "winogrande": {"sentence": "river stone as _ lamp.", "option1": "garden", "option2": "paper", "answer": "2"},
    "arc_easy": {"question": "river stone", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": {"question": "river lamp", "choices": CHOICES, "answerKey": "A"},
    "openbookqa": {"question_stem": "river stone", "choices": CHOICES, "answerKey": "B"},
    "lambada": {"text": "river stone lamp winter"},
    "mmlu": {"question": "river", "subject": "anatomy", "choices": ["lamp", "winter", "stone", "paper"], "answer": 2, "split": "test"},
    "piqa": {"goal": "river stone", "sol1": "lamp", "sol2": "winter", "label": 1},
}
