"""GGUF files of two blocks, written by llama.cpp's own library as its converter writes them."""

import numpy as np

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Byte-level merges, and a template that says who speaks.
MERGES = ["h e", "he l", "l o", "hel lo", "Ġ w", "Ċ Ġ", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# 4 heads of 16 numbers in 64 channels, 2 heads of keys: rows are whole blocks of 32 in every matrix.
SIZES = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
         "attention.head_count": 4, "attention.head_count_kv": 2}  # fmt: skip


def byte_letters():
    """The letters that stand for the 256 bytes in a byte-level BPE."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_settings(pre="smollm"):
    """The settings of a byte-level BPE: three control tokens, 256 letters, a few merges."""
    tokens = [*CONTROL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_settings(pieces):
    """The settings of a SentencePiece: unknown, begin, end, 256 bytes, then `pieces` from the best on."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def settings_of(architecture="llama", vocabulary=None):
    """The settings of a model of SIZES, by their whole names."""
    sizes = {f"{architecture}.{key}": value for key, value in SIZES.items()}
    if architecture == "qwen3":
        # The converter always writes them.
        sizes |= {f"qwen3.attention.{part}_length": 16 for part in ("key", "value")}
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": 2,
        **sizes,
        f"{architecture}.rope.freq_base": 100000.0,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        **(byte_level_settings() if vocabulary is None else vocabulary),
    }


def shapes_of(settings, *, tied=True, biases=False, rows=None):
    """{transformers' name: shape} of the model that settings of this file describe."""
    architecture = settings["general.architecture"]
    size = {key: settings[f"{architecture}.{key}"] for key in SIZES}
    channels, inner, heads = size["embedding_length"], size["feed_forward_length"], size["attention.head_count"]
    head = settings.get(f"{architecture}.attention.key_length") or channels // heads
    queries, keys = heads * head, size["attention.head_count_kv"] * head
    rows = len(settings["tokenizer.ggml.tokens"]) if rows is None else rows
    shapes = {"model.embed_tokens.weight": (rows, channels)}
    for n in range(size["block_count"]):
        block = {"input_layernorm.weight": (channels,), "self_attn.q_proj.weight": (queries, channels),
                 "self_attn.k_proj.weight": (keys, channels), "self_attn.v_proj.weight": (keys, channels),
                 "self_attn.o_proj.weight": (channels, queries), "post_attention_layernorm.weight": (channels,),
                 "mlp.gate_proj.weight": (inner, channels), "mlp.up_proj.weight": (inner, channels),
                 "mlp.down_proj.weight": (channels, inner)}  # fmt: skip
        if biases or architecture == "qwen2":
            block |= {f"self_attn.{x}_proj.bias": (rows,) for x, rows in (("q", queries), ("k", keys), ("v", keys))}
        if biases and architecture != "qwen2":
            block["self_attn.o_proj.bias"] = (channels,)
        if architecture == "qwen3":
            block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (channels,)
    if not tied:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def stored(array, kind, rng):
    """An array in a type of GGUF's, as the library stores it: (array of the file, the values that it stands for)."""
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[kind]
    if kind.name in ("Q4_K", "Q6_K"):
        # The library does not quantize to these: any bytes will do, under scales that are finite.
        size, bytes_ = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (array.size // size, bytes_), np.uint8)
        scales = slice(0, 4) if kind.name == "Q4_K" else slice(bytes_ - 2, bytes_)
        blocks[:, scales] = np.full((len(blocks), (scales.stop - scales.start) // 2), 0.01, "<f2").view(np.uint8)
        packed = blocks.reshape(len(array), -1)
    elif kind.name == "I8":
        return array.astype(np.int8), None
    elif kind.name == "Q8_1":
        return np.zeros((len(array), array.shape[1] // 32 * 40), np.uint8), None
    else:
        packed = quants.quantize(array, kind)
    return packed, quants.dequantize(packed, kind)


def theirs(name):
    """llama.cpp's name of a tensor of transformers'."""
    for mine, other in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
                        ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"),
                        ("self_attn.k_norm", "attn_k_norm"), ("input_layernorm", "attn_norm"),
                        ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"),
                        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("model.layers.", "blk."),
                        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
                        ("lm_head", "output")):  # fmt: skip
        name = name.replace(mine, other)
    return name


def permuted(array, heads):
    """What llama.cpp's converter makes of the rows of q and k of a llama. Source: `LlamaModel.permute`."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, settings=None, *, kind="F32", kinds=(), tied=True, biases=False, extra=(), rows=None, instead=(),
               seed=0, **writing):
    """Write a model as llama.cpp's converter would; {transformers' name: float32 array} that the file stands for.

    `settings` are by default those of a small llama; a value of None is left out. Matrices are stored as `kind`, those
    whose name holds a key of `kinds` as that says. `extra` is {llama.cpp's name: array, or None to leave it out}.
    `rows` are those of the embedding, by default one for each token. `instead` are settings that are written, while the
    tensors are those of `settings`.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    settings = settings_of() if settings is None else settings
    architecture = settings["general.architecture"]
    writer = GGUFWriter(path, architecture, **writing)
    for name, value in (settings | dict(instead)).items():
        if name != "general.architecture" and value is not None:
            add_setting(writer, name, value)
    rng = np.random.default_rng(seed)
    extra = dict(extra)
    values = {}
    for name, shape in shapes_of(settings, tied=tied, biases=biases, rows=rows).items():
        array = rng.normal(0, 0.5, shape).astype(np.float32)
        its_kind = next((dict(kinds)[part] for part in dict(kinds) if part in name), kind if len(shape) == 2 else "F32")
        packed, values[name] = stored(array, its_kind, rng)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            role = "head_count" if "q_proj" in name else "head_count_kv"
            packed = permuted(packed, settings[f"llama.attention.{role}"])
        if theirs(name) in extra:
            continue
        is_plain = packed.dtype in (np.float32, np.float16, np.int8)
        writer.add_tensor(theirs(name), packed, raw_dtype=None if is_plain else GGMLQuantizationType[its_kind])
    for name, array in extra.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def add_setting(writer, name, value):
    """A setting in the type that the converter gives it: 32 bits for numbers."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value) if value >= 0 else writer.add_int32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


CHATML = TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def write_chat_base(path, template=CHATML, seed=0):
    """Write a small llama that was made for chat: packed matrices, random, and a context of 512."""
    settings = settings_of()
    settings["llama.context_length"] = 512
    settings["tokenizer.chat_template"] = template
    write_gguf(path, settings, kind="Q4_1", kinds={"embed": "Q8_0"}, seed=seed)
    return path


# With "▁" before a word that follows a space; no piece reaches over a space.
PIECES = ["▁", "▁of", "▁cap", "▁me", "o", "f", "c", "a", "p", "m", "e", "▁c", "▁m", "▁ca", "ca", "of", "cap", "me"]


def write_sentencepiece_base(path, **settings):
    """Write a small llama with a SentencePiece of PIECES, as Llama 2 has one, and a context of 256."""
    whole = settings_of(vocabulary=sentencepiece_settings(PIECES)) | {"llama.context_length": 256}
    named = {f"tokenizer.{name.replace('__', '.')}": value for name, value in settings.items()}
    write_gguf(path, whole | named, kind="Q4_1", kinds={"embed": "Q8_0"})
    return path
