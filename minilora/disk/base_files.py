"""What a base is on disk: the fields, the tensors and the companions of a folder or a GGUF file.

A GGUF file is read as the folder that transformers would have of it. Knows no kind of model.
"""

from pathlib import Path

from .folder import load_config, load_folder
from .reading import LARGEST_TOKENIZER, check_regular, read_object
from .tensor_file import Claim, noted_digests

TENSORS = "model.safetensors"
CONFIG = "config.json"
# Files that a saved model takes along from the folder it came from.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
# And those of these patterns: further templates of a chat, and what the licence of a base asks for.
PATTERNS = ("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")


def is_gguf(base):
    """Is `base` a GGUF file, by its name, and no folder?"""
    return Path(base).suffix.lower() == ".gguf" and not Path(base).is_dir()


def is_json(base):
    """Is `base` a file of fields alone, a config.json, by its name, and no folder?"""
    return Path(base).suffix.lower() == ".json" and not Path(base).is_dir()


def fields_file(base):
    """The path of the file that the fields of `base` are in."""
    return Path(base) if is_gguf(base) or is_json(base) else Path(base) / CONFIG


def load_fields(base):
    """The fields of a `config.json`, in a folder or alone, or those a GGUF file would have there.

    Raises: as `load_config` and `load_gguf`.
    """
    if is_json(base):
        return read_object(base)
    if is_gguf(base):
        from .gguf import gguf_fields

        return gguf_fields(base)
    return load_config(base, TENSORS, CONFIG)


def load_stored(base):
    """(fields, {name: array or PackedTensor}, {name: Claim}) of a base, by transformers' names.

    Nothing is read yet to check the claims; a file that no claim stands in has none.

    Raises: as `load_folder` and `load_gguf`.
    """
    if is_gguf(base):
        from .gguf import load_gguf

        return *load_gguf(base), {}
    fields, tensors, metadata = load_folder(base, TENSORS, CONFIG, verify=False)
    path = Path(base) / TENSORS
    digests = noted_digests(path, metadata)
    claims = {}
    if digests:
        # Of a tensor without a digest nothing is true.
        for name, array in tensors.items():
            claims[name] = Claim(path, name, array, digests.get(name))
    return fields, tensors, claims


def companions_of(base, folder):
    """{name: path or bytes} of the files that go along from `base`, or None, into `folder`.

    A link is followed to where it leads within the folder, and from a snapshot in the cache of
    Hugging Face to the `blobs` beside its snapshots, where that keeps all files.
    Raises: ValueError that names a link that leads elsewhere: a folder of a stranger's could take
    any file of this machine into what is published.
    """
    if base is None or Path(base).resolve() == Path(folder).resolve():
        return {}
    if is_gguf(base):
        from .gguf_companions import gguf_companions

        return gguf_companions(base)
    paths = [Path(base) / name for name in COMPANIONS]
    for pattern in PATTERNS:
        paths += sorted(Path(base).glob(pattern))
    companions = {}
    for path in paths:
        if path.is_file():
            _check_inside(Path(base), path)
            check_regular(path, LARGEST_TOKENIZER)
            companions[path.relative_to(base).as_posix()] = path
    return companions


def _check_inside(base, path):
    """Raise ValueError if `path`, which is in the folder `base`, is a link to a file elsewhere."""
    folder = base.resolve()
    target = path.resolve()
    if folder in target.parents:
        return
    if folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs":
        return
    raise ValueError(
        f"{path} is a link to {target}, which is not in {base}, and would be copied along: put the "
        "file itself there, or take the link away"
    )
