"""How far a run has come: what is counted, copied and reported."""

import sys

import numpy as np
import pytest

from minilora.training.progress import Progress, peak_memory


def test_a_copy_for_json_does_not_change_with_the_run_and_goes_on_from_where_it_was():
    progress = Progress(before=4.5, losses=[4.0, 3.0], tokens=32, seconds=0.5, evaluations=[[1, 4.25]])
    copy = progress.as_json()
    progress.losses.append(2.0)
    progress.evaluations.append([2, 1.5])
    assert copy == {"before": 4.5, "losses": [4.0, 3.0], "tokens": 32, "seconds": 0.5, "evaluations": [[1, 4.25]]}
    assert Progress(**copy) == Progress(4.5, [4.0, 3.0], 32, 0.5, [[1, 4.25]])


def test_the_tokens_of_each_batch_are_counted_when_it_is_drawn():
    batches = [(np.zeros((2, 3)), "first"), (np.zeros((1, 3)), "second")]
    progress = Progress(tokens=10)
    targets = []
    for _, target in progress.count_tokens(batches):
        targets.append((target, progress.tokens))
    assert targets == [("first", 16), ("second", 19)]


def test_the_report_gives_speed_and_the_means_of_the_first_and_the_last_ten_steps():
    progress = Progress(before=5.0, losses=[4.0] * 10 + [9.0] + [2.0] * 10, tokens=8000, seconds=4.0)
    assert progress.report(after=1.5, steps=21) == [
        "21 steps in 4 s, 2,000 tokens/s; training loss 4.000 -> 2.000 nats per token (means of 10 steps)",
        "held-out loss 5.000 -> 1.500 nats per token",
    ]


def test_of_fewer_steps_the_means_are_of_all_and_nothing_is_said_of_what_was_not_held_out():
    [line] = Progress(losses=[4.0, 2.0], tokens=8, seconds=0.0).report(after=None, steps=2)
    assert line.endswith("training loss 3.000 -> 3.000 nats per token (means of 2 steps)")


@pytest.mark.skipif(sys.platform == "win32", reason="needs the module resource")
def test_the_peak_of_memory_is_in_bytes():
    before = peak_memory()
    np.ones(2**24)
    assert before >= 10**7
    assert peak_memory() >= 2**27


def test_where_the_system_does_not_tell_the_peak_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() is None
