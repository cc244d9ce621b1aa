"""Files of strangers: whatever JSON has in whatever place, the file is refused in words that name it, or is read.

And what is no file at all, in the place of any file, is refused at once.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from gguf_files import settings_of, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import hunt, small_gpt, small_llama, trained_adapter

from minilora import (
    Adam,
    init_ia3,
    init_prompt,
    load_adapter,
    load_method,
    load_model,
    save_adapter,
    save_method,
    save_model,
)
from minilora.cli import messages
from minilora.cli.inspect import inspect
from minilora.cli.main import main
from minilora.cli.messages import CONTROLS
from minilora.cli.playground import read_measured
from minilora.disk import adapter_file, chat_template, checks
from minilora.disk.base_files import companions_of, load_fields
from minilora.disk.gguf_fields import fields_of
from minilora.disk.gguf_file import read_gguf
from minilora.disk.gguf_vocabulary import read_vocabulary
from minilora.disk.models import load_model_config
from minilora.disk.tensor_file import DIGESTS, read_metadata
from minilora.disk.tokenizer import load_tokenizer
from minilora.training.checkpoint import Checkpoint
from minilora.training.progress import check_progress
from minilora.training.run_log import read_log
from minilora.training.text_files import read_rows

DIGITS = "9" * 400
# Values that JSON can hold, as texts: some that Python's own reader takes and others cannot use.
VALUES = st.sampled_from([
    "null", "true", "false", "0", "1", "2", "-1", "3", "1.5", "-0.0", "1e300", "1e999", "NaN", "-Infinity", DIGITS,
    f"-{DIGITS}", "9" * 299, "9" * 5000, f"{DIGITS}.5", "18446744073709551616", '""', '"a"', '"\\u001b[2J"',
    '"\\ud800"',
    '"\\u0000"', '"(.+)+x"', '"(?:(?:(?:a{999}){999}){999})"', '"\\u202e"',
    "[]", "[1]", '["a", "a"]', "[[]]", "[null]", "{}", '{"a": 1}', '{"": []}',
    '{"content": 3}', '{"a": {"a": {"a": null}}}', "[" * 60 + "]" * 60, "[" * 900 + "]" * 900,
    '{"a":' * 900 + "1" + "}" * 900,
    json.dumps("x" * 5000), "[0.5, 1.5]", '{"h.0.attn.q_proj": [0, 1]}', '[["a", 1]]',
])  # fmt: skip
HOLE = "a hole that no file has"


def places(value, path=()):
    """The paths of all values in a value of JSON, its own first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def spoilt(draw, value):
    """The text of a JSON value in which one value is another one, or absent, or one is there that was not."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(places(value)))
    if not path:
        return draw(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    how = draw(st.sampled_from(["replaced", "replaced", "replaced", "removed", "renamed", "added"]))
    if how == "removed":
        del holder[path[-1]]
    elif how == "renamed" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "x", "\x1b", "h.0"]))] = holder.pop(path[-1])
    elif how == "added" and isinstance(holder, list):
        holder.append(HOLE)
    else:
        holder[path[-1]] = HOLE
    return json.dumps(value).replace(json.dumps(HOLE), draw(VALUES))


def without_digests(path):
    """The metadata at `path`, but for the note by which any change would be told before it is looked at."""
    return {name: text for name, text in read_metadata(path).items() if name != DIGESTS}


def with_metadata(path, **changed):
    """The tensors at `path` again, with other metadata; without any if `changed` is empty."""
    metadata = {**without_digests(path), **changed} if changed else {"format": "pt"}
    save_file({name: array.copy() for name, array in load_file(path).items()}, path, metadata)


def as_others_write(folder, tensors):
    """The folder without the notes of this library, which would notice each change."""
    with_metadata(folder / tensors)
    return folder


CHAT = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bpe_folder):
    """A GPT-2 with a tokenizer, a Llama, adapters of all kinds, a checkpoint, a GGUF file."""
    home = tmp_path_factory.mktemp("strangers")
    gpt = small_gpt(vocab_size=300)
    save_model(gpt, home / "gpt2")
    save_model(small_llama(attention_bias=True), home / "llama")
    save_model(small_gpt(positions="rope"), home / "own")
    for name in ("gpt2", "llama", "own"):
        as_others_write(home / name, "model.safetensors")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, home / "gpt2")
    end = {"content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    for name, fields in {
        "tokenizer_config.json": {"eos_token": "<|endoftext|>", "bos_token": end, "add_bos_token": True,
                                  "added_tokens_decoder": {"0": end}, "model_max_length": 10**30,
                                  "chat_template": [{"name": "default", "template": CHAT}]},
        "special_tokens_map.json": {"eos_token": end, "unk_token": "<|endoftext|>"},
        "added_tokens.json": {"<|endoftext|>": 0}, "generation_config.json": {"eos_token_id": [0]},
    }.items():  # fmt: skip
        (home / "gpt2" / name).write_text(json.dumps(fields))
    adapter = trained_adapter(gpt, target_modules=["q_proj", "v_proj", "mlp.up_proj"])
    save_adapter(adapter, home / "noted")
    save_adapter(adapter, home / "peft")
    save_method(init_ia3(gpt, np.random.default_rng(0)), home / "ia3")
    save_method(init_prompt(gpt, 2, np.random.default_rng(0)), home / "prompt")
    for name in ("peft", "ia3", "prompt"):
        as_others_write(home / name, "adapter_model.safetensors")
    shutil.copytree(home / "gpt2", home / "sharded")
    weights = load_file(home / "sharded" / "model.safetensors")
    (home / "sharded" / "model.safetensors").rename(home / "sharded" / "one.safetensors")
    (home / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "one.safetensors")})
    )
    checkpoint = the_checkpoint(home / "checkpoint")
    checkpoint.take_snapshot(PROGRESS)
    checkpoint.save()
    as_others_write(home / "checkpoint", "checkpoint.safetensors")
    write_gguf(home / "a.gguf")
    return home


IDENTITY = {"settings": {"lr": 0.5, "target": ["q_proj"]}, "base": {"wte.weight": "0123"}}
PROGRESS = {"before": 4.0, "losses": [2.5, 2.25, 2.0], "tokens": 30, "seconds": 0.5,
            "evaluations": [[2, 3.5], [3, 3.0]], "norms": [1.0, 0.5, 0.25]}  # fmt: skip


def the_checkpoint(folder):
    adapter = trained_adapter(small_gpt())
    adam = Adam(adapter.parameters())
    adam.steps = 3
    check = lambda progress, steps: check_progress(progress, steps, planned=3, is_measured=True, eval_every=2)
    return Checkpoint(folder, IDENTITY, adapter, adam, check=check)


def told(folder, base=None):
    inspect(folder, base, lambda line: None)


def silent(receipt):
    pass


# {what is spoilt: (folder, file, what reads it)}
BASE = small_gpt(vocab_size=300)
READERS = {
    "config of gpt-2": ("gpt2", "config.json", lambda folder: (load_model(folder), load_model_config(folder))),
    "config of a llama": ("llama", "config.json", lambda folder: (load_model(folder), load_model_config(folder))),
    "config of our own": ("own", "config.json", load_model),
    "config, its tokens": ("gpt2", "config.json", load_tokenizer),
    "tokenizer settings": ("gpt2", "tokenizer_config.json", load_tokenizer),
    "special tokens": ("gpt2", "special_tokens_map.json", load_tokenizer),
    "added tokens": ("gpt2", "added_tokens.json", load_tokenizer),
    "generation": ("gpt2", "generation_config.json", load_tokenizer),
    "index of shards": ("sharded", "model.safetensors.index.json", load_model),
    "adapter": ("peft", "adapter_config.json", lambda folder: load_adapter(folder, BASE, say=silent)),
    "adapter, inspected": ("peft", "adapter_config.json", told),
    "adapter on its base": ("peft", "adapter_config.json", lambda folder: told(folder, folder.parent / "gpt2")),
    "ia3": ("ia3", "adapter_config.json", lambda folder: load_method(folder, BASE, say=silent)),
    "ia3, inspected": ("ia3", "adapter_config.json", told),
    "prompt": ("prompt", "adapter_config.json", lambda folder: load_method(folder, BASE, say=silent)),
    "checkpoint": ("checkpoint", "checkpoint.json", lambda folder: the_checkpoint(folder).restore()),
}


@pytest.fixture(scope="module")
def spare(tmp_path_factory):
    """A folder in which a folder is spoilt, beside the base that it belongs to."""
    return tmp_path_factory.mktemp("spoilt")


def only_named_errors(read, folder):
    """`read(folder)` gives what it gives, or a ValueError or FileNotFoundError that names a file in the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), str(error)


def restored(home, spare, folder):
    if not (spare / "gpt2").exists():
        shutil.copytree(home / "gpt2", spare / "gpt2")
    if not (spare / folder).exists():
        shutil.copytree(home / folder, spare / folder)
    return spare / folder


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_any_value_in_any_place_of_a_file_is_read_or_refused_by_name(folders, spare, name, data):
    folder, file, read = READERS[name]
    target = restored(folders, spare, folder)
    text = (folders / folder / file).read_text()
    try:
        (target / file).write_text(data.draw(spoilt(json.loads(text))))
        only_named_errors(read, target)
    finally:
        (target / file).write_text(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e400"])
@pytest.mark.parametrize("name", [
    "config of gpt-2", "config of a llama", "config of our own", "adapter", "ia3", "prompt", "checkpoint",
])  # fmt: skip
def test_no_number_that_is_used_may_be_infinite_or_none(folders, spare, name, number):
    folder, file, read = READERS[name]
    target = restored(folders, spare, folder)
    text = (folders / folder / file).read_text()
    try:
        for path in places(json.loads(text)):
            value = json.loads(text)
            holder = value
            for key in path[:-1]:
                holder = holder[key]
            # n_ctx is what n_positions is, and not read.
            if path and path[-1] != "n_ctx" and type(holder[path[-1]]) in (int, float):
                holder[path[-1]] = HOLE
                (target / file).write_text(json.dumps(value).replace(json.dumps(HOLE), number))
                with pytest.raises(ValueError, match=re.escape(str(target))):
                    pytest.fail(f"{path} of {number} is read as {read(target)}")
    finally:
        (target / file).write_text(text)


NOTES = ["minilora.adapter", "minilora.base", "minilora.stored", "minilora.config", "minilora.rows", DIGESTS]
SAMPLES = {"minilora.stored": '{"wte.weight": "Q4_1"}', "minilora.rows": '{"wte.weight": 11}'}


@pytest.mark.parametrize("note", NOTES)
@given(data=st.data())
def test_any_value_in_any_place_of_our_notes_is_read_or_refused_by_name(folders, spare, note, data):
    target = restored(folders, spare, "noted")
    path = folders / "noted" / "adapter_model.safetensors"
    whole = json.loads(read_metadata(path).get(note) or SAMPLES[note])
    text = data.draw(spoilt(whole))
    shutil.copy(path, target)
    with_metadata(target / path.name, **{note: text})
    only_named_errors(lambda folder: load_adapter(folder, BASE, say=silent), target)
    only_named_errors(told, target)


@given(st.data())
def test_any_value_in_any_setting_of_a_gguf_file_is_read_or_refused_by_name(folders, data):
    path = folders / "a.gguf"
    given_settings, stored = read_gguf(path)
    name = data.draw(st.sampled_from([*settings_of(), "llama.rope.scaling.factor", "llama.rope.scaling.type",
                                      "llama.attention.sliding_window", "general.alignment"]))  # fmt: skip
    value = data.draw(st.sampled_from([
        True, 0, -1, 2**63, 2**64 - 1, 1.5, float("nan"), float("inf"), "", "llama", [], ["a"], ["a", "a"], "\x1b",
        np.array([], "u4"), np.array([1, 2], "u4"), np.array([np.nan], "f4"), np.array([2**63], "u8"),
    ]))  # fmt: skip

    def read(path):
        changed = {**given_settings, name: value}
        fields_of(path, changed, stored)
        return read_vocabulary(path, changed)

    only_named_errors(read, path)


RECORDS = [{"run": "a", "step": 1, "loss": 2.0, "lr": 0.1, "tokens": 8, "seconds": 0.5},
           {"run": "a", "step": 1, "eval_loss": 2.0, "tokens": 8, "seconds": 0.5}]  # fmt: skip
ROWS = [{"prompt": "a", "answer": "b"}, {"messages": [{"role": "user", "content": "a"},
                                                      {"role": "assistant", "content": "b"}]}]  # fmt: skip
MEASURED = {"lab": "rank", "quick": False, "setting": "a", "seeds": [0], "base": "tiny", "machine": {"cpu": "x"},
            "rows": [{"method": "lora", "r": 1, "lr": 0.1, "loss": [1.0], "share_of_full": [0.5]}]}  # fmt: skip
LINES = {"log": (RECORDS[0], read_log), "evaluation": (RECORDS[1], read_log), "row": (ROWS[0], None),
         "conversation": (ROWS[1], None), "measured": (MEASURED, read_measured)}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
@given(data=st.data())
def test_any_value_in_any_place_of_a_line_is_read_or_refused_by_name(spare, name, data):
    line, read = LINES[name]
    path = spare / "lines.jsonl"
    path.write_text(data.draw(spoilt(line)) + "\n")
    only_named_errors(read or (lambda path: read_rows(path, silent)), path)


# The program: whatever a file holds, what is printed is some lines that a terminal shows and does not obey.

MARK = "\\u001b]0;a\\u0007\\u009b2J\\u202e\\u0000\\u2028\\ud800"
COMMANDS = {
    "inspect gpt-2": ("gpt2", "config.json", lambda folder: ["inspect", folder]),
    "count": ("llama", "config.json", lambda folder: ["count", "--base", folder, "--r", "2"]),
    "inspect": ("peft", "adapter_config.json", lambda folder: ["inspect", folder]),
    "inspect on its base": ("peft", "adapter_config.json",
                            lambda folder: ["inspect", folder, "--base", folder.parent / "gpt2"]),
    "generate": ("gpt2", "tokenizer_config.json",
                 lambda folder: ["generate", "--base", folder, "--prompt", "The", "--max-new-tokens", "1"]),
    "generate, tokenizer": ("gpt2", "tokenizer.json",
                            lambda folder: ["generate", "--base", folder, "--prompt", "The", "--max-new-tokens", "1"]),
    "compare": ("peft", "adapter_config.json",
                lambda folder: ["compare", folder.parent / "gpt2", folder, "--data", folder.parent / "a.txt"]),
    "merge": ("peft", "adapter_config.json", lambda folder: ["merge", "--base", folder.parent / "gpt2", "--adapter",
                                                             folder, "--out", folder.parent / "out"]),
}  # fmt: skip
marks = st.sampled_from([f'"{MARK}"', f'["{MARK}"]', f'{{"{MARK}": 1}}', f'{{"{MARK}": "{MARK}"}}'])


@st.composite
def marked(draw, value):
    """The text of a JSON value in which a name or a text is one that a terminal would obey."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from([path for path in places(value) if path]))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw(st.booleans()):
        holder[HOLE] = holder.pop(path[-1]) if draw(st.booleans()) else 1
        return json.dumps(value).replace(HOLE, MARK)
    holder[path[-1]] = HOLE
    return json.dumps(value).replace(json.dumps(HOLE), draw(marks))


def printed(words):
    """(exit code, what the program prints on stdout, on stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, words)))
    return code, out.getvalue(), err.getvalue()


def is_calm(name, target, words):
    code, out, err = printed(words)
    assert code in (0, 1, 2) and "Traceback" not in err
    # What a model writes goes into a pipe as it is.
    shown = err if name.startswith("generate") else out + err
    assert not CONTROLS.search(shown)
    assert code == 0 or (len(err.splitlines()) <= 2 and str(target) in err)


def prepared(folders, spare, name):
    """(folder to be spoilt, file in it, the words of the command)"""
    folder, file, words = COMMANDS[name]
    restored(folders, spare, "gpt2")
    (spare / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    shutil.rmtree(spare / "out", ignore_errors=True)
    target = restored(folders, spare, folder)
    return target, target / file, words(target)


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
def test_no_terminal_obeys_what_a_file_says(folders, spare, name, data):
    target, path, words = prepared(folders, spare, name)
    text = path.read_text()
    try:
        path.write_text(data.draw(marked(json.loads(text))))
        is_calm(name, target, words)
    finally:
        path.write_text(text)


@given(data=st.data())
def test_no_terminal_obeys_what_our_notes_or_names_say(folders, spare, data):
    target = restored(folders, spare, "noted")
    path = folders / "noted" / "adapter_model.safetensors"
    mark = json.loads(f'"{MARK[:-6]}"')
    arrays, metadata = {name: array.copy() for name, array in load_file(path).items()}, without_digests(path)
    note = data.draw(st.sampled_from([*NOTES, "a tensor"]))
    if note == "a tensor":
        name = data.draw(st.sampled_from(sorted(arrays)))
        arrays[name.replace("c_attn", mark)] = arrays.pop(name)
    else:
        metadata[note] = data.draw(marked(json.loads(read_metadata(path).get(note) or SAMPLES[note])))
    save_file(arrays, target / path.name, metadata)
    is_calm("inspect", target, ["inspect", target])


# What is no file.


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def silent_device(path):
    path.symlink_to("/dev/null")


def door(path):
    # The path of a socket is short.
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


NO_FILES = {"a pipe": pipe, "a folder": Path.mkdir, "a socket": door, "a device": device,
            "a device, empty": silent_device}  # fmt: skip
FILES = {
    "config": ("gpt2", "config.json", load_model), "tensors": ("gpt2", "model.safetensors", load_model),
    "index": ("sharded", "model.safetensors.index.json", load_model),
    "shard": ("sharded", "one.safetensors", load_model), "fields": ("gpt2", "config.json", load_fields),
    "tokenizer": ("gpt2", "tokenizer.json", load_tokenizer),
    "settings": ("gpt2", "tokenizer_config.json", load_tokenizer),
    "map": ("gpt2", "special_tokens_map.json", load_tokenizer),
    "added": ("gpt2", "added_tokens.json", load_tokenizer),
    "generation": ("gpt2", "generation_config.json", load_tokenizer),
    "template": ("gpt2", "chat_template.jinja", load_tokenizer),
    "adapter": ("peft", "adapter_config.json", told), "adapter's tensors": ("peft", "adapter_model.safetensors", told),
    "checkpoint": ("checkpoint", "checkpoint.json", lambda folder: the_checkpoint(folder).restore()),
    "gguf": ("peft", "a.gguf", lambda folder: load_model(folder / "a.gguf")),
    "fields alone": ("peft", "a.json", lambda folder: load_model_config(folder / "a.json")),
    "data": ("peft", "a.jsonl", lambda folder: read_rows(folder / "a.jsonl", silent)),
    "log": ("peft", "a.jsonl", lambda folder: read_log(folder / "a.jsonl")),
    "measured": ("peft", "a.json", lambda folder: read_measured(folder / "a.json")),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_at_once(folders, tmp_path, name, kind):
    folder, file, read = FILES[name]
    if kind == "a folder" and name in ("gguf", "fields alone"):
        pytest.skip("a folder of any name is read as the folder of a model")
    shutil.copytree(folders / folder, tmp_path / folder)
    path = tmp_path / folder / file
    path.unlink(missing_ok=True)
    NO_FILES[kind](path)
    with pytest.raises(ValueError, match=f"{file} is {kind.partition(',')[0]}, where a file is needed"):
        read(tmp_path / folder)


# Links.


def test_a_folder_of_links_into_the_cache_of_hugging_face_is_a_folder_like_any(folders, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for i, path in enumerate(sorted((folders / "gpt2").iterdir())):
        shutil.copy(path, blobs / f"blob{i}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{i}")
    save_model(load_model(snapshot), tmp_path / "out", like=snapshot)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folders / "gpt2" / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.model", "merges.txt", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_a_folder_is_refused_and_one_within_it_is_followed(folders, tmp_path, name):
    base = shutil.copytree(folders / "gpt2", tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "inside").write_text("inside")
    path = base / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(base / "inside")
    assert companions_of(base, tmp_path / "out")[name] == path
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret, which is not in .*take the link away"):
        save_model(load_model(base), tmp_path / "out", like=base)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# The planted bugs, each of which the tests above find.


def test_a_program_that_prints_what_it_reads_is_noticed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "visible", lambda text: text)
    target, path, words = prepared(folders, tmp_path, "inspect")
    whole = json.loads(path.read_text())

    def holds(text):
        path.write_text(text)
        is_calm("inspect", target, words)

    with pytest.raises((AssertionError, UnicodeEncodeError)):
        hunt(marked(whole), holds, examples=400)


def columns_are_anything(patch):
    patch.setattr(adapter_file, "_noted_columns", lambda note: note or {})


def any_number_is_read(patch):
    patch.setattr(checks, "MOST_DIGITS", 10**9)


def a_token_always_has_a_content(patch):
    content = lambda token: token if isinstance(token, str) else token["content"]
    texts = lambda settings, where: {name: content(token) for name, token in settings.items() if "_token" in name}
    patch.setattr(chat_template, "special_texts", texts)


def a_progress_is_always_one(patch):
    patch.setattr(Checkpoint, "_check_progress", lambda self, progress, steps: progress["losses"].append(steps))


def note_in(folder):
    return json.loads(read_metadata(folder / "adapter_model.safetensors")["minilora.adapter"])


BUGS = {columns_are_anything: None, any_number_is_read: "config of gpt-2",
        a_token_always_has_a_content: "special tokens", a_progress_is_always_one: "checkpoint"}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_value_that_is_taken_for_granted_is_noticed(folders, tmp_path, monkeypatch, bug):
    if BUGS[bug] is None:
        folder, file, read = "noted", "adapter_model.safetensors", told
        whole = note_in(folders / folder)
        write = lambda path, text: with_metadata(path, **{"minilora.adapter": text})
    else:
        folder, file, read = READERS[BUGS[bug]]
        whole = json.loads((folders / folder / file).read_text())
        write = Path.write_text
    target = restored(folders, tmp_path, folder)
    bug(monkeypatch)

    def holds(text):
        write(target / file, text)
        only_named_errors(read, target)

    with pytest.raises((AttributeError, KeyError, OverflowError, TypeError, AssertionError)):
        hunt(spoilt(whole), holds, examples=400)
