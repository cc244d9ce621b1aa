"""What the configuration of an adapter says: its fields, and which modules it means. Knows names, opens no file.

Modules go by the names of the class that PEFT would wrap: GPT-2's if the base can be saved as a GPT-2, else their own.
"""

import re

from ..gpt import GPT
from ..lora import linear_names
from ..lora_config import LoRAConfig, find_targets, is_expression
from .folder import naming
from .gpt2 import PREFIX, gpt2_modules, gpt2_name, is_gpt2

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")  # past history, once factors are saved
_NEUTRAL = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _STARTS}
_READ = (*_REQUIRED, "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform",
         "layers_pattern", "exclude_modules")
_HARMLESS = ("task_type", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "revision", "megatron_core",
             "auto_mapping", "peft_version", "qalora_group_size")


def read_config(where, config):
    """The LoRAConfig, in the names of the file, that an `adapter_config.json` describes; `where` is its path.

    Raises: ValueError that names the field: absent without a safe default, or set to what is not implemented here.
    """
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; these have no safe default, add what training used")
    for key, value in config.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise ValueError(f"{where}: {key}={value!r} is not supported, only {_NEUTRAL[key][0]!r}")
        neutral = value is None or value is False or value in ({}, [])
        if key not in (*_NEUTRAL, *_READ, *_HARMLESS) and not neutral:
            raise ValueError(f"{where}: {key}={value!r} changes what the adapter computes and is not supported")
    with naming(where):
        return LoRAConfig(config["r"], config["lora_alpha"], config["target_modules"], config.get("lora_dropout", 0.0),
                          config.get("use_rslora", False), config.get("rank_pattern") or {},
                          config.get("alpha_pattern") or {})


def chosen_modules(where, config, modules):
    """Those of `modules`, names as in the file, that an `adapter_config.json` selects.

    Raises: ValueError if a pattern matches nothing, or a block is asked for that is not there.
    Source: PEFT 0.21, `check_target_module_exists`.
    """
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    patterns, excluded = config.get("layers_pattern") or [], config.get("exclude_modules") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    with naming(where):
        chosen = find_targets(modules, targets)
        _check_expressions("layers_pattern", patterns)
        _check_expressions("exclude_modules", [excluded] if isinstance(excluded, str) else [])
        if isinstance(excluded, str):
            chosen = [name for name in chosen if not re.fullmatch(excluded, name)]
        else:
            chosen = [name for name in chosen if not any(name == e or name.endswith(f".{e}") for e in excluded)]
        if layers is None or layers == []:
            return chosen
        if isinstance(targets, str):
            raise ValueError("layers_to_transform needs target_modules to be a list, not an expression")
        layers = layers if isinstance(layers, list) else [layers]
        if not all(type(layer) is int for layer in layers):
            raise ValueError(f"layers_to_transform must be a number, or a list of them, got {layers}")
        block = {name: _block(name, patterns) for name in chosen if name not in targets}  # a full name is in as it is
        absent = [layer for layer in layers if layer not in block.values()]
        if block and absent:
            there = sorted(set(block.values()) - {-1}) or "none"
            raise ValueError(f"layers_to_transform {absent}: of the blocks of the targets, there are {there}")
        return [name for name in chosen if name not in block or block[name] in layers]


def _check_expressions(field, expressions):
    for text in expressions:
        if not is_expression(text):
            raise ValueError(f"{field} {text!r} is not a regular expression")


def _block(name, patterns):
    """The number of the block of a module, -1 for none: the first that follows one of `patterns`."""
    for pattern in patterns or [r"[^.]*\.[^.]*"]:
        found = re.match(rf"(?:.*?\.)??{pattern}\.(?P<block>\d+)\.", name)
        if found and found["block"]:
            return int(found["block"])
    return -1


def file_modules(names, gpt2):
    """{module of a file: our modules}, for the modules `names` of a GPT-2 or of another model."""
    if not gpt2:
        return {name: [name] for name in names}
    return {PREFIX + theirs: ours for theirs, ours in gpt2_modules(names).items()}


def of_gpt2(adapter):
    """Does this adapter belong to a model that GPT-2's format can hold? Its names and its base's fingerprint tell."""
    named = all(gpt2_name(name) != name for name in adapter.pairs)
    return named and (adapter.base_fingerprint is None or "wpe.weight" in adapter.base_fingerprint)


def file_table(base, used):
    """{module of a file: our modules} for all Linears of `base`, in the names of the modules `used` by a file.

    Raises: ValueError with both sides if no module is known.
    """
    table = file_modules(linear_names(base), is_gpt2(base))
    tables = [table]
    if isinstance(base, GPT):  # whichever of its names the file uses: they cannot be confused
        gpt2 = file_modules(linear_names(base), True)
        bare = {file.removeprefix(PREFIX): names for file, names in gpt2.items()}  # PEFT on a GPT2Model without head
        tables += [gpt2, bare, file_modules(linear_names(base), False)]
    for names in tables:
        if names.keys() & set(used):
            return names
    raise ValueError(f"none of the file's modules is in the base. The file has {', '.join(list(used)[:4])} ...; the "
                     f"base has {', '.join(list(table)[:4])} ...")


def translated(lora, chosen, table):
    """The configuration `lora`, which is in the names of a file, in our own names."""
    ours = {name: file for file in chosen for name in table[file]}
    everything = [name for names in table.values() for name in names]
    return LoRAConfig(
        lora.r, lora.alpha, endings(ours, everything), lora.dropout, lora.use_rslora,
        {as_pattern(name): lora.r_of(file) for name, file in ours.items() if lora.r_of(file) != lora.r},
        {as_pattern(name): lora.alpha_of(file) for name, file in ours.items() if lora.alpha_of(file) != lora.alpha},
    )  # fmt: skip


def as_pattern(name):
    """An expression for the module `name`: itself, where that is safe, which is what people like to read."""
    return name if re.fullmatch(r"[\w.]+", name) else re.escape(name)


def endings(chosen, everything):
    """The shortest endings that select exactly the names `chosen` out of `everything`; if there are none, the names."""
    for length in (1, 2):
        found = list(dict.fromkeys(".".join(name.split(".")[-length:]) for name in chosen))
        if set(chosen) <= set(everything) and set(find_targets(list(everything), found)) == set(chosen):
            return found
    return list(chosen)
