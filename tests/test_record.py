import torch

from stages import record


def test_a_run_says_what_it_was():
    facts = record.of_run(torch.device("cpu"), torch.float32, record.Stopwatch())
    assert set(facts) == {"seconds", "peak_memory_gib", "device", "dtype", "code", "versions"}
    assert 0 <= facts["seconds"] < 60
    assert facts["peak_memory_gib"] > 0.01
    assert torch.__version__.startswith(facts["versions"]["torch"])  # a wheel may leave its build out of its metadata
