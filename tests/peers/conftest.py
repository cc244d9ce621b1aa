"""The peers never ask the hub for anything, and they count with one thread. Nothing heavy is imported here."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when their libraries are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
