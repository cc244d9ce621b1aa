"""How far a run has come: what is counted, copied and reported."""

import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.progress import Progress, check_progress, peak_memory


def test_a_copy_for_json_does_not_change_with_the_run_and_goes_on_from_where_it_was():
    progress = Progress(before=4.5, losses=[4.0, 3.0], tokens=32, seconds=0.5, evaluations=[[1, 4.25]],
                        norms=[1.5, 0.5])  # fmt: skip
    copy = progress.as_json()
    progress.losses.append(2.0)
    progress.evaluations.append([2, 1.5])
    progress.norms.append(0.25)
    assert copy == {"before": 4.5, "losses": [4.0, 3.0], "tokens": 32, "seconds": 0.5, "evaluations": [[1, 4.25]],
                    "norms": [1.5, 0.5]}  # fmt: skip
    assert Progress(**copy) == Progress(4.5, [4.0, 3.0], 32, 0.5, [[1, 4.25]], [1.5, 0.5])


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


def test_of_one_step_and_one_evaluation_is_told_in_the_singular():
    progress = Progress(before=5.0, losses=[4.0], tokens=8, seconds=1.0)
    assert progress.report(after=None, steps=1)[0].startswith("1 step in 1 s, 8 tokens/s; ")
    progress = Progress(before=5.0, losses=[4.0] * 1234, tokens=8, seconds=1.0, evaluations=[[1, 3.0], [2, 4.0]])
    lines = progress.report(after=None, steps=9999)
    assert lines[0].startswith("1,234 steps in 1 s, ") and lines[1].endswith(": the last evaluation was no better")


@pytest.mark.parametrize("losses, told", [
    ([4.0, 9.0, 2.0], "4.000 -> 2.000 nats per token (first and last step)"),
    ([5.1483, 5.1479], "5.1483 -> 5.1479 nats per token (first and last step)"),
    ([5.0, 5.00000004], "5.00000000 -> 5.00000004 nats per token (first and last step)"),
    ([5.0, 5.0], "5.000 nats per token, unchanged (first and last step)"),
    ([5.0], "5.000 nats per token"),
    ([4.0] * 18 + [2.0], "4.000 -> 2.000 nats per token (first and last step)"),
    ([4.0] * 10 + [3.9999] * 10, "4.0000 -> 3.9999 nats per token (means of 10 steps)"),
], ids=str)  # fmt: skip
def test_two_losses_are_told_apart_and_of_few_steps_the_first_and_the_last_are_told(losses, told):
    [line] = Progress(losses=losses, tokens=8).report(after=None, steps=len(losses))
    assert line.endswith(f"; training loss {told}")


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40), st.floats(0, 20), st.floats(0, 20))
def test_no_line_gives_two_equal_numbers_as_news(losses, before, after):
    for line in Progress(before=before, losses=losses).report(after, steps=len(losses)):
        for first, last in re.findall(r"([\d.]+) -> ([\d.]+)", line):
            assert first != last


ROSE = "lower the learning rate, or look at the data"


@pytest.mark.parametrize("progress, after, told", [
    (Progress(5.0, [4.0, 3.0]), 5.5, [f"the held-out loss rose, by 0.5: {ROSE}"]),
    (Progress(5.0, [3.0, 4.0]), 4.5, []),
    (Progress(5.0, [3.0, 4.0], evaluations=[[2, 6.0]]), 6.0, []),
    (Progress(None, [3.0] * 10 + [4.0] * 10), None, [f"the training loss rose, by 1: {ROSE}"]),
    (Progress(None, [3.0, 4.0]), None,
     ["the training loss rose, by 1: each step has other rows; hold some out to know (--eval-split)"]),
    (Progress(None, [4.0, 4.0]), None, []),
    (Progress(None, [4.0] * 10, norms=[1.0] * 9 + [0.5]), None, []),
    (Progress(None, [4.0] * 10, norms=[1.0] * 10), None,
     ["clipping shortened the gradients in 10 of 10 steps, to a norm of 0.5 (--clip)"]),
    (Progress(None, [4.0] * 3, norms=[1.0, 9.0, 0.1]), None, []),
    (Progress(None, [4.0] * 3, norms=[0.01, 4.0, 0.1]), None, []),
    (Progress(None, [4.0] * 3, norms=[1.0, 11.0, 0.1]), None,
     ["the norm of the gradients grew from 1 to 11, and clipping alone held them back: lower the learning rate"]),
    (Progress(None, [4.0] * 3, norms=[0.0, 11.0, 0.1]), None,
     ["the norm of the gradients grew from 0 to 11, and clipping alone held them back: lower the learning rate"]),
], ids=str)  # fmt: skip
def test_what_went_otherwise_than_hoped_is_told_in_a_line_each(progress, after, told):
    progress.norms = progress.norms or [0.0]
    assert progress.remarks(after, clip=0.5) == told


@pytest.mark.skipif(sys.platform == "win32", reason="needs the module resource")
def test_the_peak_of_memory_is_in_bytes():
    before = peak_memory()
    np.ones(2**24)
    assert before >= 10**7
    assert peak_memory() >= 2**27


def test_where_the_system_does_not_tell_the_peak_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() is None


# What JSON may hold in the place of a progress.

FIELDS = {"before": 5.0, "losses": [4.0, 3.0, 2.5], "tokens": 60, "seconds": 0.5, "evaluations": [[2, 4.5], [3, 4.0]],
          "norms": [1.0, 0.5, 2]}  # fmt: skip
RUN = {"planned": 3, "is_measured": True, "eval_every": 2}


def test_a_progress_that_can_be_is_taken():
    check_progress(FIELDS, 3, **RUN)
    check_progress({**FIELDS, "evaluations": []}, 3, **{**RUN, "eval_every": None})
    check_progress({**FIELDS, "evaluations": [], "before": None}, 3, planned=9, is_measured=False, eval_every=None)
    check_progress(Progress().as_json(), 0, **RUN)
    check_progress({**FIELDS, "losses": [4, 3.0], "norms": [1, 0.5], "evaluations": [[2, 4.5]]}, 2, **RUN)


@pytest.mark.parametrize("fields, steps, shown", [
    (None, 3, "progress must have before, losses"), ([1], 3, "progress must have"),
    ({**FIELDS, "more": 1}, 3, "progress must have"), ({**FIELDS, "losses": [4.0] * 4}, 4, "steps is 4, of 3"),
    ({**FIELDS, "losses": [4.0, 3.0]}, 3, "losses must be 3 numbers"),
    ({**FIELDS, "losses": [4.0, 3.0, True]}, 3, "losses must be 3 numbers"),
    ({**FIELDS, "losses": [4.0, 3.0, math.nan]}, 3, "losses"), ({**FIELDS, "losses": "abc"}, 3, "losses"),
    ({**FIELDS, "losses": {}, "norms": []}, 0, "losses"), ({**FIELDS, "tokens": 2}, 3, "tokens of 3 steps cannot be 2"),
    ({**FIELDS, "tokens": 60.0}, 3, "tokens"), ({**FIELDS, "tokens": True}, 3, "tokens"),
    ({**FIELDS, "norms": [1.0]}, 3, "norms must be 3 numbers"), ({**FIELDS, "norms": None}, 3, "norms must be 3"),
    ({**FIELDS, "seconds": -1.0}, 3, "seconds cannot be -1.0"), ({**FIELDS, "seconds": None}, 3, "seconds"),
    ({**FIELDS, "seconds": math.inf}, 3, "seconds"), ({**FIELDS, "before": None}, 3, "before, the held-out loss"),
    ({**FIELDS, "before": "5"}, 3, "before"), ({**FIELDS, "evaluations": [[2, 4.5]]}, 3, r"of the steps \[2, 3\]"),
    ({**FIELDS, "evaluations": [[1, 4.5], [3, 4.0]]}, 3, r"of the steps \[2, 3\]"),
    ({**FIELDS, "evaluations": [[2, 4.5], [3]]}, 3, "evaluations must be of"),
    ({**FIELDS, "evaluations": [[2, 4.5], [3, math.nan]]}, 3, "evaluations must be of"),
    ({**FIELDS, "evaluations": [[2, 4.5], [3.0, 4.0]]}, 3, "evaluations must be of"),
    ({**FIELDS, "evaluations": None}, 3, "evaluations must be of"),
])  # fmt: skip
def test_a_progress_that_cannot_be_is_refused_by_its_field(fields, steps, shown):
    with pytest.raises(ValueError, match=shown):
        check_progress(fields, steps, **RUN)


def test_a_loss_before_without_anything_held_out_is_refused():
    with pytest.raises(ValueError, match="before, the held-out loss, cannot be 5.0"):
        check_progress({**FIELDS, "evaluations": []}, 3, planned=3, is_measured=False, eval_every=None)
