"""How BLAS's threads are set while a command writes. What is written is tested with the commands."""

import numpy as np
import pytest
import strategies
from strategies import blas_now, tiny_gpt

from minilora.cli import generation
from minilora.cli.generation import Sampling, one_row_at_a_time


@pytest.fixture
def two_blas_threads():
    with strategies.two_blas_threads():
        yield


def seen_by(n):
    """An iterator that tells how many threads BLAS has whenever it is asked for the next item."""
    for _ in range(n):
        yield set(blas_now())


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_prompt_is_read_with_all_threads_of_blas_and_each_token_with_one(n, two_blas_threads):
    assert list(one_row_at_a_time(seen_by(n))) == [{2}, {1}, {1}, {1}][:n]
    assert set(blas_now()) == {2}


def test_who_leaves_early_finds_blas_as_it_was(two_blas_threads):
    tokens = one_row_at_a_time(seen_by(4))
    assert [next(tokens), next(tokens)] == [{2}, {1}]
    tokens.close()
    assert set(blas_now()) == {2}


@pytest.mark.parametrize("rows, after_the_first", [(1, {1}), (2, {2})])
def test_several_rows_keep_the_threads(rows, after_the_first, two_blas_threads, monkeypatch):
    monkeypatch.setattr(generation, "generate_tokens", lambda *args, **options: seen_by(3))
    sampling = Sampling(max_new_tokens=3)
    seen = list(sampling.tokens(tiny_gpt("learned"), np.ones((rows, 2), int), 3, None, None))
    assert seen == [{2}, after_the_first, after_the_first]
