"""The settings of a run, in its checkpoint and in a file that repeats it; what its folder may hold.

Opens no base and no data.

    {"base": "smollm2", "data": "notes.txt", "alpha": 16.0, ..., "backend": "numpy", "parts": 2}

The names are those of FineTuneConfig, and `backend`, `parts` and `workers`. A `target` that is a
regular expression is called `target_regex`. What has no value is left out.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from ..disk.checks import check_fields, errors_name
from ..disk.folder import check_unused, replace_file, sync_folder
from ..disk.versions import check_keeps, is_adapter
from .checkpoint import STATE, end_removal, failure_of, is_checkpoint, read_state
from .finetune_config import FineTuneConfig

# Beside what a run has made lies the file that repeats it.
RUN = "run.json"
# Until the run has ended, this folder in the folder of the adapter holds its checkpoint.
CHECKPOINT = "checkpoint"
# These settings may change when a run goes on: where things lie, and how often they are saved. The
# model and the data themselves may not, so their fingerprints are compared.
MAY_CHANGE = ("base", "data", "from_adapter", "out", "save_every", "log_file")
# Those of them that lead to a file or a folder of somebody else's.
PATHS = ("base", "data", "from_adapter", "log_file")
# Those of them that what is made names: an adapter its base, a receipt the data as well.
SOURCES = ("base", "data", "from_adapter")
# What decides how numbers are rounded.
ARRAYS = ("module", "parts (--parts)", "BLAS threads")
# A run that repeats another has these to itself.
OWN = ("out", "log_file")


def settings_of(config, arrays):
    """{name: value} of all that determines a run of this FineTuneConfig, for JSON.

    `arrays` is `arrays_of` it.
    """
    left_out = (*OWN, *config.idle())
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    if isinstance(settings.get("target"), str) and settings["target"] != "all-linear":
        settings["target_regex"] = settings.pop("target")
    settings = {name: value for name, value in settings.items() if _says_something(value)}
    settings["backend"] = arrays["module"]
    settings["parts"] = arrays["parts (--parts)"]
    if settings["parts"] == 1 and arrays["BLAS threads"] == "one":
        # A part that is alone has one thread of BLAS with a worker, and without one all there are.
        settings["workers"] = 1
    return settings


def arrays_of(xp, parts, has_workers):
    """{name of ARRAYS: its value} of a run."""
    blas = "one" if parts > 1 or has_workers else "as many as there are"
    return dict(zip(ARRAYS, (xp.__name__, parts, blas), strict=True))


def write_run_file(config, arrays):
    """Write the file that repeats the run, whole or not at all, into the folder of what it made."""
    out = Path(config.out)
    # In a folder that is ours, so that nobody's file has this name.
    unfinished = out / CHECKPOINT / RUN
    content = json.dumps(settings_of(config, arrays), indent=2) + "\n"
    replace_file(out / RUN, content.encode(), unfinished)
    sync_folder(out)


def places_of(config, typed):
    """{setting: value} of what may change, the folder that paths are relative to, and `typed`.

    This is {setting: path} of the SOURCES, of the config that `as_typed` gives.
    """
    places = {name: value for name, value in asdict(config).items() if name in MAY_CHANGE}
    del places["out"]
    sources = {name: getattr(typed, name) for name in SOURCES}
    return _as_json({**places, "folder": os.getcwd(), "typed": sources})


def as_typed(config):
    """`config` of a run that goes on, with its sources called as they were when it began.

    What is written names them so: who goes on in another folder opens them by other paths, and
    makes the same files as who stayed. A source that is another one now is called as it is now.
    Raises: as `saved_settings`.
    """
    folder = Path(config.out) / CHECKPOINT
    places = _saved_places(folder, read_state(folder))
    typed = {}
    for name in SOURCES:
        with errors_name(folder / STATE):
            before = _from_here(name, places[name], places["folder"])
            called = _checked_path(name, places["typed"][name])
        if _is_same_place(before, getattr(config, name)):
            typed[name] = called
    return replace(config, **typed)


def _is_same_place(before, now):
    if before is None or now is None:
        return before is now
    return os.path.realpath(before) == os.path.realpath(now)


def as_it_began(config):
    """`config`, which goes on from what its run began with, if that was in its own folder."""
    if not goes_on_from_out(config):
        return config
    return replace(config, from_adapter=saved_settings(config.out)["from_adapter"])


def goes_on_from_out(config):
    """Does a run of this config go on from the adapter in its own folder?"""
    parent = config.from_adapter
    return parent is not None and Path(parent).resolve() == Path(config.out).resolve()


def identity_settings(config):
    """{setting: value} of what may not change."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    return _as_json(settings)


def check_out(out, resume, most_kept):
    """Raise unless `out` holds a run to resume, or nothing that a new run would write over.

    An adapter may be there if so many of its versions are kept, at least one.
    """
    checkpoint = out / CHECKPOINT
    if checkpoint.is_symlink():
        raise ValueError(
            f"{checkpoint} is a link, and a checkpoint is made and removed in the folder of its "
            "run alone; remove it"
        )
    if resume:
        check_resumable(out)
        return
    if is_checkpoint(checkpoint):
        try:
            read_state(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{error}. It is the checkpoint of a run that has not ended: remove {checkpoint}, "
                "or choose another folder"
            ) from None
        failure = failure_of(checkpoint)
        if failure is not None:
            raise ValueError(
                f"{out} holds a run that failed, and would fail again ({failure}): remove "
                f"{checkpoint}, or choose another folder"
            )
        raise ValueError(
            f"{out} holds a run that has not ended: go on with --resume, remove {checkpoint}, "
            "or choose another folder"
        )
    if is_adapter(out):
        if most_kept is None:
            raise ValueError(
                f"{out} holds an adapter, which is never written over: choose another folder, or "
                "have so many of its versions kept with keep=3 (--keep 3)"
            )
        check_keeps(out)
        return
    # A run that was killed in its first save leaves a checkpoint folder without a checkpoint.
    check_unused(out, ignore=[CHECKPOINT])


def check_resumable(out):
    """Raise FileNotFoundError unless the folder `out` holds a run that has not ended."""
    out = Path(out)
    if is_checkpoint(out / CHECKPOINT):
        return
    reason = "no run was begun there; start without --resume"
    if (out / RUN).exists():
        reason = "the run has ended, and what it learned is there"
    raise FileNotFoundError(f"nothing to resume in {out}: {reason}")


def saved_settings(out):
    """{name: value} of the run that has not ended in the folder `out`, as `settings_of` gives them.

    `log_file` is among them if it has one. Paths lead to where they led from the folder in which
    the run was started.
    Raises: FileNotFoundError if there is no such run; ValueError that names the file and the field
    for what no run has written.
    """
    end_removal(out)
    check_resumable(out)
    folder = Path(out) / CHECKPOINT
    state = read_state(folder)
    where = folder / STATE
    identity = state["identity"]
    check_fields(f"{where}: identity", identity, ("settings", "arrays"))
    places = _saved_places(folder, state)
    arrays = identity["arrays"]
    check_fields(f"{where}: identity, its arrays", arrays, ARRAYS)
    origin = places.pop("folder")
    del places["typed"]
    with errors_name(where):
        for name in PATHS:
            places[name] = _from_here(name, places[name], origin)
        config = FineTuneConfig(**identity["settings"], **places, out=str(out))
        settings = settings_of(config, arrays)
        if type(settings["parts"]) is not int or settings["backend"] not in ("numpy", "cupy"):
            raise ValueError(f"identity, its arrays: parts and module cannot be {arrays!r:.200}")
    if config.log_file is not None:
        settings["log_file"] = config.log_file
    return settings


def _saved_places(folder, state):
    """A copy of what `places_of` gave to the checkpoint in `folder`, whose JSON is `state`."""
    where = f"{folder / STATE}: places"
    places = dict(state["places"])
    check_fields(where, places, (*PATHS, "folder", "typed"))
    check_fields(f"{where}, typed", places["typed"], SOURCES)
    if not isinstance(places["folder"], str):
        raise ValueError(f"{where}, folder must be a path, got {places['folder']!r:.100}")
    return places


def _checked_path(name, path):
    """The path in the setting `name`; TypeError for what cannot stand there."""
    if not isinstance(path, str) and not (path is None and name in ("from_adapter", "log_file")):
        raise TypeError(f"{name} must be a path, got {path!r:.100}")
    return path


def _from_here(name, path, origin):
    """What the setting `name`, a path in the folder `origin`, is called in the working folder."""
    if _checked_path(name, path) is None or Path(origin) == Path.cwd():
        return path
    moved = Path(origin, path)
    # A base may be a name that is no path.
    return str(moved) if moved.exists() else path


def _says_something(value):
    return value is not None and value is not False and value not in ({}, [], ())


def _as_json(settings):
    """As JSON gives it back: it makes a list of a tuple."""
    return json.loads(json.dumps(settings))
