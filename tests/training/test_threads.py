"""What a command does to its process: BLAS's threads for a while, malloc for good, and neither unless asked to."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import strategies
import threadpoolctl
from strategies import blas_now, character_gpt

from minilora import Adam, LoRAConfig, attach, init_adapter
from minilora.backend import array_module
from minilora.cli.ctrl_c import TerminationAsCtrlC
from minilora.training import threads
from minilora.training.loop import heldout_loss, train
from minilora.training.threads import blas_threads, cores, keep_freed_memory, parts_and_threads


def test_blas_has_n_threads_within_the_block_and_what_it_had_after_it():
    before = blas_now()
    assert before, "NumPy's BLAS is one that threadpoolctl knows"
    with blas_threads(1):
        assert set(blas_now()) == {1}
    assert blas_now() == before
    with pytest.raises(KeyError), blas_threads(1):
        raise KeyError
    assert blas_now() == before


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_blas_is_looked_for_is_not_lost_and_leaves_blas_as_it_was(monkeypatch, number):
    """threadpoolctl is called back by C, where an exception would be printed and forgotten."""
    before, real = blas_now(), threadpoolctl.ThreadpoolController
    found = []

    def looked_for():
        os.kill(os.getpid(), number)
        found.append(real())
        return found[0]

    with monkeypatch.context() as patch, TerminationAsCtrlC():
        patch.setattr(threadpoolctl, "ThreadpoolController", looked_for)
        with pytest.raises(KeyboardInterrupt), blas_threads(1):
            raise AssertionError("Ctrl-C was lost")
    assert found and blas_now() == before and threads._BLAS.n_holders == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_blas_is_limited_from_another_thread_too():
    seen = []

    def work():
        with blas_threads(1):
            seen.extend(blas_now())

    with strategies.two_blas_threads():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert set(blas_now()) == {2}
    assert set(seen) == {1}


def test_where_another_thread_has_taken_the_number_nothing_is_silent():
    told = []

    def work():
        with pytest.raises(ValueError, match="BLAS keeps 2 threads where 1 are needed") as error, blas_threads(1):
            raise AssertionError
        told.append(str(error.value))

    with threadpoolctl.threadpool_limits(2, "blas"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert told and threads._BLAS.n_holders == 0


@pytest.fixture
def two_blas_threads():
    with strategies.two_blas_threads():
        assert set(blas_now()) == {2}
        yield


def test_where_blas_counts_by_thread_the_second_training_is_refused(two_blas_threads, monkeypatch):
    """As an OpenBLAS on OpenMP does."""
    with blas_threads(1):
        monkeypatch.setattr(threads, "_numbers", lambda controller: {2})
        told = "2 threads for this thread of Python and 1 for another.*one training or measurement at a time"
        with pytest.raises(ValueError, match=told), blas_threads(1):
            raise AssertionError


def test_blocks_that_overlap_share_the_number_and_the_last_one_sets_it_back(two_blas_threads):
    first, second = blas_threads(1), blas_threads(1)
    with ThreadPoolExecutor(1) as another:
        another.submit(first.__enter__).result()
        second.__enter__()
        another.submit(first.__exit__, None, None, None).result()
        assert set(blas_now()) == {1}
        second.__exit__(None, None, None)
        assert set(blas_now()) == {2}


@pytest.mark.parametrize("held, asked, told", [
    (1, None, "computes with 1 threads.*needs 2"), (None, 1, "computes with 2 threads.*needs 1"),
    (1, 3, "computes with 1 threads.*needs 3"),
], ids=str)  # fmt: skip
def test_a_block_that_needs_another_number_is_refused_and_disturbs_nobody(two_blas_threads, held, asked, told):
    with blas_threads(held):
        during = blas_now()
        with pytest.raises(ValueError, match=f"{told}.*Cut both into several parts"), blas_threads(asked):
            raise AssertionError
        with blas_threads(held):
            assert blas_now() == during
    assert set(blas_now()) == {2}
    with blas_threads(asked):
        assert set(blas_now()) == {asked or 2}


def test_where_no_blas_is_known_there_is_nothing_to_disagree_on(monkeypatch):
    monkeypatch.setattr(threadpoolctl, "ThreadpoolController", lambda: SimpleNamespace(
        info=lambda: []))  # fmt: skip
    with blas_threads(1), blas_threads(None), blas_threads(3):
        assert threads._BLAS.n_holders == 3


def several_trainings_at_once_change_nothing():
    """A failure of version 0.5: the rest of the process had one thread of BLAS, and bits differed from serial runs."""
    base = character_gpt(n_embd=16)

    def run(seed):
        adapter = init_adapter(base, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        batches = (rng.integers(0, 96, (2, 4, 9)) for _ in repeat(None))
        losses = train(attach(base, adapter), Adam(adapter.parameters()), batches, 2 + seed, quiet=True, parts=2,
                       threads=2)  # fmt: skip
        return losses, heldout_loss(base, [rng.integers(0, 96, (2, 4, 9))], parts=2, threads=2)

    before = blas_now()
    serial = [run(seed) for seed in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(run, range(4))) == serial
        assert blas_now() == before


def test_several_trainings_at_once_change_no_bit_and_leave_blas_as_it_was(two_blas_threads):
    several_trainings_at_once_change_nothing()


def each_sets_back_what_it_found(n=None):
    return threadpoolctl.threadpool_limits(n, "blas")


def test_a_number_that_each_sets_back_alone_is_noticed(two_blas_threads, monkeypatch):
    """Two blocks that overlap as in a chain, as three trainings do that begin and end one after the other."""
    monkeypatch.setitem(globals(), "blas_threads", each_sets_back_what_it_found)
    with pytest.raises(AssertionError):
        test_blocks_that_overlap_share_the_number_and_the_last_one_sets_it_back(None)


def test_a_training_in_one_part_is_told_of_one_in_several(two_blas_threads):
    model = character_gpt(n_embd=8)
    batch = np.zeros((2, 2, 3), int)
    fingerprint = model.fingerprint()
    with blas_threads(1):
        for how in ({}, {"parts": 1}):
            with pytest.raises(ValueError, match="this one needs 2.*Cut both into several parts"):
                train(model, Adam(model.parameters()), [batch], 1, quiet=True, **how)
            with pytest.raises(ValueError, match="this one needs 2"):
                heldout_loss(model, [batch], **how)
    assert model.fingerprint() == fingerprint


def test_the_cores_are_those_of_this_process():
    assert 1 <= cores() <= os.cpu_count()


@pytest.mark.parametrize("n_cores, asked, given", [
    (8, (None, None), (8, 8)), (1, (None, None), (2, 1)), (8, (None, 1), (8, 1)),
    (8, (1, None), (1, 1)), (8, (4, None), (4, 4)), (2, (4, None), (4, 2)), (2, (4, 3), (4, 3)),
])
def test_there_are_as_many_parts_and_threads_as_cores_unless_told(n_cores, asked, given, monkeypatch):
    monkeypatch.setattr("minilora.training.threads.cores", lambda: n_cores)
    assert parts_and_threads(*asked, "numpy") == given


def test_a_gpu_computes_one_part_after_the_other():
    assert parts_and_threads(None, None, "cupy") == (1, 1) and parts_and_threads(2, None, "cupy") == (2, 1)
    with pytest.raises(ValueError, match="2 threads with backend 'cupy'.* one part at a time"):
        parts_and_threads(2, 2, "cupy")


def test_more_threads_than_parts_are_refused(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 1)
    for parts in (2, None):
        with pytest.raises(ValueError, match="3 threads for 2 parts: give as many parts.* or at most 2 threads"):
            parts_and_threads(parts, 3, "numpy")
    with pytest.raises(ValueError, match="parts 2, threads 0"):
        parts_and_threads(2, 0, "numpy")


COUNT_PAGES = """
import resource, sys
import numpy as np
import minilora
from minilora.training.threads import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else None
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**22)
before = pages()
for _ in range(10):
    np.ones(2**22)
print(done, (pages() - before) * resource.getpagesize() / (10 * 2**25))
"""


def pages_per_array(how):
    """Whether it was done, and which share of each new array of 32 MiB was fetched from the system."""
    child = subprocess.run([sys.executable, "-c", COUNT_PAGES, how], capture_output=True, text=True, check=True)
    done, share = child.stdout.split()
    return done, float(share)


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in str(os.confstr_names.get("CS_GNU_LIBC_VERSION")
                    and os.confstr("CS_GNU_LIBC_VERSION")), reason="needs glibc")  # fmt: skip
def test_kept_memory_is_not_fetched_again_and_importing_keeps_none():
    assert pages_per_array("keep")[0] == "True" and pages_per_array("keep")[1] < 0.05
    done, share = pages_per_array("leave")
    assert done == "None" and share > 0.001  # huge pages make the count small, but not zero


@pytest.mark.parametrize("libc", [OSError("no such library"), object()], ids=["none", "another"])
def test_where_there_is_no_glibc_nothing_is_done(libc, monkeypatch):
    def load(name):
        if isinstance(libc, OSError):
            raise libc
        return libc

    monkeypatch.setattr("ctypes.CDLL", load)
    assert keep_freed_memory() is False


@pytest.mark.parametrize("largest, tried, done", [(2**40, 4, True), (2**25, 5, True), (0, 2, False)], ids=str)
def test_where_the_threshold_is_refused_a_smaller_one_is_tried_or_nothing_is_done(monkeypatch, largest, tried, done):
    """glibc's own adapting ends with the first option that is set: the others alone would make everything slower."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return option != -3 or value <= largest

    libc = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    assert keep_freed_memory() is done
    assert len(calls) == tried and all(option == -3 for option, _ in calls[: tried - 3 if done else tried])


def test_an_array_module_by_its_name(monkeypatch):
    assert array_module("numpy") is np
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[cuda12\]'"):
        array_module("cupy")
