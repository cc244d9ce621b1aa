"""An adapter folder as it stands, in PEFT's layout: read, checked and kept apart from any base.

A file holds `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r),
whichever way round the base stores its weights; of DoRA also `.lora_magnitude_vector` (out,). What
PEFT has no field for travels in the metadata of the safetensors file, which other readers skip: the
fingerprint of the base, our configuration, r and scaling of each pair, and which columns of a
c_attn belong to which projection.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..lora_config import LoRAConfig, check_speed
from .checks import errors_name, json_object, json_texts, listed
from .folder import load_folder
from .peft_config import MERGE_IN_PEFT, read_config
from .tensor_file import widened

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# What DoRA has beside the two factors.
MAGNITUDE = "lora_magnitude_vector"
_FACTOR = rf"lora_[AB]\.weight|{MAGNITUDE}"
# Where our own notes are among the metadata.
NOTE = "minilora.adapter"
BASE_NOTE = "minilora.base"
STORED_NOTE = "minilora.stored"
ROWS_NOTE = "minilora.rows"
_ON_AN_EMBEDDING = (
    "LoRA on an embedding is not supported: merged into a tied one it would change the head; leave "
    f"the embedding out of target_modules, or, if the head is not tied, {MERGE_IN_PEFT}"
)
# Keys that PEFT skips or reads as something else, and what they tell. The last one is in every key.
_STRANGE_KEYS = (
    (f"{PREFIX}{PREFIX}", "the model was wrapped twice: take one prefix out of every key"),
    (".default.", "the name of the adapter was left in the key: take it out"),
    ("lora_embedding_", _ON_AN_EMBEDDING),
    # PEFT saves the embedding itself beside it.
    (".base_layer.weight", _ON_AN_EMBEDDING),
    (
        "trainable_tokens",
        "rows of an embedding were trained (trainable_token_indices), which is not supported; "
        f"{MERGE_IN_PEFT}",
    ),
    ("lora_magnitude_vector", "DoRA's magnitudes are <module>.lora_magnitude_vector"),
    ("lora_B.bias", "lora_bias is not supported"),
    (".bias", f"biases that were trained beside LoRA are not supported; {MERGE_IN_PEFT}"),
    (
        "",
        "only LoRA's factors are read, and no whole tensor that was trained beside them "
        f"(modules_to_save); {MERGE_IN_PEFT}",
    ),
)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder says, without its base. Modules go by their names in the file.

    fields: the JSON. config: its LoRAConfig.
    factors: {module of the file: {"lora_A": array (r, in), "lora_B": array (out, r)}}, of DoRA with
    a third, "lora_magnitude_vector": array (out,).
    This library's own notes, in our names; None or {} in the files of others:
    our_config: the LoRAConfig by which the pairs were made. columns: {our module: (start, stop)}
    of the columns of lora_B that are its own. recorded: {our module: (r, scaling)}, None from
    version 0.1.0. fingerprint: the base's. stored: {our tensor of the base: how it was stored}, for
    what was stored in few bits. rows: {our table of the base: how many it had}.
    """

    fields: dict
    config: LoRAConfig
    factors: dict
    our_config: LoRAConfig | None
    columns: dict
    recorded: dict | None
    fingerprint: dict | None
    stored: dict
    rows: dict

    is_dora = property(lambda self: bool(self.fields.get("use_dora")))


def read_adapter(folder):
    """The AdapterFile of an adapter folder. Raises: as `load_adapter`."""
    folder = Path(folder)
    _check_folder(folder)
    fields, tensors, metadata = load_folder(folder, TENSORS, CONFIG)
    config = read_config(folder / CONFIG, fields)
    factors = _factors(folder, tensors, bool(fields.get("use_dora")))
    with errors_name(folder / CONFIG):
        check_speed(config, factors)
    _check_ranks(folder, config, factors)
    where = f"{folder / TENSORS}: its {NOTE}"
    note = json_object(where, metadata.get(NOTE)) or {}
    with errors_name(where):
        our_config = LoRAConfig(**note.get("config", {})) if note else None
        recorded = _recorded_pairs(note.get("pairs"))
        columns = _noted_columns(note.get("columns"))
    fingerprint = read_fingerprint(folder, metadata)
    stored = json_texts(f"{folder / TENSORS}: its {STORED_NOTE}", metadata.get(STORED_NOTE)) or {}
    where = f"{folder / TENSORS}: its {ROWS_NOTE}"
    rows = json_object(where, metadata.get(ROWS_NOTE)) or {}
    if not all(type(n) is int and n > 0 for n in rows.values()):
        raise ValueError(f"{where} must say how many rows each table had, got {rows!r:.200}")
    return AdapterFile(
        fields, config, factors, our_config, columns, recorded, fingerprint, stored, rows
    )


def read_fingerprint(folder, metadata):
    """The fingerprint of its base in the metadata of an adapter, {tensor: digest}, None for none.

    Raises: ValueError that names the file for anything else.
    """
    return json_texts(f"{folder / TENSORS}: its {BASE_NOTE}", metadata.get(BASE_NOTE))


def _check_folder(folder):
    """Name the two kinds of folder that look like an adapter's and are not."""
    if (folder / "adapters.safetensors").exists() and not (folder / TENSORS).exists():
        raise ValueError(
            f"{folder} is an adapter of mlx-lm, whose adapter_config.json has the same name and "
            "another meaning (scale, transposed factors); convert it to PEFT's format"
        )
    inside = sorted(path.parent.name for path in folder.glob(f"[!.]*/{CONFIG}"))
    if inside and not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}, but its sub-folders {listed(inside, most=8)} have: load one"
        )


def _factors(folder, tensors, is_dora):
    """{module: {"lora_A": array, "lora_B": array}} of all the tensors of a file, as AdapterFile."""
    factors = {}
    for key, stored in tensors.items():
        array = widened(stored)
        match = re.fullmatch(rf"{PREFIX}(?!{PREFIX})(.+)\.({_FACTOR})", key)
        if match is None:
            reason = next(reason for mark, reason in _STRANGE_KEYS if mark in key)
            raise ValueError(
                f"{folder}: {key} is not {PREFIX}<module>.lora_A.weight or .lora_B.weight; {reason}"
            )
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(
                f"{folder}: {key} ({array.dtype}) must hold floats, and no inf or nan"
            )
        factors.setdefault(match[1], {})[match[2].removesuffix(".weight")] = array
    if not factors:
        raise ValueError(f"{folder}: {TENSORS} holds no tensor")
    for module, pair in factors.items():
        if not {"lora_A", "lora_B"} <= pair.keys():
            raise ValueError(
                f"{folder}: {module} has only {', '.join(pair)}; both factors are needed"
            )
        if is_dora and MAGNITUDE not in pair:
            raise ValueError(f"{folder}: {module} has no {MAGNITUDE}; use_dora=True needs one")
        if not is_dora and MAGNITUDE in pair:
            raise ValueError(
                f"{folder}: {module} has a {MAGNITUDE}, as in DoRA, but {CONFIG} does not say "
                "use_dora=True"
            )
    return factors


def _check_ranks(folder, config, factors):
    for module, pair in factors.items():
        A = pair["lora_A"].shape
        B = pair["lora_B"].shape
        r = config.r_of(module)
        if len(A) != 2 or len(B) != 2 or not A[0] == B[1] == r:
            raise ValueError(
                f"{folder}: {module} has lora_A {A} and lora_B {B}; (r, in) and (out, r) are "
                f"needed, and {CONFIG} says r={r}"
            )
        magnitude = pair.get(MAGNITUDE)
        if magnitude is not None and magnitude.shape != B[:1]:
            raise ValueError(
                f"{folder}: {module} has lora_B {B} and {MAGNITUDE} {magnitude.shape}; "
                "(out, r) and (out,) are needed"
            )


def _recorded_pairs(note):
    """{our module: (r, scaling)} from the note of a file, None if it has none."""
    if note is None:
        return None
    try:
        return {name: (pair["r"], float(pair["scaling"])) for name, pair in note.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"pairs must be {{module: r and scaling}}, got {note!r:.200}") from None


def _noted_columns(note):
    """{our module: (start, stop)} from the note of a file; {} if it has none."""
    if note is None:
        return {}
    if isinstance(note, dict) and all(map(_is_span, note.values())):
        return {name: tuple(span) for name, span in note.items()}
    raise ValueError(f"columns must be {{module: [start, stop]}}, got {note!r:.200}")


def _is_span(span):
    """Is it [start, stop], of columns that there may be?"""
    if not isinstance(span, list) or [type(number) for number in span] != [int, int]:
        return False
    return 0 <= span[0] < span[1]
