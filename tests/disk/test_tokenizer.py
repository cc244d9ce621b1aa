"""Tokenizers of model folders: texts come back to the character; folders that do not fit their model are refused."""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_sentencepiece_base
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import characters
from minilora.disk.tokenizer import END, load_tokenizer
from minilora.disk.vocabulary import Vocabulary

TEXTS = ["a\n\nb\n", " leading and trailing ", "😀 naïve 字\t\r\n", "doesn't", "\n", "   \n  x", f"The fox{END}The dog"]
FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def write_config(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def copied(folder, to, names=FILES, **fields):
    """`folder` with only the files `names`, and other fields in its configuration."""
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())
    return write_config(to, **{"model_type": "gpt2", "vocab_size": 300, **fields})


def settings(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' \
+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chatty(bpe_folder, folder, names=FILES[1:], template=CHATML):
    """The folder of a model that was made for chat: two control tokens more, and a template."""
    copied(bpe_folder, folder, names, vocab_size=302)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 301, "<|im_start|>": 300}))
    decoder = {"300": {"content": "<|im_start|>", "special": True}, "301": {"content": "<|im_end|>", "special": True}}
    settings(folder, eos_token=END, added_tokens_decoder=decoder, chat_template=template)
    return folder


@pytest.fixture(params=[FILES[:1], FILES[1:], FILES], ids=["one file", "two files", "all three"])
def bpe(request, bpe_folder, tmp_path):
    return load_tokenizer(copied(bpe_folder, tmp_path, request.param))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_text_comes_back_to_the_character(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1 and (0 <= ids).all() and (ids < bpe.vocab_size).all()
    assert bpe.decode(ids) == text


def test_the_tokens_are_those_of_the_library_and_there_are_merges_among_them(bpe, bpe_folder):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for text in TEXTS:
        assert bpe.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert len(bpe.encode("The quick brown fox")) < len("The quick brown fox")


def test_the_end_of_a_text_is_one_token_and_none_is_added(bpe):
    assert bpe.vocab_size == 300 and bpe.cuttable
    assert bpe.encode(END).tolist() == [bpe.end] and bpe.decode([bpe.end]) == END
    assert bpe.end not in bpe.encode("The fox") and len(bpe.encode("x")) == 1 and len(bpe.encode("")) == 0


def test_special_tokens_that_a_tokenizer_adds_are_not_added(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1])
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = bpe.encode("The fox").ids
    bpe.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, bpe.token_to_id(END))])
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("The fox").tolist() == plain
    assert len(load_tokenizer(folder).encode("The fox" * 9)) == 9 * len(plain)


@pytest.mark.parametrize("eos, ends", [(None, (0,)), (7, (7,)), ([9, 7, 9], (9, 7)), ([], (0,))])
def test_the_end_is_the_one_of_the_configuration_if_that_has_one(bpe_folder, tmp_path, eos, ends):
    tokenizer = load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], eos_token_id=eos))
    assert tokenizer.ends == ends
    assert tokenizer.end == ends[0]


def test_the_tokenizers_own_end_comes_first_and_every_file_is_asked(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1], eos_token_id=[7, 8])
    settings(folder, eos_token={"content": END, "lstrip": False})
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 11]}')
    assert load_tokenizer(folder).ends == (0, 7, 8, 11)


def test_the_end_of_a_turn_is_the_last_of_the_ends(bpe_folder, tmp_path):
    folder = chatty(bpe_folder, tmp_path)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.ends == (0, tokenizer.encode("<|im_end|>")[0])


@pytest.mark.parametrize("template", ["{{ messages[0].content }}",
                                      "{% for m in messages %}{{ m.content }} {% endfor %}",
                                      "{{ raise_exception('a system message comes first') }}"])  # fmt: skip
def test_a_template_that_ends_no_turn_adds_no_end(bpe_folder, tmp_path, template):
    folder = copied(bpe_folder, tmp_path, FILES[:1])
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(folder).ends == (0,)


def test_a_tokenizer_of_other_pieces_is_not_cuttable(bpe_folder, tmp_path):
    import tokenizers
    from tokenizers import normalizers

    folder = copied(bpe_folder, tmp_path, FILES[:1])
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.normalizer = normalizers.Strip()
    bpe.save(str(folder / "tokenizer.json"))
    assert not load_tokenizer(folder).cuttable


# The characters of the demo.


@given(st.text(alphabet=characters.ALPHABET))
def test_the_characters_are_those_of_the_demo(text):
    with tempfile.TemporaryDirectory() as folder:
        known = load_tokenizer(write_config(Path(folder), model_type="minilora-gpt", vocab_size=96))
    assert known.encode(text).tolist() == characters.encode(text).tolist() and known.decode(known.encode(text)) == text
    assert (known.end, known.vocab_size, known.cuttable) == (0, 96, True)


def test_a_model_of_minilora_with_a_tokenizer_beside_it_uses_that(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1], model_type="minilora-gpt", vocab_size=300)
    assert load_tokenizer(folder).vocab_size == 300


# Refused.


@pytest.mark.parametrize("fields, names, missing", [
    ({"model_type": "gpt2", "vocab_size": 96}, (), "tokenizer.json, or vocab.json and merges.txt, is missing"),
    ({"model_type": "minilora-gpt", "vocab_size": 95}, (), "tokenizer.json, or vocab.json"),
    ({"model_type": "gpt2", "vocab_size": 300}, ("vocab.json",), r": merges.txt is missing"),
    ({"model_type": "gpt2", "vocab_size": 300}, ("merges.txt",), r": vocab.json is missing"),
], ids=["nothing", "95 characters", "no merges", "no vocabulary"])  # fmt: skip
def test_what_is_missing_is_named(tmp_path, fields, names, missing):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=missing):
        load_tokenizer(write_config(tmp_path, **fields))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content, shown", [("{", "is not JSON"), ("[1]", "an object with fields, got list")])
def test_a_configuration_that_is_none_is_refused(tmp_path, content, shown):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=shown):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("room", [299, None, "300", True])
def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(bpe_folder, tmp_path, room):
    with pytest.raises(ValueError, match=rf"has 300 tokens, the model \(config.json: vocab_size\) {room}"):
        load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], vocab_size=room))


def test_a_model_whose_table_was_rounded_up_is_taken(bpe_folder, tmp_path):
    assert load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], vocab_size=304)).vocab_size == 300


@pytest.mark.parametrize("eos, wrong", [(300, 300), (-1, -1), ([0, 300], 300), ("0", "'0'"), (True, True),
                                        ([[1]], [1])])  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_refused_with_the_one_that_is(bpe_folder, tmp_path, name, eos, wrong):
    """The advice is not already followed: the folder's tokenizer knows <|endoftext|>, whose id is told."""
    folder = copied(bpe_folder, tmp_path, FILES[:1])
    fields = json.loads((folder / "config.json").read_text()) if name == "config.json" else {}
    (folder / name).write_text(json.dumps({**fields, "eos_token_id": eos}))
    wrong = re.escape(str(wrong))
    told = rf"{name}: eos_token_id .*: {wrong} is none of the tokenizer's ids, 0 .. 299; set it to 0, which"
    with pytest.raises(ValueError, match=told):
        load_tokenizer(folder)


def test_an_end_named_by_the_settings_must_be_a_token(bpe_folder, tmp_path):
    folder = settings(copied(bpe_folder, tmp_path, FILES[:1]), eos_token="</s>")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token '</s>' is none of the 300 tokens"):
        load_tokenizer(folder)


def test_an_end_may_be_named_by_the_map_alone(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1], eos_token_id=7)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END}}))
    assert load_tokenizer(folder).ends == (0, 7)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match=r"special_tokens_map.json: eos_token '</s>' is none of the 300 tokens"):
        load_tokenizer(folder)
    assert load_tokenizer(settings(folder, eos_token=END)).ends == (0, 7)


def test_a_tokenizer_without_an_end_is_refused(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[1:])
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<|end|>"] = vocabulary.pop(END)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"no token ends a text: set eos_token_id in config.json .*0 \.\. 299"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name, shown", [("tokenizer.json", "tokenizer.json: damaged"),
                                         ("vocab.json", "vocab.json and .*merges.txt: damaged")])  # fmt: skip
def test_damaged_files_are_named(bpe_folder, tmp_path, name, shown):
    folder = copied(bpe_folder, tmp_path, FILES[:1] if name == "tokenizer.json" else FILES[1:])
    (folder / name).write_text((folder / name).read_text()[:-20])
    with pytest.raises(ValueError, match=shown):
        load_tokenizer(folder)


def test_the_characters_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(write_config(tmp_path, model_type="minilora-gpt", vocab_size=96)).end == 0


@pytest.mark.parametrize("change", ["a space before every text", "a token that is blank", "a token that eats blanks"])
def test_a_tokenizer_that_reaches_over_a_cut_is_not_cut(change, bpe_folder, tmp_path):
    """What is encoded in pieces must give the same tokens: each of these would not."""
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if change == "a space before every text":
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        blank = change == "a token that is blank"
        bpe.add_tokens([tokenizers.AddedToken("x\ny" if blank else "dog", rstrip=not blank)])
    write_config(tmp_path, model_type="gpt2", vocab_size=301)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.cuttable
    text, cut = "the x\ny dog\nx", 5 if change == "a token that is blank" else 11
    assert tokenizer.encode(text).tolist() != [*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])]


# Tokens that were added.


@pytest.mark.parametrize("names", [FILES[:1], FILES[1:]], ids=["one file", "two files"])
@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_tokens(bpe_folder, tmp_path, names, where):
    folder = copied(bpe_folder, tmp_path, names, vocab_size=302)
    if where == "added_tokens.json":
        (folder / where).write_text(json.dumps({"<|bot|>": 301, "<|user|>": 300}))
    else:
        settings(folder, added_tokens_decoder={"301": {"content": "<|bot|>"}, "300": {"content": "<|user|>"}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|user|>x<|bot|>").tolist() == [300, *tokenizer.encode("x"), 301]
    assert tokenizer.vocab_size == 302
    assert tokenizer.decode([300, 301]) == "<|user|><|bot|>"


def test_an_added_token_keeps_its_id_where_there_is_a_gap_before_it(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[1:], vocab_size=310)
    (folder / "added_tokens.json").write_text('{"<|bot|>": 309}')
    assert load_tokenizer(folder).encode("<|bot|>").tolist() == [309]


def test_the_flags_of_an_added_token_are_kept(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[1:], vocab_size=301)
    settings(folder, added_tokens_decoder={"300": {"content": "<|bot|>", "rstrip": True, "special": True}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|bot|> \n x").tolist() == [300, *tokenizer.encode("x")]
    assert not tokenizer.cuttable


@pytest.mark.parametrize("names", [FILES[:1], FILES[1:]], ids=["one file", "two files"])
@pytest.mark.parametrize("added", [{"<|bot|>": 7}, {"The": 300}, {"<|bot|>": 301}])
def test_an_added_token_that_does_not_fit_is_refused_with_both_sides(bpe_folder, tmp_path, names, added):
    folder = copied(bpe_folder, tmp_path, names, vocab_size=400)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if names == FILES[1:] and added == {"<|bot|>": 301}:
        assert load_tokenizer(folder).vocab_size == 302
        return
    with pytest.raises(ValueError, match="added_tokens.json or tokenizer_config.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("decoder, shown", [({"x": {"content": "a"}}, "decoder: 'x'"), ({"300": {}}, "decoder: '300'"),
                                            ({"300": 5}, "decoder: '300'"), ({"300": {"content": 1}}, "decoder: '300'"),
                                            ({"-1": {"content": "a"}}, "-1 is no id"),
                                            ({"300": {"content": "\ud800"}}, "decoder: '300'"),
                                            ({"300": {"content": "a", "lstrip": "no"}}, "decoder: '300'"),
                                            ({"9" * 5000: {"content": "a"}}, "is no id"),
                                            ({"2147483648": {"content": "a"}}, "2147483648 is no id"),
                                            (["x"], "added_tokens_decoder must be an object, .* got .'x'."),
                                            ("x", "must be an object"), (0, "must be an object")])  # fmt: skip
@pytest.mark.parametrize("names", [FILES[:1], FILES[1:]], ids=["one file", "two files"])
def test_added_tokens_that_are_none_are_refused(bpe_folder, tmp_path, names, decoder, shown):
    folder = settings(copied(bpe_folder, tmp_path, names), added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: .*{shown}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("added, shown", [({"z": [5]}, r"'z': \[5\] is no id"), ({"z": "5"}, "'z': '5' is no id"),
                                          ({"z": True}, "'z': True is no id"), ({"z": None}, "'z': None is no id"),
                                          ({"z": {}}, "'z': {} is no id"), ({"z": 5.5}, "'z': 5.5 is no id"),
                                          ({"y": -1}, "'y': -1 is no id"), ({"z": 10**30}, "'z': 1000.* is no id"),
                                          ({"\ud800": 300}, "is no token"), (["z"], "got list")])  # fmt: skip
@pytest.mark.parametrize("names", [FILES[:1], FILES[1:]], ids=["one file", "two files"])
def test_added_ids_that_are_none_are_refused_by_the_name_of_their_file(bpe_folder, tmp_path, names, added, shown):
    folder = copied(bpe_folder, tmp_path, names)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=rf"added_tokens.json: .*{shown}"):
        load_tokenizer(folder)


def test_merges_of_another_vocabulary_are_refused(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[1:])
    (folder / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(ValueError, match=r"merges.txt: damaged, or of another kind: "):
        load_tokenizer(folder)


@pytest.mark.parametrize("names", [FILES[:1], FILES[1:]], ids=["one file", "two files"])
def test_a_token_of_the_vocabulary_that_the_settings_name_is_a_control_token(bpe_folder, tmp_path, names):
    folder = copied(bpe_folder, tmp_path, names, eos_token_id=0)
    if names == FILES[:1]:
        changed(folder, lambda saved: saved.update(added_tokens=[]))
    settings(folder, eos_token=END)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(f"x{END}").tolist() == [*tokenizer.encode("x"), 0]
    assert 0 not in tokenizer.encode_text(f"x{END}")


# Control tokens in a text.


def test_a_control_token_written_out_is_a_token_or_text_as_one_asks(bpe_folder, tmp_path):
    tokenizer = load_tokenizer(chatty(bpe_folder, tmp_path))
    text = "The fox <|im_end|> the<|im_start|>"
    assert [i for i in tokenizer.encode(text).tolist() if i >= 300] == [301, 300]
    as_text = tokenizer.encode_text(text)
    assert as_text.max() < 300
    assert tokenizer.decode(as_text) == text
    assert tokenizer.encode_text("The fox").tolist() == tokenizer.encode("The fox").tolist()


def test_without_a_template_messages_are_refused_with_the_remedy(bpe):
    for encode in (bpe.encode_chat, bpe.encode_answers):
        with pytest.raises(ValueError, match="no chat template.*chat_template.jinja.*prompts and answers"):
            encode([{"role": "user", "content": "x"}])
    assert bpe.template is None


def test_a_chat_is_what_the_template_writes(bpe_folder, tmp_path):
    tokenizer = load_tokenizer(chatty(bpe_folder, tmp_path))
    ids = tokenizer.encode_chat([{"role": "user", "content": "The fox"}], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nThe fox<|im_end|>\n<|im_start|>assistant\n"
    assert ids.tolist() == tokenizer.encode(tokenizer.decode(ids)).tolist()


# A text that comes token by token.


@given(st.text(alphabet="aé字😀 \n\ufffd", max_size=12), st.lists(st.integers(0, 299), max_size=12))
def test_a_stream_gives_the_whole_text_and_no_half_character(bpe_folder, text, noise):
    tokenizer = load_tokenizer(bpe_folder)
    stream = tokenizer.stream()
    ids = tokenizer.encode(text).tolist()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)
    stream = tokenizer.stream()
    ids += noise
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_gives_a_letter_as_soon_as_it_is_whole(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    stream = tokenizer.stream()
    ids = tokenizer.encode("x字y").tolist()
    assert len(ids) == 5
    assert [stream.push(i) for i in ids] == ["x", "", "", "字", "y"]


def test_a_stream_keeps_the_blanks_that_a_decoder_drops_at_the_start_of_a_text(tmp_path):
    """As Llama's: each word begins with a mark, which is a blank, but not at the start."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, END: 2}, unk_token=END))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    write_config(tmp_path, model_type="gpt2", vocab_size=3)
    bpe.save(str(tmp_path / "tokenizer.json"))
    stream = load_tokenizer(tmp_path).stream()
    assert [stream.push(i) for i in (0, 1, 1, 0)] == ["a", " b", " b", " a"]


# What the library does not take.


def test_a_text_that_the_tokenizer_does_not_take_is_refused(tmp_path):
    """A bare Exception of the library's: a WordPiece that has no token for what it does not know."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, END: 1}, unk_token="none"))
    write_config(tmp_path, model_type="gpt2", vocab_size=2)
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not take 'Zz'"):
        load_tokenizer(tmp_path).encode("Zz")


def changed(folder, change):
    """The folder, with what `change` does to the fields of its tokenizer.json."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    change(saved)
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize("table", ["", "AAAA", "////////", "AAAAAAAA", "BAAAAAAA", "BAAAAA=="])
@pytest.mark.parametrize("nested", [True, False])
def test_a_table_of_characters_that_lies_about_its_size_is_refused(bpe_folder, tmp_path, capfd, table, nested):
    """The library would ask for gigabytes, and abort the process."""
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    if nested:
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    folder = changed(copied(bpe_folder, tmp_path, FILES[:1]), lambda saved: saved.update(normalizer=normalizer))
    with pytest.raises(ValueError, match="tokenizer.json: damaged"):
        load_tokenizer(folder)
    assert capfd.readouterr().err == ""


def test_a_file_that_the_library_panics_at_is_named(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1])
    changed(folder, lambda saved: saved["model"].update(continuing_subword_prefix="x" * 100))
    with pytest.raises(ValueError, match="tokenizer.json: damaged"):
        load_tokenizer(folder)


def test_merges_are_not_left_out_at_random(bpe_folder, tmp_path):
    folder = changed(copied(bpe_folder, tmp_path, FILES[:1]), lambda saved: saved["model"].update(dropout=0.9))
    text = "The quick brown fox" * 9
    assert load_tokenizer(folder).encode(text).tolist() == load_tokenizer(bpe_folder).encode(text).tolist()


# Texts that go on: SentencePiece puts a space before each text, and its decoder takes one off.


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return load_tokenizer(write_sentencepiece_base(tmp_path_factory.mktemp("pieces") / "a.gguf"))


def named(tokenizer, ids):
    return " ".join(tokenizer.vocabulary.bpe.id_to_token(int(i)) for i in ids)


words = st.text(alphabet=" ofcapme", min_size=1, max_size=12)


@given(words, st.data())
def test_a_text_that_is_continued_keeps_every_space(pieces, text, data):
    ids = pieces.begun(pieces.encode(text))
    cut = data.draw(st.integers(1, len(ids)))
    stream = pieces.stream(after=ids[:cut])
    written = "".join(map(stream.push, ids[cut:])) + stream.finish()
    assert pieces.decode(ids[:cut]) + written == pieces.decode(ids) == "<s> " + text


def test_a_text_of_its_own_begins_without_the_space_before_its_first_word(pieces):
    stream = pieces.stream()
    assert [stream.push(i) for i in pieces.encode("cap of")] == ["cap", " of"]


@given(words, words)
def test_an_answer_goes_on_after_its_prompt_with_no_space_but_its_own(pieces, prompt, answer):
    prompt_ids, answer_ids = pieces.encode_pair(prompt, answer)
    assert prompt_ids.tolist() == pieces.begun(pieces.encode(prompt)).tolist()
    assert pieces.decode([*prompt_ids, *answer_ids]) == f"<s> {prompt}{answer}"
    whole = pieces.begun(pieces.encode(prompt + answer)).tolist()
    if whole[: len(prompt_ids)] == prompt_ids.tolist():
        assert whole[len(prompt_ids) :] == answer_ids.tolist()


@pytest.mark.parametrize("prompt, answer, ids", [
    ("cap", " of", "<s> ▁cap | ▁of"),
    ("cap", "of", "<s> ▁cap | of"),
    # A token of the whole reaches over the end of these prompts.
    ("ca", "p of", "<s> ▁ca | p ▁of"),
    ("cap ", "of", "<s> ▁cap ▁ | of"),
    # After an added token this tokenizer puts a space.
    ("cap</s>", "of", "<s> ▁cap </s> | ▁of"),
    ("ca", "p</s>of", "<s> ▁ca | p </s> ▁of"),
    ("<s>cap", " of", "<s> ▁cap | ▁of"),
    ("é", "é", "<s> ▁ <0xC3> <0xA9> | <0xC3> <0xA9>"),
])  # fmt: skip
def test_the_ids_of_a_prompt_and_its_answer(pieces, prompt, answer, ids):
    assert " | ".join(named(pieces, part) for part in pieces.encode_pair(prompt, answer)) == ids


def test_what_was_typed_into_a_prompt_is_text_and_its_answer_still_goes_on(pieces):
    prompt_ids, answer_ids = pieces.encode_pair("cap</s>", "of</s>", prompt_is_typed=True)
    assert named(pieces, prompt_ids) == "<s> ▁cap <0x3C> <0x2F> <0x73> <0x3E>"
    assert named(pieces, answer_ids) == "of </s>"


@given(st.text(alphabet="The quick\n'1<|endoftext|>", max_size=12), st.text(alphabet="The quick\n'1", max_size=12))
def test_byte_level_prompts_and_answers_are_encoded_apart(bpe_folder, prompt, answer):
    bpe = load_tokenizer(bpe_folder)
    prompt_ids, answer_ids = bpe.encode_pair(prompt, answer)
    assert prompt_ids.tolist() == bpe.encode(prompt).tolist() and answer_ids.tolist() == bpe.encode(answer).tolist()
    # In the whole, "do" is no token.
    assert bpe.encode_pair("'", "dog")[1].tolist() == bpe.encode("dog").tolist() != bpe.encode("'dog")[1:].tolist()
    typed, _ = bpe.encode_pair(prompt, answer, prompt_is_typed=True)
    assert typed.tolist() == bpe.encode_text(prompt).tolist()


def in_front(bpe, kind):
    """Let a tokenizer put a space, or its mark, before each text, as models do."""
    from tokenizers import normalizers, pre_tokenizers

    if kind == "byte-level":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return
    if kind == "in a sequence":
        parts = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
        return
    bpe.normalizer = {"prepended": normalizers.Prepend("Ġ"), "stripped": normalizers.Strip()}[kind]


@pytest.mark.parametrize("kind", ["byte-level", "in a sequence", "prepended", "stripped"])
def test_whatever_a_tokenizer_does_before_a_text_it_does_not_do_before_an_answer(bpe_folder, tmp_path, kind):
    import tokenizers

    folder = copied(bpe_folder, tmp_path, FILES[:1])
    plain = load_tokenizer(folder)
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    in_front(bpe, kind)
    bpe.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert any(tokenizer.encode(t).tolist() != plain.encode(t).tolist() for t in ("quick", " quick"))
    # Together "The qui" and "ck" would share a token.
    prompt_ids, answer_ids = tokenizer.encode_pair("The qui", "ck brown")
    assert prompt_ids.tolist() == tokenizer.encode("The qui").tolist()
    assert answer_ids.tolist() == plain.encode("ck brown").tolist()
    assert tokenizer.encode_pair("The", " quick")[1].tolist() == plain.encode(" quick").tolist()


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_mark_of_a_words_beginning_comes_before_an_answer(scheme):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocab = {"▁": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "bc": 5, "?": 6}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")], unk_token="?", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    vocabulary = Vocabulary(bpe, [], "t.json")
    assert vocabulary.encode("b").tolist() == [0, 2]
    # In the whole, "bc" would take a part of the prompt, and one unknown token would stand for both é.
    cases = [("a", "b", [2]), ("b", "b", [2]), ("a", " b", [0, 2]), ("ab", "c", [4]), ("aé", "éb", [6, 2])]
    for prompt, answer, ids in cases:
        assert vocabulary.encode_answer(prompt, vocabulary.encode(prompt), answer).tolist() == ids


# What a text begins with.


def with_processor(bpe_folder, folder, processor):
    """A folder whose tokenizer.json has a post-processor."""
    import tokenizers

    copied(bpe_folder, folder, FILES[:1])
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.post_processor = processor(bpe)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def template_of(single, texts=(END,)):
    from tokenizers.processors import TemplateProcessing

    return lambda bpe: TemplateProcessing(single=single, special_tokens=[(t, bpe.token_to_id(t)) for t in texts])


def after_byte_level(bpe):
    """As Llama 3's."""
    from tokenizers import processors

    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template_of(f"{END} $A")(bpe)])


@pytest.mark.parametrize("processor, start", [
    (lambda bpe: None, ()),
    (template_of("$A", ()), ()),
    (template_of(f"{END} $A"), (0,)),
    (template_of(f"{END} $A {END}"), (0,)),
    (template_of(f"$A {END}"), ()),
    (template_of(f"{END} T $A", (END, "T")), "two"),
    (after_byte_level, (0,)),
])  # fmt: skip
def test_a_text_begins_with_what_the_post_processor_puts_before_it(bpe_folder, tmp_path, processor, start):
    tokenizer = load_tokenizer(with_processor(bpe_folder, tmp_path, processor))
    assert tokenizer.start == ((0, tokenizer.encode("T")[0]) if start == "two" else start)
    # Nothing but `begun` puts it there.
    assert tokenizer.decode(tokenizer.encode("The")) == "The"


@pytest.mark.parametrize("single, start", [("$A", ()), (f"{END} $A", (0,))])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_decides_whatever_is_said_beside_it(bpe_folder, tmp_path, single, start, adds):
    """As in transformers, which passes over add_bos_token where there is a tokenizer.json."""
    folder = with_processor(bpe_folder, tmp_path, template_of(single, (END,) if start else ()))
    assert load_tokenizer(settings(folder, add_bos_token=adds, bos_token="T")).start == start


@pytest.mark.parametrize("fields, begins", [
    ({}, False),
    ({"bos_token": "T"}, False),
    ({"add_bos_token": False, "bos_token": "T"}, False),
    ({"add_bos_token": None, "bos_token": "T"}, False),
    ({"add_bos_token": True, "bos_token": "T"}, True),
    ({"add_bos_token": True, "bos_token": {"content": "T"}}, True),
    ({"add_bos_token": True, "bos_token": None}, False),
])  # fmt: skip
def test_without_a_post_processor_the_settings_say_what_a_text_begins_with(bpe_folder, tmp_path, fields, begins):
    tokenizer = load_tokenizer(settings(copied(bpe_folder, tmp_path, FILES[1:]), **fields))
    assert tokenizer.start == (tuple(tokenizer.encode("T")) if begins else ())
    settings(tmp_path, add_bos_token=True)
    assert load_tokenizer(tmp_path).start == (0,)


@pytest.mark.parametrize("fields, told", [
    ({"add_bos_token": "yes", "bos_token": END}, "add_bos_token must be true or false, got 'yes'"),
    ({"add_bos_token": True, "bos_token": "<s>"}, "bos_token '<s>' is none of the 300 tokens"),
])  # fmt: skip
def test_a_beginning_that_cannot_be_told_is_refused(bpe_folder, tmp_path, fields, told):
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {told}"):
        load_tokenizer(settings(copied(bpe_folder, tmp_path, FILES[1:]), **fields))


@pytest.mark.parametrize("adds, start", [(None, (1,)), (True, (1,)), (False, ())])
def test_a_gguf_file_says_whether_texts_begin_with_bos(tmp_path, adds, start):
    assert load_tokenizer(write_sentencepiece_base(tmp_path / "a.gguf", ggml__add_bos_token=adds)).start == start


def test_a_token_behind_each_text_is_no_beginning_and_templates_know_the_one_before(tmp_path):
    path = write_sentencepiece_base(
        tmp_path / "a.gguf", ggml__add_bos_token=False, ggml__add_eos_token=True, chat_template="{{ bos_token }}x"
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.start == ()
    assert tokenizer.template.render([]) == "<s>x"


def test_a_beginning_is_never_put_there_twice(pieces):
    once = pieces.begun(pieces.encode("cap"))
    assert named(pieces, once) == "<s> ▁cap" and once.dtype == np.int64
    assert pieces.begun(once).tolist() == pieces.begun(pieces.encode("<s>cap")).tolist() == once.tolist()


def test_a_conversation_begins_as_its_template_has_it(tmp_path):
    turns = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    for number, (opening, n) in enumerate([("{{ bos_token }}", 1), ("", 0)]):
        path = write_sentencepiece_base(tmp_path / f"{number}.gguf", chat_template=opening + turns)
        ids = load_tokenizer(path).encode_chat([{"role": "user", "content": "cap"}])
        assert ids.tolist().count(1) == n
