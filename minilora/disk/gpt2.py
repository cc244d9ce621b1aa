"""GPT-2 in files, as transformers writes it: its names, its fields, its stored weights.

GPT-2 stores its linear layers as Conv1D, (in, out). They are transposed on the way in and on the
way out, never inside. Its c_attn is q_proj, k_proj and v_proj side by side.
"""

from ..gpt import GPT, GPTConfig
from .family import Family, check_fields, head_is_tied

# Fields that change what a GPT-2 computes. The first value stands for an absent field.
_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}


def _read_config(folder, fields, tensors):
    check_fields(fields, _SUPPORTED)
    missing = [key for key in ("n_layer", "n_head", "n_embd", "vocab_size") if key not in fields]
    if "n_positions" not in fields and "n_ctx" not in fields:
        missing.append("n_positions")
    if missing:
        raise ValueError(f"no {', '.join(missing)}: this does not describe a GPT-2")
    # n_ctx is the older name, and stands beside n_positions in many files.
    block_size = fields.get("n_positions", fields.get("n_ctx"))
    tied = head_is_tied(
        folder, fields, tensors, embedding="wte.weight", head="lm_head.weight", default=True
    )
    return GPTConfig(
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        n_embd=fields["n_embd"],
        vocab_size=fields["vocab_size"],
        block_size=block_size,
        n_inner=fields.get("n_inner"),
        layer_norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=tied,
    )


def _write_config(model, fields, dtype):
    config = model.config
    # torch_dtype is what transformers 4 called dtype.
    settings = {key: fields[key] for key in fields if key not in ("torch_dtype", *_SUPPORTED)}
    return {
        **settings,
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        # llama.cpp's converter asks for it.
        "n_ctx": config.block_size,
        "n_inner": None if config.n_inner == 4 * config.n_embd else config.n_inner,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype,
        # Without a tokenizer there is no end-of-text token to name: transformers' default, 50256,
        # lies outside a smaller vocabulary.
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
    }


def count_gpt(config):
    """How many numbers a GPT of this configuration holds, but for biases and norms."""
    C = config.n_embd
    block = 4 * C * C + 2 * C * config.n_inner
    return config.n_layer * block + C * (config.vocab_size + config.block_size)


def describe_gpt(config):
    """The shape of a GPT, for people."""
    return (
        f"{config.n_layer} blocks of {config.n_head} heads, {config.n_embd} channels, "
        f"{config.n_inner} in the MLP"
    )


GPT2 = Family(
    title="GPT-2, learned positions",
    model_types=("gpt2", None),
    model=GPT,
    marks=("wpe.weight",),
    block=r"h\.\d+\.",
    parts={
        "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attn.c_proj": ("attn.o_proj",),
        "mlp.c_fc": ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
    # GPT2LMHeadModel has it before every name but that of its head, a bare GPT2Model has none.
    prefix="transformer.",
    transposed=True,
    # Causal masks that old files carry. Not every bias: c_attn.bias is none of them.
    unused=r"h\.\d+\.attn\.(bias|masked_bias)",
    read_config=_read_config,
    write_config=_write_config,
    count=count_gpt,
    describe=describe_gpt,
    note="but vLLM serves no LoRA on GPT-2 (GPT2LMHeadModel), whatever the format: merge the "
    "adapter, and serve the merged folder",
)
