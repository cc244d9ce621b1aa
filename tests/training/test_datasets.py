"""Texts and rows as batches of tokens: what the loss is on, what is held out, and that nothing is left out."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from gguf_files import write_sentencepiece_base
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import characters
from minilora.disk.tokenizer import Tokenizer, load_tokenizer
from minilora.functional import IGNORE
from minilora.training import datasets
from minilora.training.batches import answer_rows
from minilora.training.datasets import Rows, Text, load_data

CHARACTERS = Tokenizer(characters.encode, characters.decode, (0,), 96, True, encode_text=characters.encode)


def txt(path, content="to be or not to be, that is the question\n"):
    path.write_text(content)
    return path


def jsonl(path, pairs):
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs]
    path.write_text("".join(lines))
    return path


# Texts.


def test_a_text_is_tokenised_whole(tmp_path):
    content = "to be or not to be, that is the question\n"
    text = load_data(txt(tmp_path / "a.txt", content), CHARACTERS, 16)
    assert text.ids.tolist() == characters.encode(content).tolist()
    assert text.length == 16
    assert str(text) == "41 tokens, in windows of 16"


@pytest.mark.parametrize("context, length, used", [(16, None, 16), (300, None, 256), (300, 5, 5), (300, 300, 300)])
def test_the_length_of_a_window_is_the_one_asked_for_or_what_fits_up_to_256(tmp_path, context, length, used):
    assert load_data(txt(tmp_path / "a.txt", "ab" * 200), CHARACTERS, context, length).length == used


def test_a_length_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length 17 does not fit in the model's context of 16"):
        load_data(txt(tmp_path / "a.txt"), CHARACTERS, 16, 17)


def test_a_text_too_short_is_refused_with_its_tokens(tmp_path):
    too_few = "8 tokens are too few: a window needs 8 and the one after it; use more text or a smaller length"
    with pytest.raises(ValueError, match=too_few):
        load_data(txt(tmp_path / "a.txt", "12345678"), CHARACTERS, 16, 8)


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        load_data(txt(tmp_path / "a.txt", " \n\n"), CHARACTERS, 16)


def test_a_character_unknown_to_the_tokenizer_is_named_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: .*'é'"):
        load_data(txt(tmp_path / "a.txt", "café " * 9), CHARACTERS, 16)


@given(st.text(alphabet="ab .'\n\t\x0b\x1c\u00a0\u2028é😀", max_size=60))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(bpe_folder, content):
    bpe = load_tokenizer(bpe_folder)
    content += "The quick brown\nfox jumps.\n\nOver\nthe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "PIECE_LENGTH", 1)
        pieces = datasets._pieces(content)
    assert "".join(pieces) == content
    assert len(pieces) > 2
    ids = np.concatenate([bpe.encode(piece) for piece in pieces])
    assert ids.tolist() == bpe.encode(content).tolist()


@pytest.mark.parametrize("cuttable, pieces", [(True, ["ab", "\ncd", "\nef", "\ngh\n"]), (False, ["ab\ncd\nef\ngh\n"])])
def test_a_tokenizer_that_may_not_be_cut_is_given_the_whole(tmp_path, monkeypatch, cuttable, pieces):
    encoded = []

    def encode(piece):
        encoded.append(piece)
        return characters.encode(piece)

    monkeypatch.setattr(datasets, "PIECE_LENGTH", 1)
    tokenizer = Tokenizer(encode, characters.decode, (0,), 96, cuttable, encode_text=encode)
    load_data(txt(tmp_path / "a.txt", "ab\ncd\nef\ngh\n"), tokenizer, 4)
    assert encoded == pieces


# Prompts and answers.


def test_prompts_and_answers_are_tokenised_apart_and_answers_end(bpe_folder, tmp_path):
    """Together, "The" and " quick" could share a token, which a model that is given the prompt alone never sees."""
    bpe = load_tokenizer(bpe_folder)
    # The shorter first, as batches of an epoch have them.
    pairs = [("\n", " fox"), ("The qui", "ck brown")]
    [(inputs, targets)] = load_data(jsonl(tmp_path / "a.jsonl", pairs), bpe, 64).epoch(9)
    for (prompt, answer), input_row, target_row in zip(pairs, inputs, targets, strict=True):
        prompt_ids = bpe.encode(prompt).tolist()
        answer_ids = [*bpe.encode(answer).tolist(), bpe.end]
        n = len(prompt_ids) + len(answer_ids) - 1
        assert input_row[:n].tolist() == (prompt_ids + answer_ids)[:-1]
        assert target_row[target_row != IGNORE].tolist() == answer_ids
        assert (target_row[: len(prompt_ids) - 1] == IGNORE).all()
    assert bpe.encode("The quick brown").tolist() != [*bpe.encode("The qui"), *bpe.encode("ck brown")]


def test_rows_longer_than_the_context_are_refused_with_their_lines_and_lengths(tmp_path):
    pairs = [("1234", "567"), ("12345", "678"), ("1", "2"), ("1" * 20, "2")]
    longest = load_data(jsonl(tmp_path / "a.jsonl", pairs[:1]), CHARACTERS, 7)
    assert longest.epoch(1)[0][0].shape == (1, 7)
    with pytest.raises(ValueError, match="2 rows are longer than the model's context of 7 tokens; shorten") as refusal:
        load_data(jsonl(tmp_path / "a.jsonl", pairs), CHARACTERS, 7)
    assert str(refusal.value).splitlines()[1:] == ["  line 2 has 8", "  line 4 has 21"]


def test_of_many_rows_too_long_the_first_are_named_and_the_others_counted(tmp_path):
    with pytest.raises(ValueError, match=r"12 rows are longer(.*\n){8}.*line 8 has 3\n  \.\.\. and 4 more$"):
        load_data(jsonl(tmp_path / "a.jsonl", [("12", "3")] * 12), CHARACTERS, 2)


def test_a_character_unknown_in_a_row_is_named_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*'é'"):
        load_data(jsonl(tmp_path / "a.jsonl", [("a", "b"), ("a", "é")]), CHARACTERS, 16)


def test_half_a_character_is_refused_with_its_line(bpe_folder, tmp_path):
    path = txt(tmp_path / "a.jsonl", '{"prompt": "a", "answer": "\\ud800"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the tokenizer of .* does not take '.ud800'"):
        load_data(path, load_tokenizer(bpe_folder), 16)


def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 holds list"):
        load_data(txt(tmp_path / "a.jsonl", "[]"), CHARACTERS, 16)


def test_a_length_for_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"length 8 is for \.txt files; a row of .*a\.jsonl is as long as it is$"):
        load_data(jsonl(tmp_path / "a.jsonl", [("a", "b")]), CHARACTERS, 64, 8)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a", "a.TXT"])
def test_another_kind_of_file_is_refused_with_the_two_that_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match=r"a \.txt file, UTF-8, or a \.jsonl file, one row on each line") as refusal:
        load_data(txt(tmp_path / name), CHARACTERS, 16)
    assert ("JSON array one object a line" in str(refusal.value)) == (name == "a.json")


@pytest.mark.parametrize("too_long, told", [
    ("cut", r"too_long 'cut' is for \.jsonl files; .*a\.txt is learned in windows"),
    ("drop", r"too_long 'drop' is for \.jsonl"),
    ("shorten", "too_long must be cut or drop, or None"),
])  # fmt: skip
def test_a_way_to_treat_long_rows_is_refused_for_a_text(tmp_path, too_long, told):
    with pytest.raises(ValueError, match=told):
        load_data(txt(tmp_path / "a.txt"), CHARACTERS, 16, too_long=too_long)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_data(tmp_path / name, CHARACTERS, 16)


# Rows as people have them.

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip


def chat_folder(bpe_folder, folder, template=CHATML):
    """The folder of a model made for chat: the tokens of `bpe_folder` and two more, and a template."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, folder)
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 302}')
    decoder = {"300": {"content": "<|im_start|>", "special": True}, "301": {"content": "<|im_end|>", "special": True}}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.fixture
def chat(bpe_folder, tmp_path):
    return chat_folder(bpe_folder, tmp_path)


def rows(path, *fields):
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    return path


def learned(tokenizer, data):
    """[(text of a row, [texts of what is learned in it])]."""
    found = []
    for ids, has_loss in data.rows:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], has_loss, [0]])))
        found.append((tokenizer.decode(ids), [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]))
    return found


def loaded(path, tokenizer, *fields, context=512, **options):
    """(data, what was said) of a file with these rows."""
    said = []
    data = load_data(rows(path / "a.jsonl", *fields), tokenizer, context, log=said.append, **options)
    return data, said


def test_a_completion_is_an_answer_whatever_the_order_of_the_keys(chat, tmp_path):
    answer, _ = loaded(tmp_path, chat, {"answer": "fox", "prompt": "The "})
    completion, _ = loaded(tmp_path, chat, {"prompt": "The ", "completion": "fox"})
    assert answer.fingerprint() == completion.fingerprint()
    assert learned(chat, answer) == [("The fox<|im_end|>", ["fox<|im_end|>"])]


def test_control_tokens_of_a_prompt_are_tokens_because_a_prompt_is_the_whole_text(chat, tmp_path):
    data, _ = loaded(tmp_path, chat, {"prompt": "<|im_start|>The", "answer": "fox"})
    assert data.rows[0].ids[0] == 300


def test_of_a_conversation_what_the_assistant_says_is_learned_to_the_end_of_each_turn(chat, tmp_path):
    messages = [{"role": "user", "content": "one <|im_end|>"}, {"role": "assistant", "content": "The fox"},
                {"role": "user", "content": "two"}, {"role": "assistant", "content": "sleeps"},
                {"role": "user", "content": "three"}]  # fmt: skip
    data, said = loaded(tmp_path, chat, {"messages": messages})
    [(text, parts)] = learned(chat, data)
    assert parts == ["The fox<|im_end|>", "sleeps<|im_end|>"]
    # What comes after the last of them is not computed.
    assert chat.template.render(messages).startswith(text) and text.endswith("sleeps<|im_end|>")
    assert data.rows[0].ids.tolist().count(301) == 4
    assert said == []


def test_a_row_of_messages_begins_with_the_tokens_that_a_chat_gives(chat, tmp_path):
    messages = [{"role": "user", "content": "The"}, {"role": "assistant", "content": "\nfox"}]
    data, _ = loaded(tmp_path, chat, {"messages": messages})
    prompt = chat.encode_chat(messages[:1], add_generation_prompt=True)
    assert data.rows[0].ids[: len(prompt)].tolist() == prompt.tolist()
    assert np.flatnonzero(data.rows[0].has_loss)[0] == len(prompt)


def test_messages_without_a_template_are_refused_with_the_remedy(bpe_folder, tmp_path):
    message = {"role": "assistant", "content": "b"}
    with pytest.raises(ValueError, match='a.jsonl holds messages, and the base has no chat template.*"answer".*jinja'):
        loaded(tmp_path, load_tokenizer(bpe_folder), {"messages": [message]})


def test_a_template_that_refuses_a_row_is_told_with_its_line(bpe_folder, tmp_path):
    refusing = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    chat = chat_folder(bpe_folder, tmp_path, refusing + CHATML)
    good, bad = ([{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}] for role in ("user", "system"))
    with pytest.raises(ValueError) as refusal:
        loaded(tmp_path, chat, {"messages": good}, {"messages": bad})
    told = f"{tmp_path}/a.jsonl, line 2: {tmp_path}/chat_template.jinja: the chat template fails: no system"
    assert str(refusal.value).replace("\\", "/") == told.replace("\\", "/")


def test_a_template_that_changes_what_it_wrote_is_refused_with_the_line(bpe_folder, tmp_path):
    chat = chat_folder(bpe_folder, tmp_path, "{{ messages | length }}" + CHATML)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: .*generation %} and {% endgeneration"):
        loaded(tmp_path, chat, {"messages": messages})


def test_marks_around_nothing_are_refused_with_the_line(bpe_folder, tmp_path):
    chat = chat_folder(bpe_folder, tmp_path, CHATML + "{% generation %}{% endgeneration %}")
    with pytest.raises(ValueError, match="line 1: nothing of it is learned"):
        loaded(tmp_path, chat, {"messages": [{"role": "assistant", "content": "b"}]})


def test_the_first_token_of_all_is_not_learned(bpe_folder, tmp_path):
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    chat = chat_folder(bpe_folder, tmp_path, marked)
    data, _ = loaded(tmp_path, chat, {"messages": [{"role": "assistant", "content": "The fox"}]})
    assert data.rows[0].has_loss.tolist() == [False] + [True] * (len(data.rows[0].ids) - 1)


INSTRUCTIONS = [{"output": "3", "instruction": "Add <|im_end|>", "input": "1 2"},
                {"instruction": "Sing", "output": "la"}]  # fmt: skip


def test_an_instruction_is_a_users_where_there_is_a_template(chat, tmp_path):
    data, [said] = loaded(tmp_path, chat, *INSTRUCTIONS)
    start = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert learned(chat, data) == [(start.format("Add <|im_end|>\n\n1 2") + "3<|im_end|>", ["3<|im_end|>"]),
                                   (start.format("Sing") + "la<|im_end|>", ["la<|im_end|>"])]  # fmt: skip
    assert [row.ids.tolist().count(301) for row in data.rows] == [2, 2]
    assert "put to the base as a user's, in its chat template" in said


def test_an_instruction_is_in_alpacas_words_where_there_is_none(bpe_folder, tmp_path):
    plain = chat_folder(bpe_folder, tmp_path, template=None)
    data, [said] = loaded(tmp_path, plain, *INSTRUCTIONS)
    (first, parts), (second, _) = learned(plain, data)
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd <|im_end|>\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"
    )
    assert second == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing\n\n### Response:\nla<|im_end|>"
    )
    assert parts == ["3<|im_end|>"]
    # What somebody typed ends nothing.
    assert data.rows[0].ids.tolist().count(301) == 1
    assert "in Alpaca's words" in said


def test_of_a_text_all_is_learned_and_its_end(chat, tmp_path):
    data, _ = loaded(tmp_path, chat, {"text": "The fox"}, {"text": "x"})
    assert learned(chat, data) == [("The fox<|im_end|>", [" fox<|im_end|>"]), ("x<|im_end|>", ["<|im_end|>"])]


def test_answers_that_end_with_no_end_are_told(bpe_folder, tmp_path):
    chat = chat_folder(bpe_folder, tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, [said] = loaded(tmp_path, chat, {"messages": messages})
    assert "no answer ends with a token that ends a text" in said


def test_other_keys_are_told(chat, tmp_path):
    _, [said] = loaded(tmp_path, chat, {"prompt": "a", "answer": "b", "id": 5})
    assert said.endswith("ignored, and not learned: id")


# Tokenizers that begin each text with a token, and put a space before it.


@pytest.fixture
def pieces(tmp_path):
    return load_tokenizer(write_sentencepiece_base(tmp_path / "a.gguf"))


START = 1


def test_a_prompt_begins_as_texts_do_and_its_answer_goes_on(pieces, tmp_path):
    pairs = [("cap", " of"), ("ca", "p of")]
    data = load_data(jsonl(tmp_path / "a.jsonl", pairs), pieces, 64)
    for row, (prompt, answer) in zip(data.rows, pairs, strict=True):
        prompt_ids = [START, *pieces.encode(prompt)]
        assert row.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert np.flatnonzero(row.has_loss).tolist() == list(range(len(prompt_ids), len(row.ids)))
        assert pieces.decode(row.ids) == f"<s> {prompt}{answer}</s>"


def test_an_instruction_in_alpacas_words_begins_as_texts_do_and_its_answer_goes_on(pieces, tmp_path):
    data, _ = loaded(tmp_path, pieces, *INSTRUCTIONS, context=2000)
    for row, text in zip(data.rows, ["### Response:\n3</s>", "### Response:\nla</s>"], strict=True):
        assert row.ids.tolist().count(START) == 1 and row.ids[0] == START
        assert pieces.decode(row.ids).endswith(text)


def test_of_a_text_all_but_what_every_text_begins_with_is_learned(pieces, tmp_path):
    data, _ = loaded(tmp_path, pieces, {"text": "cap of"}, {"text": "<s>cap"})
    assert [row.ids[0] for row in data.rows] == [START, START]
    assert [row.has_loss.tolist() for row in data.rows] == [[False, True, True, True], [False, True, True]]
    assert data.rows[0].ids[1:-1].tolist() == pieces.encode("cap of").tolist()


def test_a_document_begins_as_texts_do_once(pieces, tmp_path):
    content = "cap of me\n\ncap of me\n"
    ids = load_data(txt(tmp_path / "a.txt", content), pieces, 4).ids
    assert ids.tolist() == [START, *pieces.encode(content)]


def test_a_conversation_begins_as_its_template_does(tmp_path):
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    asking = "{% if add_generation_prompt %}<s>{% endif %}"
    tokenizer = load_tokenizer(write_sentencepiece_base(tmp_path / "b.gguf", chat_template=template + asking))
    messages = [{"role": "user", "content": "cap"}, {"role": "assistant", "content": "of"}]
    data, _ = loaded(tmp_path, tokenizer, {"messages": messages})
    assert data.rows[0].ids.tolist() == tokenizer.encode("<s>cap</s><s>of</s>").tolist()
    data, _ = loaded(tmp_path, tokenizer, {"instruction": "cap", "output": "of"})
    assert data.rows[0].ids.tolist() == tokenizer.encode("<s>cap</s><s>of</s>").tolist()


# Rows that are too long.

LONG = [("12", "34"), ("123456", "78"), ("1234567890", "1"), ("1", "2345")]


def of_lengths(path, too_long, pairs=LONG, context=7):
    said = []
    data = load_data(jsonl(path / "a.jsonl", pairs), CHARACTERS, context, too_long=too_long, log=said.append)
    return [characters.decode(row.ids) for row in data.rows], said


def test_rows_that_are_too_long_are_dropped_and_counted(tmp_path):
    texts, said = of_lengths(tmp_path, "drop")
    assert texts == ["1234\n", "12345\n"]
    assert said == [f"{tmp_path / 'a.jsonl'}: 2 of 4 rows are longer than 7 tokens: they are dropped"]


def test_rows_that_are_too_long_are_cut_and_counted_and_those_without_an_answer_dropped(tmp_path):
    texts, said = of_lengths(tmp_path, "cut")
    assert texts == ["1234\n", "12345678", "12345\n"]
    counts = "2 of 4 rows are longer than 7 tokens: 1 are cut, 1 dropped with no answer left"
    assert said == [f"{tmp_path / 'a.jsonl'}: {counts}"]


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_rows_of_which_none_is_left_are_refused(tmp_path, too_long):
    with pytest.raises(ValueError, match="1 of 1 rows are longer than 3 tokens, and none is left"):
        of_lengths(tmp_path, too_long, [("1234", "5")], 3)


def test_rows_that_fit_are_not_touched(tmp_path):
    assert of_lengths(tmp_path, "cut", LONG[:1]) == (["1234\n"], [])


def test_another_way_to_treat_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too_long must be cut or drop, or None; got 'shorten'"):
        of_lengths(tmp_path, "shorten")


def test_a_conversation_is_cut_behind_the_last_token_that_is_learned(chat, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "The fox sleeps. " * 9}, {"role": "assistant", "content": "c"}]  # fmt: skip
    data, _ = loaded(tmp_path, chat, {"messages": messages}, context=60, too_long="cut")
    [(text, parts)] = learned(chat, data)
    assert parts == ["b<|im_end|>"]
    assert text.endswith("b<|im_end|>")


# Held out.


@given(st.integers(20, 60), st.sampled_from([0.2, 0.25, 0.5]))
def test_of_a_text_the_end_is_held_out(n, fraction):
    train, heldout = Text(np.arange(n), 3).split(fraction, None)
    assert np.concatenate([train.ids, heldout.ids]).tolist() == list(range(n))
    assert len(heldout.ids) == round(fraction * n)
    assert train.length == heldout.length == 3


def numbered_rows(n):
    """Rows of which number i is the prompt [i] and the answer [i]."""
    return Rows(tuple(answer_rows((np.array([i]), np.array([i])) for i in range(n))))


def numbers_in(rows, batch=1):
    """How often each number comes in an epoch of numbered rows."""
    return Counter(int(row[0]) for inputs, _ in rows.epoch(batch) for row in inputs)


@given(st.integers(4, 30), st.sampled_from([0.2, 0.5]), st.integers(0, 99))
def test_of_rows_a_random_share_is_held_out_and_none_is_lost(n, fraction, seed):
    train, heldout = numbered_rows(n).split(fraction, np.random.default_rng(seed))
    assert numbers_in(train, 3) + numbers_in(heldout, 2) == Counter(range(n))
    assert len(heldout.rows) == round(fraction * n)


def test_the_seed_decides_which_rows_are_held_out():
    def heldout_numbers(seed):
        _, heldout = numbered_rows(30).split(0.3, np.random.default_rng(seed))
        return tuple(numbers_in(heldout))

    assert heldout_numbers(0) == heldout_numbers(0)
    assert len({heldout_numbers(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("data", [Text(np.arange(9), 3), numbered_rows(3)], ids=["text", "rows"])
def test_nothing_held_out_is_none(data):
    assert data.split(0, np.random.default_rng(0)) == (data, None)


@pytest.mark.parametrize("data, fraction, complaint", [
    (numbered_rows(3), 0.1, "3 lines to train on and 0 held out"),
    (numbered_rows(3), 0.9, "0 lines to train on and 3 held out"),
    (Text(np.arange(20), 3), 0.1, "18 tokens to train on and 2 held out: 2 tokens are too few: a window needs 3"),
    (Text(np.arange(20), 3), 0.9, "2 tokens to train on and 18 held out: 2 tokens are too few: a window needs 3"),
], ids=["no line held out", "no line to learn", "nothing to measure", "nothing to learn"])  # fmt: skip
def test_a_side_that_would_be_empty_is_refused_with_the_counts(data, fraction, complaint):
    with pytest.raises(ValueError, match=complaint):
        data.split(fraction, np.random.default_rng(0))


def test_fewer_lines_than_a_batch_are_refused_before_the_first_is_asked_for():
    with pytest.raises(ValueError, match="3 lines to train on do not make one batch of 4"):
        numbered_rows(3).batches(4, np.random.default_rng(0))


# What they are.


def one_row(prompt, answer):
    return Rows(tuple(answer_rows([(np.array(prompt), np.array(answer))])))


def test_a_fingerprint_tells_tokens_and_what_is_learned_apart():
    rows = [one_row([1, 2], [3]), one_row([1], [2, 3]), one_row([1], [23])]
    texts = [Text(np.array([1, 2]), 1), Text(np.array([2, 1]), 1)]
    assert len({data.fingerprint() for data in rows + texts}) == 5


def test_rows_say_how_many_they_are():
    assert str(one_row([1, 2], [3])) == "1 row of 3 tokens, of which 1 are learned"
