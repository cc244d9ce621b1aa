"""(IA)³ and prompt tuning in PEFT's layout, both ways. How files call modules it asks the family.

The other relatives have none: PEFT's prefixes count the positions of a text from their own length
on, here from 0, so that one file would mean two functions; bottlenecks and lone biases it has not.

    base_model.model.<module>.ia3_l    (out, 1), or (1, in) for a module of `feedforward_modules`
    prompt_embeddings                  (P, C)
"""

import json
from pathlib import Path

import numpy as np

from ..backend import to_device, to_numpy
from ..fits import check_fits
from ..ia3 import Factors
from ..method import Method
from ..prompt import Prompt
from ..tensor import Tensor
from .adapter_file import BASE_NOTE, CONFIG, NOTE, PREFIX, TENSORS, read_fingerprint
from .checks import check_same_tensors, errors_name, json_object, listed
from .folder import load_folder, save_folder
from .models import family_of
from .peft_config import chosen_modules, endings, is_neutral, module_table
from .tensor_file import widened

FACTORS = ".ia3_l"
PROMPT = "prompt_embeddings"
# What a file may say without a change in what is computed, whatever the value.
_HARMLESS = (
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision",
    "auto_mapping", "peft_version", "fan_in_fan_out",
    # How what was learned began is history.
    "init_ia3_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs",
    # What the base is like: its tensors say so.
    "num_layers", "num_attention_heads",
)  # fmt: skip
_IA3_FIELDS = ("target_modules", "feedforward_modules", "exclude_modules")
_PROMPT_FIELDS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules")


def save_method(method, folder, *, base_model="minilora"):
    """Write what `init_ia3` or `init_prompt` made to `folder`, as PEFT would.

    `base_model`, the name or folder of the base, is recorded for people and for other programs.
    Shapes: ia3_l (out, 1) or (1, in), prompt_embeddings (P, C), in their dtype.
    Raises: TypeError for anything else than a Method, ValueError for a method without a layout in
    PEFT, for inf or nan, and for factors of the inputs of a part of c_attn.
    Source: PEFT 0.21, `save_pretrained`.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"save_method: expected what an init_... of LoRA's relatives made, got "
            f"{type(method).__name__}; LoRA and DoRA are saved by save_adapter"
        )
    kinds = {type(part) for part in method.parts.values()}
    for name, p in method.named_parameters():
        if not np.isfinite(to_numpy(p.data)).all():
            raise ValueError(f"save_method: {name} holds inf or nan; lower the learning rate")
    if kinds == {Factors}:
        tensors, fields = _written_ia3(method)
    elif kinds == {Prompt}:
        tensors, fields = _written_prompt(method)
    else:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"save_method: PEFT has no layout for {names} as computed here, only for (IA)³ and "
            "prompts; keep state_dict() in a file of your own"
        )
    fields |= {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    # Of a c_attn the file has factors for all parts, which need not all be learned.
    metadata = {NOTE: json.dumps({"parts": list(method.parts)})}
    if method.base_fingerprint is not None:
        metadata[BASE_NOTE] = json.dumps(method.base_fingerprint)
    save_folder(folder, TENSORS, tensors, CONFIG, fields, metadata)


def _written_prompt(method):
    """({name: array}, fields) of a prompt."""
    vectors = to_numpy(method.parts[""].prompt_embeddings.data)
    n_vectors, n_channels = vectors.shape
    fields = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": n_vectors,
        "token_dim": n_channels,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return {PROMPT: vectors}, fields


def _written_ia3(method):
    """({name: array}, fields) of the factors of (IA)³."""
    family = family_of(method.parts, method.base_fingerprint)
    tensors = {}
    # {does it scale inputs: modules of the file}
    modules = {False: [], True: []}
    for theirs, names in family.module_table(method.parts).items():
        factors = {name: method.parts[name] for name in names}
        of_inputs = any(part.of_inputs for part in factors.values())
        our_modules = family.our_modules(theirs)
        if of_inputs and len(our_modules) > 1:
            raise ValueError(
                f"save_method: {listed(names, most=3)} scale their inputs, which are one for all "
                f"of {theirs}: scale their outputs"
            )
        array = _joined(our_modules, factors)
        tensors[f"{PREFIX}{theirs}{FACTORS}"] = array[None] if of_inputs else array[:, None]
        modules[of_inputs].append(theirs)
    base_modules = {name.rpartition(".")[0] for name in method.base_fingerprint or {}}
    all_modules = list(family.module_table(base_modules))
    of_outputs = endings(modules[False], all_modules)
    of_inputs = endings(modules[True], all_modules)
    fields = {
        "peft_type": "IA3",
        "target_modules": [*of_outputs, *of_inputs],
        "feedforward_modules": of_inputs,
        "fan_in_fan_out": family.transposed,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    return tensors, fields


def _joined(our_modules, factors):
    """The factors of one module of a file: those of its parts, and ones for parts without any."""
    arrays = {name: to_numpy(part.ia3_l.data) for name, part in factors.items()}
    # The parts of a c_attn are of one size.
    ones = np.ones_like(next(iter(arrays.values())))
    return np.concatenate([arrays.get(name, ones) for name in our_modules])


def load_method(folder, base, *, say=print):
    """The (IA)³ or the prompt that PEFT or `save_method` wrote, checked against `base`.

    `say` is told what was read. A file that does not name its base is loaded, and that is said.
    Shapes: as saved, on the backend of `base` and at least in its dtype.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: another method,
    a field this library does not implement, tensors absent or superfluous, inf or nan, and a base
    that does not fit. TypeError if the file holds float64 and the base float32.
    Source: PEFT 0.21, `PeftModel.from_pretrained`, without its silent skips.
    """
    folder = Path(folder)
    fields, stored, metadata = load_folder(folder, TENSORS, CONFIG)
    fingerprint = read_fingerprint(folder, metadata)
    arrays = {name: _finite(folder, name, tensor) for name, tensor in stored.items()}
    method_name = fields.get("peft_type")
    if method_name == "IA3":
        _check_fields(folder / CONFIG, fields, _IA3_FIELDS)
        note = json_object(f"{folder / TENSORS}: its {NOTE}", metadata.get(NOTE)) or {}
        parts = _read_ia3(folder, fields, arrays, base, note.get("parts"))
    elif method_name == "PROMPT_TUNING":
        _check_fields(folder / CONFIG, fields, _PROMPT_FIELDS)
        parts = _read_prompt(folder, fields, arrays, base)
    else:
        raise ValueError(
            f"{folder / CONFIG}: peft_type is {method_name!r}; load_method reads 'IA3' and "
            "'PROMPT_TUNING', load_adapter 'LORA'"
        )
    method = Method(parts, fingerprint)
    known = fingerprint is not None
    check_fits(str(folder), base, method, check_base=known)
    verdict = "recognised" if known else "UNVERIFIED, the file does not say which it was trained on"
    say(f"{folder}: {method_name}, {len(arrays)} tensors, all used\n  base: {verdict}")
    return method


def _finite(folder, name, stored):
    array = widened(stored)
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{folder}: {name} ({array.dtype}) must hold floats, and no inf or nan")
    return array


def _check_fields(where, fields, read):
    """Raise ValueError if a field asks for something that is not implemented here."""
    for key, value in fields.items():
        if key not in _HARMLESS and key not in read and not is_neutral(value):
            raise ValueError(
                f"{where}: {key}={value!r} changes what the method computes and is not supported"
            )


def _read_prompt(folder, fields, arrays, base):
    """{"": Prompt} of a file."""
    n_vectors = fields.get("num_virtual_tokens")
    n_channels = fields.get("token_dim")
    if fields.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"{folder / CONFIG}: num_transformer_submodules="
            f"{fields['num_transformer_submodules']!r} is not supported, only 1"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    shape = shapes.get(PROMPT, ())
    if n_channels is None and len(shape) == 2:
        n_channels = shape[1]
    check_same_tensors(f"{folder}, its tensors", shapes, {PROMPT: (n_vectors, n_channels)})
    return {"": Prompt(_tensor(arrays[PROMPT], base))}


def _read_ia3(folder, fields, arrays, base, learned):
    """{our module: Factors} of a file; `learned`, from its notes, are our modules that have some.

    None: all that the file has factors for.
    """
    where = folder / CONFIG
    by_module = {}
    for name, array in arrays.items():
        if not name.startswith(PREFIX) or not name.endswith(FACTORS):
            raise ValueError(f"{folder}: {name} is not {PREFIX}<module>{FACTORS}")
        by_module[name.removeprefix(PREFIX).removesuffix(FACTORS)] = array
    if not by_module:
        raise ValueError(f"{folder}: {TENSORS} holds no tensor")
    if fields.get("target_modules") is None:
        raise ValueError(f"{where}: no target_modules; add what training used")
    with errors_name(folder / TENSORS):
        table = module_table(base, by_module)
    chosen = chosen_modules(where, fields, list(table))
    check_same_tensors(f"{folder}, modules of the file and target_modules", by_module, chosen)
    _check_learned(f"{folder / TENSORS}: its {NOTE}", learned, table)
    of_inputs = _feedforward(where, fields, chosen)
    modules = dict(base.named_modules())
    parts = {}
    for theirs in chosen:
        names = table[theirs]
        scales_inputs = theirs in of_inputs
        if scales_inputs and len(names) > 1:
            raise ValueError(
                f"{where}: the inputs of {theirs} are scaled, which {listed(names, 3)} share: not "
                "supported"
            )
        n = modules[names[0]].in_features
        if not scales_inputs:
            n = sum(modules[name].out_features for name in names)
        shape = (1, n) if scales_inputs else (n, 1)
        if by_module[theirs].shape != shape:
            raise ValueError(
                f"{folder}: {theirs}{FACTORS} is {by_module[theirs].shape}, but the base and "
                f"feedforward_modules ask for {shape}"
            )
        rows = np.split(by_module[theirs].reshape(-1), len(names))
        for name, factors in zip(names, rows, strict=True):
            if learned is None or name in learned:
                parts[name] = Factors(_tensor(factors, base), scales_inputs)
            elif (factors != 1).any():
                raise ValueError(
                    f"{folder}: {theirs}{FACTORS} has factors for {name}, which its metadata say "
                    "was not learned; save it again"
                )
    return parts


def _check_learned(where, learned, table):
    """Raise ValueError unless `learned` is None or a list of our modules in `table`, a file's."""
    if learned is None:
        return
    names = [name for ours in table.values() for name in ours]
    if not isinstance(learned, list) or not learned or any(n not in names for n in learned):
        raise ValueError(
            f"{where}: parts must be a list of some of {listed(names, most=3)}, "
            f"got {learned!r:.200}; save it again"
        )


def _feedforward(where, fields, chosen):
    """Those of the modules `chosen` whose inputs are scaled."""
    named = fields.get("feedforward_modules") or []
    if isinstance(named, list):
        # A pattern may belong to a block that is left out here.
        named = [name for name in named if any(f".{m}".endswith(f".{name}") for m in chosen)]
    if not named:
        return []
    return chosen_modules(where, {"target_modules": named}, chosen)


def _tensor(array, base):
    """A trainable Tensor on the backend of `base`, in its dtype if that is wider."""
    like = base.parameters()[0]
    wide = array.astype(np.result_type(array.dtype, like.dtype))
    return Tensor(to_device(wide, like.xp), requires_grad=True)
