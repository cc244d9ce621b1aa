"""Is it a model, an adapter, both or neither? Knows the names of files, and reads none."""

import shlex
from pathlib import Path

from ..disk import models, peft
from ..disk.bases import SMOLLM2, find_base
from ..training.checkpoint import is_checkpoint
from ..training.finetune import CHECKPOINT

# {kind: the files that a folder of this kind has}
FILES = {"model": (models.CONFIG, models.TENSORS), "adapter": (peft.CONFIG, peft.TENSORS)}
WITH_ARTICLE = {"model": "a model", "adapter": "an adapter"}


def find_sources(base, adapters=()):
    """The path of `base`, which is what `find_base` takes.

    Raises: ValueError or OSError unless it and the folders `adapters` hold what they should.
    """
    path = find_base(base)
    check_source(path, "model")
    for folder in adapters:
        check_source(folder, "adapter")
    return path


def located(text):
    """The path that `text` is; or, if there is none, that of the model `smollm2`."""
    path = Path(text)
    if str(text) == SMOLLM2 and not path.exists():
        return find_base(text)
    return path


def kinds_of(folder):
    """What `folder` holds, or holds a part of: ["model"], ["adapter"] or both.

    A .gguf file is a model.
    Raises: FileNotFoundError if it holds neither, or does not exist; NotADirectoryError.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist; give the folder of a model or of an adapter"
        )
    if models.is_gguf(folder):
        return ["model"]
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder that it is in")
    kinds = _kinds(folder)
    if not kinds:
        neither = f"{folder} has neither {models.CONFIG} of a model nor {peft.CONFIG} of an adapter"
        raise FileNotFoundError(neither + _hint(folder))
    return kinds


def check_source(folder, kind):
    """Raise ValueError or OSError unless `folder` holds what `kind` says: "model" or "adapter"."""
    kinds = kinds_of(folder)
    if kind not in kinds:
        raise ValueError(
            f"{folder} holds {WITH_ARTICLE[kinds[0]]}, where {WITH_ARTICLE[kind]} is needed"
        )


def unfinished_run(folder):
    """What to do with the run that `folder` holds, as the end of a sentence, or ""."""
    if not is_checkpoint(Path(folder) / CHECKPOINT):
        return ""
    command = f"minilora finetune --resume --out {shlex.quote(str(folder))}"
    return f"; {command} goes on with the run in it, which has not ended"


def _kinds(folder):
    return [
        kind for kind, files in FILES.items() if any((folder / file).exists() for file in files)
    ]


def _hint(folder):
    """Where to look, if `folder` itself is not it."""
    run = unfinished_run(folder)
    if run:
        return run
    inside = sorted(path.name for path in folder.iterdir() if _kinds(path))
    if inside:
        return f", but its sub-folders have: {', '.join(inside)}"
    return ""
