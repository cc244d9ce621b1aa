"""What the configuration of an adapter says: its fields, and which modules it means.

Modules go by the names of files, unless they are called ours. Knows names, opens no file.
"""

import math
from collections import Counter

from ..lora import linear_names
from ..lora_config import LoRAConfig, as_pattern, find_targets, whole_matches
from ..patterns import Matcher, check_expressions
from .checks import errors_name, listed
from .models import families_of

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# How the factors were drawn is history once they are saved.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Not so where the start was taken out of the base's weights: the factors belong to what was left.
STARTS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Tensors of the base itself that PEFT trains as well: what is in the file stands in their place.
_TRAINED_BESIDE = {
    "modules_to_save": "whole copies of these modules were trained",
    "trainable_token_indices": "rows of an embedding were trained, for the tokens of these numbers",
    "bias": "biases of the base were trained",
}
# What makes another file of such an adapter.
MERGE_IN_PEFT = (
    "merge it in PEFT (merge_and_unload, save_pretrained), and use the merged model as a base"
)
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": _STARTS,
    "use_dora": (True, False, None),
}
# A block is a number that follows such a name. PEFT's own pattern is any two names.
_IN_BLOCK = r"(?:.*?\.)??{}\.(?P<block>\d+)\."
_ANY_BLOCK = r"[^.]*\.[^.]*"
_READ = (
    *_REQUIRED, "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "exclude_modules",
)  # fmt: skip
_HARMLESS = (
    "task_type", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "revision",
    "megatron_core", "auto_mapping", "peft_version", "qalora_group_size",
    # How the start "eva" was computed.
    "eva_config",
)  # fmt: skip


def read_config(where, fields):
    """The LoRAConfig that the fields of an `adapter_config.json` describe; `where` is its path.

    Raises: ValueError that names the field: absent without a safe default, or set to what is not
    implemented here.
    """
    if fields.get("peft_type") in ("IA3", "PROMPT_TUNING"):
        raise ValueError(
            f"{where}: peft_type={fields['peft_type']!r} is not supported here, only 'LORA'; "
            "use load_method"
        )
    missing = [key for key in _REQUIRED if fields.get(key) is None]
    if missing:
        raise ValueError(
            f"{where}: no {', '.join(missing)}; these have no safe default, add what training used"
        )
    for key, value in fields.items():
        if key in _TRAINED_BESIDE and not is_neutral(value) and value != "none":
            raise ValueError(
                f"{where}: {key}={value!r:.200} is not supported: {_TRAINED_BESIDE[key]}, beside "
                f"LoRA's factors; {MERGE_IN_PEFT}"
            )
        if key in _SUPPORTED:
            if key == "init_lora_weights" and str(value).startswith(STARTS_IN_THE_BASE):
                raise ValueError(
                    f"{where}: {key}={value!r} is not supported: its factors belong to a base whose"
                    " weights that start has changed; PEFT's save_pretrained(..., "
                    "path_initial_model_for_weight_conversion=...) makes plain LoRA of it"
                )
            if value not in _SUPPORTED[key]:
                only = _SUPPORTED[key][0]
                raise ValueError(f"{where}: {key}={value!r} is not supported, only {only!r}")
        elif key not in _READ and key not in _HARMLESS and not is_neutral(value):
            raise ValueError(
                f"{where}: {key}={value!r} changes what the adapter computes and is not supported"
            )
    with errors_name(where):
        return LoRAConfig(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            target_modules=fields["target_modules"],
            dropout=fields.get("lora_dropout", 0.0),
            use_rslora=fields.get("use_rslora", False),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
        )


def is_neutral(value):
    """Does a field of this value ask for nothing? 0 and "" may mean something."""
    return value is None or value is False or value in ({}, [])


def written_fields(config, strengths, *, fan_in_fan_out, base_model, all_modules, use_dora=False):
    """The fields of `adapter_config.json` for an adapter.

    `config` is how it was made, `strengths` {module: (r, scaling)}. `all_modules` are those of the
    base, adapted or not; none if the base is not known.
    """
    ranks = {}
    alphas = {}
    for module, (r, scaling) in strengths.items():
        ranks[module] = r
        alphas[module] = alpha_for(scaling, r, config.use_rslora)
    # What most modules have is the default, the others are named one by one.
    counts = Counter((ranks[module], alphas[module]) for module in strengths)
    r, alpha = max(counts, key=counts.get)
    # The first match counts, so that the key of x.y must not come before that of z.x.y.
    longest_first = sorted(strengths, key=lambda module: -len(module))
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": endings(list(strengths), all_modules),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": {as_pattern(m): ranks[m] for m in longest_first if ranks[m] != r},
        "alpha_pattern": {as_pattern(m): alphas[m] for m in longest_first if alphas[m] != alpha},
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if use_dora:
        fields["use_dora"] = True
    return fields


def alpha_for(scaling, r, use_rslora):
    """The alpha that gives `scaling` at rank `r`: alpha / r, or alpha / √r with use_rslora.

    The shortest decimal number that gives it to the bit, as an int if it is whole. Where no number
    does (not every number is a multiple of 1/r in floating point), the nearest.
    """
    scaling = float(scaling)
    divisor = math.sqrt(r) if use_rslora else r
    nearest = scaling * divisor
    # Two roundings lie between an alpha and `nearest`: it is at most two numbers away.
    neighbours = [nearest]
    for direction in (-math.inf, math.inf):
        neighbour = math.nextafter(nearest, direction)
        neighbours += [neighbour, math.nextafter(neighbour, direction)]
    for digits in range(1, 18):
        for number in neighbours:
            alpha = float(f"{number:.{digits}g}")
            if alpha / divisor == scaling:
                return int(alpha) if alpha.is_integer() else alpha
    return nearest


def chosen_modules(where, fields, modules):
    """Those of `modules` that the fields of an `adapter_config.json` select; `where` is its path.

    Raises: ValueError if a pattern matches nothing, or a block is asked for that is not there.
    Source: PEFT 0.21, `check_target_module_exists`.
    """
    with errors_name(where):
        chosen = find_targets(modules, fields["target_modules"])
        chosen = _without_excluded(chosen, fields.get("exclude_modules") or [])
        return _in_layers(chosen, fields)


def _without_excluded(modules, excluded):
    """The modules that `excluded`, an expression or a list of endings, does not name."""
    if isinstance(excluded, str):
        matched = set(whole_matches("exclude_modules", excluded, modules))
        return [name for name in modules if name not in matched]
    suffixes = tuple(f".{ending}" for ending in excluded)
    return [name for name in modules if not f".{name}".endswith(suffixes)]


def _in_layers(modules, fields):
    """The modules in the blocks that layers_to_transform names; all of them if it names none."""
    layers = fields.get("layers_to_transform")
    patterns = fields.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list) or not all(isinstance(text, str) for text in patterns):
        raise ValueError(f"layers_pattern must be an expression, or a list of them, got {patterns}")
    check_expressions("layers_pattern", patterns)
    if layers is None or layers == []:
        return modules
    if isinstance(fields["target_modules"], str):
        raise ValueError("layers_to_transform needs target_modules to be a list, not an expression")
    if not isinstance(layers, list):
        layers = [layers]
    if not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers_to_transform must be a number, or a list of them, got {layers}")
    # A module named in full is chosen in whatever block it is.
    matcher = Matcher("layers_pattern", around=_IN_BLOCK)
    block_of = {}
    for module in modules:
        if module not in fields["target_modules"]:
            block_of[module] = _block(matcher, module, patterns or [_ANY_BLOCK])
    absent = [layer for layer in layers if layer not in block_of.values()]
    if block_of and absent:
        blocks = sorted(set(block_of.values()) - {-1}) or "none"
        raise ValueError(
            f"layers_to_transform {absent}: of the blocks of the targets, there are {blocks}"
        )
    return [name for name in modules if name not in block_of or block_of[name] in layers]


def _block(matcher, name, patterns):
    """The number of a module's block, -1 for none: the first that follows one of `patterns`."""
    for pattern in patterns:
        found = matcher.first([pattern], name)
        if found is not None and found[1]["block"]:
            return int(found[1]["block"])
    return -1


def module_table(base, their_modules):
    """{module of a file: our modules that it is} for all Linears of `base`.

    `their_modules` are those that a file names, in whichever of the base's names: no two names of a
    base are alike.
    Raises: ValueError with both sides if none of them is in the base.
    """
    linears = linear_names(base)
    tables = []
    for family in families_of(base):
        table = family.module_table(linears)
        # PEFT on a model without its head (GPT2Model) leaves the prefix out.
        bare = {theirs.removeprefix(family.prefix): ours for theirs, ours in table.items()}
        tables += [table, bare]
    for table in tables:
        if table.keys() & set(their_modules):
            return table
    raise ValueError(
        "none of the file's modules is in the base. The file has "
        f"{listed(their_modules, most=4)}; the base has {listed(tables[0], most=4)}"
    )


def our_targets(model, target_modules):
    """The names of our modules that `target_modules` selects, by the names of files or by ours.

    Raises: ValueError that lists both, if it matches none of the one nor of the other.
    """
    linears = linear_names(model)
    table = families_of(model)[0].module_table(linears)
    try:
        chosen = find_targets(list(table), target_modules)
    except ValueError as refusal:
        return targets_after(refusal, linears, target_modules)
    return [name for module in chosen for name in table[module]]


def targets_after(refusal, linears, target_modules):
    """Those of our Linears that are selected, after the names of files were refused by an error.

    Raises: ValueError that says both, unless ours are refused in the same words.
    """
    try:
        return find_targets(linears, target_modules)
    except ValueError as error:
        if str(error) == str(refusal):
            raise
        raise ValueError(f"{refusal}; or, by minilora's names: {error}") from None


def config_in_our_names(config, chosen, table):
    """`config`, which is in the names of a file, for our modules in the modules `chosen`."""
    module_of = {name: module for module in chosen for name in table[module]}
    all_ours = [name for names in table.values() for name in names]
    rank_pattern = {}
    alpha_pattern = {}
    for name, module in module_of.items():
        if config.r_of(module) != config.r:
            rank_pattern[as_pattern(name)] = config.r_of(module)
        if config.alpha_of(module) != config.alpha:
            alpha_pattern[as_pattern(name)] = config.alpha_of(module)
    return LoRAConfig(
        r=config.r,
        alpha=config.alpha,
        target_modules=endings(list(module_of), all_ours),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def endings(chosen, modules):
    """The shortest endings that select exactly the names `chosen` out of `modules`.

    The names themselves, if no ending of one or two parts does.
    """
    if set(chosen) <= set(modules):
        for length in (1, 2):
            shortened = [".".join(name.split(".")[-length:]) for name in chosen]
            shortened = list(dict.fromkeys(shortened))
            if set(find_targets(list(modules), shortened)) == set(chosen):
                return shortened
    return list(chosen)
