"""Models and adapters on disk: safetensors beside JSON, written whole, read whole or refused. Never pickle.

A model is a folder with `model.safetensors` and `config.json`; an adapter is a folder in PEFT's layout,
`adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (the base's fingerprint) travels
in the metadata of the safetensors file, which other readers skip.
"""

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .backend import get_array_module, to_device, to_numpy
from .gpt import GPT, GPTConfig
from .lora import Adapter, LoRAConfig, LoRALinear, LoRAPair, check_fits, find_targets
from .tensor import Tensor

MODEL_TYPE = "minilora-gpt"
PREFIX, SUFFIX = "base_model.model.", ".weight"  # PEFT: base_model.model.h.0.attn.q_proj.lora_A.weight


def save_model(model, folder):
    """Write a plain GPT to `folder`, made if need be: `model.safetensors` and `config.json`.

    Shapes: each parameter under its dotted name, in its own shape and dtype, from either backend.
    Raises: ValueError for a model that carries an adapter: save the adapter and the base, or merge(model).
    Source: https://github.com/huggingface/safetensors.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoRAPair))]
    if adapted:
        raise ValueError(f"save_model: {adapted[0]} has lora_A and lora_B; save merge(model), or both apart")
    config = {"model_type": MODEL_TYPE, **asdict(model.config)}
    _save_folder(folder, "model.safetensors", dict(model.named_parameters()), "config.json", config, {})


def load_model(folder):
    """The GPT that `save_model` wrote, trainable, on the host: `model.to_device(cupy)` moves it.

    Shapes: those `config.json` implies; each tensor of the file is used exactly once.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: absent, superfluous or misshapen
    tensors, unknown fields, a truncated file, or files of two different saves.
    Source: as `save_model`.
    """
    config, tensors, _ = _load_folder(folder, "model.safetensors", "config.json")
    where = Path(folder) / "config.json"
    if config.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{where}: model_type is not {MODEL_TYPE!r}; this is not a model that minilora saved")
    with _naming(where):
        config = GPTConfig(**config)
    blank = GPT(config, np.random.default_rng(0))
    found, needed = tensors.items(), blank.named_parameters()
    _same_tensors(f"{folder}, model.safetensors", {n: t.shape for n, t in found}, {n: p.shape for n, p in needed})
    odd = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype != tensors["wte.weight"].dtype]
    if odd:
        raise ValueError(f"{folder}: {odd[0]}, wte.weight is {tensors['wte.weight'].dtype}; all need one dtype")
    with _naming(folder):
        return blank.rebuild(lambda name, t: Tensor(tensors[name], True) if isinstance(t, Tensor) else None)


def save_adapter(adapter, folder, base_model="minilora"):
    """Write an adapter to `folder` in PEFT's layout, with the fingerprint of its base in the metadata.

    Shapes: lora_A (r, in), lora_B (out, r) as PEFT stores them. `base_model` is recorded for the reader's eyes.
    Raises: ValueError if a number is not finite.
    Source: PEFT 0.21, `save_pretrained`.
    """
    arrays = {f"{PREFIX}{name}{SUFFIX}": p for name, p in adapter.named_parameters()}
    broken = [name for name, p in arrays.items() if not np.isfinite(to_numpy(p.data)).all()]
    if broken:
        raise ValueError(f"save_adapter: {broken[0]} ({len(broken)} tensors) holds inf or nan; lower the learning rate")
    targets = adapter.config.target_modules
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "lora_dropout": adapter.config.dropout,
        "use_rslora": adapter.config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    metadata = {} if adapter.base_fingerprint is None else {"minilora.base": json.dumps(adapter.base_fingerprint)}
    _save_folder(folder, "adapter_model.safetensors", arrays, "adapter_config.json", config, metadata)


_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")  # past history, once factors are saved
_NEUTRAL = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _STARTS}
_HARMLESS = ("task_type", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "revision", "megatron_core",
             "auto_mapping", "peft_version", "qalora_group_size")
_ACCEPTED = (*_NEUTRAL, *_REQUIRED, "lora_dropout", "use_rslora", *_HARMLESS)


def load_adapter(folder, base):
    """The adapter that `save_adapter` (or PEFT, for a model with these module names) wrote, checked against `base`.

    Shapes: as saved, on the backend of `base` and at least in its dtype; each tensor is used, each target has both
    factors. TypeError if the file holds float64 and the base float32.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong: a field this library does not
    implement, lora_alpha absent, tensors absent or superfluous, and a base that is not the one it was trained on.
    Source: PEFT 0.21, `PeftModel.from_pretrained`, without its silent skips.
    """
    config, tensors, metadata = _load_folder(folder, "adapter_model.safetensors", "adapter_config.json")
    where = Path(folder) / "adapter_config.json"
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; these have no safe default, add what training used")
    for key, value in config.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise ValueError(f"{where}: {key}={value!r} is not supported, only {_NEUTRAL[key][0]!r}")
        neutral = value is None or value is False or value in ({}, [])
        if key not in _ACCEPTED and not neutral:
            raise ValueError(f"{where}: {key}={value!r} changes what the adapter computes and is not supported")
    with _naming(where):
        lora = LoRAConfig(config["r"], config["lora_alpha"], config["target_modules"],
                          config.get("lora_dropout", 0.0), config.get("use_rslora", False))

    pairs, xp = {}, get_array_module(base.parameters()[0].data)
    for key, value in tensors.items():
        name, _, factor = key.removeprefix(PREFIX).removesuffix(SUFFIX).rpartition(".")
        if key != f"{PREFIX}{name}.{factor}{SUFFIX}" or factor not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder}: tensor {key} is not {PREFIX}<module>.lora_A{SUFFIX} or .lora_B{SUFFIX}")
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"{folder}: {key} ({value.dtype}) must hold floats, and no inf or nan")
        wide = np.result_type(value.dtype, base.parameters()[0].dtype)  # a narrower file is widened, never the reverse
        pairs.setdefault(name, {})[factor] = Tensor(to_device(value.astype(wide), xp), requires_grad=True)
    half = [name for name, pair in pairs.items() if len(pair) != 2]
    if half:
        raise ValueError(f"{folder}: {half[0]} has only {', '.join(pairs[half[0]])}; both factors are needed")
    with _naming(where):
        targets = find_targets(base, lora.target_modules)
    _same_tensors(f"{folder}, modules of the file and target_modules", dict.fromkeys(pairs), dict.fromkeys(targets))
    file = Path(folder) / "adapter_model.safetensors"
    fingerprint = _json_object(f"{file}: its minilora.base", metadata.get("minilora.base"))
    with _naming(folder):
        adapter = Adapter(lora, {name: LoRAPair(**pairs[name]) for name in targets}, fingerprint)
    check_fits(f"load_adapter({str(folder)!r})", base, adapter)
    return adapter


@contextlib.contextmanager
def _naming(where):
    """What a constructor objects to becomes a ValueError that names the file it was read from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _json_object(where, text):
    """The JSON object in `text`, None for no text; ValueError that names `where` for anything else."""
    try:
        value = json.loads("null" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) and text is not None:
        raise ValueError(f"{where}: expected an object with fields, got {type(value).__name__}")
    return value


def _same_tensors(where, found, expected):
    """Raise ValueError with both sides unless two {name: shape} agree."""
    absent, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    common = found.keys() & expected.keys()
    shapes = [f"{n} is {found[n]}, not {expected[n]}" for n in common if found[n] != expected[n]]
    lists = [
        f"{what}: {', '.join(sorted(names)[:6])}{' ...' * (len(names) > 6)}"
        for what, names in (("absent", absent), ("superfluous", extra), ("misshapen", shapes))
        if names
    ]
    if lists:
        raise ValueError(f"{where}: do not match. {'; '.join(lists)}")


def _save_folder(folder, tensor_file, tensors, config_file, config, metadata):
    """Write both files so that the folder can be read at every moment, as what it was or as what it becomes.

    Both are written under temporary names first; then the tensors, which carry their configuration in the metadata, are
    renamed, then the configuration. A crash in between leaves it under its temporary name, where readers find it.
    """
    folder, text = Path(folder), json.dumps(config, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(to_numpy(t.data)) for name, t in tensors.items()}
    blob = save(arrays, {"format": "pt", "minilora.config": text, **metadata})
    contents = {tensor_file: blob, config_file: text.encode()}
    if _staged(folder / config_file).exists():  # an earlier save may have died between its renames: end it
        with contextlib.suppress(OSError, SafetensorError), safe_open(folder / tensor_file, framework="np") as file:
            os.replace(_config_file(folder, config_file, file.metadata()), folder / config_file)
    try:
        for name, content in contents.items():
            with open(_staged(folder / name), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(_staged(folder / name), folder / name)
    except BaseException:
        if _staged(folder / tensor_file).exists():  # nothing has been renamed yet: leave no trace
            for name in contents:
                _staged(folder / name).unlink(missing_ok=True)
        raise


def _staged(path):
    return path.with_name(f".{path.name}.tmp")


def _config_file(folder, name, metadata):
    """Where the configuration is: under its temporary name if that is the one which belongs to the tensors."""
    staged, text = _staged(folder / name), (metadata or {}).get("minilora.config")
    return staged if text and staged.exists() and staged.read_bytes() == text.encode() else folder / name


def _load_folder(folder, tensor_file, config_file):
    """(config dict, {name: array}, metadata dict) of a folder, or an error that names the file."""
    folder = Path(folder)
    for pickle in [] if (folder / tensor_file).exists() else folder.glob("*.bin"):
        raise ValueError(f"{pickle} is a pickle, which can run code; save it again as {tensor_file}")
    for name in (tensor_file, config_file):
        if not (folder / name).exists() and not (name == config_file and _staged(folder / name).exists()):
            raise FileNotFoundError(f"{folder / name} does not exist; the folder needs {tensor_file} and {config_file}")
    try:
        with safe_open(folder / tensor_file, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{folder / tensor_file} is damaged or not a safetensors file: {error}") from None
    except TypeError as error:  # a type NumPy does not have
        raise ValueError(f"{folder / tensor_file}: {error}; save it again as float32") from None
    saved = _json_object(f"{folder / tensor_file}: its minilora.config", metadata.get("minilora.config"))
    where = _config_file(folder, config_file, metadata)
    config = _json_object(where, where.read_bytes())
    differing = [f"{key}: {saved.get(key)!r} and {config.get(key)!r}" for key in sorted((saved or {}).keys() | config)
                 if saved and saved.get(key) != config.get(key)]
    if differing:
        raise ValueError(f"{folder}: {tensor_file} and {config_file} are of two different saves, or one was edited "
                         f"({'; '.join(differing)}); save the folder again")
    return config, tensors, metadata
