"""What the command line does with folders, besides training and measuring: merge, combine, extract.

Knows folders and models, and no arguments.
"""

import math
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..compose import combine, compress, extract, spectrum
from ..disk.checks import counted
from ..disk.folder import new_folder
from ..disk.models import TENSORS, load_model
from ..disk.peft import TENSORS as ADAPTER_TENSORS
from ..disk.peft import load_adapter, save_adapter
from ..disk.peft_config import our_targets
from ..disk.receipt import sha256_of
from ..disk.rounding import save_merged
from ..lora import attach
from ..training.provenance import provenance_of
from .folders import find_sources


def merge_folders(
    base,
    adapters,
    out,
    log,
    *,
    dtype,
    allow_rounding,
    weights=None,
    quantize=None,
    accept_base=(),
):
    """Merge the adapters in the folders `adapters` into the model in `base`; write it to `out`.

    `base` is what `find_base` takes. Without `weights` there is one adapter, and it is merged as it
    is; with them it is their weighted sum. `accept_base` is as for `load_adapter`; the other
    options are those of `save_merged`.
    Raises: ValueError if `out` is not empty, or as `combine` and `save_merged`.
    """
    with new_folder(out):
        path = find_sources(base, adapters)
        model = load_model(path)
        loaded = _load_all(adapters, model, accept_base, log)
        if weights is None:
            [adapter] = loaded
        else:
            # Each was compared with this base, when it was loaded.
            adapter = combine(loaded, weights, check_base=False)
            log(f"added: {_formula(adapters, weights)}")
        save_merged(
            attach(model, adapter, check_base=False),
            out,
            dtype=dtype,
            like=path,
            quantize=quantize,
            allow_rounding=allow_rounding,
            say=log,
        )
        size = (Path(out) / TENSORS).stat().st_size
        log(f"kept in {out}: a plain model, {size / 1e6:,.1f} MB")


def combine_folders(base, adapters, weights, out, log, *, command, r=None, accept_base=()):
    """Write the weighted sum of the adapters in the folders `adapters` to `out`, as an adapter.

    `base` is what `find_base` takes, and theirs. The sum is exact; with `r` it is compressed to
    that rank, and the loss is printed. `accept_base` is as for `load_adapter`: adapters of
    one base in several precisions give one that does not say which is its own. `command` is what
    its receipt names.
    Raises: ValueError if `out` is not empty, or as `combine`, `compress` and `save_adapter`.
    """
    with new_folder(out):
        model = load_model(find_sources(base, adapters))
        loaded = _load_all(adapters, model, accept_base, log)
        adapter = combine(loaded, weights, check_base=not accept_base)
        log(f"added: {_formula(adapters, weights)}: {_sizes(adapter)}")
        if r is not None:
            result = compress(adapter, r)
            adapter = result.adapter
            log(f"compressed: {_sizes(adapter)}")
            _log_lost(result, log)
        parents = [sha256_of(Path(folder) / ADAPTER_TENSORS) for folder in adapters]
        _save(adapter, out, base, model, command, parents, log)


def extract_folders(base, tuned, out, log, *, command, r, target):
    """Write what leads from the model in `base` to the one in `tuned` to `out`, as an adapter.

    Both are what `find_base` takes. `target` is as for `finetune`: the names of files, or ours.
    `command` is what its receipt names.
    Raises: ValueError if `out` is not empty, or as `extract`.
    """
    with new_folder(out):
        model = load_model(find_sources(base))
        tuned_model = load_model(find_sources(tuned))
        names = our_targets(model, target)
        with tqdm(
            total=len(names), desc="extracting", unit="layer", delay=1, leave=False, disable=None
        ) as bar:
            result = extract(model, tuned_model, r, names, on_layer=lambda name: bar.update())
        log(f"extracted: {_sizes(result.adapter)}, of {len(names)} targeted")
        _log_lost(result, log)
        _save(result.adapter, out, base, model, command, [], log)


def _load_all(folders, model, accept_base, log):
    """The adapters in `folders`, each compared with `model`."""
    return [
        load_adapter(folder, model, accept_base=accept_base, say=log) for folder in folders
    ]


def _save(adapter, out, base, model, command, parents, log):
    receipt = provenance_of(adapter, model, command, base, parents)
    save_adapter(adapter, out, base_model=str(base), receipt=receipt)
    size = (Path(out) / ADAPTER_TENSORS).stat().st_size
    log(f"kept in {out}: an adapter, {size / 1e3:,.0f} kB")


def _formula(folders, weights):
    """The sum in signs: 0.7 a - 0.3 b."""
    terms = []
    for folder, weight in zip(folders, weights, strict=True):
        sign = "-" if weight < 0 else "+"
        terms.append(f"{sign} {abs(weight):g} {folder}")
    return " ".join(terms).removeprefix("+ ")


def _sizes(adapter):
    """How many modules, and their ranks, in words."""
    ranks = {pair.r for pair in adapter.pairs.values()}
    rank = f"rank {min(ranks)}"
    if len(ranks) > 1:
        rank += f" to {max(ranks)}"
    return f"{counted(len(adapter.pairs), 'module')} of {rank}"


def _log_lost(result, log):
    """Print what a Compressed lacks: of each kind of update, what was left out, and of all."""
    _log_shares("what is lost of an update", result.errors, log)
    if result.left_out:
        log(f"left out: {len(result.left_out)} tensors changed that no pair holds")
        _log_shares("how far a tensor moved", result.left_out, log)
    log(f"in all, {_share(_lost_of_all(result))} of what changed is lost, in Frobenius's norm")


def _log_shares(title, distances, log):
    """Print {name: Distance} as a table: the mean and the worst of each kind."""
    kinds = {}
    for name, distance in distances.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(distance.relative)
    width = max(len(title), *map(len, kinds))
    log(f"  {title:<{width}} {'n':>4} {'mean':>9} {'worst':>9}")
    for kind, shares in kinds.items():
        mean = _share(sum(shares) / len(shares))
        log(f"  {kind:<{width}} {len(shares):>4} {mean:>9} {_share(max(shares)):>9}")


def _share(number):
    """A share in percent; of what was zero, anything is infinitely much."""
    return "from zero" if number == math.inf else f"{100 * number:.3g} %"


def _lost_of_all(result):
    """What a Compressed does not hold of all that changed, as a share: by norms, not by squares.

    What a truncated SVD keeps is orthogonal to what it loses, so that squares add up.
    """
    kept = [np.linalg.norm(spectrum(pair)) for pair in result.adapter.pairs.values()]
    lost = [distance.absolute for distance in (*result.errors.values(), *result.left_out.values())]
    whole = math.hypot(*kept, *lost)
    return math.hypot(*lost) / whole if whole else 0.0
