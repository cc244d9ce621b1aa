"""Adapters on disk, in PEFT's layout: what PEFT wrote is read here, what is written here PEFT reads.

A file holds `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), whichever way round the
base stores its weights. What PEFT has no field for travels in the metadata of the safetensors file, which other readers
skip: the fingerprint of the base, and which columns of a c_attn belong to which projection.
"""

import hashlib
import json
import math
import re
from collections import Counter, namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..backend import get_array_module, to_device, to_numpy
from ..fits import check_fits
from ..lora import Adapter, LoRAPair, init_adapter, linear_names
from ..lora_config import LoRAConfig, check_patterns, find_targets
from ..tensor import Tensor
from .c_attn import join, take_apart
from .folder import json_object, load_folder, naming, same_names, save_folder
from .gpt2 import is_gpt2
from .peft_config import as_pattern, chosen_modules, endings, file_modules, file_table, of_gpt2, read_config, translated

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def save_adapter(adapter, folder, *, base_model="minilora", allow_untrained=False):
    """Write an adapter to `folder` in PEFT's layout, with the fingerprint of its base in the metadata.

    Shapes: lora_A (r, in), lora_B (out, r), in their dtype. `base_model`, the name or folder of the base, is recorded
    for people and for other programs.
    Raises: ValueError, unless allow_untrained=True, for an adapter that does nothing (every lora_B zero: never
    trained) or holds inf or nan; and if the parts of one c_attn have different scalings, which one file cannot hold.
    Source: PEFT 0.21, `save_pretrained`.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"save_adapter: expected an Adapter, got {type(adapter).__name__}; a stack is saved one by one")
    broken = [name for name, p in adapter.named_parameters() if not np.isfinite(to_numpy(p.data)).all()]
    if broken and not allow_untrained:
        raise ValueError(f"save_adapter: {', '.join(broken[:4])} hold inf or nan; lower the learning rate "
                         "(allow_untrained=True saves it all the same)")
    if not any(to_numpy(pair.lora_B.data).any() for pair in adapter.pairs.values()) and not allow_untrained:
        raise ValueError("save_adapter: every lora_B is zero: this adapter was never trained and changes nothing; "
                         "train it first (allow_untrained=True saves it all the same)")
    lora, gpt2, tensors, columns, strength = adapter.config, of_gpt2(adapter), {}, {}, {}
    for file, names in file_modules(adapter.pairs, gpt2).items():
        A, B, spans = join(file, adapter, names)
        tensors[f"{PREFIX}{file}.lora_A.weight"], tensors[f"{PREFIX}{file}.lora_B.weight"] = A, B
        grown = len(A) / lora.r_of(names[0])
        alpha = lora.alpha_of(names[0]) * (math.sqrt(grown) if lora.use_rslora else grown)
        strength[file] = len(A), int(alpha) if alpha == int(alpha) else alpha
        columns |= spans
    (r, alpha), _ = Counter(strength.values()).most_common(1)[0]
    longest_first = sorted(strength.items(), key=lambda item: -len(item[0]))  # the key of x.y must not catch z.x.y
    known = adapter.base_fingerprint or {}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": endings(strength, file_modules((name.rpartition(".")[0] for name in known), gpt2)),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "rank_pattern": {as_pattern(file): its_r for file, (its_r, _) in longest_first if its_r != r},
        "alpha_pattern": {as_pattern(file): its_alpha for file, (_, its_alpha) in longest_first if its_alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": gpt2,  # "stored as Conv1D": PEFT takes that from the layer, others read it here
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    metadata = {"minilora.adapter": json.dumps({"config": asdict(lora), "columns": columns})}
    if adapter.base_fingerprint is not None:
        metadata["minilora.base"] = json.dumps(adapter.base_fingerprint)
    save_folder(folder, TENSORS, tensors, CONFIG, config, metadata)


def load_adapter(folder, base, *, say=print):
    """The adapter that PEFT or `save_adapter` wrote, checked against `base`; `say` gets a receipt of what went where.

    Shapes: as saved, on the backend of `base` and at least in its dtype; each tensor is used once, each target matched.
    TypeError if the file holds float64 and the base float32.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field this library does not
    implement, lora_alpha absent, tensors absent or superfluous, inf or nan, and a base that is not the one the
    adapter was trained on. A file that does not name its base is loaded, and the receipt says so.
    Source: PEFT 0.21, `PeftModel.from_pretrained`, without its silent skips.
    """
    config, lora, factors, own, columns, fingerprint = file = read_adapter(folder)
    where, first, pairs = Path(folder) / TENSORS, base.parameters()[0], {}
    with naming(where):
        table = file_table(base, factors)
    chosen = chosen_modules(Path(folder) / CONFIG, config, list(table))
    same_names(f"{folder}, modules of the file and target_modules", factors, chosen)
    own = own or translated(lora, chosen, table)
    tensor = lambda x: Tensor(  # a narrower file is widened, never the reverse
        to_device(x.astype(np.result_type(x.dtype, first.dtype)), get_array_module(first.data)), requires_grad=True)
    for module in chosen:
        A, B = factors[module]["lora_A"], factors[module]["lora_B"]
        with naming(where):
            pieces = take_apart(module, A, B, table[module], columns)
        shared = {span: tensor(A[slice(*span)]) for span, _ in pieces.values()}
        for name, (span, rows) in pieces.items():
            pairs[name] = LoRAPair(shared[span], tensor(rows), own.scaling_of(name))
            if pairs[name].r != own.r_of(name):
                raise ValueError(f"{where}: its metadata give {name} r={pairs[name].r} columns, and say r="
                                 f"{own.r_of(name)}; save the adapter again")
            if not math.isclose(own.scaling_of(name), lora.scaling_of(module), rel_tol=1e-12):
                raise ValueError(f"{where}: its metadata scale {name} by {own.scaling_of(name)}, {CONFIG} says "
                                 f"{lora.scaling_of(module)}; save the adapter again")
    with naming(where):
        adapter = Adapter(own, pairs, fingerprint)
    check_fits(f"load_adapter({str(folder)!r})", base, adapter, check_base=fingerprint is not None)
    say(receipt(folder, file, {module: table[module] for module in chosen}))
    return adapter


AdapterFile = namedtuple("AdapterFile", "config lora factors own columns fingerprint")


def digest_of(fingerprint):
    """16 hex digits that stand for a whole model: the SHA-256 of its fingerprint."""
    return hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:16]


def read_adapter(folder):
    """What an adapter folder says, without its base: an AdapterFile.

    `config` is the JSON, `lora` what it means as a LoRAConfig in the names of the file, `factors` {module of the file:
    {"lora_A": array, "lora_B": array}}; `own` (LoRAConfig in our names), `columns` (of a c_attn) and `fingerprint` are
    what this library noted, None and {} in other files.
    Raises: as `load_adapter`.
    """
    folder = Path(folder)
    _check_folder(folder)
    config, tensors, metadata = load_folder(folder, TENSORS, CONFIG)
    lora, factors = read_config(folder / CONFIG, config), _factors(folder, tensors)
    for module, pair in factors.items():
        A, B, r = pair["lora_A"].shape, pair["lora_B"].shape, lora.r_of(module)
        if len(A) != 2 or len(B) != 2 or not A[0] == B[1] == r:
            raise ValueError(f"{folder}: {module} has lora_A {A} and lora_B {B}; (r, in) and (out, r) are needed, and "
                             f"{CONFIG} says r={r}")
    noted = lambda key: json_object(f"{folder / TENSORS}: its {key}", metadata.get(key))
    note = noted("minilora.adapter") or {}
    with naming(f"{folder / TENSORS}: its minilora.adapter"):
        own = LoRAConfig(**note.get("config", {})) if note else None
    return AdapterFile(config, lora, factors, own, note.get("columns", {}), noted("minilora.base"))


def init_peft_adapter(model, config, rng, *, allow_large_r=False):
    """A new adapter as PEFT would make it: `target_modules` and patterns are in the names of the files.

    On a GPT-2, `c_attn` gives q_proj, k_proj and v_proj one lora_A that is the same Tensor; on other models, and if the
    names are this library's own (`q_proj`), this is `init_adapter`.
    Shapes: as `init_adapter`. Raises: as `init_adapter`. Source: PEFT 0.21, `get_peft_model`.
    """
    table = file_modules(linear_names(model), is_gpt2(model))
    try:
        chosen = find_targets(list(table), config.target_modules)
    except ValueError as error:
        try:
            return init_adapter(model, config, rng, allow_large_r=allow_large_r)
        except ValueError as other:
            raise ValueError(f"{error}; or, by minilora's names: {other}") from None
    check_patterns(config, chosen)
    adapter = init_adapter(model, translated(config, chosen, table), rng, allow_large_r=allow_large_r)
    pairs = {name: _with_lora_A(adapter.pairs[name], adapter.pairs[table[file][0]].lora_A)
             for file in chosen for name in table[file]}
    return Adapter(adapter.config, pairs, adapter.base_fingerprint)


def _with_lora_A(pair, lora_A):
    return LoRAPair(lora_A, pair.lora_B, pair.scaling)


def receipt(folder, file, used):
    """What a load put where, as lines: which modules, their r and scaling, and whether the base was recognised."""
    kinds = Counter()
    for module, names in used.items():
        ours = "" if list(names) == [module] else " -> " + ", ".join(name.rpartition(".")[2] for name in names)
        part = re.sub(r"^.*\bh\.\d+\.", "", module)
        kinds[f"{part}{ours}: r={file.lora.r_of(module)}, scaling {file.lora.scaling_of(module):g}"] += 1
    lines = [f"{folder}: {2 * len(used)} tensors, all used"] + [f"  {n} x {kind}" for kind, n in kinds.items()]
    known = "UNVERIFIED, the file does not say which base it was trained on"
    if file.fingerprint is not None:
        known = f"recognised, fingerprint {digest_of(file.fingerprint)}"
    return "\n".join([*lines, f"  base: {known}"])


def _check_folder(folder):
    """Name the two kinds of folder that look like an adapter's and are not."""
    if (folder / "adapters.safetensors").exists() and not (folder / TENSORS).exists():
        raise ValueError(f"{folder} is an adapter of mlx-lm, whose adapter_config.json has the same name and another "
                         "meaning (scale, transposed factors); convert it to PEFT's format")
    inside = sorted(path.parent.name for path in folder.glob(f"[!.]*/{CONFIG}"))
    if inside and not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, but its sub-folders {', '.join(inside)} have: load one")


_STRANGE = (  # keys that PEFT skips or reads as something else, and what they tell
    (f"{PREFIX}{PREFIX}", "the model was wrapped twice: take one prefix out of every key"),
    (".default.", "the name of the adapter was left in the key: take it out"),
    ("lora_embedding_", "LoRA on an embedding: merged into a tied one it would change the head as well"),
    ("lora_magnitude_vector", "this is DoRA"),
    ("lora_B.bias", "lora_bias is not supported"),
    (".bias", "biases that were trained beside LoRA are not supported"),
    ("", "only LoRA is read, under PEFT's names; whole tensors beside it (modules_to_save) are not supported"),
)


def _factors(folder, tensors):
    """{module: {"lora_A": array, "lora_B": array}} of the tensors of a file, all of them."""
    factors = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"{PREFIX}(?!{PREFIX})(.+)\.(lora_[AB])\.weight", key)
        if not match:
            reason = next(why for mark, why in _STRANGE if mark in key)
            raise ValueError(f"{folder}: {key} is not {PREFIX}<module>.lora_A.weight or .lora_B.weight; {reason}")
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"{folder}: {key} ({value.dtype}) must hold floats, and no inf or nan")
        factors.setdefault(match[1], {})[match[2]] = value
    half = [name for name, pair in factors.items() if len(pair) != 2]
    if half or not factors:
        raise ValueError(f"{folder}: {half[0]} has only {', '.join(factors[half[0]])}; both factors are needed" if half
                         else f"{folder}: {TENSORS} holds no tensor")
    return factors
