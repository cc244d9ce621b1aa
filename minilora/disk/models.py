"""Models as folders: the table of families, and loading and saving for each of them alike.

Of a family it knows the record alone. A model that carries an adapter it refuses.
"""

import re

import numpy as np

from ..backend import to_numpy
from ..lora import adapted_names
from ..nn import Embedding, Linear
from ..packed import PackedTensor, StoredTensor
from ..tensor import Tensor
from .base_files import (
    CONFIG,
    TENSORS,
    companions_of,
    fields_file,
    is_gguf,
    load_fields,
    load_stored,
)
from .checks import check_same_tensors, errors_name
from .folder import save_folder
from .gpt2 import GPT2
from .llama import LLAMA
from .own import OWN
from .receipt import beside_of
from .tensor_file import all_finite, half_kind, release_pages, rounded, widened

# Another kind of model is a record in a file of its own, as gpt2.py has it, and a row here.
# The families are asked in this order. The last one leaves every name as it is, also the names in a
# model that no family holds.
FAMILIES = (
    GPT2,
    LLAMA,
    OWN,
)
# No side of an array is longer, by NumPy's count.
LARGEST_SIZE = 2**63 - 1


def families_of(model):
    """The families in whose names an adapter of `model` may be written, its own family first."""
    holding = [family for family in FAMILIES if family.holds(model)]
    related = [family for family in FAMILIES if isinstance(model, family.model)]
    return list(dict.fromkeys([*holding, *related, FAMILIES[-1]]))


def family_of_adapter(adapter):
    """The family in whose names an adapter is saved: its base's, as far as names can tell."""
    return family_of(adapter.pairs, adapter.base_fingerprint)


def family_of(modules, tensors=None):
    """The family of a model with these `modules`, as far as names can tell; all names are ours.

    `tensors` are the names of the model's tensors, None if they are not known.
    """
    for family in FAMILIES:
        if family.owns(modules, tensors):
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


def load_model(base, xp=np):
    """The model in a folder that `save_model` or transformers wrote, or in a GGUF file.

    It is frozen, and nobody can write its arrays, because they need not be in memory: a float32
    tensor is a map of its file, so that loading costs no memory and two processes share one copy.
    A GPT-2's linears are the exception: they lie the other way round in files, and are copied. Full
    fine-tuning starts from `load_model(base).trainable_copy()`.

    Shapes: those `config.json` implies; each tensor of the file is used exactly once. The model
    computes in float32, or in float64 if the file holds that. Weights of float16 and bfloat16, and
    a GGUF's packed ones, stay as they are stored, and are widened where they are used, exactly;
    norms, biases and a GPT-2 are widened here. The arrays belong to the array module `xp`. Dropout
    (`resid_pdrop`, ...) is not part of the model.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field under
    which a model of its kind computes something else, absent, superfluous or misshapen tensors, inf
    or nan, a pickle, a pointer of Git LFS, damage.
    Source: the layouts of transformers' model classes.
    """
    model = _load(base, FAMILIES)
    if xp is np:
        return model
    return model.to_device(xp)


def load_model_config(base):
    """The configuration of the model in `base`, read from its fields alone, without its tensors.

    `base` may also be a config.json.

    Raises: as `load_model`, but for what only the tensors tell.
    """
    fields = load_fields(base)
    family = _family_in(base, fields, FAMILIES)
    return _read_config(base, family, fields, {})


def load_gpt2(folder):
    """The GPT in a GPT-2 folder (`model.safetensors`, or shards and an index; `config.json`).

    It is frozen, as `load_model` says, and on the host. A head that differs from the embedding is
    kept untied, with a warning if `config.json` says tied.
    Shapes: as `load_model`. Raises: as `load_model`, and for a folder of another family.
    Source: Radford et al. 2019 (GPT-2); the layout of transformers' `GPT2LMHeadModel`.
    """
    return _load(folder, (GPT2,))


def save_model(model, folder, *, dtype=None, like=None, receipt=None):
    """Write a plain model as the first family that can hold it.

    Shapes: each tensor in the orientation of the files, in `dtype`: "float32", "float16",
    "bfloat16", "float64", or None for the one that it computes in. `like` is what the model was
    loaded from: its tokenizer and other settings go along, also out of a GGUF file. `receipt` is as
    for `save_adapter`.
    Raises: ValueError for a model that carries an adapter (merge it first), for a linear without
    the bias that files have, for inf or nan, and for numbers that overflow in `dtype`. TypeError
    for what no family holds.
    Source: as `load_model`.
    """
    for family in FAMILIES:
        if family.holds(model):
            return _save(model, family, folder, dtype, like, receipt)
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
    _save(model, GPT2, folder, dtype, like, receipt=None)


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


def _save(model, family, folder, dtype, like, receipt):
    """Write a model: its tensors joined and turned as files have them, beside its companions."""
    fields = {} if like is None else load_fields(like)
    carrying = adapted_names(model)
    if carrying:
        raise ValueError(
            f"{carrying[0]} carries an adapter: save merge(model), or the adapter and its base "
            "apart"
        )
    ours = dict(model.named_parameters())
    # A model of zeros is made for its names, and gone before anything is written.
    names = [name for name, _ in family.model(model.config, None).named_parameters()]
    check_same_tensors(f"saving a {type(model).__name__}, its tensors", ours, names)
    config_dtype = model.parameters()[0].dtype.name if dtype is None else dtype
    config = family.write_config(model, fields, config_dtype)
    arrays = {}
    for name, (parts, turned) in _layout(family, model).items():
        # A packed weight is widened here. All are there at once until the file is written.
        array = to_numpy(ours[parts[0]].data)
        if len(parts) > 1:
            array = np.concatenate([to_numpy(ours[part].data) for part in parts])
        if not all_finite(array):
            raise ValueError(
                f"saving a {type(model).__name__}: {name} holds inf or nan, and would be refused "
                "when it is loaded; train it with a lower learning rate, or make it anew"
            )
        if turned:
            array = array.T
        if dtype is not None:
            array = rounded(name, array, dtype)
        arrays[name] = array
    beside = {**companions_of(like, folder), **beside_of(receipt)}
    save_folder(folder, TENSORS, arrays, CONFIG, config, beside=beside)


def _load(base, families):
    """The model in `base`, a folder or a GGUF file, which must be of one of `families`."""
    fields, tensors, claims = load_stored(base)
    family = _family_in(base, fields, families)
    _take_prefix_off(base, family, tensors)
    config = _read_config(base, family, fields, tensors)
    with errors_name(fields_file(base)):
        _check_size(family.count(config), tensors)
    blank = family.model(config, None)
    claims = {name.removeprefix(family.prefix): claim for name, claim in claims.items()}
    return _filled(base, family, blank, tensors, claims)


def _family_in(base, fields, families):
    """The family, one of `families`, of a base with these fields. Raises: ValueError for none."""
    model_type = fields.get("model_type")
    family = _with_model_type(families, model_type)
    if family is None:
        known = [repr(name) for family in families for name in family.model_types]
        raise ValueError(
            f"{fields_file(base)}: model_type={model_type!r} is another kind of model; only "
            f"{' or '.join(known)} is implemented"
        )
    return family


def _read_config(base, family, fields, tensors):
    """The configuration of a model. Raises: ValueError that names the file and the field."""
    with errors_name(fields_file(base)):
        config = family.read_config(base, fields, tensors)
        for name, value in vars(config).items():
            if type(value) is int and value > LARGEST_SIZE:
                raise ValueError(f"{name} is {value:.3g}; no array is longer than {LARGEST_SIZE}")
    return config


def _take_prefix_off(base, family, tensors):
    """Rename `tensors` to what they are called without the prefix, and drop the unused ones."""
    for name in list(tensors):
        short = name.removeprefix(family.prefix)
        array = tensors.pop(name)
        if short in tensors:
            raise ValueError(
                f"{base}: {short} is there twice, with and without {family.prefix}; keep one"
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


def _check_tensors(base, tensors, layout, shapes):
    """Raise ValueError unless `tensors` are those of `layout`; `shapes` are our tensors'."""
    expected = {}
    for name, (parts, turned) in layout.items():
        rows = sum(shapes[part][0] for part in parts)
        shape = (rows, *shapes[parts[0]][1:])
        expected[name] = shape[::-1] if turned else shape
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    where = base if is_gguf(base) else f"{base}, {TENSORS}"
    check_same_tensors(where, stored, expected)
    for name, tensor in tensors.items():
        if not _holds_numbers(tensor):
            raise ValueError(f"{base}: {name} ({tensor.dtype}) must hold floats, and no inf or nan")


def _holds_numbers(tensor):
    if isinstance(tensor, PackedTensor):
        return tensor.packed.is_finite()
    is_float = tensor.dtype.kind == "f" or half_kind(tensor) is not None
    return is_float and all_finite(tensor)


def _filled(base, family, blank, tensors, claims):
    """`blank` with `tensors`, by their names without prefix, in the place of its own.

    `tensors` is emptied on the way: there is never a second copy of the whole model. `claims` is
    {name: Claim} of what the file says of them.
    """
    shapes = {name: p.shape for name, p in blank.named_parameters()}
    layout = {
        name.removeprefix(family.prefix): place for name, place in _layout(family, blank).items()
    }
    _check_tensors(base, tensors, layout, shapes)
    dtype = np.result_type(np.float32, *(tensor.dtype for tensor in tensors.values()))
    may_pack = set()
    # What is turned is copied in any case.
    if dtype == np.float32 and not family.transposed:
        may_pack = _weights_of_layers(blank)
    loaded = {}
    for name, (parts, turned) in layout.items():
        whole = tensors.pop(name)
        claim = claims.get(name)
        if isinstance(whole, PackedTensor):
            if parts[0] in may_pack and len(parts) == 1:
                loaded[parts[0]] = whole
                continue
            whole = whole.data
        if turned:
            whole = whole.T
        ends = np.cumsum([shapes[part][0] for part in parts])
        for part, rows in zip(parts, np.split(whole, ends[:-1]), strict=True):
            loaded[part] = _stored(rows, dtype, part in may_pack, claim)
        if turned:
            # It was copied, and is not read in the file again.
            release_pages([whole])
    return blank.rebuild(lambda name, x: loaded[name] if isinstance(x, Tensor) else None)


def _weights_of_layers(model):
    """The names of the tensors that their layers can compute with as they are stored."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Embedding))
    }


def _stored(array, dtype, may_pack, claim):
    """A StoredTensor of `array` in `dtype`; with its 16 bits as they are if it may be packed."""
    kind = half_kind(array)
    if may_pack and kind is not None:
        packed = PackedTensor(kind, array.shape, array.view(np.uint16))
        packed.claim = claim
        return packed
    return StoredTensor(np.ascontiguousarray(widened(array), dtype), claim)
