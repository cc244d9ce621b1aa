"""A tokenizer.json of anybody's: nothing in it ends this process, or keeps it waiting."""

import copy
import json
import subprocess
import sys

import pytest

from minilora.disk import tokenizer_file
from minilora.disk.gguf_vocabulary import SPLITS
from minilora.disk.tokenizer_file import is_ordinary, read_tokenizer_file

CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA"}


def fields_in(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def written(folder, fields):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def no_trial(monkeypatch):
    """No process is started."""

    def refuse(*command, **how):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


SPLIT = {"type": "Split", "pattern": {"Regex": SPLITS["qwen2"]}, "behavior": "Isolated", "invert": False}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
          {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}  # fmt: skip
ORDINARY = {
    "as it is": {}, "template": {"post_processor": TEMPLATE | {"pair": TEMPLATE["single"]}},
    "qwen": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        SPLIT, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}},
    "llama": {"normalizer": LLAMA2, "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}},
}  # fmt: skip


@pytest.mark.parametrize("changes", ORDINARY.values(), ids=ORDINARY)
def test_what_is_ordinary_is_read_without_another_process(bpe_folder, tmp_path, no_trial, changes):
    fields = fields_in(bpe_folder) | changes
    assert is_ordinary(fields)
    read_tokenizer_file(written(tmp_path, fields)).encode("The fox")


RARE = {
    "prefix": {"model": {"continuing_subword_prefix": "a"}}, "suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "charsmap": {"normalizer": CHARSMAP}, "nested": {"normalizer": {"type": "Sequence", "normalizers": [CHARSMAP]}},
    "another kind": {"model": {"type": "Unigram"}}, "no kind": {"model": {"type": None}},
    "an expression": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+b"}}},
    "an expression in a normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}},
    "a token that is not explained": {"post_processor": TEMPLATE | {"special_tokens": {}}},
    "a long text": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**5}},
    "a large number": {"decoder": {"type": "Strip", "content": " ", "start": 2**62, "stop": 0}},
    "an id": {"model": {"vocab": {"a": 2**40}}},
    "an id of an added token": {"added_tokens": [{"content": "a", "id": -1}]},
    "ids": {"model": {"vocab": [["a", 1]]}}, "merges": {"model": {"merges": [["a", "b", "c"]]}},
}  # fmt: skip


def changed(fields, changes):
    fields = copy.deepcopy(fields)
    for name, change in changes.items():
        fields[name] = fields[name] | change if name == "model" else change
    return fields


@pytest.mark.parametrize("changes", RARE.values(), ids=RARE)
def test_what_is_rare_is_not_ordinary(bpe_folder, changes):
    assert not is_ordinary(changed(fields_in(bpe_folder), changes))


# The second merge cuts a letter of two bytes in half while the library tidies up after the first.
TOKENS = {"h": 0, "e": 1, "he": 2, "Ġ": 3, "ĠĠ": 4}
ENDS_A_PROCESS = {"vocab": TOKENS, "merges": [["h", "e"], ["Ġ", "Ġ"]], "continuing_subword_prefix": "a"}


@pytest.mark.parametrize("prefix", ["a", "\0"])
def test_a_file_that_ends_a_process_is_refused_by_name(bpe_folder, tmp_path, prefix):
    model = ENDS_A_PROCESS | {"continuing_subword_prefix": prefix}
    path = written(tmp_path, changed(fields_in(bpe_folder), {"model": model}))
    with pytest.raises(ValueError, match="tokenizer.json: damaged, or of another kind: the library that reads it ends"):
        read_tokenizer_file(path)


def test_that_file_does_end_a_process(bpe_folder, tmp_path):
    """The planted bug: the file is read here, without a trial."""
    path = written(tmp_path, changed(fields_in(bpe_folder), {"model": ENDS_A_PROCESS}))
    code = f"import tokenizers; tokenizers.Tokenizer.from_file({str(path)!r})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


def test_a_start_that_the_library_panics_at_is_told_in_one_line(bpe_folder, tmp_path, capfd):
    fields = changed(fields_in(bpe_folder), {"post_processor": TEMPLATE | {"special_tokens": {}}})
    with pytest.raises(ValueError, match="tokenizer.json: damaged, or of another kind: "):
        read_tokenizer_file(written(tmp_path, fields))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("code, complaint", [
    ("while True: pass", "does not come back within 1 s"), ("import os; os.abort()", "ends the whole process"),
    ("import os; os._exit(3)", r"ends the whole process \(exit code 3\)"), ("raise KeyError('x')", "'x'"),
    ("bytearray(1 << 40)", "MemoryError"),
], ids=["hangs", "aborts", "exits", "raises", "takes all memory"])  # fmt: skip
def test_whatever_happens_in_the_other_process_is_told(bpe_folder, tmp_path, monkeypatch, code, complaint):
    monkeypatch.setattr(tokenizer_file, "PROCESSOR_SECONDS", 1)
    head, line, tail = tokenizer_file._TRIAL.partition("    bpe = Tokenizer.from_buffer(content)\n")
    assert line
    monkeypatch.setattr(tokenizer_file, "_TRIAL", f"{head}    {code}\n{line}{tail}")
    rare = {"pre_tokenizer": SPLIT | {"pattern": {"Regex": f"a|{code}"}}}
    with pytest.raises(ValueError, match=f"tokenizer.json: damaged, or of another kind: .*{complaint}"):
        read_tokenizer_file(written(tmp_path, changed(fields_in(bpe_folder), rare)))


def test_that_no_process_can_be_started_is_no_fault_of_the_file(bpe_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    path = written(tmp_path, changed(fields_in(bpe_folder), {"normalizer": CHARSMAP}))
    with pytest.raises(FileNotFoundError, match="no python was to try .*tokenizer.json in a process of") as error:
        read_tokenizer_file(path)
    assert "damaged" not in str(error.value)


# A table of so many bytes that a process could make it, and has not.
SHORT = {"type": "Precompiled", "precompiled_charsmap": "AAAAEAAAAAAA"}


@pytest.mark.parametrize("key", ["precompiled_charsmap", r"precompiled\u005fcharsmap", r"\u0070recompiled_charsmap"])
@pytest.mark.parametrize("place", [
    SHORT, {"type": "Sequence", "normalizers": [{"type": "NFC"}, SHORT]},
    {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [SHORT]}]},
], ids=["alone", "in a list", "in a list in a list"])  # fmt: skip
def test_a_short_table_of_characters_is_refused_without_a_process(bpe_folder, tmp_path, no_trial, place, key):
    path = written(tmp_path, changed(fields_in(bpe_folder), {"normalizer": place}))
    path.write_text(path.read_text().replace('"precompiled_charsmap"', f'"{key}"'))
    with pytest.raises(ValueError, match="its precompiled_charsmap .* table of 268435456 bytes, and has 9 in all"):
        read_tokenizer_file(path)


def test_a_key_that_comes_twice_is_refused(bpe_folder, tmp_path):
    """Python takes the last one: what was looked at would not be what the library reads."""
    text = (bpe_folder / "tokenizer.json").read_text()
    path = tmp_path / "tokenizer.json"
    path.write_text(text.replace('"model":', '"model": {"type": "Unigram"}, "model":', 1))
    with pytest.raises(ValueError, match="tokenizer.json: damaged.*the key 'model' comes twice"):
        read_tokenizer_file(path)
