"""The peers never ask the hub for anything, and they count with one thread. Nothing heavy is imported here."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when their libraries are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Helpers that import the peers: pytest's doctests must not.
collect_ignore = ["asking.py", "wide.py"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order, and no bars among the dots."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)
