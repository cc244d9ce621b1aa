"""How the tests run: hypothesis's settings, and the array modules that every backend test is given."""

import gc
import importlib
import os

import numpy
import pytest
import strict_array
from hypothesis import settings

# pytest looks for doctests in every file. The conftest of a folder has the same name as this one, which it would
# import a second time.
collect_ignore_glob = ["*conftest.py"]

settings.register_profile("local", deadline=None, max_examples=15, print_blob=True)
settings.register_profile("ci", deadline=None, max_examples=15, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish():
    """The collector does not go through what the tests themselves are made of: it stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """No test of this process cuts the power: what was written is there, whether the disk has it yet or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def cupy_or_skip():
    """The module `cupy`, or a skip that says what this machine lacks."""
    try:
        cupy = importlib.import_module("cupy")
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver, no GPU: each has its own exception
        pytest.skip(f"needs CuPy and an NVIDIA GPU: {error}")
    if not devices:
        pytest.skip("needs an NVIDIA GPU: CuPy is here and sees none")
    return cupy


@pytest.fixture(params=["numpy", "strict_array", pytest.param("cupy", marks=pytest.mark.cupy)])
def xp(request):
    """Each array module in turn: NumPy, the strict stand-in for CuPy, and CuPy itself where there is a GPU."""
    return {"numpy": lambda: numpy, "strict_array": lambda: strict_array, "cupy": cupy_or_skip}[request.param]()


@pytest.fixture(params=["strict_array", pytest.param("cupy", marks=pytest.mark.cupy)])
def device_xp(request):
    """Each array module whose arrays are not NumPy's."""
    return strict_array if request.param == "strict_array" else cupy_or_skip()


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A folder with the files of a GPT-2, its weights aside: a byte-level BPE of 300 tokens learned from few words."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=letters,
                                  show_progress=False)  # fmt: skip
    words = "The quick brown fox jumps over the lazy dog.\n\nThe dog sleeps; the fox doesn't. 1 + 1 = 2, café 😀\n"
    bpe.train_from_iterator([words * 3], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    bpe.model.save(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 300}')
    return folder


@pytest.fixture
def no_garbage_collector():
    """Within the test, memory is freed by the last reference going away and by nothing else."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
