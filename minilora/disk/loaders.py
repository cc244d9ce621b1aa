"""What other programs ask of an adapter folder, as rules on its JSON and its tensors.

PEFT's rules are those of version 0.21. vLLM's were read from its PEFTHelper, they were not run.
Knows no base and refuses nothing: is this module in the base, has it this width, is not asked here.
"""

import re

from ..lora_config import LoRAConfig, check_speed
from .adapter_file import PREFIX
from .models import family_of_file
from .peft_config import STARTS_IN_THE_BASE, chosen_modules

# What vLLM's server takes as --max-lora-rank; without it, it takes 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# A module and one of its tensors, under the names that PEFT gives them.
_NAMED = re.compile(
    rf"{PREFIX}(?!{PREFIX})(.+)\.(lora_(?:[AB]\.weight|embedding_[AB]|B\.bias|magnitude_vector))"
)


def peft_objections(fields, shapes):
    """Why PEFT would refuse this adapter, or warn, or compute something else with it.

    `fields` is the JSON, `shapes` {tensor name: shape}. Empty if PEFT takes it as it is.
    """
    objections = []
    if fields.get("peft_type") != "LORA":
        objections.append(f"peft_type is {fields.get('peft_type')!r}, not 'LORA'")
    if fields.get("peft_type") in ("IA3", "PROMPT_TUNING"):
        # Another method, of which the rules below say nothing.
        return objections
    for key in ("r", "lora_alpha"):
        if key not in fields:
            objections.append(f"no {key}: PEFT silently takes 8")
    modules, stray = _by_module(fields, shapes)
    if stray:
        objections.append(
            f"{_are(stray, 'tensors')} not named {PREFIX}<module>.lora_A.weight: PEFT skips such a "
            "tensor, unless the base, or an adapter called default, has one of that name, which it "
            "overwrites"
        )
    try:
        config = _config(fields)
        check_speed(config, modules)
        idle = _idle_targets(fields, modules)
        chosen = _chosen(fields, idle, modules)
    except (ValueError, TypeError) as error:
        return [*objections, str(error)]
    # What is excluded has no tensors.
    if idle and not fields.get("exclude_modules"):
        objections.append(
            f"target_modules {idle} have no tensors: PEFT warns of it if the base has such "
            "modules, and silently adapts fewer if it has not"
        )
    not_chosen = [name for name in modules if name not in chosen]
    if not_chosen:
        objections.append(
            f"{_are(not_chosen, 'modules')} not chosen by target_modules, exclude_modules and "
            "layers_to_transform: PEFT skips their tensors"
        )
    chosen = {name: modules[name] for name in chosen}
    return objections + _tensor_objections(fields, config, chosen)


def _by_module(fields, shapes):
    """({module: {"lora_A": shape, ...}}, [tensors that belong to no module])."""
    # Either asks for tensors of the base itself, under plain names, beside the factors.
    keeps_plain = bool(fields.get("modules_to_save")) or fields.get("bias", "none") != "none"
    modules = {}
    stray = []
    for name, shape in shapes.items():
        match = _NAMED.fullmatch(name)
        if match:
            kind = match[2].removesuffix(".weight").replace("embedding_", "")
            modules.setdefault(match[1], {})[kind] = shape
        elif not keeps_plain or not name.startswith(PREFIX) or ".lora_" in name:
            stray.append(name)
    return modules, stray


def _config(fields):
    """What PEFT would make of the fields, its defaults included, as a LoRAConfig."""
    alpha = fields.get("lora_alpha", 8)
    # PEFT multiplies by whatever number it is, also by one that LoRAConfig refuses.
    if isinstance(alpha, (int, float)):
        alpha = 1
    return LoRAConfig(
        r=fields.get("r", 8),
        alpha=alpha,
        target_modules=_targets(fields),
        rank_pattern=fields.get("rank_pattern") or {},
    )


def _targets(fields):
    targets = fields.get("target_modules")
    # PEFT's default for a GPT-2.
    return ["c_attn"] if targets is None else targets


def _idle_targets(fields, modules):
    """Those of a list of targets that no module with tensors ends with."""
    targets = _targets(fields)
    if not isinstance(targets, list):
        return []
    idle = []
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            idle.append(target)
    return idle


def _chosen(fields, idle, modules):
    """The modules that the fields choose, `idle` targets aside."""
    targets = _targets(fields)
    if isinstance(targets, list):
        targets = [target for target in targets if target not in idle]
    if not targets:
        return []
    return chosen_modules("its JSON", {**fields, "target_modules": targets}, list(modules))


def _tensor_objections(fields, config, modules):
    """What PEFT would say of the tensors of the chosen modules, {module: {"lora_A": shape}}."""
    wanted = {"lora_A", "lora_B"}
    if fields.get("lora_bias"):
        wanted.add("lora_B.bias")
    if fields.get("use_dora"):
        wanted.add("lora_magnitude_vector")
    objections = []
    incomplete = [name for name in modules if not wanted <= modules[name].keys()]
    if incomplete:
        missing = sorted(wanted - modules[incomplete[0]].keys())
        objections.append(
            f"{_are(incomplete, 'modules')} without {', '.join(missing)}: PEFT warns of missing "
            "keys, and starts those anew"
        )
    unwanted = []
    for name in modules:
        unwanted += [f"{name}.{kind}" for kind in sorted(modules[name].keys() - wanted)]
    if unwanted:
        objections.append(
            f"{_are(unwanted, 'tensors')} not asked for by lora_bias or use_dora: PEFT skips such "
            "tensors"
        )
    misshapen = []
    for name in modules:
        if name not in incomplete:
            A = modules[name]["lora_A"]
            B = modules[name]["lora_B"]
            if len(A) != 2 or len(B) != 2 or not A[0] == B[1] == config.r_of(name):
                misshapen.append(name)
    if misshapen:
        first = misshapen[0]
        A = modules[first]["lora_A"]
        B = modules[first]["lora_B"]
        objections.append(
            f"{_are(misshapen, 'modules')} of sizes {A} and {B}, the configuration says "
            f"r={config.r_of(first)}: PEFT refuses them"
        )
    for name, shape_of in modules.items():
        magnitude = shape_of.get("lora_magnitude_vector")
        if name not in incomplete and magnitude not in (None, shape_of["lora_B"][:1]):
            objections.append(
                f"{name}.lora_magnitude_vector is of size {magnitude}, lora_B of "
                f"{shape_of['lora_B']}: PEFT refuses it"
            )
            break
    return objections


def vllm_objections(fields, shapes):
    """Why vLLM's own check of an adapter would refuse it. Arguments: as `peft_objections`."""
    objections = []
    for key in ("r", "lora_alpha", "target_modules"):
        if fields.get(key) is None:
            objections.append(f"no {key}")
    for key in (
        "modules_to_save",
        "use_dora",
        "lora_bias",
        "layer_replication",
        "alora_invocation_tokens",
        "use_bdlora",
        "use_qalora",
    ):
        if fields.get(key):
            objections.append(f"{key} is {fields[key]!r}")
    if fields.get("bias", "none") != "none":
        objections.append(f"bias is {fields['bias']!r}")
    start = str(fields.get("init_lora_weights"))
    if start.startswith(STARTS_IN_THE_BASE):
        objections.append(
            f"init_lora_weights is {start!r}: such adapters belong to a changed base"
        )
    r = _largest_r(shapes)
    if isinstance(fields.get("r"), int):
        r = max(r, fields["r"])
    if r > VLLM_RANKS[-1]:
        objections.append(f"rank {r} is above its largest, {VLLM_RANKS[-1]}")
    return objections


def vllm_rank(shapes):
    """The --max-lora-rank that vLLM needs for tensors of these shapes; None if there is none."""
    r = _largest_r(shapes)
    if r == 0:
        return None
    return next((rank for rank in VLLM_RANKS if rank >= r), None)


def note_on_base(shapes, tensors=None):
    """What those programs make of the base that these modules belong to; "" if it is not known.

    `tensors` are the names of the base's tensors, None if the file does not say.
    """
    modules, _ = _by_module({}, shapes)
    family = family_of_file(modules, tensors)
    return "" if family is None else family.note


def _largest_r(shapes):
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight") and shape]
    return max(ranks, default=0)


def _are(names, kind):
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} {kind}, {names[0]} among them, are"
