"""Models on disk: GPT-2 folders as transformers writes them, and this library's rotary GPTs. Knows nothing of LoRA.

GPT-2 stores its linear layers as Conv1D, (in, out): they are transposed on the way in and on the way out, never inside.
Its c_attn is q_proj, k_proj and v_proj side by side. A GPT with rotary positions has no class in transformers; it is
kept under its own names and in its own orientation.
"""

import re
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..backend import to_numpy
from ..gpt import GPT, GPTConfig
from ..lora import adapted_names
from ..tensor import Tensor
from .folder import load_config, load_folder, naming, rounded, same_names, save_folder

TENSORS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "minilora-gpt"  # of a GPT that GPT-2's format cannot hold
CONV1D = {
    "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.c_proj": ("attn.o_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
PREFIX = "transformer."  # where GPT2LMHeadModel keeps all but its head; a bare GPT2Model has none
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json")
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry; c_attn.bias is no mask
_MATHS = {  # fields that change what a GPT-2 computes: what this library computes comes first
    "model_type": ("gpt2", None),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}


def gpt2_name(module):
    """GPT-2's name of our module, without `transformer.`: h.0.attn.q_proj -> h.0.attn.c_attn, as k_proj and v_proj."""
    block, part = re.fullmatch(r"(h\.\d+\.|)(.*)", module).groups()
    return block + next((theirs for theirs, ours in CONV1D.items() if block and part in ours), part)


def gpt2_modules(names):
    """{GPT-2's name: [our names]} for names of modules; those that share a layer in the order of its rows."""
    place = {part: i for parts in CONV1D.values() for i, part in enumerate(parts)}
    groups = {}
    for name in sorted(names, key=lambda name: place.get(".".join(name.split(".")[-2:]), 0)):
        groups.setdefault(gpt2_name(name), []).append(name)
    return groups


def is_gpt2(model):
    """Can GPT-2's format hold this model? Its positions must be learned."""
    return isinstance(model, GPT) and model.config.positions == "learned"


def load_gpt2(folder):
    """The GPT in a GPT-2 folder (`model.safetensors`, or shards and an index; `config.json`), trainable, on the host.

    Shapes: those `config.json` implies; each tensor of the file is used exactly once. float32, also where the file
    holds float16 or bfloat16 (widened exactly); float64 if it holds that. A head that differs from the embedding is
    kept untied, with a warning if `config.json` says tied. Dropout (`resid_pdrop`, ...) is not part of the model.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field under which GPT-2 computes
    something else, absent, superfluous or misshapen tensors, inf or nan, a pickle, damage.
    Source: Radford et al. 2019 (GPT-2); the layout of transformers' `GPT2LMHeadModel`.
    """
    config, tensors, _ = load_folder(folder, TENSORS, CONFIG)
    return _gpt2(folder, config, tensors)


def load_model(folder, xp=np):
    """The GPT in any folder that `save_model`, `save_gpt2` or transformers wrote, on the array module `xp`.

    Shapes: as `load_gpt2`. Raises: as `load_gpt2`. Source: as `load_gpt2`.
    """
    config, tensors, _ = load_folder(folder, TENSORS, CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        model = _gpt2(folder, config, tensors)
    else:
        del config["model_type"]
        with naming(Path(folder) / CONFIG):
            blank = _blank(GPTConfig(**config), tensors)
        model = _filled(folder, blank, tensors, {name: ([name], False) for name, _ in blank.named_parameters()})
    return model if xp is np else model.to_device(xp)


def save_gpt2(model, folder, *, dtype=None, like=None):
    """Write a plain GPT with learned positions as GPT-2: what transformers, and converters from its format, read.

    Shapes: each tensor in GPT-2's orientation, in `dtype`: "float32", "float16", "bfloat16", "float64", or None for
    the model's own. `like` is the GPT-2 folder the model came from: its tokenizer and other settings go along.
    Raises: ValueError for a model that carries an adapter (merge it first), for rotary positions, for a linear without
    bias, and for numbers that overflow in `dtype`.
    Source: as `load_gpt2`.
    """
    if not is_gpt2(model):
        raise ValueError(f"save_gpt2: {type(model).__name__} is not a GPT with learned positions; see save_model")
    ours, theirs = model.config, {} if like is None else load_config(like, TENSORS, CONFIG)
    config = {
        **{key: value for key, value in theirs.items() if key not in ("torch_dtype", *_MATHS)},
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": ours.n_layer, "n_head": ours.n_head, "n_embd": ours.n_embd, "vocab_size": ours.vocab_size,
        "n_positions": ours.block_size, "n_ctx": ours.block_size,  # n_ctx: llama.cpp's converter asks for it
        "n_inner": None if ours.n_inner == 4 * ours.n_embd else ours.n_inner,
        "layer_norm_epsilon": ours.layer_norm_epsilon, "tie_word_embeddings": ours.tie_word_embeddings,
        "dtype": model.wte.weight.dtype.name if dtype is None else dtype,
    }  # fmt: skip
    # Without a tokenizer there is no end-of-text token to name: GPT-2's own id lies outside a smaller vocabulary.
    config |= {key: theirs.get(key) for key in ("bos_token_id", "eos_token_id")}
    _save(model, folder, _conv1d_layout(model), config, dtype, like)


def save_model(model, folder, *, dtype=None, like=None):
    """Write a plain GPT: as GPT-2 if it is one (`save_gpt2`), else under its own names.

    Shapes: as `save_gpt2`. Raises: as `save_gpt2`. Source: https://github.com/huggingface/safetensors.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"save_model: expected a GPT, got {type(model).__name__}; an adapter is for save_adapter")
    if is_gpt2(model):
        return save_gpt2(model, folder, dtype=dtype, like=like)
    layout = {name: ([name], False) for name, _ in model.named_parameters()}
    _save(model, folder, layout, {"model_type": MODEL_TYPE, **asdict(model.config)}, dtype, like)


def _conv1d_layout(model):
    """{tensor of a GPT-2 file: (our tensors that it joins, is it transposed?)}"""
    layout = {}
    for kind in ("weight", "bias"):
        ours = [n.rpartition(".")[0] for n, _ in model.named_parameters() if n.endswith(f".{kind}")]
        for theirs, modules in gpt2_modules(ours).items():
            prefix = "" if theirs == "lm_head" else PREFIX
            conv1d = kind == "weight" and theirs != modules[0]
            layout[f"{prefix}{theirs}.{kind}"] = [f"{module}.{kind}" for module in modules], conv1d
    return layout


def _save(model, folder, layout, config, dtype, like):
    """Write the tensors of `model`, joined and turned as `layout` says, beside the tokenizer of the folder `like`."""
    odd = adapted_names(model)
    if odd:
        raise ValueError(f"{odd[0]} carries an adapter: save merge(model), or the adapter and its base apart")
    arrays, ours = {}, {name: to_numpy(p.data) for name, p in model.named_parameters()}
    same_names("saving a GPT, its tensors", ours, [n for n, _ in GPT(model.config, None).named_parameters()])
    for name, (parts, transposed) in layout.items():
        joined = ours[parts[0]] if len(parts) == 1 else np.concatenate([ours[part] for part in parts])
        joined = joined.T if transposed else joined
        arrays[name] = joined if dtype is None else rounded(name, joined, dtype)
    elsewhere = like is not None and Path(like).resolve() != Path(folder).resolve()
    beside = [Path(like) / name for name in COMPANIONS if (Path(like) / name).exists()] if elsewhere else []
    save_folder(folder, TENSORS, arrays, CONFIG, config, beside=beside)


def _gpt2(folder, config, tensors):
    """The GPT described by a GPT-2 configuration and the tensors of its file, which is emptied."""
    where = Path(folder) / CONFIG
    for field, allowed in _MATHS.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {field}={config[field]!r} changes what the model computes; only "
                             f"{' or '.join(map(repr, allowed))} is implemented")
    missing = [key for key in ("n_layer", "n_head", "n_embd", "vocab_size") if key not in config]
    if missing or not {"n_positions", "n_ctx"} & config.keys():
        raise ValueError(f"{where}: no {', '.join(missing) or 'n_positions'}: this does not describe a GPT-2")
    for name in list(tensors):
        short, tensor = name.removeprefix(PREFIX), tensors.pop(name)
        if short in tensors:
            raise ValueError(f"{folder}: {short} is there twice, with and without {PREFIX}; keep one")
        if not _MASKS.fullmatch(short):
            tensors[short] = tensor
    tied, head = config.get("tie_word_embeddings", True), tensors.get("lm_head.weight")
    if tied and head is not None:
        tied = np.array_equal(head, tensors.get("wte.weight"))
        if tied:
            del tensors["lm_head.weight"]
        else:
            warnings.warn(f"{folder}: lm_head.weight differs from wte.weight although tie_word_embeddings is true; it "
                          "is kept as a head of its own, as transformers 5 does (4 overwrites one)", stacklevel=3)
    with naming(where):
        blank = _blank(GPTConfig(
            config["n_layer"], config["n_head"], config["n_embd"], config["vocab_size"],
            config.get("n_positions", config.get("n_ctx")), n_inner=config.get("n_inner"),
            layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5), tie_word_embeddings=tied,
        ), tensors)  # fmt: skip
    layout = {name.removeprefix(PREFIX): value for name, value in _conv1d_layout(blank).items()}
    return _filled(folder, blank, tensors, layout)


def _blank(config, tensors):
    """A GPT of zeros; ValueError, before any memory is asked for, if it would dwarf the `tensors` it is made for."""
    C, V = config.n_embd, config.vocab_size
    implied = config.n_layer * C * (4 * C + 2 * config.n_inner) + C * (V + config.block_size)
    held = sum(t.size for t in tensors.values())
    if implied > 10 * held + 10**7:
        raise ValueError(f"it describes a model of {implied:.2g} numbers, but the file of tensors holds {held:.2g}")
    return GPT(config, None)


def _filled(folder, blank, tensors, layout):
    """`blank` with the tensors of a file in the place of its own; `tensors` is emptied on the way, to save memory."""
    shapes = {name: p.shape for name, p in blank.named_parameters()}
    stacked = lambda parts: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
    expected = {name: stacked(parts)[::-1] if turned else stacked(parts) for name, (parts, turned) in layout.items()}
    same_names(f"{folder}, {TENSORS}", {name: t.shape for name, t in tensors.items()}, expected)
    odd = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype.kind != "f" or not np.isfinite(t).all()]
    if odd:
        raise ValueError(f"{folder}: {odd[0]} must hold floats, and no inf or nan")
    dtype, state = np.result_type(np.float32, *(t.dtype for t in tensors.values())), {}
    for name, (parts, turned) in layout.items():
        whole = tensors.pop(name).astype(dtype, copy=False)
        for part, piece in zip(parts, np.split(whole.T if turned else whole, len(parts)), strict=True):
            state[part] = Tensor(np.ascontiguousarray(piece), requires_grad=True)
    return blank.rebuild(lambda name, t: state[name] if isinstance(t, Tensor) else None)
