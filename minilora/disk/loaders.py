"""What other programs ask of an adapter folder, as rules on its JSON and its tensors. Knows no base, refuses nothing.

PEFT's rules are those of version 0.21; vLLM's were read from its PEFTHelper, they were not run. What only the base
could tell (is this module there? is this its width?) is not asked here.
"""

import re

from ..lora_config import LoRAConfig
from .peft import PREFIX
from .peft_config import chosen_modules

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its server takes as --max-lora-rank, 16 unless told
VLLM_NOTE = ("vLLM serves no LoRA on GPT-2 (GPT2LMHeadModel), whatever the format: merge the adapter, and serve the "
             "merged folder")
_NAMED = re.compile(rf"{PREFIX}(?!{PREFIX})(.+)\.(lora_(?:[AB]\.weight|embedding_[AB]|B\.bias|magnitude_vector))")


def peft_objections(config, shapes):
    """Why PEFT would refuse this adapter, or warn, or compute something else with it; empty if it would not.

    `config` is the JSON, `shapes` {tensor name: shape}.
    """
    found = [] if config.get("peft_type") == "LORA" else [f"peft_type is {config.get('peft_type')!r}, not 'LORA'"]
    found += [f"no {key}: PEFT silently takes 8" for key in ("r", "lora_alpha") if key not in config]
    modules, stray = {}, []
    for name, shape in shapes.items():
        named = _NAMED.fullmatch(name)
        if named:
            modules.setdefault(named[1], {})[named[2].removesuffix(".weight").replace("embedding_", "")] = shape
        elif not (_keeps_plain(config) and name.startswith(PREFIX) and ".lora_" not in name):
            stray.append(name)
    if stray:
        found.append(f"{_some(stray, 'tensors')} not named {PREFIX}<module>.lora_A.weight: PEFT skips such a tensor, "
                     "unless the base, or an adapter called default, has one of that name, which it overwrites")
    targets = ["c_attn"] if config.get("target_modules") is None else config["target_modules"]  # a GPT-2's default
    alpha = config.get("lora_alpha", 8)  # PEFT multiplies by whatever number it is
    try:
        lora = LoRAConfig(config.get("r", 8), 1 if isinstance(alpha, (int, float)) else alpha, targets,
                          rank_pattern=config.get("rank_pattern") or {})
        if isinstance(targets, list):
            idle = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in modules)]
            if idle and not config.get("exclude_modules"):  # what is excluded has no tensors
                found.append(f"target_modules {idle} have no tensors: PEFT warns of it if the base has such modules, "
                             "and silently adapts fewer if it has not")
            targets = [t for t in targets if t not in idle]
        chosen = chosen_modules("its JSON", {**config, "target_modules": targets}, list(modules)) if targets else []
    except (ValueError, TypeError, re.error) as error:
        return [*found, str(error)]
    untold = [name for name in modules if name not in chosen]
    if untold:
        found.append(f"{_some(untold, 'modules')} not chosen by target_modules, exclude_modules and "
                     "layers_to_transform: PEFT skips their tensors")
    wanted = {"lora_A", "lora_B", *["lora_B.bias"] * bool(config.get("lora_bias")),
              *["lora_magnitude_vector"] * bool(config.get("use_dora"))}  # fmt: skip
    partly = {name: sorted(wanted - modules[name].keys()) for name in chosen if wanted - modules[name].keys()}
    if partly:
        found.append(f"{_some(list(partly), 'modules')} without {', '.join(next(iter(partly.values())))}: PEFT warns "
                     "of missing keys, and starts those anew")
    extra = [f"{name}.{kind}" for name in chosen for kind in sorted(modules[name].keys() - wanted)]
    if extra:
        found.append(f"{_some(extra, 'tensors')} not asked for by lora_bias or use_dora: PEFT skips such tensors")
    sizes = {name: (modules[name]["lora_A"], modules[name]["lora_B"]) for name in chosen if name not in partly}
    odd = [name for name, (A, B) in sizes.items() if len(A) != 2 or len(B) != 2 or not A[0] == B[1] == lora.r_of(name)]
    if odd:
        A, B = sizes[odd[0]]
        found.append(f"{_some(odd, 'modules')} of sizes {A} and {B}, the configuration says r={lora.r_of(odd[0])}: "
                     "PEFT refuses them")
    return found


def vllm_objections(config, shapes):
    """Why vLLM's own check of an adapter would refuse it; empty if it would not. Arguments as `peft_objections`."""
    found = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    for key in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens",
                "use_bdlora", "use_qalora"):
        if config.get(key):
            found.append(f"{key} is {config[key]!r}")
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']!r}")
    start = str(config.get("init_lora_weights"))
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        found.append(f"init_lora_weights is {start!r}: such adapters belong to a changed base")
    r = max(_largest(shapes), config["r"] if isinstance(config.get("r"), int) else 0)
    if r > VLLM_RANKS[-1]:
        found.append(f"rank {r} is above its largest, {VLLM_RANKS[-1]}")
    return found


def vllm_rank(shapes):
    """The --max-lora-rank that vLLM must be started with for tensors of these shapes; None if there is none."""
    r = _largest(shapes)
    return next((rank for rank in VLLM_RANKS if rank >= r), None) if r else None


def _largest(shapes):
    return max((shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight") and shape), default=0)


def _keeps_plain(config):
    """Does this configuration ask for tensors of the base itself beside the factors?"""
    return bool(config.get("modules_to_save")) or config.get("bias", "none") != "none"


def _some(names, what):
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} {what}, {names[0]} among them, are"
