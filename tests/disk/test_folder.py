"""Tensors on disk: what is saved comes back to the bit or is refused; a stop at any moment leaves one whole save."""

import ast
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from strategies import (
    ODD_NUMBERS,
    bits,
    same_adapter,
    seeds,
    shapes,
    small_gpt,
    trained_adapter,
)

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    init_adapter,
    load_adapter,
    load_model,
    save_adapter,
    save_model,
)
from minilora.disk.folder import NAMES, UNFINISHED, check_unused, load_folder, new_folder, save_folder
from minilora.disk.lock import LOCK
from minilora.disk.tensor_file import DIGESTS

ROOT = Path(__file__).resolve().parents[2]
TENSORS, CONFIG = "things.safetensors", "things.json"


def drawn(seed=0, n=3):
    """A few arrays of several shapes."""
    rng = np.random.default_rng(seed)
    return {f"t.{i}": rng.standard_normal((2, i + 1)).astype("f4") for i in range(n)}


def write(folder, seed=0, n=3, **config):
    save_folder(folder, TENSORS, drawn(seed, n), CONFIG, {"seed": seed, **config})


def read(folder):
    return load_folder(folder, TENSORS, CONFIG)


def seed_of(folder):
    """Which save lies in `folder`: its tensors and its configuration must be of one and the same."""
    config, tensors, _ = read(folder)
    assert same_arrays(tensors, drawn(config["seed"], len(tensors)))
    return config["seed"]


def same_arrays(a, b):
    exact = lambda arrays: {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in arrays.items()}
    return exact(a) == exact(b)


def same_folder(found, expected):
    return found[0] == expected[0] and same_arrays(found[1], expected[1])


# Round trips.


json_values = st.none() | st.booleans() | st.integers() | st.text("aé\n\"", max_size=3)


@given(st.lists(st.tuples(shapes(), st.sampled_from(["float32", "float64"])), min_size=1, max_size=4), seeds,
       st.dictionaries(st.text("bß", max_size=3), json_values, max_size=3))  # fmt: skip
def test_a_folder_comes_back_to_the_bit(kinds, seed, config):
    rng, arrays = np.random.default_rng(seed), {}
    for i, (shape, dtype) in enumerate(kinds):
        array = np.asarray(rng.standard_normal(shape)).astype(dtype)
        odd = ODD_NUMBERS[np.abs(ODD_NUMBERS) < np.finfo(dtype).max]
        array.reshape(-1)[: len(odd)] = odd[: array.size]
        arrays[f"{i}.x"] = array.reshape(1) if array.ndim == 0 else array
    with tempfile.TemporaryDirectory() as folder:
        save_folder(folder, TENSORS, arrays, CONFIG, config, {"more": "text"})
        found, tensors, metadata = read(folder)
    assert found == config and same_arrays(tensors, arrays)
    assert metadata["format"] == "pt" and metadata["more"] == "text"


def test_arrays_that_are_views_are_saved_as_what_they_show(tmp_path):
    x = np.arange(12, dtype="f4").reshape(3, 4)
    views = {"turned": x.T, "every other": x[:, ::2], "backwards": x[::-1]}
    save_folder(tmp_path, TENSORS, views, CONFIG, {})
    assert same_arrays(read(tmp_path)[1], views)


def test_a_folder_is_made_with_its_parents_and_holds_two_files(tmp_path):
    write(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [CONFIG, TENSORS]


def test_saving_over_an_older_save_leaves_nothing_of_it(tmp_path):
    write(tmp_path, 1, n=5, only_then=True)
    write(tmp_path, 2, n=2)
    config, tensors, _ = read(tmp_path)
    assert config == {"seed": 2} and tensors.keys() == {"t.0", "t.1"}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_metadata_have_the_format_that_other_readers_ask_for_and_the_configuration(tmp_path):
    write(tmp_path, 3)
    with safe_open(tmp_path / TENSORS, framework="np") as file:
        metadata = file.metadata()
    assert metadata.pop(DIGESTS)
    assert metadata == {"format": "pt", "minilora.config": (tmp_path / CONFIG).read_text()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_who_may_read_one_of_the_files_may_read_the_other(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path)
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in (TENSORS, CONFIG)} == {0o640}


# Missing and damaged files.


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"nowhere.*{TENSORS} does not exist.*needs {TENSORS} and {CONFIG}"):
        read(tmp_path / "nowhere")
    for name in (TENSORS, CONFIG):
        write(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} does not exist"):
            read(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    write(tmp_path, 7, more=["x"] * 5)
    for name, shown in ((TENSORS, "damaged"), (CONFIG, "not JSON")):
        whole = (tmp_path / name).read_bytes()
        for length in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{re.escape(name)}.*{shown}"):
                read(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert seed_of(tmp_path) == 7


def test_garbage_is_noticed(tmp_path):
    write(tmp_path)
    path, rng = tmp_path / TENSORS, np.random.default_rng(0)
    whole = path.read_bytes()
    for garbage in (b"", b"\0" * 64, rng.bytes(500), b"\xff" * 8 + whole[8:], whole + b"\0", b"PK\x03\x04" + whole):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=rf"{TENSORS} is damaged"):
            read(tmp_path)


@pytest.mark.parametrize("content, shown", [
    (b"[1, 2]", "expected an object.*list"), (b'"text"', "expected an object.*str"), (b"null", "expected an object"),
    (b"7", "expected an object.*int"), (b"", "not JSON"), (b"{", "not JSON"), (b"{'r': 2}", "not JSON"),
    (b"\xff\xfe{}", "not JSON"), (b"[" * 100_000, "not JSON"), (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
], ids=["a list", "text", "null", "a number", "empty", "cut", "not quoted", "not utf-8", "too deep",
        "too long"])  # fmt: skip
def test_a_configuration_that_is_no_object_is_refused(content, shown, tmp_path):
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{shown}"):
        read(tmp_path)


@given(st.data())
def test_any_change_of_any_byte_is_refused_or_changes_nothing(data):
    """Byte flips, cuts and inserts: a ValueError, or the very same configuration, names, shapes and values."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder, 5)
        expected = read(folder)
        name = data.draw(st.sampled_from([TENSORS, CONFIG]))
        whole = (folder / name).read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        spoilt = data.draw(st.sampled_from([
            whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :],
            whole[:at] + whole[at + 1 :],
            whole[:at] + b" " + whole[at:],
            whole[:at] + data.draw(st.binary(max_size=8)) + whole[at:],
        ]))  # fmt: skip
        (folder / name).write_bytes(spoilt)
        try:
            config, tensors, _ = read(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            return
    assert same_folder((config, tensors), expected) or without_a_note(folder, expected)


def without_a_note(folder, expected):
    """Was the name of the note on digests hit? Then the file is as one of another program: nothing vouches for it."""
    with safe_open(folder / TENSORS, framework="np") as file:
        return DIGESTS not in file.metadata() and same_arrays(read(folder)[1], expected[1])


# Two files of one save.


def test_files_of_two_saves_are_not_mixed(tmp_path):
    write(tmp_path / "a", 1, r=2)
    write(tmp_path / "b", 1, r=3, s=None)
    os.replace(tmp_path / "b" / TENSORS, tmp_path / "a" / TENSORS)
    with pytest.raises(ValueError, match=r"two different saves, or one was edited \(r: 3 and 2\); put the first"):
        read(tmp_path / "a")


@pytest.mark.parametrize("edit, shown", [
    (lambda c: c.update(seed=2), "seed: 1 and 2"), (lambda c: c.pop("seed"), "seed: 1 and None"),
], ids=["changed", "taken out"])  # fmt: skip
def test_an_edited_configuration_is_noticed(edit, shown, tmp_path):
    write(tmp_path, 1)
    config = json.loads((tmp_path / CONFIG).read_text())
    edit(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"two different saves.*{shown}"):
        read(tmp_path)


def test_what_people_write_beside_what_was_saved_is_theirs(tmp_path):
    """A note in a field of its own, or where the base has been moved to: no program computes with them."""
    write(tmp_path, 1, base_model_name_or_path="here")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "there", "note": "x"}))
    assert read(tmp_path)[0]["note"] == "x" and read(tmp_path)[0]["base_model_name_or_path"] == "there"


@pytest.mark.parametrize("held", ["adapter_config.json", "adapter_model.bin", "tokenizer.json", "notes.txt"])
def test_a_folder_that_holds_anything_is_not_written_into(held, tmp_path):
    check_unused(tmp_path / "new")
    check_unused(tmp_path)
    (tmp_path / held).write_text("mine")
    with pytest.raises(ValueError, match=f"is not empty: it holds {held}; choose another folder"):
        check_unused(tmp_path)
    check_unused(tmp_path, ignore=[held])
    with pytest.raises(NotADirectoryError, match="is a file; choose a folder"), new_folder(tmp_path / held):
        pass


@pytest.mark.parametrize("left", [UNFINISHED, LOCK])
def test_what_a_killed_run_left_is_in_nobodys_way(left, tmp_path):
    if left == LOCK:
        (tmp_path / left).write_text("process 1 on a machine that was switched off")
    else:
        (tmp_path / left).mkdir()
        (tmp_path / left / TENSORS).write_bytes(b"half a file")
    with new_folder(tmp_path):
        write(tmp_path, 3)
    assert seed_of(tmp_path) == 3 and sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


class Killed(BaseException):
    """Nothing runs after it."""


@pytest.mark.parametrize("when", range(6))
def test_a_new_folder_whose_save_was_killed_is_written_again_or_is_whole(when, tmp_path, monkeypatch):
    """At each rename: of the list of names, two copies, the tensors, the configuration; and after them."""
    beside = {"inside/a.txt": b"a", "b.txt": b"b"}
    real, renames = os.replace, []

    def replace(source, target):
        if len(renames) == when:
            raise Killed
        renames.append(real(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(shutil, "rmtree", lambda *given, **how: None if len(renames) < 5 else 1 / 0)
        with pytest.raises((Killed, ZeroDivisionError)):
            save_folder(tmp_path, TENSORS, drawn(3, 2), CONFIG, {"seed": 3}, beside=beside)
    if when < 4:
        with new_folder(tmp_path):
            save_folder(tmp_path, TENSORS, drawn(3, 2), CONFIG, {"seed": 3}, beside=beside)
    else:
        with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path):
            pass
    assert seed_of(tmp_path) == 3
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == sorted(["inside", *beside, TENSORS, CONFIG])


@pytest.mark.parametrize("noted", [
    "no JSON", "[]", '{"names": 1, "new": []}', '{"names": ["../a"], "new": ["../a"]}', '{"names": [1], "new": [1]}',
])  # fmt: skip
def test_a_list_of_names_that_no_save_wrote_makes_nothing_ours(noted, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "a" / NAMES).write_text(noted)
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty: it holds mine.txt;"), new_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "mine.txt").exists()


@pytest.mark.parametrize("name", [".unfinished", ".checkpoint.done", "unfinished"])
def test_folders_of_the_users_own_are_not_taken_for_ours(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    write(tmp_path, 1)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"


def test_another_spelling_of_the_same_configuration_is_the_same_save(tmp_path):
    write(tmp_path, 4, b=1, a=2)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(dict(sorted(config.items()))))
    assert seed_of(tmp_path) == 4


@pytest.mark.parametrize("metadata, shown", [("{", "not JSON"), ("[1]", "expected an object"), ("", "not JSON")])
def test_a_damaged_copy_of_the_configuration_is_refused(metadata, shown, tmp_path):
    write(tmp_path)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, {"minilora.config": metadata})
    with pytest.raises(ValueError, match=rf"{TENSORS}: its minilora.config.*{shown}"):
        read(tmp_path)


# Shards.


def shard(folder, change=lambda index, files: None):
    """The tensors of `drawn()` in two files with an index, after `change(index, files)`."""
    arrays = drawn(0, 4)
    parts = {"one.safetensors": dict(list(arrays.items())[:1]), "two.safetensors": dict(list(arrays.items())[1:])}
    index = {"metadata": {"total_size": 1}, "weight_map": {k: file for file, part in parts.items() for k in part}}
    change(index, parts)
    folder.mkdir(exist_ok=True)
    for file, part in parts.items():
        save_file(part, folder / file)
    (folder / f"{TENSORS}.index.json").write_text(json.dumps(index))
    (folder / CONFIG).write_text('{"seed": 0}')


def test_shards_are_read_as_one_file(tmp_path):
    shard(tmp_path)
    assert seed_of(tmp_path) == 0 and len(read(tmp_path)[1]) == 4


@pytest.mark.parametrize("change, error, shown", [
    (lambda i, f: f.pop("two.safetensors"), FileNotFoundError, r"two.safetensors does not exist, but .* places"),
    (lambda i, f: i["weight_map"].update({"t.0": "../one.safetensors"}), ValueError, "'../one.safetensors' is not the"),
    (lambda i, f: i["weight_map"].update({"t.0": "/one.safetensors"}), ValueError, "'/one.safetensors' is not the"),
    (lambda i, f: i["weight_map"].update({"t.0": "sub/one.safetensors"}), ValueError, "'sub/one.safetensors' is not"),
    (lambda i, f: i["weight_map"].update({"t.0": "one.bin"}), ValueError, "'one.bin' is not the name of a safetensors"),
    (lambda i, f: i["weight_map"].update({"t.0": ""}), ValueError, "'' is not the name"),
    (lambda i, f: i["weight_map"].update({"t.0": 7}), ValueError, "weight_map must name the file of each tensor"),
    (lambda i, f: i["weight_map"].update({"t.9": "two.safetensors"}), ValueError, r"two.safetensors.*absent: t.9"),
    (lambda i, f: i["weight_map"].pop("t.1"), ValueError, r"two.safetensors.*superfluous: t.1"),
    (lambda i, f: i["weight_map"].update({"t.1": "one.safetensors"}), ValueError, r"one.safetensors.*absent: t.1"),
    (lambda i, f: f["one.safetensors"].update({"t.1": np.ones(1, "f4")}), ValueError, "one.saf.*superfluous: t.1"),
    (lambda i, f: i.pop("weight_map"), ValueError, "weight_map must name.*got None"),
    (lambda i, f: i.update(weight_map=[]), ValueError, r"weight_map must name.*got \[\]"),
    (lambda i, f: i.update(weight_map={}), ValueError, r"weight_map must name.*got \{\}"),
], ids=["a shard missing", "outside the folder", "an absolute path", "in a folder inside", "a pickle", "an empty name",
        "a number", "a tensor that is nowhere", "a tensor the index leaves out", "placed in the wrong file",
        "a tensor twice", "no weight_map", "a list", "empty"])  # fmt: skip
def test_shards_that_are_not_what_their_index_says_are_refused(change, error, shown, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"outside")
    shard(tmp_path / "folder", change)
    with pytest.raises(error, match=shown):
        read(tmp_path / "folder")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
def test_a_damaged_index_is_refused(content, tmp_path):
    shard(tmp_path)
    (tmp_path / f"{TENSORS}.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{TENSORS}\.index\.json"):
        read(tmp_path)


# Pickles.


class Trap:
    """Unpickling this makes the file `sprung`."""

    def __init__(self, sprung):
        self.sprung = str(sprung)

    def __reduce__(self):
        return (open, (self.sprung, "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "pytorch_model-00001-of-2.bin"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    base, sprung, folder = small_gpt(), tmp_path / "sprung", tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    for load in (lambda: load_adapter(folder, base), lambda: load_model(folder)):
        with pytest.raises(ValueError, match=f"{re.escape(name)} is a pickle.*weights_only=True.*save_pretrained"):
            load()
    (folder / name).rename(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(folder, base)
    assert not sprung.exists()


def test_a_pickle_beside_safetensors_is_in_nobodys_way(tmp_path):
    write(tmp_path, 6)
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert seed_of(tmp_path) == 6 and not (tmp_path / "sprung").exists()


def unpickling(source):
    """Every way of this file to run what a data file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""]
        elif isinstance(node, ast.keyword):
            found += [node.arg or ""]
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node.func)]
    dangerous = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "allow_pickle", "torch",
                 "np.load", "numpy.load", "eval", "exec"}  # fmt: skip
    return dangerous & {*found, *(name.partition(".")[0] for name in found)}


SOURCES = sorted((ROOT / "minilora").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_the_library_can_unpickle(path):
    assert unpickling(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("planted", ["import pickle", "from pickle import load", "np.load(f, allow_pickle=True)",
                                     "def f(x):\n    return eval(x)"])  # fmt: skip
def test_a_planted_unpickling_is_found(planted):
    assert unpickling(planted)


# Interrupted.


def test_a_rename_that_fails_leaves_the_old_save(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def refuse(source, target):
        raise OSError("the disk said no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="the disk said no"):
        write(tmp_path, 2)
    assert seed_of(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"


def stop_at_the_json(source, target, real=os.replace):
    if str(target).endswith(".json"):
        raise KeyboardInterrupt
    real(source, target)


def write_alike(folder, seed):
    """Every save has the same configuration: what is mixed then could be told by nothing but the tensors."""
    save_folder(folder, TENSORS, drawn(seed), CONFIG, {"same": True})


def which_alike(folder):
    return next(seed for seed in range(9) if same_arrays(read(folder)[1], drawn(seed)))


ways = pytest.mark.parametrize("write, which", [(write_alike, which_alike), (write, seed_of)],
                               ids=["one configuration", "two configurations"])  # fmt: skip


@ways
def test_a_stop_between_the_two_renames_is_the_new_save(write, which, tmp_path, monkeypatch):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_json)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert which(tmp_path) == 2
    assert which(tmp_path) == 2, "loading changes nothing"
    write(tmp_path, 1)
    assert which(tmp_path) == 1, "saving again repairs it"
    assert len(list(tmp_path.iterdir())) == 2


@ways
def test_a_first_save_that_stops_between_its_two_renames_is_read_too(write, which, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_json)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3)
    assert not (tmp_path / CONFIG).exists()
    assert which(tmp_path) == 3


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_models_and_adapters_survive_a_stop_between_the_two_renames(positions, tmp_path, monkeypatch):
    model = small_gpt(positions=positions)
    adapter = trained_adapter(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_json)
        for save in (lambda: save_model(model, tmp_path / "m"), lambda: save_adapter(adapter, tmp_path / "a")):
            with pytest.raises(KeyboardInterrupt):
                save()
    assert bits(load_model(tmp_path / "m")) == bits(model)
    assert same_adapter(load_adapter(tmp_path / "a", model), adapter)


class Moments:
    """A copy of `folder` for every moment at which a kill could fall while a save is under way."""

    def __init__(self, folder, copies, monkeypatch):
        self.folder, self.copies, self.found = folder, copies, []
        self.after(monkeypatch, os, "replace")
        self.after(monkeypatch, os, "fsync")
        moments = self

        class Slowly:
            """A file whose content arrives in two parts."""

            def __init__(self, path, mode):
                self.file = open(path, mode)
                moments.copy()

            def __enter__(self):
                return self

            def __exit__(self, *raised):
                self.file.close()
                moments.copy()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                    self.file.write(part)
                    self.file.flush()
                    moments.copy()

        def save_slowly(arrays, path, metadata, real=save_file):
            real(arrays, copies.with_name("whole"), metadata)
            with Slowly(path, "wb") as file:
                file.write(copies.with_name("whole").read_bytes())

        monkeypatch.setattr("minilora.disk.folder.open", Slowly, raising=False)
        monkeypatch.setattr("minilora.disk.tensor_file.save_file", save_slowly)

    def after(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def followed(*arguments):
            real(*arguments)
            self.copy()

        monkeypatch.setattr(owner, name, followed)

    def copy(self):
        self.found.append(self.copies / f"{len(self.found)}")
        shutil.copytree(self.folder, self.found[-1])


@ways
def test_a_kill_at_any_moment_leaves_the_old_save_or_the_new_one(write, which, tmp_path, monkeypatch):
    """And so does a kill of the save after that, at any moment too, over whatever the first one left behind."""

    def moments(folder, seed):
        copies = tmp_path / f"moments-{len(list(tmp_path.iterdir()))}"
        with monkeypatch.context() as patch:
            seen = Moments(folder, copies, patch)
            write(folder, seed)
        assert len(seen.found) >= 10
        return seen.found

    folder = tmp_path / "folder"
    write(folder, 0)
    first = moments(folder, 1)
    outcomes = [which(left) for left in first]
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, 1} and which(folder) == 1
    for left, outcome in zip(first, outcomes, strict=True):
        later = [which(again) for again in moments(left, 2)]
        assert later == sorted(later) and set(later) == {outcome, 2} and which(left) == 2
        assert len(list(left.iterdir())) == 2, "nothing of the killed save is left"


def test_a_save_that_renames_the_configuration_first_is_seen(tmp_path, monkeypatch):
    """The planted bug: the moments then hold a folder that can not be read."""
    real, held = os.replace, []

    def swapped(source, target):
        if str(target).endswith(TENSORS) and not held:
            held.append((source, target))
        else:
            real(source, target)
            if held:
                shutil.copytree(tmp_path / "folder", tmp_path / "between")
                real(*held.pop())

    write(tmp_path / "folder", 0)
    monkeypatch.setattr(os, "replace", swapped)
    write(tmp_path / "folder", 1)
    with pytest.raises(ValueError, match="two different saves"):
        read(tmp_path / "between")


@pytest.mark.parametrize("left_behind", ["garbage", "another save"])
def test_what_a_kill_of_long_ago_left_behind_is_in_nobodys_way(left_behind, tmp_path):
    folder, config, tensors = tmp_path / "folder", b"{", b"\0" * 9
    write(folder, 1)
    if left_behind == "another save":
        write(tmp_path / "other", 2)
        config, tensors = ((tmp_path / "other" / name).read_bytes() for name in (CONFIG, TENSORS))
    (folder / UNFINISHED).mkdir()
    (folder / UNFINISHED / CONFIG).write_bytes(config)
    (folder / UNFINISHED / TENSORS).write_bytes(tensors)
    (folder / UNFINISHED / ".tmpcM1MHt").write_bytes(tensors[:4])  # safetensors' own, under a random name
    assert seed_of(folder) == 1
    whole = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(whole.replace('"seed": 1', '"seed": 8'))
    with pytest.raises(ValueError, match="two different saves.*seed: 1 and 8"):
        read(folder)
    write(folder, 1)
    assert seed_of(folder) == 1 and (folder / CONFIG).read_text() == whole
    assert len(list(folder.iterdir())) == 2


def killed_before_a_name(folder, name=TENSORS):
    """A first save into `folder`, with a file in a folder inside, killed before a file gets its `name`."""
    replace, rmtree, renamed = os.replace, shutil.rmtree, []

    def killed(source, target):
        if Path(target).name == name:
            raise Killed
        renamed.append(replace(source, target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", killed)
        # A kill leaves what an error takes away.
        patch.setattr(shutil, "rmtree", lambda *given, **how: None if renamed else rmtree(*given, **how))
        with pytest.raises(Killed):
            save_folder(folder, TENSORS, drawn(), CONFIG, {"seed": 1}, beside={"inside/b.txt": b"b"})


def test_what_killed_saves_put_into_a_folder_does_not_count(tmp_path):
    for name in (TENSORS, TENSORS, "b.txt", "b.txt", TENSORS):
        killed_before_a_name(tmp_path, name)
        assert (tmp_path / "inside" / "b.txt").exists()
        check_unused(tmp_path)
    with new_folder(tmp_path):
        save_folder(tmp_path, TENSORS, drawn(), CONFIG, {"seed": 1}, beside={"inside/b.txt": b"b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", CONFIG, TENSORS]


@pytest.mark.parametrize("mine", ["inside/b.txt", "inside/other.txt", TENSORS, CONFIG])
def test_a_file_of_the_same_name_that_a_user_put_there_does_count(mine, tmp_path):
    killed_before_a_name(tmp_path)
    (tmp_path / mine).unlink(missing_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(ValueError, match=f"is not empty: it holds {mine.partition('/')[0]}"), new_folder(tmp_path):
        pass
    assert (tmp_path / mine).read_text() == "mine"


@pytest.mark.parametrize("kind", ["an empty folder", "a link to one in the place of ours"])
def test_so_does_an_empty_folder_of_a_user_and_a_link(kind, tmp_path):
    killed_before_a_name(tmp_path / "out")
    if kind == "an empty folder":
        name = "mine"
        (tmp_path / "out" / name).mkdir()
    else:
        name = "inside"
        shutil.rmtree(tmp_path / "out" / name)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"is not empty: it holds {name}"):
        check_unused(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="makes links")
@pytest.mark.parametrize("names", [
    ["up/secret"], ["secret"], ["../secret"], [""], ["."], [3], [], "secret", None, ["b", "up/secret"],
    ["up/secret", "b"], [["secret"]],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("link", ["up", UNFINISHED])
@pytest.mark.parametrize("new", [[], {}, None, {"secret": 1}, {"secret": [1]}, {"b": [[0, 0]]}], ids=str)
def test_a_folder_of_a_stranger_moves_nothing_from_elsewhere_and_over_nothing(names, link, new, tmp_path):
    home, folder = tmp_path / "home", tmp_path / "home" / "folder"
    folder.mkdir(parents=True)
    (home / "secret").write_text("mine")
    if link == "up":
        (folder / UNFINISHED / "up").mkdir(parents=True)
        for name in ("up/secret", "secret", "b"):
            (folder / UNFINISHED / name).write_text("theirs")
    (folder / link).symlink_to(home)
    (folder / NAMES).write_text(json.dumps({"names": names, "new": new}))
    (folder / TENSORS).write_text("theirs")
    with pytest.raises(ValueError, match="is not empty"), new_folder(folder):
        pass
    assert (home / "secret").read_text() == "mine"
    assert sorted(path.name for path in home.iterdir()) == ["folder", "secret"]


def test_a_damaged_old_file_does_not_stand_in_the_way_of_a_new_save(tmp_path):
    write(tmp_path, 1)
    (tmp_path / TENSORS).write_bytes(b"nonsense")
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / CONFIG).write_bytes(b"{}")
    write(tmp_path, 2)
    assert seed_of(tmp_path) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", [TENSORS, CONFIG, "beside.txt"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_changes(name, tmp_path):
    write(tmp_path, 1)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{name} is a folder, where a file is to be written"):
        save_folder(tmp_path, TENSORS, drawn(2, 2), CONFIG, {"seed": 2}, beside={"beside.txt": b"content"})
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_each_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    note = lambda file, what: events.append((os.stat(file).st_ino, what, os.stat(file).st_size))
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), note(number, "on disk")))
    monkeypatch.setattr(os, "replace", lambda a, b: (note(a, Path(b).name), replace(a, b)))
    write(tmp_path)
    of_the_folder = [] if os.name == "nt" else ["on disk"]
    (its_file,) = [file for file, what, _ in events if what == NAMES]
    at = [file for file, *_ in events].index(its_file)
    assert [what for _, what, _ in events[at : at + 2]] == ["on disk", NAMES]
    del events[at : at + 2]
    assert [what for _, what, _ in events] == ["on disk", "on disk", TENSORS, CONFIG, *of_the_folder]
    assert [(file, size) for file, _, size in events[:2]] == [(file, size) for file, _, size in events[2:4]]
    assert [file for file, _, _ in events[4:]] == [tmp_path.stat().st_ino for _ in of_the_folder]


@pytest.mark.parametrize("name", ["tokenizer.json", "inside/a.jinja", TENSORS, CONFIG])
@pytest.mark.parametrize("content", ["bytes", "a copy"])
def test_a_full_disk_names_the_file_that_there_was_no_room_for(name, content, tmp_path, monkeypatch):
    """The error of the system names none, or, where a file is copied, the one that was read."""
    source = tmp_path / "source"
    source.write_bytes(b"of a base")
    beside = dict.fromkeys(["tokenizer.json", "inside/a.jinja"], b"bytes" if content == "bytes" else source)
    written = []

    def no_room(number, real=os.fsync):
        written.append(number)
        if len(written) == 1 + [*beside, TENSORS, CONFIG].index(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real(number)

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=f"No space left on device.*{re.escape(str(tmp_path / 'out' / name))}"):
        save_folder(tmp_path / "out", TENSORS, drawn(), CONFIG, {}, beside=beside)
    assert list((tmp_path / "out").iterdir()) in ([], [tmp_path / "out" / "inside"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("of", ["tensors", "configuration"])
def test_a_write_that_stops_half_way_leaves_the_old_save(of, error, tmp_path, monkeypatch):
    write(tmp_path, 1)

    def half_of_the_tensors(arrays, path, metadata, real=save_file):
        real(arrays, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        if isinstance(error, KeyboardInterrupt):
            raise error
        # As the library says it.
        raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")

    class Half:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise error

    with monkeypatch.context() as patch:
        if of == "tensors":
            patch.setattr("minilora.disk.tensor_file.save_file", half_of_the_tensors)
        else:
            patch.setattr("minilora.disk.folder.open", Half, raising=False)
        with pytest.raises(type(error)) as raised:
            write(tmp_path, 2)
    if isinstance(error, OSError):
        named = tmp_path / {"tensors": TENSORS, "configuration": CONFIG}[of]
        assert str(raised.value) == f"[Errno 28] No space left on device: '{named}'"
    assert seed_of(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"


SAVE_FOREVER = """
import sys
import numpy as np
from minilora import GPT, GPTConfig, LoRAConfig, init_adapter, save_adapter
base = GPT(GPTConfig(2, 2, 8, 11, 16), np.random.default_rng(0))
adapters = [init_adapter(base, LoRAConfig(r, 4, "all-linear"), np.random.default_rng(r)) for r in (2, int(sys.argv[2]))]
adapters[1].pairs["h.0.attn.q_proj"].lora_B.data[:] = 1
print("ready", flush=True)
while True:
    for adapter in adapters:
        save_adapter(adapter, sys.argv[1], allow_untrained=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
@pytest.mark.parametrize("r", [2, 5], ids=["one configuration", "two configurations"])
def test_a_process_killed_while_saving_leaves_one_whole_save(r, tmp_path):
    base, rng = GPT(GPTConfig(2, 2, 8, 11, 16), np.random.default_rng(0)), np.random.default_rng(r)
    saves = [init_adapter(base, LoRAConfig(k, 4, "all-linear"), np.random.default_rng(k)) for k in (2, r)]
    saves[1].pairs["h.0.attn.q_proj"].lora_B.data[:] = 1
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(r)], cwd=ROOT,
                                 stdout=subprocess.PIPE)  # fmt: skip
        try:
            assert child.stdout.readline() == b"ready\n"
            while not (tmp_path / "adapter_config.json").exists():
                assert child.poll() is None, "the child must save until it is killed"
                time.sleep(0.001)
            time.sleep(rng.uniform(0.05, 0.2))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            found = load_adapter(tmp_path, base)
            assert any(same_adapter(found, save) for save in saves)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
    save_adapter(saves[1], tmp_path)  # whatever the killed left behind is in nobody's way
    assert same_adapter(load_adapter(tmp_path, base), saves[1])
    assert len(list(tmp_path.iterdir())) == 2
