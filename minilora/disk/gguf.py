"""A model of Llama's family in a GGUF file: its tensors under the names that transformers has.

Knows what llama.cpp's converter does to tensors, and knows no model class.
Source: convert_hf_to_gguf.py and gguf-py of llama.cpp.
"""

import warnings

import numpy as np

from ..packed import BLOCKS, HALVES, PackedTensor
from .checks import check_same_tensors
from .gguf_fields import EMBEDDING, HEAD, ROPE_FACTORS, end_ids, fields_of
from .gguf_file import read_gguf
from .gguf_vocabulary import read_vocabulary

# Numbers that are widened at once.
_CHUNK = 2**20

_MODULES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path):
    """(fields, tensors) of a GGUF file, as transformers would have them in a folder.

    `fields` are those of `config.json`. `tensors` is {name: array} with the prefix "model.". A
    matrix of Q8_0, Q4_0, Q4_1, F16 or BF16 is a PackedTensor and stays as it is stored; F32 is a
    float32 array. Both are read-only maps of the file, but for the rows of q and k in a llama,
    which its converter has permuted: these are copies in the order that transformers has. Norms and
    biases are float32. A matrix of any other type is widened to float32 here, with a warning.
    Shapes: (out, in), as everywhere here; nothing is transposed.
    Whether numbers are inf or nan is for `load_model` to ask, as of every file.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: damage, another
    architecture, a setting or a tensor that is not computed here.
    """
    settings, stored = read_gguf(path)
    fields = fields_of(path, settings, stored)
    expected = _expected_shapes(fields, stored)
    shapes = {name: array.shape for name, array in stored.items()}
    check_same_tensors(f"{path}, its tensors", shapes, expected)
    _warn_of_widening(path, stored)
    tensors = {}
    for name, array in stored.items():
        if name != ROPE_FACTORS:
            tensors[_their_name(name)] = _tensor(path, name, array, fields)
    return fields, tensors


def gguf_fields(path):
    """The fields of `load_gguf`, without a look at the numbers. Raises: as `load_gguf`."""
    settings, stored = read_gguf(path)
    return fields_of(path, settings, stored)


def gguf_tokenizer(path):
    """(tokenizers.Tokenizer, [ids that end a text], chat template or None) of a GGUF file.

    The ids are those that the file names as the end of a text, of a turn and of a message, in this
    order. Whether texts begin with `bos` (add_bos_token) is in the tokenizer as transformers has
    it: encode(text) adds it, encode(text, add_special_tokens=False) does not.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: damage, a kind
    of tokenizer that is not read, one that does not fit the embedding or names no end.
    """
    settings, stored = read_gguf(path)
    bpe = read_vocabulary(path, settings)
    tokens = len(settings["tokenizer.ggml.tokens"])
    if EMBEDDING in stored and stored[EMBEDDING].shape[0] != tokens:
        rows = stored[EMBEDDING].shape[0]
        raise ValueError(
            f"{path}: its tokenizer has {tokens} tokens, its embedding {rows} rows; they do not "
            "belong together"
        )
    ends = end_ids(path, settings)
    if not ends:
        raise ValueError(f"{path}: no token ends a text; tokenizer.ggml.eos_token_id must name one")
    template = settings.get("tokenizer.chat_template")
    if not isinstance(template, (str, type(None))):
        raise ValueError(f"{path}: tokenizer.chat_template is no text, got {template!r:.50}")
    return bpe, ends, template


def _expected_shapes(fields, stored):
    """{name: shape} of the tensors of a model with these fields, in llama.cpp's names."""
    hidden = fields["hidden_size"]
    inner = fields["intermediate_size"]
    head_dim = fields["head_dim"]
    queries = fields["num_attention_heads"] * head_dim
    keys = fields["num_key_value_heads"] * head_dim
    block = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_output.weight": (hidden, queries),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    biases = {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if fields["model_type"] == "qwen2":
        block |= biases
    elif fields["attention_bias"]:
        block |= biases | {"attn_output.bias": (hidden,)}
    if fields["model_type"] == "qwen3":
        block |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    expected = {EMBEDDING: (fields["vocab_size"], hidden), "output_norm.weight": (hidden,)}
    if not fields["tie_word_embeddings"]:
        expected[HEAD] = expected[EMBEDDING]
    if ROPE_FACTORS in stored:
        expected[ROPE_FACTORS] = (head_dim // 2,)
    for index in range(fields["num_hidden_layers"]):
        expected |= {f"blk.{index}.{name}": shape for name, shape in block.items()}
    return expected


def _their_name(name):
    """transformers' name of a tensor: blk.0.attn_q.weight is layers.0.self_attn.q_proj.weight."""
    if name == HEAD:
        return "lm_head.weight"
    module, _, kind = name.rpartition(".")
    if module in _MODULES:
        return f"model.{_MODULES[module]}.{kind}"
    _, index, module = module.split(".")
    return f"model.layers.{index}.{_IN_BLOCK[module]}.{kind}"


def _stays(array):
    """Can a tensor be used as it is stored?"""
    if array.kind == "F32":
        return True
    return len(array.shape) == 2 and array.kind in (*BLOCKS, *HALVES)


def _warn_of_widening(path, stored):
    """Warn of the memory that matrices of other types will need, before it is taken."""
    widened = [array for array in stored.values() if len(array.shape) == 2 and not _stays(array)]
    if not widened:
        return
    kinds = ", ".join(sorted({array.kind for array in widened}))
    before = sum(array.data.nbytes for array in widened)
    after = sum(4 * array.shape[0] * array.shape[1] for array in widened)
    warnings.warn(
        f"{path}: {len(widened)} matrices of {kinds} are widened to float32, which takes "
        f"{after:,} bytes of memory where the file has {before:,}; only {', '.join(BLOCKS)}, F16 "
        "and BF16 stay as they are stored",
        stacklevel=3,
    )


def _tensor(path, name, array, fields):
    """The array or PackedTensor of one tensor, its rows in the order that transformers has."""
    if not _stays(array):
        array = _widened(path, name, array)
    data = _as_transformers_has_it(name, array.data, fields)
    if array.kind == "F32":
        return data
    return PackedTensor(array.kind, array.shape, data)


def _widened(path, name, array):
    """A tensor as float32, a bounded number of rows at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[array.kind]
    if array.kind == "BF16":
        # The upper half of a float32.
        wide = (array.data.astype(np.uint32) << 16).view(np.float32)
        return array._replace(kind="F32", data=_read_only(wide))
    wide = np.empty(array.shape, np.float32)
    target = wide.reshape(-1, array.shape[-1])
    source = array.data.reshape(len(target), -1)
    step = max(_CHUNK // array.shape[-1], 1)
    for begin in range(0, len(target), step):
        rows = slice(begin, begin + step)
        try:
            # Whoever loads the model refuses inf; the library would warn of it before.
            with np.errstate(all="ignore"):
                target[rows] = dequantize(source[rows], kind)
        except NotImplementedError:
            raise ValueError(
                f"{path}: tensor {name} is of type {array.kind}, which the library gguf cannot "
                "widen; quantize the model as Q8_0 or Q4_1"
            ) from None
    return array._replace(kind="F32", data=_read_only(wide))


def _as_transformers_has_it(name, data, fields):
    """The rows of q and k in a llama, whose halves of a head the converter has interleaved."""
    module = name.split(".")[-2]
    if fields["model_type"] != "llama" or module not in ("attn_q", "attn_k"):
        return data
    # Of k there are as many heads as there are keys, not queries.
    heads = fields["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
    pairs = fields["head_dim"] // 2
    rows = data.reshape(heads, pairs, 2, -1).swapaxes(1, 2)
    return _read_only(rows.reshape(data.shape))


def _read_only(array):
    array.flags.writeable = False
    return array
