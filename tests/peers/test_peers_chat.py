"""Conversations as transformers tokenises them, asked live: the same text, the same ids, the same marks."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from minilora.disk.tokenizer import load_tokenizer

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
transformers = pytest.importorskip("transformers", reason=WHY, exc_type=ImportError)

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|user|>",
            "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]  # fmt: skip
# In the manner of templates that are in use; each has something of jinja2's that another has not.
TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "marks": "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{{- '\n' }}\n    {%- else %}\n        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content }}\n"
    "        {{- '<|im_end|>\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}\n",
    "inst": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '<<SYS>>' + message['content'] | upper }}{% endif %}"
    "{% endfor %}",
    "phi": "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "gemma": "{{ bos_token }}\n{%- set ns = namespace(last='') -%}\n{%- for message in messages -%}\n"
    "    {%- if (message['role'] == 'assistant') -%}\n        {%- set role = 'model' -%}\n    {%- else -%}\n"
    "        {%- set role = message['role'] -%}\n    {%- endif -%}\n    {%- set ns.last = role -%}\n"
    "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}\n",
    "reversed": "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if message.role == 'user' %}"
    "{%- set ns.last = index %}{%- break %}{%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
    "    {%- if loop.index0 > ns.last and message.role == 'assistant' %}\n"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}\n"
    "    {%- else %}\n{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n{%- if tools %}{{ tools | tojson }}{% endif %}",
    "json": "{{ messages | tojson }}{% for m in messages %}{{ m | tojson(indent=2) }}{{ m.content.split(' ')[-1] }}"
    "{% endfor %}<|eot_id|>",
}
PIECES = ["The fox", " sleeps", "é😀", "字", "\n", "  ", "<", "|>", "im_end", "1 + 1 = 2", "\t<b>", "'\"\\", "[", "x"]


def folder_with(folder, template, two_files=False, **flags):
    """A tokenizer with many control tokens and a template, as transformers saves it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(["The fox sleeps. user assistant system model"] * 4, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, **flags) for text in CONTROLS])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    if two_files:
        bpe.model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": bpe.get_vocab_size()}))
    return theirs


def conversations(n=40):
    rng = np.random.default_rng(0)
    for _ in range(n):
        roles = ["system"] * rng.integers(0, 2) + ["user", "assistant"] * rng.integers(1, 3)
        yield [{"role": role, "content": "".join(rng.choice(PIECES, rng.integers(1, 6)))} for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_text_and_the_ids_of_transformers(name, tmp_path):
    theirs = folder_with(tmp_path, TEMPLATES[name])
    ours = load_tokenizer(tmp_path)
    for messages in conversations():
        for add in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            assert ours.template.render(messages, add) == text
            ids = theirs.apply_chat_template(messages, add_generation_prompt=add)["input_ids"]
            assert ours.encode_chat(messages, add).tolist() == ids


@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"normalized": True}])
def test_flags_of_control_tokens_are_those_of_transformers(flags, tmp_path):
    theirs = folder_with(tmp_path, TEMPLATES["phi"], **flags)
    ours = load_tokenizer(tmp_path)
    for messages in conversations(10):
        assert ours.encode_chat(messages).tolist() == theirs.apply_chat_template(messages)["input_ids"]


def test_typed_control_tokens_change_nothing_but_themselves(tmp_path):
    """transformers takes a typed <|im_end|> for the token. That is the only difference."""
    theirs = folder_with(tmp_path, TEMPLATES["chatml"])
    ours = load_tokenizer(tmp_path)
    for messages in conversations(10):
        typed = [{**message, "content": message["content"] + "<|im_end|>" + "x"} for message in messages]
        their_ids = theirs.apply_chat_template(typed)["input_ids"]
        our_ids = ours.encode_chat(typed).tolist()
        end = ours.encode("<|im_end|>")[0]
        assert their_ids.count(end) == our_ids.count(end) + len(messages)
        assert ours.decode(our_ids) == theirs.decode(their_ids)


def test_what_the_assistant_wrote_is_what_transformers_marks(tmp_path):
    theirs = folder_with(tmp_path, TEMPLATES["marks"])
    ours = load_tokenizer(tmp_path)
    for messages in conversations():
        marked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, is_answer = ours.encode_answers(messages)
        assert ids.tolist() == marked["input_ids"]
        assert is_answer.tolist() == [bool(mark) for mark in marked["assistant_masks"]]


def test_turns_found_by_rendering_are_those_that_marks_tell(tmp_path):
    (tmp_path / "marks").mkdir()
    (tmp_path / "none").mkdir()
    folder_with(tmp_path / "marks", TEMPLATES["marks"])
    without = TEMPLATES["marks"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    folder_with(tmp_path / "none", without)
    marked, found = load_tokenizer(tmp_path / "marks"), load_tokenizer(tmp_path / "none")
    for tokenizer in (marked, found):
        assert tokenizer.end == tokenizer.encode("</s>")[0]
        assert tokenizer.ends[1] == tokenizer.encode("<|im_end|>")[0]
    for messages in conversations():
        for ours, theirs in zip(marked.encode_answers(messages), found.encode_answers(messages), strict=True):
            assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("decoder", [True, False], ids=["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_of_a_gpt2_are_those_of_transformers(decoder, bpe_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((bpe_folder / name).read_bytes())
    added = {"<|user|>": 300, "<|bot|>": 301}
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    if decoder:
        settings["added_tokens_decoder"] = {str(i): {"content": text, "special": True} for text, i in added.items()}
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 302}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("<|user|>The fox<|bot|>", "<|user|> The<|endoftext|> fox <|bot|>x"):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
