"""This library's own GPTs in files: under their own names, in their own orientation.

A GPT with rotary positions has no class in transformers. It is kept as it is.
"""

from dataclasses import asdict

from ..gpt import GPT, GPTConfig
from .family import Family
from .gpt2 import count_gpt, describe_gpt

MODEL_TYPE = "minilora-gpt"


def _read_config(folder, fields, tensors):
    settings = {key: fields[key] for key in fields if key != "model_type"}
    return GPTConfig(**settings)


def _write_config(model, fields, dtype):
    return {"model_type": MODEL_TYPE, **asdict(model.config)}


LINEARS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
OWN = Family(
    title="a GPT of minilora's, rotary positions",
    model_types=(MODEL_TYPE,),
    model=GPT,
    block=r"h\.\d+\.",
    parts={name: (name,) for name in LINEARS},
    read_config=_read_config,
    write_config=_write_config,
    count=count_gpt,
    describe=describe_gpt,
    note="but neither has a class for its base, a rotary GPT of minilora's: only minilora can use "
    "it",
    knows_characters=True,
)
