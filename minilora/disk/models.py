"""Models as folders: the table of families, and loading and saving for each of them alike.

Of a family it knows the record alone. A model that carries an adapter it refuses.
"""

import re
from pathlib import Path

import numpy as np

from ..backend import to_numpy
from ..lora import adapted_names
from ..tensor import Tensor
from .checks import check_same_tensors, errors_name
from .folder import load_config, load_folder, save_folder
from .gpt2 import GPT2
from .own import OWN
from .tensor_file import rounded

# Another kind of model is a record in a file of its own, as gpt2.py has it, and a row here.
# The families are asked in this order. The last one leaves every name as it is, also the names in a
# model that no family holds.
FAMILIES = (
    GPT2,
    OWN,
)
TENSORS = "model.safetensors"
CONFIG = "config.json"
# Files that a saved model takes along from the folder it came from.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip


def families_of(model):
    """The families in whose names an adapter of `model` may be written, its own family first."""
    holding = [family for family in FAMILIES if family.holds(model)]
    related = [family for family in FAMILIES if isinstance(model, family.model)]
    return list(dict.fromkeys([*holding, *related, FAMILIES[-1]]))


def family_of_adapter(adapter):
    """The family in whose names an adapter is saved: its base's, as far as names can tell."""
    for family in FAMILIES:
        if family.owns(adapter.pairs, adapter.base_fingerprint):
            return family
    return FAMILIES[-1]


def family_of_file(their_modules, tensors=None):
    """The family that the modules of an adapter file belong to; None if none has such names.

    `tensors` are the names of the tensors of its base, None if the file does not say.
    """
    for family in FAMILIES:
        if family.owns_file(their_modules, tensors):
            return family
    return None


def family_of_fields(fields):
    """The family of a folder with these fields in its `config.json`; None if there is none."""
    return _with_model_type(FAMILIES, fields.get("model_type"))


def _with_model_type(families, model_type):
    for family in families:
        if model_type in family.model_types:
            return family
    return None


def load_model(folder, xp=np):
    """The model in any folder that `save_model`, `save_gpt2` or transformers wrote.

    Shapes: those `config.json` implies; each tensor of the file is used exactly once. float32, also
    where the file holds float16 or bfloat16 (widened exactly); float64 if it holds that. The arrays
    belong to the array module `xp`. Dropout (`resid_pdrop`, ...) is not part of the model.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field under
    which a model of its kind computes something else, absent, superfluous or misshapen tensors, inf
    or nan, a pickle, damage.
    Source: the layouts of transformers' model classes.
    """
    model = _load(folder, FAMILIES)
    if xp is np:
        return model
    return model.to_device(xp)


def load_gpt2(folder):
    """The GPT in a GPT-2 folder (`model.safetensors`, or shards and an index; `config.json`).

    It is trainable, and on the host. A head that differs from the embedding is kept untied, with a
    warning if `config.json` says tied.
    Shapes: as `load_model`. Raises: as `load_model`, and for a folder of another family.
    Source: Radford et al. 2019 (GPT-2); the layout of transformers' `GPT2LMHeadModel`.
    """
    return _load(folder, (GPT2,))


def save_model(model, folder, *, dtype=None, like=None):
    """Write a plain model as the first family that can hold it.

    Shapes: each tensor in the orientation of the files, in `dtype`: "float32", "float16",
    "bfloat16", "float64", or None for the model's own. `like` is the folder the model came from:
    its tokenizer and other settings go along.
    Raises: ValueError for a model that carries an adapter (merge it first), for a linear without
    the bias that files have, and for numbers that overflow in `dtype`. TypeError for what no family
    holds.
    Source: as `load_model`.
    """
    for family in FAMILIES:
        if family.holds(model):
            return _save(model, family, folder, dtype, like)
    kinds = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES))
    raise TypeError(
        f"save_model: expected {kinds}, got {type(model).__name__}; an adapter is for save_adapter"
    )


def save_gpt2(model, folder, *, dtype=None, like=None):
    """Write a plain GPT with learned positions as GPT-2.

    transformers reads it, and so do converters from its format.
    Shapes: as `save_model`. Raises: as `save_model`, and for rotary positions.
    Source: as `load_gpt2`.
    """
    if not GPT2.holds(model):
        kind = type(model).__name__
        raise ValueError(f"save_gpt2: {kind} is not a GPT with learned positions; see save_model")
    _save(model, GPT2, folder, dtype, like)


def _layout(family, model):
    """{tensor of a file: (our tensors in it, in the order of its rows; is it stored (in, out)?)}"""
    modules = {}
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        modules.setdefault(kind, []).append(module)
    layout = {}
    for kind in modules:
        for theirs, ours in family.module_table(modules[kind]).items():
            turned = family.transposed and kind == "weight" and family.is_part(ours[0])
            layout[f"{theirs}.{kind}"] = ([f"{module}.{kind}" for module in ours], turned)
    return layout


def _save(model, family, folder, dtype, like):
    """Write a model: its tensors joined and turned as files have them, beside its companions."""
    fields = {} if like is None else load_config(like, TENSORS, CONFIG)
    carrying = adapted_names(model)
    if carrying:
        raise ValueError(
            f"{carrying[0]} carries an adapter: save merge(model), or the adapter and its base "
            "apart"
        )
    ours = {name: to_numpy(p.data) for name, p in model.named_parameters()}
    # A model of zeros is made for its names, and gone before anything is written.
    names = [name for name, _ in family.model(model.config, None).named_parameters()]
    check_same_tensors(f"saving a {type(model).__name__}, its tensors", ours, names)
    arrays = {}
    for name, (parts, turned) in _layout(family, model).items():
        array = ours[parts[0]]
        if len(parts) > 1:
            array = np.concatenate([ours[part] for part in parts])
        if turned:
            array = array.T
        if dtype is not None:
            array = rounded(name, array, dtype)
        arrays[name] = array
    stored = model.parameters()[0].dtype.name if dtype is None else dtype
    config = family.write_config(model, fields, stored)
    save_folder(folder, TENSORS, arrays, CONFIG, config, beside=_companions(folder, like))


def _companions(folder, like):
    """The files of the folder `like` that go along into another one."""
    if like is None or Path(like).resolve() == Path(folder).resolve():
        return []
    return [Path(like) / name for name in COMPANIONS if (Path(like) / name).exists()]


def _load(folder, families):
    """The model in `folder`, which must be of one of `families`."""
    fields, tensors, _ = load_folder(folder, TENSORS, CONFIG)
    where = Path(folder) / CONFIG
    model_type = fields.get("model_type")
    family = _with_model_type(families, model_type)
    if family is None:
        known = [repr(name) for family in families for name in family.model_types]
        raise ValueError(
            f"{where}: model_type={model_type!r} is another kind of model; only "
            f"{' or '.join(known)} is implemented"
        )
    _take_prefix_off(folder, family, tensors)
    with errors_name(where):
        config = family.read_config(folder, fields, tensors)
        _check_size(family.count(config), tensors)
    blank = family.model(config, None)
    return _filled(folder, family, blank, tensors)


def _take_prefix_off(folder, family, tensors):
    """Rename `tensors` to what they are called without the prefix, and drop the unused ones."""
    for name in list(tensors):
        short = name.removeprefix(family.prefix)
        array = tensors.pop(name)
        if short in tensors:
            raise ValueError(
                f"{folder}: {short} is there twice, with and without {family.prefix}; keep one"
            )
        if not re.fullmatch(family.unused, short):
            tensors[short] = array


def _check_size(implied, tensors):
    """Raise ValueError, before any memory is asked for, if a model would dwarf its tensors."""
    stored = sum(array.size for array in tensors.values())
    if implied > 10 * stored + 10**7:
        raise ValueError(
            f"it describes a model of {implied:.2g} numbers, but the file of tensors holds "
            f"{stored:.2g}"
        )


def _check_tensors(folder, tensors, layout, shapes):
    """Raise ValueError unless `tensors` are those of `layout`; `shapes` are our tensors'."""
    expected = {}
    for name, (parts, turned) in layout.items():
        rows = sum(shapes[part][0] for part in parts)
        shape = (rows, *shapes[parts[0]][1:])
        expected[name] = shape[::-1] if turned else shape
    stored = {name: array.shape for name, array in tensors.items()}
    check_same_tensors(f"{folder}, {TENSORS}", stored, expected)
    for name, array in tensors.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(
                f"{folder}: {name} ({array.dtype}) must hold floats, and no inf or nan"
            )


def _filled(folder, family, blank, tensors):
    """`blank` with `tensors`, by their names without prefix, in the place of its own.

    `tensors` is emptied on the way: there is never a second copy of the whole model.
    """
    shapes = {name: p.shape for name, p in blank.named_parameters()}
    layout = {
        name.removeprefix(family.prefix): place for name, place in _layout(family, blank).items()
    }
    _check_tensors(folder, tensors, layout, shapes)
    dtype = np.result_type(np.float32, *(array.dtype for array in tensors.values()))
    loaded = {}
    for name, (parts, turned) in layout.items():
        whole = tensors.pop(name).astype(dtype, copy=False)
        if turned:
            whole = whole.T
        ends = np.cumsum([shapes[part][0] for part in parts])
        for part, rows in zip(parts, np.split(whole, ends[:-1]), strict=True):
            loaded[part] = Tensor(np.ascontiguousarray(rows), requires_grad=True)
    return blank.rebuild(lambda name, x: loaded[name] if isinstance(x, Tensor) else None)
