"""What `inspect` prints of a folder: sizes of a model, modules of an adapter. Changes nothing."""

import math
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from ..backend import to_numpy
from ..count import parameter_report
from ..disk import loaders
from ..disk.adapter_file import read_fingerprint
from ..disk.folder import load_folder
from ..disk.models import families_of, load_fields, load_model
from ..disk.peft import CONFIG, TENSORS, digest_of, load_adapter, read_adapter
from ..disk.peft_config import module_table
from ..disk.tensor_file import noted_digests
from ..disk.versions import version_in
from ..fits import ACCEPTABLE
from ..low_rank import product_norm
from ..quant import storage_of, stored_as
from .folders import find_sources, kinds_of, located
from .history import summary

# Of the lines that are wrapped, in characters.
WIDTH = 110


# What is told of a file whose tensors are compared with their digests, and of one without.
VERIFIED = "those that were saved, by the SHA-256 of each tensor"
UNVERIFIED = "UNVERIFIED, the file holds no digests: minilora writes them since version 0.7"


def inspect(folder, base, log, *, verify=False):
    """Print what is in a folder: a model, or an adapter measured against its base.

    `base` is what `find_base` takes, or None: then it is looked for where the adapter says.
    All values are compared with the digests in their file; with `verify` there must be some.
    Raises: FileNotFoundError if it holds neither; what reading it raises, after everything else was
    printed; with `verify` ValueError for a file without digests.
    """
    folder = located(folder)
    kinds = kinds_of(folder)
    if base is not None and "adapter" not in kinds:
        raise ValueError(f"{folder} holds a model, which has no base; inspect it without --base")
    if "model" in kinds:
        _inspect_model(folder, verify, log)
    if "adapter" in kinds:
        _inspect_adapter(Path(folder), base, verify, log)


def _log_values(folder, has_digests, verify, log):
    """Say whether values were compared with digests. Where they must be, raise ValueError."""
    _log_entry("values", VERIFIED if has_digests else UNVERIFIED, log)
    if verify and not has_digests:
        raise ValueError(
            f"{folder}: nothing to verify its values with; what minilora merge or finetune writes "
            "has digests"
        )


def _inspect_model(folder, verify, log):
    model = load_model(folder)
    config = model.config
    family = families_of(model)[0]
    kind = family.title
    if len(family.model_types) > 2:
        kind += f": {load_fields(folder)['model_type']}"
    head = "the embedding (tied)" if config.tie_word_embeddings else "a matrix of its own"
    dtype = model.parameters()[0].dtype
    log(f"{folder}: a model, {parameter_report(model).total:,} parameters, {dtype}")
    log(f"  kind         {kind}")
    log(f"  sizes        {family.describe(config)}")
    log(
        f"  text         {config.vocab_size:,} tokens, a context of {config.block_size:,}; "
        f"the head is {head}"
    )
    if stored_as(model):
        _log_entry("stored", _storage(model), log)
    log(f"  fingerprint  {digest_of(model.fingerprint())}")
    has_digests = all(getattr(p, "claim", None) for p in model.parameters())
    _log_values(folder, has_digests, verify, log)


def _storage(model):
    """How the tensors of a model with packed weights are stored, and what they would take wide."""
    counts = Counter(storage_of(p) for p in model.parameters())
    kinds = ", ".join(f"{n} as {kind}" for kind, n in counts.items())
    report = parameter_report(model)
    wide = sum(p.size * p.dtype.itemsize for p in model.parameters())
    return (
        f"of {len(model.parameters())} tensors {kinds}: {report.total_bytes / 1e6:,.1f} MB, and "
        f"{wide / 1e6:,.1f} MB once it is widened to {model.parameters()[0].dtype}"
    )


def _inspect_adapter(folder, base, verify, log):
    """What other programs would say comes first: this library may refuse to read it at all."""
    config, tensors, metadata = load_folder(folder, TENSORS, CONFIG)
    n_parameters = sum(tensor.size for tensor in tensors.values())
    log(f"{folder}: an adapter, {n_parameters:,} parameters in {len(tensors)} tensors")
    fingerprint = read_fingerprint(folder, metadata)
    _log_values(folder, bool(noted_digests(folder / TENSORS, metadata)), verify, log)
    _log_loaders(config, {name: t.shape for name, t in tensors.items()}, fingerprint, log)

    adapter = read_adapter(folder)
    recorded = _recorded_base(config)
    verified = "UNVERIFIED, it notes no fingerprint"
    if adapter.fingerprint:
        verified = f"fingerprint {digest_of(adapter.fingerprint)}"
    kinds = sorted(set(adapter.stored.values()))
    if kinds:
        verified += f"; it was trained on weights stored as {' and '.join(kinds)}"
    _log_receipt(version_in(folder), log)
    _log_entry("base", f"{recorded or 'it does not say which'}; {verified}", log)

    if base is None and recorded and _is_model(recorded):
        base = recorded
    misfit = None
    weight_norms = {}
    if base is not None:
        try:
            weight_norms, account = _measured_on(base, folder, adapter)
            _log_entry("", f"{base} {_match(account)}", log)
        except (ValueError, TypeError, OSError) as error:
            misfit = error
    _log_table(adapter, weight_norms, log)
    if misfit:
        raise misfit
    if base is None:
        log("  |dW|/|W| needs the base: give its folder with --base")


def _log_receipt(version, log):
    """Print where a Version of an adapter comes from, if it has a receipt, or what that one is."""
    if version.problem is not None:
        _log_entry("receipt", version.problem, log)
    if version.receipt is not None:
        for title, text in summary(version.receipt):
            _log_entry(title, text, log)


def _recorded_base(config):
    """The base that the adapter's JSON names, or None: this library computes nothing with it."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _is_model(text):
    """Is `text` what `find_base` takes, and a model? A name of a model elsewhere is not."""
    try:
        find_sources(text)
    except (ValueError, OSError):
        return False
    return True


def _log_loaders(config, shapes, fingerprint, log):
    """What the loaders of other programs would say of this adapter.

    `shapes` is {tensor: shape}, `fingerprint` that of the base, or None.
    """
    _log_entry("PEFT", _verdict(loaders.peft_objections(config, shapes)), log)
    objections = loaders.vllm_objections(config, shapes)
    verdict = _verdict(objections)
    if not objections:
        verdict += f", from --max-lora-rank {loaders.vllm_rank(shapes)} on"
    _log_entry("vLLM", verdict, log)
    note = loaders.note_on_base(shapes, fingerprint)
    if note:
        _log_entry("", note, log)


def _verdict(objections):
    if objections:
        return f"its loader's rules object: {'; '.join(objections)}"
    return "its loader's rules accept it"


def _log_entry(title, text, log):
    """Print `text` in a column of its own, beside its title."""
    log(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"  {title:<12} ",
            subsequent_indent=" " * 15,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _match(account):
    """What `load_adapter` says of the base, as the end of a sentence about it."""
    match = "fits it"
    for line in account.splitlines():
        if line.startswith("  base: recognised, CHANGED"):
            return "is that base" + line.removeprefix("  base: recognised,")
        if line.startswith("  base: recognised"):
            match = "is that base"
        if line.startswith("  base: the same values"):
            match += line.replace("  base: ", "; ")
    return match


def _measured_on(base, folder, adapter):
    """({module of the file: |W| of its weight in the model `base`}, what the load says).

    Norms are Frobenius's.
    Raises: as `load_adapter`, if that is not the base of the adapter in `folder`.
    """
    model = load_model(find_sources(base))
    accounts = []
    load_adapter(folder, model, accept_base=ACCEPTABLE, say=accounts.append)
    modules = dict(model.named_modules())
    norms = {}
    for module, our_names in module_table(model, adapter.factors).items():
        # Our q_proj, k_proj and v_proj are the rows of one c_attn, so that their squares add up.
        parts = [np.linalg.norm(to_numpy(modules[name].weight.data)) for name in our_names]
        norms[module] = math.hypot(*map(float, parts))
    return norms, accounts[0]


def _log_table(adapter, weight_norms, log):
    """Print a line for each module of an AdapterFile, blocks in the order of their numbers."""
    width = max(map(len, adapter.factors))
    log(
        f"  {'module':<{width}} {'in':>6} {'out':>6} {'r':>4} {'alpha':>6} {'scaling':>8} "
        f"{'|dW|':>10} {'|dW|/|W|':>9}"
    )
    for module in sorted(adapter.factors, key=_by_number):
        A = adapter.factors[module]["lora_A"]
        B = adapter.factors[module]["lora_B"]
        alpha = adapter.config.alpha_of(module)
        scaling = adapter.config.scaling_of(module)
        update_norm = scaling * product_norm(A.astype(np.float64), B.astype(np.float64))
        share = "-"
        if module in weight_norms:
            share = f"{100 * update_norm / (weight_norms[module] or math.nan):.3g} %"
        log(
            f"  {module:<{width}} {A.shape[1]:>6} {B.shape[0]:>6} {len(A):>4} {alpha:>6g} "
            f"{scaling:>8.4g} {update_norm:>10.4g} {share:>9}"
        )
    for name, (start, stop) in adapter.columns.items():
        log(
            f"  {name} was trained apart: r={stop - start}, columns {start} to {stop} of its module"
        )
    log("  dW = scaling * lora_B @ lora_A, what is added to the weight W; | | is Frobenius's norm")
    if adapter.is_dora:
        log("  DoRA: each row of W + dW then gets a length of its own, its magnitude")


def _by_number(name):
    """A key that sorts h.2 before h.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
