"""What a folder of transformers holds beside the weights, made out of a GGUF file.

Knows transformers' names of files and fields. What is in the GGUF file it asks gguf.py.
Source: transformers' PreTrainedTokenizerFast and GenerationConfig.
"""

import json

from .gguf import gguf_fields, gguf_tokenizer


def gguf_companions(path):
    """{name of a file: its bytes}, from which transformers makes the tokenizer of a GGUF file.

    tokenizer.json and tokenizer_config.json; chat_template.jinja, if there is a template; and
    generation_config.json, which names every token that ends a text.
    Raises: as `gguf_tokenizer`.
    """
    fields = gguf_fields(path)
    bpe, ends, template = gguf_tokenizer(path)
    first_token = fields["bos_token_id"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if first_token is None else bpe.id_to_token(first_token),
        "eos_token": bpe.id_to_token(ends[0]),
        # It would take spaces out of a text before punctuation.
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["max_position_embeddings"],
    }
    generation_config = {
        "bos_token_id": first_token,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }
    companions = {
        "tokenizer.json": bpe.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        "generation_config.json": json.dumps(generation_config, indent=2),
    }
    if template is not None:
        companions["chat_template.jinja"] = template
    return {name: text.encode() for name, text in companions.items()}
