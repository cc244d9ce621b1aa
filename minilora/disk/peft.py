"""Adapters and folders in PEFT's layout: whatever PEFT wrote is read, PEFT reads what is written.

Knows adapters and bases; how files call their modules it asks the family.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..architectures import blank_adapter
from ..backend import to_device, to_numpy
from ..dora import DoRAPair, with_magnitudes
from ..fits import (
    ACCEPTABLE,
    NAME_OF,
    MoreRows,
    OtherPrecision,
    changes_of,
    check_fits,
    indented,
)
from ..lora import Adapter, LoRAPair, init_adapter, linear_names
from ..lora_config import check_patterns, find_targets
from ..quant import stored_as
from ..tensor import Tensor
from .adapter_file import (
    BASE_NOTE,
    CONFIG,
    MAGNITUDE,
    NOTE,
    PREFIX,
    ROWS_NOTE,
    STORED_NOTE,
    TENSORS,
    read_adapter,
)
from .c_attn import check_all_parts, join, join_magnitudes, take_apart
from .checks import check_same_tensors, errors_name, listed
from .folder import save_folder
from .models import families_of, family_of_adapter
from .peft_config import (
    chosen_modules,
    config_in_our_names,
    module_table,
    read_config,
    targets_after,
    written_fields,
)
from .receipt import beside_of, check_receipt_of


def save_adapter(adapter, folder, *, base_model="minilora", allow_untrained=False, receipt=None):
    """Write an adapter to `folder` in PEFT's layout, with the fingerprint of its base.

    `base_model`, the name or folder of the base, is recorded for people and for other programs.
    `receipt`, a dict of the fields in receipt.py but for `tensors`, is written beside it.
    Shapes: lora_A (r, in), lora_B (out, r), of DoRA lora_magnitude_vector (out,), in their dtype.
    Raises: ValueError, unless allow_untrained=True, for an adapter that does nothing (every lora_B
    zero: never trained) or holds inf or nan; and for what a file cannot hold: parts of one c_attn
    with different scalings, or with and without DoRA's magnitude, a scaling that is not positive,
    and pairs of several kinds.
    Source: PEFT 0.21, `save_pretrained`.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"save_adapter: expected an Adapter, got {type(adapter).__name__}; "
            "a stack is saved one by one"
        )
    if not allow_untrained:
        check_trained(adapter)
    tensors, fields, metadata = _contents(adapter, base_model)
    save_folder(folder, TENSORS, tensors, CONFIG, fields, metadata, beside_of(receipt))


def check_savable(adapter):
    """Raise ValueError for an Adapter that no file can hold, as `save_adapter` does.

    Whether it was trained is not asked: whoever is going to train it asks this before.
    """
    _contents(adapter, base_model="")


def _contents(adapter, base_model):
    """(tensors, JSON fields, metadata) of the files that hold an Adapter."""
    is_dora = _is_dora(adapter)
    family = family_of_adapter(adapter)
    tensors = {}
    columns = {}
    # {module of the file: (r, scaling)}
    strengths = {}
    for their_name, names in family.module_table(adapter.pairs).items():
        pairs = {name: adapter.pairs[name] for name in names}
        parts = family.our_modules(their_name)
        A, B, its_columns = join(their_name, parts, pairs)
        tensors[f"{PREFIX}{their_name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{their_name}.lora_B.weight"] = B
        if is_dora:
            magnitude = join_magnitudes(their_name, parts, pairs)
            tensors[f"{PREFIX}{their_name}.{MAGNITUDE}"] = magnitude
        strengths[their_name] = (len(A), pairs[names[0]].scaling)
        columns |= its_columns
    base_modules = {name.rpartition(".")[0] for name in adapter.base_fingerprint or {}}
    fields = written_fields(
        adapter.config,
        strengths,
        # In PEFT's words "stored as Conv1D". PEFT asks the layer, others read it here.
        fan_in_fan_out=family.transposed,
        base_model=base_model,
        all_modules=family.module_table(base_modules),
        use_dora=is_dora,
    )
    # What is written must be readable: a scaling that is not positive is refused here.
    read_config("save_adapter", fields)
    return tensors, fields, _metadata(adapter, columns)


def _is_dora(adapter):
    """Are the pairs of `adapter` DoRA's? Raises ValueError if they are of several kinds."""
    kinds = {type(pair) for pair in adapter.pairs.values()}
    if kinds <= {LoRAPair}:
        return False
    if kinds == {DoRAPair}:
        return True
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"save_adapter: a file holds pairs of LoRA or of DoRA, this adapter {names}")


def check_trained(adapter):
    """Raise ValueError for an adapter that holds inf or nan, or that changes nothing."""
    broken = []
    for name, p in adapter.named_parameters():
        if not np.isfinite(to_numpy(p.data)).all():
            broken.append(name)
    if broken:
        raise ValueError(
            f"save_adapter: {listed(broken, most=4)} hold inf or nan; lower the learning rate "
            "(allow_untrained=True saves it all the same)"
        )
    if not any(to_numpy(pair.lora_B.data).any() for pair in adapter.pairs.values()):
        raise ValueError(
            "save_adapter: every lora_B is zero: this adapter was never trained and changes "
            "nothing; train it first (allow_untrained=True saves it all the same)"
        )


def _metadata(adapter, columns):
    """What PEFT has no field for."""
    pairs = {
        name: {"r": pair.r, "scaling": float(pair.scaling)} for name, pair in adapter.pairs.items()
    }
    note = {"config": asdict(adapter.config), "columns": columns, "pairs": pairs}
    metadata = {NOTE: json.dumps(note)}
    if adapter.base_fingerprint is not None:
        metadata[BASE_NOTE] = json.dumps(adapter.base_fingerprint)
    if adapter.base_stored:
        metadata[STORED_NOTE] = json.dumps(adapter.base_stored)
    if adapter.base_rows:
        metadata[ROWS_NOTE] = json.dumps(adapter.base_rows)
    return metadata


def load_adapter(folder, base, *, accept_base=(), receipt=None, say=print):
    """The adapter that PEFT or `save_adapter` wrote, checked against `base`.

    `say` is told what went where. A file that does not name its base is loaded, and that is said. A
    base whose weights are stored in other bits, with the same values, is the same base. One that
    was changed on purpose is another one, and is accepted by the name of the change, if nothing
    else differs: accept_base=["other-precision"] if it was quantised, or is not any more;
    ["grown-vocabulary"] if its embedding and its head got more rows after those they had. How much
    it differs is said. `attach` is then given check_base=False. With `receipt`, a dict or the path
    of a receipt.json, the tensors must be those that it is of.
    Shapes: as saved, on the backend of `base` and at least in its dtype; each tensor is used once,
    each target matched.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field this
    library does not implement, lora_alpha absent, tensors absent or superfluous, inf or nan, other
    tensors than those of the receipt, and a base that is not the one the adapter was trained on,
    with the name under which it would be accepted, if there is one. TypeError if the file holds
    float64 and the base float32.
    Source: PEFT 0.21, `PeftModel.from_pretrained`, without its silent skips.
    """
    _check_acceptable(accept_base)
    file = read_adapter(folder)
    where = Path(folder) / TENSORS
    if receipt is not None:
        check_receipt_of(where, receipt)
    with errors_name(where):
        table = module_table(base, file.factors)
    modules = chosen_modules(Path(folder) / CONFIG, file.fields, list(table))
    check_same_tensors(f"{folder}, modules of the file and target_modules", file.factors, modules)
    used = {module: table[module] for module in modules}
    like = base.parameters()[0]
    pairs = {}
    with errors_name(where):
        for module, names in used.items():
            pairs |= _read_pairs(file, module, names, like)
        config = file.our_config
        if config is None:
            config = config_in_our_names(file.config, used, table)
        adapter = Adapter(config, pairs, file.fingerprint, file.stored, file.rows)
    changes = _check_base(folder, base, adapter, accept_base)
    say(_account(folder, file, used, stored_as(base), changes))
    return adapter


def _check_acceptable(names):
    """Raise ValueError unless each of `names` is that of a change of the base."""
    is_list = isinstance(names, (list, tuple, set, frozenset))
    if not is_list or not all(name in ACCEPTABLE for name in names):
        raise ValueError(
            f"accept_base must be a list of {' and '.join(map(repr, ACCEPTABLE))}, or empty, got "
            f"{names!r}"
        )


def _check_base(folder, base, adapter, accept_base):
    """What differs between `base` and that of `adapter`, as `changes_of` says; {} for nothing.

    Raises: ValueError unless `adapter`, read from `folder`, belongs on `base`.
    """
    who = str(folder)
    known = adapter.base_fingerprint is not None
    changes = None
    if known:
        changes = changes_of(
            base, adapter.base_fingerprint, adapter.base_stored, adapter.base_rows
        )
    if not changes:
        check_fits(who, base, adapter, check_base=known)
        return {}
    check_fits(who, base, adapter, check_base=False)
    needed = {NAME_OF[type(change)] for change in changes.values()}
    if not needed <= set(accept_base):
        names = [name for name in ACCEPTABLE if name in needed]
        raise ValueError(
            f"{who}: this is the base of the adapter, but changed; load it as it was in training, "
            f"or accept the change with accept_base={names} (--accept-base {' '.join(names)}):"
            + indented(_in_words(changes))
        )
    return changes


def _in_words(changes):
    """How a base differs from that in training, as lines: what `changes_of` gives."""
    words = []
    precisions = [change for change in changes.values() if isinstance(change, OtherPrecision)]
    if precisions:
        words.append(f"in another precision: {_precisions(precisions)}")
    tables = {}
    for name, change in changes.items():
        if isinstance(change, MoreRows):
            tables.setdefault(change, []).append(name)
    for (trained_on, now), names in tables.items():
        words.append(
            f"with a grown vocabulary: {trained_on:,} rows of {' and '.join(names)} in training "
            f"are {now:,} here, the first of which are those"
        )
    return words


def _precisions(precisions):
    """In words, how the weights of a base differ from those in training: OtherPrecisions."""
    kinds = Counter((p.trained_on, p.now) for p in precisions)
    changes = [
        f"{n} weights were {was} in training and are {now} here" for (was, now), n in kinds.items()
    ]
    errors = [p.error for p in precisions]
    return (
        f"{', '.join(changes)}, which moves a weight by {np.mean(errors):.2%} of itself on average,"
        f" {max(errors):.2%} at most"
    )


def _read_pairs(file, module, names, like):
    """{our module: LoRAPair} for our modules `names` that are one `module` of the file.

    `like` is a tensor of the base: theirs are put on its backend, and widened to its dtype.
    """
    def tensor(array):
        # A narrower file is widened, never the reverse.
        widened = array.astype(np.result_type(array.dtype, like.dtype))
        return Tensor(to_device(widened, like.xp), requires_grad=True)

    A = file.factors[module]["lora_A"]
    B = file.factors[module]["lora_B"]
    pieces = take_apart(module, A, B, names, file.columns)
    if file.is_dora:
        # The parts of a c_attn are rows of it, each of which has its own length.
        magnitudes = dict(
            zip(names, np.split(file.factors[module][MAGNITUDE], len(names)), strict=True)
        )
    # Parts with the same rows of A share one Tensor: the engine sums its gradient.
    shared = {}
    for start, stop in dict.fromkeys(span for span, _ in pieces.values()):
        shared[start, stop] = tensor(A[start:stop])
    pairs = {}
    for name, (span, rows) in pieces.items():
        scaling = _scaling(file, module, name, r=len(shared[span].data))
        if file.is_dora:
            magnitude = tensor(magnitudes[name])
            pairs[name] = DoRAPair(shared[span], tensor(rows), scaling, magnitude)
        else:
            pairs[name] = LoRAPair(shared[span], tensor(rows), scaling)
    return pairs


def _scaling(file, module, name, r):
    """The scaling of our module `name`, which has rank `r` and is in the `module` of the file.

    It is the one of PEFT's fields. Our own note gives it to the last bit, which a joined module's
    fields may miss, and must say the same otherwise.
    """
    scaling = file.config.scaling_of(module)
    if file.recorded is not None:
        recorded = file.recorded.get(name)
    elif file.our_config is not None:
        # Version 0.1.0 kept the configuration alone.
        recorded = (file.our_config.r_of(name), file.our_config.scaling_of(name))
    else:
        return scaling
    if recorded is not None:
        recorded_r, recorded_scaling = recorded
        if recorded_r == r and math.isclose(recorded_scaling, scaling, rel_tol=1e-12):
            return recorded_scaling
    raise ValueError(
        f"its metadata give {name} (r, scaling) {recorded}, its tensors and {CONFIG} "
        f"{(r, scaling)}; save the adapter again"
    )


def init_peft_adapter(model, config, rng, *, allow_large_r=False):
    """A new adapter as PEFT would make it: targets and patterns are in the names of the files.

    On a GPT-2, `c_attn` gives q_proj, k_proj and v_proj one lora_A that is the same Tensor; on
    other models, and if the names are this library's own (`q_proj`), this is `init_adapter`.
    Shapes: as `init_adapter`. Raises: as `init_adapter`. Source: PEFT 0.21, `get_peft_model`.
    """
    make = lambda ours: init_adapter(model, ours, rng, allow_large_r=allow_large_r)
    return _in_their_names(model, config, make)


def blank_peft_adapter(model, config):
    """An adapter as `init_peft_adapter` makes it, whose matrices take no memory: to be counted.

    Shapes: as `init_adapter`. Raises: as `init_adapter`.
    """
    return _in_their_names(model, config, lambda ours: blank_adapter(model, ours))


def _in_their_names(model, config, make):
    """What `make(config in our names)` gives, with the lora_A's shared that are one in files."""
    family = families_of(model)[0]
    linears = linear_names(model)
    table = family.module_table(linears)
    try:
        chosen = find_targets(list(table), config.target_modules)
    except ValueError as refusal:
        targets_after(refusal, linears, config.target_modules)
        return make(config)
    check_patterns(config, chosen)
    ours = config_in_our_names(config, chosen, table)
    adapter = make(ours)
    pairs = {}
    for module in chosen:
        shared_A = adapter.pairs[table[module][0]].lora_A
        for name in table[module]:
            pair = adapter.pairs[name]
            pairs[name] = LoRAPair(shared_A, pair.lora_B, pair.scaling)
    return adapter.with_pairs(ours, pairs)


def init_peft_dora(model, config, rng, *, allow_large_r=False):
    """A new DoRA adapter as PEFT would make it, which a file can hold; see `init_peft_adapter`.

    Shapes: as `init_dora`. Source: PEFT 0.21, `get_peft_model` with use_dora=True.
    Raises: as `init_peft_adapter` and `init_dora`; ValueError if only some parts of a c_attn are
    adapted.
    """
    adapter = init_peft_adapter(model, config, rng, allow_large_r=allow_large_r)
    family = families_of(model)[0]
    for their_name in family.module_table(adapter.pairs):
        check_all_parts(their_name, family.our_modules(their_name), adapter.pairs)
    return with_magnitudes("init_peft_dora", model, adapter)


def _account(folder, file, used, stored, changes):
    """What a load put where, as lines: kinds of modules, their r and scaling, and the base.

    `used` is {module of the AdapterFile `file`: our modules}, `stored` {tensor: kind} of what the
    base holds in few bits, `changes` what differs from training, as `changes_of` gives it.
    """
    kinds = Counter()
    for module, names in used.items():
        kind = _without_block(module)
        if [_without_block(name) for name in names] != [kind]:
            kind += " -> " + ", ".join(name.rpartition(".")[2] for name in names)
        r = file.config.r_of(module)
        kinds[f"{kind}: r={r}, scaling {file.config.scaling_of(module):g}"] += 1
    n_tensors = sum(len(file.factors[module]) for module in used)
    method = ", DoRA" if file.is_dora else ""
    lines = [f"{folder}: {n_tensors} tensors, all used{method}"]
    lines += [f"  {n} x {kind}" for kind, n in kinds.items()]
    if file.fingerprint is None:
        lines.append("  base: UNVERIFIED, the file does not say which base it was trained on")
    elif changes:
        lines.append(f"  base: recognised, CHANGED: {', and '.join(_in_words(changes))}")
    else:
        lines.append(f"  base: recognised, fingerprint {digest_of(file.fingerprint)}")
        if stored != file.stored:
            lines.append(
                f"  base: the same values, stored as {_storage(file.stored)} in training and as "
                f"{_storage(stored)} here"
            )
    return "\n".join(lines)


def _storage(stored):
    """In words, how weights are stored: {tensor: kind} -> "210 Q4_1 and 1 Q8_0"."""
    kinds = Counter(stored.values())
    return " and ".join(f"{n} {kind}" for kind, n in kinds.items()) or "plain numbers"


def _without_block(module):
    """What a module is called in each block: "attn.c_attn" of "transformer.h.0.attn.c_attn"."""
    return re.sub(r"^.*\.\d+\.", "", module)


def digest_of(fingerprint):
    """16 hex digits that stand for a whole model: the SHA-256 of its fingerprint."""
    return hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:16]
