"""What the command line does with folders, besides training: generate, merge, inspect, compare. Knows no arguments."""

import math
import re
import textwrap
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..backend import to_numpy
from ..compose import stack
from ..count import parameter_report
from ..disk import loaders as rules
from ..disk.checks import json_object
from ..disk.folder import check_unused, load_folder
from ..disk.models import CONFIG as MODEL_CONFIG
from ..disk.models import TENSORS as MODEL_TENSORS
from ..disk.models import families_of, load_model
from ..disk.peft import CONFIG, TENSORS, digest_of, load_adapter, read_adapter
from ..disk.peft_config import module_table
from ..disk.rounding import save_merged
from ..disk.tokenizer import load_tokenizer
from ..generate import generate
from ..lora import attach, merge
from ..training.checkpoint import is_checkpoint
from ..training.datasets import load_data
from ..training.finetune import CHECKPOINT
from ..training.loop import heldout_loss

KINDS = {"model": {MODEL_CONFIG, MODEL_TENSORS}, "adapter": {CONFIG, TENSORS}}  # what is in a folder of each kind


def kinds_in(folder):
    """Which of "model" and "adapter" the folder holds, or a part of; what it is that holds neither, for a message.

    Raises: FileNotFoundError, NotADirectoryError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        missing = FileNotFoundError(f"{folder} does not exist; give the folder of a model or of an adapter")
        raise NotADirectoryError(f"{folder} is a file; give the folder that it is in") if folder.exists() else missing
    found = [kind for kind, files in KINDS.items() if any((folder / name).exists() for name in files)]
    if found:
        return found, ""
    files = set().union(*KINDS.values())
    inside = sorted(path.name for path in folder.iterdir() if any((path / name).exists() for name in files))
    hint = f", but its sub-folders have: {', '.join(inside)}" if inside else ""
    if is_checkpoint(folder / CHECKPOINT):
        hint = "; it holds a run that has not ended, which finetune --resume goes on with"
    return found, f"{folder} has neither {MODEL_CONFIG} of a model nor {CONFIG} of an adapter{hint}"


def check_source(folder, kind):
    """Raise ValueError or OSError unless `folder` is one, and holds what `kind` says: "model" or "adapter"."""
    found, neither = kinds_in(folder)
    if neither:
        raise FileNotFoundError(neither)
    if kind not in found:
        raise ValueError(f"{folder} holds {_a(found[0])}, where {_a(kind)} is needed")


def _a(kind):
    return {"model": "a model", "adapter": "an adapter"}[kind]


def _model_and_tokenizer(base, adapters, xp):
    check_source(base, "model")
    for folder in adapters:  # before anything is read
        check_source(folder, "adapter")
    return load_model(base, xp), load_tokenizer(base)


def continue_prompt(base, adapters, prompt, xp, seed, say, tell, *, max_new_tokens, temperature, top_k):
    """Continue `prompt` with the model in the folder `base` under each of `adapters`, folders, in one batch.

    `say` is given the texts, `tell` what else there is to know. Raises: ValueError if the prompt is empty, too long or
    no text, or top_k is more tokens than there are.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not UTF-8: character {error.start + 1} is {prompt[error.start]!a}") from None
    model, tokenizer = _model_and_tokenizer(base, adapters, xp)
    ids, context = tokenizer.encode(prompt), model.config.block_size
    if not len(ids):
        raise ValueError("the prompt is empty; give at least one word to go on from")
    if len(ids) + max_new_tokens > context:
        raise ValueError(f"the prompt has {len(ids)} tokens: with {max_new_tokens} new ones they outgrow the model's "
                         f"context of {context}; shorten the prompt or ask for fewer new tokens")
    if top_k is not None and top_k > tokenizer.vocab_size:
        raise ValueError(f"top-k is {top_k}, but there are only {tokenizer.vocab_size} tokens; choose a smaller one")
    loaded = [load_adapter(folder, model, say=tell) for folder in adapters]
    if len(loaded) == 1:
        model = merge(attach(model, loaded[0], check_base=False))  # one adapter for all rows costs nothing, merged
    elif loaded:
        model = attach(model, stack(loaded), check_base=False)
    rows = np.repeat(ids[None], max(1, len(loaded)), axis=0)
    with tqdm(total=max_new_tokens, desc="generating", unit="token", delay=1, leave=False) as bar:
        texts = generate(model, rows, max_new_tokens, temperature=temperature, top_k=top_k, stop=tokenizer.end,
                         rng=np.random.default_rng(seed), on_token=lambda token: bar.update())  # fmt: skip
    for folder, row in zip(adapters or [base], texts, strict=True):
        if len(loaded) > 1:
            say(f"--- {folder}")
        new = row[len(ids) :].tolist()
        unknown = sum(token >= tokenizer.vocab_size for token in new)
        if unknown:
            tell(f"{unknown} of {len(new)} new tokens are left out: the tokenizer knows {tokenizer.vocab_size:,}, the "
                 f"model {model.config.vocab_size:,}")
        end = new.index(tokenizer.end) if tokenizer.end in new else len(new)
        say(prompt + tokenizer.decode(new[:end]))


def merge_folders(base, adapter, out, say, *, dtype, allow_rounding):
    """Write the model in the folder `base` with the adapter in `adapter` merged into it, as a model folder `out`.

    Raises: ValueError if `out` is not empty, or as `save_merged`.
    """
    check_unused(out)
    check_source(base, "model")
    check_source(adapter, "adapter")
    model = load_model(base)
    adapted = attach(model, load_adapter(adapter, model, say=say), check_base=False)
    save_merged(adapted, out, dtype=dtype, like=base, allow_rounding=allow_rounding, say=say)
    say(f"kept in {out}: a plain model, {(Path(out) / MODEL_TENSORS).stat().st_size / 1e6:,.1f} MB")


def compare(base, adapter, path, xp, say, *, batch, length):
    """The loss of the model in the folder `base` on a file of text or of questions, without and with an adapter."""
    model, tokenizer = _model_and_tokenizer(base, [adapter], xp)
    rows = load_data(path, tokenizer, model.config.block_size, length)
    adapted = attach(model, load_adapter(adapter, model, say=say), check_base=False)
    say(f"data {path}: {rows}")
    losses, bar = [], {"unit": "batch", "delay": 1, "leave": False}
    for m, label in ((model, "without"), (adapted, "with")):
        losses.append(heldout_loss(m, tqdm(rows.once(batch), desc=label, **bar)))
    say(f"{'nats per token':<20} {'loss':>8} {'perplexity':>11}")
    for name, loss in zip(("without the adapter", "with it"), losses, strict=True):
        say(f"{name:<20} {loss:>8.4f} {math.exp(min(loss, 700)):>11.5g}")
    say(f"{'difference':<20} {losses[1] - losses[0]:>+8.4f}")


def inspect(folder, base, say):
    """Tell what is in a folder: a model, or an adapter, measured against its `base` (a folder, or None).

    Raises: FileNotFoundError if it holds neither; what reading it raises, after everything else was told.
    """
    found, neither = kinds_in(folder)
    if neither:
        raise FileNotFoundError(neither)
    if base is not None and "adapter" not in found:
        raise ValueError(f"{folder} holds a model, which has no base; inspect it without --base")
    if "model" in found:
        _inspect_model(folder, say)
    if "adapter" in found:
        _inspect_adapter(Path(folder), base, say)


def _inspect_model(folder, say):
    model = load_model(folder)
    c = model.config
    family = families_of(model)[0]
    say(f"{folder}: a model, {parameter_report(model).total:,} parameters, {model.parameters()[0].dtype}")
    say(f"  kind         {family.title}")
    say(f"  sizes        {family.describe(c)}")
    say(f"  text         {c.vocab_size:,} tokens, a context of {c.block_size:,}; the head is "
        f"{'the embedding (tied)' if c.tie_word_embeddings else 'a matrix of its own'}")
    say(f"  fingerprint  {digest_of(model.fingerprint())}")


def _inspect_adapter(folder, base, say):
    def tell(title, text):
        say(textwrap.fill(text, 110, initial_indent=f"  {title:<12} ", subsequent_indent=" " * 15,
                          break_long_words=False, break_on_hyphens=False))  # fmt: skip

    config, tensors, metadata = load_folder(folder, TENSORS, CONFIG)
    shapes, named = {name: t.shape for name, t in tensors.items()}, config.get("base_model_name_or_path")
    named = named if isinstance(named, str) else None  # only people and other programs read it
    rank = rules.vllm_rank(shapes)
    say(f"{folder}: an adapter, {sum(t.size for t in tensors.values()):,} parameters in {len(tensors)} tensors")
    found = {"PEFT": rules.peft_objections(config, shapes), "vLLM": rules.vllm_objections(config, shapes)}
    for loader, objections in found.items():
        told = f"its loader's rules object: {'; '.join(objections)}" if objections else "its loader's rules accept it"
        tell(loader, told + f", from --max-lora-rank {rank} on" * (loader == "vLLM" and not objections))
    tensors_of_base = json_object(f"{Path(folder) / TENSORS}: its minilora.base", metadata.get("minilora.base"))
    note = rules.note_on_base(shapes, tensors_of_base)
    if note:
        tell("", f"but {note}")
    file = read_adapter(folder)
    known = f"fingerprint {digest_of(file.fingerprint)}" if file.fingerprint else "UNVERIFIED, it notes no fingerprint"
    tell("base", f"{named or 'it does not say which'}; {known}")
    if base is None and named and (Path(named) / MODEL_CONFIG).exists():
        base = named
    model = table = misfit = None
    if base is not None:
        try:
            check_source(base, "model")
            model = load_model(base)
            load_adapter(folder, model, say=lambda receipt: None)
            table = module_table(model, file.factors)
            tell("", f"{base} {'is that base' if file.fingerprint else 'fits it'}")
        except (ValueError, TypeError, OSError) as error:
            model, misfit = None, error
    _table(file, model, table, say)
    if misfit:
        raise misfit
    if model is None:
        say("  |dW|/|W| needs the base: give its folder with --base")


def _table(file, model, table, say):
    """The modules of an adapter in the order of their numbers, a line each."""
    names = sorted(file.factors, key=lambda name: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)])
    wide = max(map(len, names))
    say(f"  {'module':<{wide}} {'in':>6} {'out':>6} {'r':>4} {'alpha':>6} {'scaling':>8} {'|dW|':>10} {'|dW|/|W|':>9}")
    for name in names:
        A, B, lora = file.factors[name]["lora_A"], file.factors[name]["lora_B"], file.config
        size = lora.scaling_of(name) * product_norm(B, A)
        share = "-" if model is None else f"{100 * size / (_weight_norm(model, table[name]) or math.nan):.3g} %"
        say(f"  {name:<{wide}} {A.shape[1]:>6} {B.shape[0]:>6} {len(A):>4} {lora.alpha_of(name):>6g} "
            f"{lora.scaling_of(name):>8.4g} {size:>10.4g} {share:>9}")
    for name, (start, stop) in file.columns.items():
        say(f"  {name} was trained apart: r={stop - start}, columns {start} to {stop} of its module")
    say("  dW = scaling * lora_B @ lora_A, what is added to the weight W; | | is Frobenius's norm")


def product_norm(B, A):
    """The Frobenius norm of B A, (out, r) times (r, in), without making it: √ sum (BᵀB) ∘ (A Aᵀ)."""
    B, A = B.astype(np.float64), A.astype(np.float64)
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def _weight_norm(model, names):
    modules = dict(model.named_modules())
    return math.hypot(*(float(np.linalg.norm(to_numpy(modules[name].weight.data))) for name in names))
