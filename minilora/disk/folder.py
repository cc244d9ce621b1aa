"""Tensors on disk: safetensors beside JSON, written whole, read whole or refused. Never pickle. Knows no model.

A folder holds one file of tensors and one of configuration. The text of the configuration also travels in the
metadata of the tensors, so that two files of two different saves are noticed.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

FREE = ("base_model_name_or_path", "_name_or_path")  # fields that people may change: no program computes with them
DTYPES = ("float16", "bfloat16", "float32", "float64")  # what tensors can be saved in
UNFINISHED = ".unfinished"  # the folder inside a folder where a save is written


def save_folder(folder, tensor_file, arrays, config_file, config, metadata=None, beside=()):
    """Write both files so that the folder can be read at every moment, as what it was or as what it becomes.

    `arrays` is {name: NumPy array}, `config` a dict for JSON, `metadata` {str: str} that other readers skip, `beside`
    paths of files to copy along.
    Everything is written into the folder UNFINISHED first. Then the copies get their names, then the tensors, which
    carry their configuration in the metadata, then the configuration: where the tensors are, the folder is whole. A
    crash in between leaves the configuration in UNFINISHED, where readers find it.
    """
    folder, text = Path(folder), json.dumps(config, indent=2)
    staging = folder / UNFINISHED
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": "pt", "minilora.config": text, **(metadata or {})}
    if (staging / config_file).exists():  # an earlier save may have died between its renames: end it
        with contextlib.suppress(OSError, SafetensorError), safe_open(folder / tensor_file, framework="np") as file:
            os.replace(_config_file(folder, config_file, file.metadata()), folder / config_file)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    names = (*(Path(path).name for path in beside), tensor_file, config_file)
    try:
        for path in beside:
            shutil.copyfile(path, staging / Path(path).name)
        _write_tensors(staging / tensor_file, arrays, metadata)
        with open(staging / config_file, "wb") as file:
            file.write(text.encode())
        for name in names:
            with open(staging / name, "rb+") as file:
                os.fsync(file.fileno())
        for name in names:
            os.replace(staging / name, folder / name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} has gone while it was written: is another run at it?") from None
    finally:
        if (staging / tensor_file).exists() or not (staging / config_file).exists():  # else that is still needed
            shutil.rmtree(staging, ignore_errors=True)


def _write_tensors(path, arrays, metadata):
    try:
        save_file(arrays, path, metadata)  # straight to the disk: no second copy in memory
    except SafetensorError as error:  # which is no OSError, also where the disk is full
        raise OSError(f"{path} could not be written: {error}") from None


def check_unused(folder, ignore=()):
    """Raise ValueError unless `folder` is new or empty, but for the names in `ignore`: nothing is written over."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose a folder to write to")
    held = sorted(path.name for path in folder.iterdir() if path.name not in ignore) if folder.exists() else []
    if held:
        raise ValueError(f"{folder} is not empty: it holds {', '.join(held[:4])}{' ...' * (len(held) > 4)}; choose "
                         "another folder, or empty this one")


def load_folder(folder, tensor_file, config_file):
    """(config dict, {name: array}, metadata dict) of a folder, its tensors in one file or in shards with an index.

    Shapes: as stored. float16 and bfloat16 are widened to float32, which changes no value.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong with it: a pickle, a damaged or
    truncated file, no JSON, two files of different saves, shards that do not hold what their index says.
    """
    folder = Path(folder)
    tensors_at, shards = folder / tensor_file, folder / f"{tensor_file}.index.json"
    if not tensors_at.exists() and not shards.exists():
        for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")):
            raise ValueError(f"{pickle} is a pickle, which can run code when loaded, and is not read; in PyTorch, "
                             f"load it with weights_only=True and save it with save_pretrained, as {tensor_file}")
    for path, other in ((tensors_at, shards), (folder / config_file, folder / UNFINISHED / config_file)):
        if not path.exists() and not other.exists():
            raise FileNotFoundError(f"{path} does not exist; the folder needs {tensor_file} and {config_file}")
    tensors, metadata = _read_tensors(tensors_at) if tensors_at.exists() else (_read_shards(shards), {})
    saved = json_object(f"{tensors_at}: its minilora.config", metadata.get("minilora.config"))
    where = _config_file(folder, config_file, metadata)
    config = json_object(where, where.read_bytes())
    differing = [f"{key}: {value!r} and {config.get(key)!r}" for key, value in sorted((saved or {}).items())
                 if key not in FREE and value != config.get(key)]
    if differing:
        raise ValueError(f"{folder}: {tensor_file} and {config_file} are of two different saves, or one was edited "
                         f"({'; '.join(differing)}); put the first value back, or take both files from one save")
    return config, tensors, metadata


def load_config(folder, tensor_file, config_file):
    """The configuration of a folder, as `load_folder` finds it, without its tensors. Raises: as `load_folder`."""
    folder, metadata = Path(folder), None
    with contextlib.suppress(OSError, SafetensorError), safe_open(folder / tensor_file, framework="np") as file:
        metadata = file.metadata()
    path = _config_file(folder, config_file, metadata)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the folder needs {tensor_file} and {config_file}")
    return json_object(path, path.read_bytes())


def _read_tensors(path):
    """({name: array}, metadata) of one safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            tensors = {name: file.get_tensor(name) for name, dtype in stored.items() if dtype != "BF16"}
        if len(tensors) < len(stored):  # NumPy has no bfloat16: it is the upper half of a float32
            for name, view in deserialize(path.read_bytes()):
                if view["dtype"] == "BF16":
                    halves = np.frombuffer(view["data"], "<u2").reshape(view["shape"])
                    tensors[name] = (halves.astype(np.uint32) << 16).view(np.float32)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    except (TypeError, AttributeError) as error:  # a type that NumPy does not have
        raise ValueError(f"{path}: {error}; save it again as float32") from None
    return {name: t.astype(np.float32) if t.dtype == np.float16 else t for name, t in tensors.items()}, metadata


def _read_shards(index):
    """{name: array} of the files that an index names; each must hold exactly the tensors it is said to hold."""
    places = (json_object(index, index.read_bytes()) or {}).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: weight_map must name the file of each tensor, got {places!r:.200}")
    tensors = {}
    for name in sorted(set(places.values())):
        path = index.parent / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file beside it")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, but {index.name} places tensors there; fetch it again")
        found = _read_tensors(path)[0]
        same_names(path, found, [key for key, file in places.items() if file == name])
        tensors |= found
    return tensors


def same_names(where, found, expected):
    """Raise ValueError with both sides unless two {name: shape}, or two collections of names, agree."""
    absent, extra = [n for n in expected if n not in found], [n for n in found if n not in expected]
    shapes = [f"{n} is {found[n]}, not {expected[n]}" for n in found if n in expected and isinstance(expected, dict)
              and found[n] != expected[n]]
    lists = [
        f"{what}: {', '.join(sorted(names)[:6])}{' ...' * (len(names) > 6)}"
        for what, names in (("absent", absent), ("superfluous", extra), ("misshapen", shapes))
        if names
    ]
    if lists:
        raise ValueError(f"{where}: do not match. {'; '.join(lists)}")


def json_object(where, text):
    """The JSON object in `text`, None for no text; ValueError that names `where` for anything else."""
    try:
        value = json.loads("null" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) and text is not None:
        raise ValueError(f"{where}: expected an object with fields, got {type(value).__name__}")
    return value


def rounded(name, array, dtype):
    """`array` in the dtype called `dtype`, one of DTYPES, rounded to nearest (float64 to bfloat16: by way of float32).

    Raises: ImportError that names the extra, if bfloat16 has no home here; ValueError if a finite number overflows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16 as dtype
        except ImportError as error:
            raise ImportError("writing bfloat16 needs ml_dtypes: pip install 'minilora[hf]'") from error
    with np.errstate(over="ignore"):
        new = array.astype(dtype)
    if not np.isfinite(new.astype(array.dtype)).all() and np.isfinite(array).all():
        raise ValueError(f"{name}: {np.abs(array).max():.3g} is too large for {new.dtype.name}; save it as float32")
    return new


@contextlib.contextmanager
def naming(where):
    """What a constructor objects to becomes a ValueError that names the file it was read from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _config_file(folder, name, metadata):
    """Where the configuration is: still in UNFINISHED if that one belongs to the tensors."""
    staged, text = folder / UNFINISHED / name, (metadata or {}).get("minilora.config")
    return staged if text and staged.exists() and staged.read_bytes() == text.encode() else folder / name
