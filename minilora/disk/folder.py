"""Tensors on disk: safetensors beside JSON, written whole, read whole or refused. Knows no model.

A folder holds one file of tensors and one of configuration. The text of the configuration also
travels in the metadata of the tensors, so that two files of two different saves are noticed.
Pickles are never opened.
"""

import contextlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

from .checks import full_disk_names, json_object, listed
from .lock import LOCK, only_writer
from .reading import LARGEST_CONFIG, check_regular, read_bytes, read_object
from .tensor_file import check_digests, read_metadata, read_shards, read_tensors, write_tensors

# Fields that people may change: no program computes with them.
FREE = ("base_model_name_or_path", "_name_or_path")
# The folder inside a folder where a save is written. No folder of anybody else's has this name.
UNFINISHED = ".minilora-unfinished"
# While files get their names in a folder, this one says which: all, in their order, and of those
# that are new there by what they are told from others.
NAMES = ".minilora-names"
# What NAMES holds: all names, and {name: marks} of those that are new.
_Noted = namedtuple("_Noted", "names new")


def save_folder(folder, tensor_file, arrays, config_file, config, metadata=None, beside=None):
    """Write both files so that the folder can be read at every moment, as the old save or the new.

    `arrays` is {name: NumPy array}, `config` a dict for JSON, `metadata` {str: str} that other
    readers skip, `beside` {name: path of a file to copy along, or the bytes of one, or a function
    that makes them of the path of the file of tensors}; the name may be in a folder inside.
    Everything is written into the folder UNFINISHED first. Then the copies get their names, then
    the tensors, which carry their configuration in the metadata, then the configuration: where the
    tensors are, the folder is whole. A crash in between leaves the configuration in UNFINISHED,
    where readers find it.
    Raises: ValueError, before anything is written, as `check_places`; OSError that names the file
    that could not be written.
    """
    folder = Path(folder)
    text = json.dumps(config, indent=2)
    metadata = {"format": "pt", "minilora.config": text, **(metadata or {})}
    beside = beside or {}
    with _staged(folder, tensor_file, config_file, list(beside)) as staging:
        for name, content in beside.items():
            (staging / name).parent.mkdir(exist_ok=True)
            with full_disk_names(folder / name):
                if isinstance(content, bytes):
                    (staging / name).write_bytes(content)
                elif not callable(content):
                    shutil.copyfile(content, staging / name)
        with full_disk_names(folder / tensor_file):
            write_tensors(staging / tensor_file, arrays, metadata)
        for name, content in beside.items():
            if callable(content):
                with full_disk_names(folder / name):
                    (staging / name).write_bytes(content(staging / tensor_file))
        with full_disk_names(folder / config_file), open(staging / config_file, "wb") as file:
            file.write(text.encode())
        # safetensors makes its file for this user alone. Who may read the one may read the other.
        shutil.copymode(staging / config_file, staging / tensor_file)


def place_copies(source, folder, tensor_file, config_file, beside):
    """Put the files of the folder `source` into `folder`, as `save_folder` puts what it writes.

    `beside` are the names of those beside the two. The tensors carry their configuration in the
    metadata, or a crash in between leaves them with another's.
    Raises: as `save_folder`.
    """
    source = Path(source)
    folder = Path(folder)
    with _staged(folder, tensor_file, config_file, beside) as staging:
        for name in [*beside, tensor_file, config_file]:
            with full_disk_names(folder / name):
                # With its date.
                shutil.copy2(source / name, staging / name)


@contextlib.contextmanager
def _staged(folder, tensor_file, config_file, beside):
    """The empty folder UNFINISHED in `folder`; the files that the block puts there get their names.

    They are the two, and those with the names `beside`. See `save_folder`.
    """
    staging = folder / UNFINISHED
    names = [*beside, tensor_file, config_file]
    check_places(folder, names)
    end_save(folder)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        # On the disk before it gets its name: a crash leaves no empty file under a good name.
        for name in names:
            with full_disk_names(folder / name):
                sync_file(staging / name)
        _note_names(folder, staging, names)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        # The new names too, before the old state can no longer be told from what is staged.
        for inside in sorted({(folder / name).parent for name in names}):
            sync_folder(inside)
        end_save(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} vanished while it was written: does another run write there too?"
        ) from None
    finally:
        # A save that stopped between its last two renames still needs the staged configuration.
        tensors_are_out = not (staging / tensor_file).exists()
        config_is_staged = (staging / config_file).exists()
        if not (tensors_are_out and config_is_staged):
            shutil.rmtree(staging, ignore_errors=True)


def check_places(folder, names):
    """Raise ValueError if a folder has one of the `names` in `folder`, where files are to be."""
    for name in names:
        path = Path(folder) / name
        # A link gives way to a file, wherever it leads.
        if path.is_dir() and not path.is_symlink():
            raise ValueError(
                f"{path} is a folder, where a file is to be written; remove it, or choose another "
                "folder to write to"
            )


def replace_file(path, content, unfinished):
    """Write the bytes `content` to `unfinished`, which is named `path` once it is on the disk.

    Raises: OSError that names `path` on a full disk.
    """
    with full_disk_names(path), open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def sync_file(path):
    """Have what was written to a file on its disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder):
    """Have the names in a folder on its disk: a rename is there only once its folder is."""
    if os.name == "nt":
        # Windows opens no folder, and writes names by itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _note_names(folder, staging, names):
    """Write NAMES. What was new in the eyes of a save that was killed is so still."""
    new_before = _noted(folder).new
    new = {}
    for name in names:
        if name in new_before or not os.path.lexists(folder / name):
            # The file of that one may be there still when this save is killed as well.
            new[name] = [*new_before.get(name, []), _mark(staging / name)]
    content = json.dumps({"names": names, "new": new}).encode()
    replace_file(folder / NAMES, content, staging / NAMES)


def _mark(path):
    """What tells a file from another one of its name, and stays when it is renamed."""
    status = os.lstat(path)
    return [status.st_size, status.st_mtime_ns]


def _noted(folder):
    """The _Noted of the save that was killed in `folder`; an empty one if none was."""
    nothing = _Noted([], {})
    # A save makes no links: they would lead elsewhere.
    if (folder / UNFINISHED).is_symlink():
        return nothing
    try:
        noted = read_object(folder / NAMES)
    except (OSError, ValueError):
        return nothing
    names = noted.get("names")
    new = noted.get("new")
    if not isinstance(names, list) or not names or not isinstance(new, dict):
        return nothing
    if not all(map(_is_inside, [*names, *new])):
        return nothing
    # The last one, the configuration, lies in no folder inside.
    if Path(names[-1]).name != names[-1] or not all(isinstance(m, list) for m in new.values()):
        return nothing
    return _Noted(names, new)


def _is_inside(name):
    """Does a name lead to a file in its folder, or in a folder inside?"""
    if not isinstance(name, str) or not Path(name).name:
        return False
    return ".." not in Path(name).parts and not Path(name).is_absolute()


def end_save(folder):
    """End a save in `folder` that lacks its last rename or less: by now it is the new state.

    One that lacks more is left alone. For who writes there alone.
    """
    names = _noted(folder).names
    if not names:
        return
    waiting = [name for name in names if not (folder / name).exists()]
    waiting += [name for name in names if (folder / UNFINISHED / name).exists()]
    if not set(waiting) <= {names[-1]}:
        return
    if (folder / UNFINISHED / names[-1]).exists():
        os.replace(folder / UNFINISHED / names[-1], folder / names[-1])
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    # At last: as long as it is there, somebody comes and ends this.
    (folder / NAMES).unlink()


@contextlib.contextmanager
def new_folder(folder):
    """Within this block `folder`, which must be new or empty, is written by nobody else.

    Raises: as `only_writer` and `check_unused`.
    """
    with only_writer(folder):
        end_save(Path(folder))
        check_unused(folder)
        yield


def check_unused(folder, ignore=()):
    """Raise ValueError unless `folder` is new or empty, but for the names in `ignore`.

    Nothing is ever written over. What a killed save put there does not count.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    placed = {folder / name: marks for name, marks in _noted(folder).new.items()}
    ignore = {*ignore, UNFINISHED, LOCK, NAMES}
    contents = []
    for path in sorted(folder.iterdir()):
        if path.name not in ignore and not _is_of_a_save(path, placed):
            contents.append(path.name)
    if contents:
        raise ValueError(
            f"{folder} is not empty: it holds {listed(contents, most=4)}; "
            "choose another folder, or empty this one"
        )


def _is_of_a_save(path, placed):
    """Did a killed save put this there? `placed` is {path: marks} of what it put."""
    if path.is_symlink() or not path.is_dir():
        return _mark(path) in placed.get(path, [])
    is_made = any(path in place.parents for place in placed)
    return is_made and all(_is_of_a_save(inner, placed) for inner in path.iterdir())


def load_folder(folder, tensor_file, config_file, *, verify=True, most=LARGEST_CONFIG):
    """(config dict, {name: array}, metadata dict) of a folder.

    The tensors may be in one file, or in shards with an index. With `verify` all of them are read
    and compared with the digests in the file, if it has some. The configuration has at most `most`
    bytes.
    Shapes and dtypes: as stored; arrays are read-only maps of the file, as `read_tensors` says.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong with it: a
    pickle, a damaged or truncated file, a pointer of Git LFS, no JSON, two files of different
    saves, shards that do not hold what their index says, values that are not those of the save.
    """
    folder = Path(folder)
    whole = folder / tensor_file
    index = folder / f"{tensor_file}.index.json"
    staged_config = folder / UNFINISHED / config_file
    if not whole.exists() and not index.exists():
        _refuse_pickles(folder, tensor_file)
        raise _missing(whole, tensor_file, config_file)
    if not (folder / config_file).exists() and not staged_config.exists():
        raise _missing(folder / config_file, tensor_file, config_file)
    if whole.exists():
        tensors, metadata = read_tensors(whole)
        if verify:
            check_digests(whole, tensors, metadata)
    else:
        tensors = read_shards(index)
        metadata = {}
    path = _config_path(folder, config_file, metadata)
    saved_text = metadata.get("minilora.config")
    saved_config = json_object(f"{whole}: its minilora.config", saved_text)
    config = read_object(path, most)
    if saved_config is not None:
        _check_one_save(f"{folder}: {tensor_file} and {config_file}", saved_config, config)
    return config, tensors, metadata


def load_config(folder, tensor_file, config_file, *, most=LARGEST_CONFIG):
    """The configuration of a folder, as `load_folder` finds it, without its tensors.

    Raises: as `load_folder`.
    """
    path = config_path(folder, tensor_file, config_file)
    if not path.exists():
        raise _missing(path, tensor_file, config_file)
    return read_object(path, most)


def _missing(path, tensor_file, config_file):
    return FileNotFoundError(
        f"{path} does not exist; the folder needs {tensor_file} and {config_file}"
    )


def _refuse_pickles(folder, tensor_file):
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when loaded, and is not read; in "
            "PyTorch, load it with weights_only=True and save it with save_pretrained, as "
            f"{tensor_file}"
        )


def _check_one_save(where, saved, config):
    """Raise ValueError with both values if a field is not what the tensors were saved with."""
    differing = []
    for field in sorted(saved.keys() - set(FREE)):
        if saved[field] != config.get(field):
            differing.append(f"{field}: {saved[field]!r} and {config.get(field)!r}")
    if differing:
        raise ValueError(
            f"{where} are of two different saves, or one was edited ({'; '.join(differing)}); "
            "put the first value back, or take both files from one save"
        )


def _config_path(folder, config_file, metadata):
    """Where the configuration is: still in UNFINISHED if the one there belongs to the tensors."""
    staged = folder / UNFINISHED / config_file
    text = metadata.get("minilora.config")
    if text and staged.exists() and _holds(staged, text.encode()):
        return staged
    return folder / config_file


def _holds(path, content):
    """Are these the bytes of a file? One of another length is not read."""
    check_regular(path)
    return path.stat().st_size == len(content) and read_bytes(path, len(content)) == content


def config_path(folder, tensor_file, config_file):
    """Where the configuration of a folder is, even if a save died before its last rename."""
    folder = Path(folder)
    return _config_path(folder, config_file, read_metadata(folder / tensor_file) or {})
