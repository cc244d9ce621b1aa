"""What a run that was killed needs to go on, to the same last bit. Knows no data and no loop.

Nothing is kept of the batches: they follow from the seed and the number of steps done.
"""

import contextlib
import os
import shutil
from collections import namedtuple
from pathlib import Path

from ..backend import to_numpy
from ..disk.checks import check_fields, errors_name
from ..disk.folder import load_config, load_folder, save_folder
from ..disk.lock import only_writer
from ..disk.reading import LARGEST_CONFIG, LARGEST_STATE, read_bytes
from ..disk.tensor_file import all_finite
from ..fits import indented
from ..tensor import check_same_layout

# The first version of this library that wrote checkpoints as they are written here, and drew the
# same random numbers after them.
VERSION = "0.7"
TENSORS = "checkpoint.safetensors"
STATE = "checkpoint.json"
FIELDS = {"version", "identity", "places", "steps", "progress"}
# A folder that is being removed has this name instead of its own.
REMOVED = ".minilora-checkpoint-done"
# What a run says that failed after it had been saved.
FAILURE = "failure.txt"

# All tensors, {name: array}, and what JSON holds: {"steps": ..., "progress": ...}.
Snapshot = namedtuple("Snapshot", "arrays state")


def is_checkpoint(folder):
    """Does `folder` hold a saved state to go on from?"""
    return (Path(folder) / TENSORS).exists()


class Checkpoint:
    """The state of a run: the tensors of `module`, the moments and steps of `adam`, the progress.

    A snapshot is taken after each step, in memory, where a step that is cut in half cannot touch
    it. The last snapshot is saved now and then, and when the run is interrupted. Of a state that is
    large no snapshots are taken: it is saved as it is, now and then.

    `identity` is what must be the same when the run goes on: {group: {field: value}}, of values
    that JSON gives back as they were. `places` is {name: value} of what may
    change: it is saved too, and tells where the run finds what it works with.

    `best` is {name: array} of the module when it was at its best, None if nobody marks that: it is
    part of the state. Whoever restores a state with it marks one before, so that both have it.

    `check(progress, steps)` raises ValueError for what cannot be the progress after so many steps;
    without it any progress is restored.
    """

    def __init__(self, folder, identity, module, adam, places=None, check=None):
        self.folder = Path(folder)
        self.identity = identity
        self.places = dict(places or {})
        self.module = module
        self.adam = adam
        self.check = check
        self.best = None
        self.snapshot = None

    def mark_best(self):
        """Copy the module as it is now: the best so far. The next snapshot has it."""
        self.best = _copies(_on_host(self.module.state_dict()))

    def take_back_best(self):
        """Write the best into the module."""
        self.module.load_state_dict(self.best)

    def take_snapshot(self, progress):
        """Copy the state as it is now. `progress` is for JSON, and must not change afterwards."""
        arrays, state = self._current(progress)
        # In one assignment: Ctrl-C finds the old snapshot or the new one, whole.
        self.snapshot = Snapshot(_copies(arrays), state)

    def save(self):
        """Write the last snapshot. A kill at any moment leaves this one or the one saved before."""
        self._write(*self.snapshot)

    def save_current(self, progress):
        """Write the state as it is now, which nobody may change meanwhile, without a copy of it.

        A kill at any moment leaves this one or the one saved before.
        """
        self._write(*self._current(progress))

    def _current(self, progress):
        """The Snapshot of now, of the very arrays."""
        adam_state = self.adam.state_dict()
        arrays = _with_prefix("module.", self.module.state_dict())
        arrays |= _with_prefix("adam.", adam_state["moments"])
        arrays |= _with_prefix("best.", self.best or {})
        return Snapshot(arrays, {"steps": adam_state["steps"], "progress": progress})

    def _write(self, arrays, state):
        arrays = _on_host(arrays)
        state = {
            "version": VERSION,
            "identity": self.identity,
            "places": self.places,
            **state,
        }
        save_folder(self.folder, TENSORS, arrays, STATE, state)

    def saved_steps(self):
        """How many steps were done when it was last saved."""
        return read_state(self.folder)["steps"]

    def restore(self):
        """Put all back as it was saved; returns the progress saved with it.

        Raises: FileNotFoundError if nothing was saved. ValueError, before anything changes, if the
        folder is damaged or was written by another version, or with both sides of what differs if
        it belongs to another run.
        """
        state, tensors, _ = load_folder(self.folder, TENSORS, STATE, most=LARGEST_STATE)
        _check_state(self.folder, state)
        self._check_identity(state["identity"])
        self._check_progress(state["progress"], state["steps"])
        parameters = _without_prefix("module.", tensors)
        moments = _without_prefix("adam.", tensors)
        best = _without_prefix("best.", tensors)
        where = f"{self.folder / TENSORS} is damaged"
        check_same_layout(where, parameters, self.module.state_dict())
        check_same_layout(where, best, self.best or {})
        self._check_finite(parameters)
        self._check_finite(best)
        with errors_name(where):
            self.adam.load_state_dict({"steps": state["steps"], "moments": moments})
        self.module.load_state_dict(parameters)
        if self.best is not None:
            self.best = _copies(best)
        (self.folder / FAILURE).unlink(missing_ok=True)
        return state["progress"]

    def _check_finite(self, tensors):
        """Raise ValueError for a parameter that is inf or nan, from which no step leads on."""
        for name, array in tensors.items():
            if not all_finite(array):
                raise ValueError(
                    f"{self.folder / TENSORS}: {name} holds inf or nan: it is damaged, or the run "
                    "had no use any more; start anew in another folder"
                )

    def _check_progress(self, progress, steps):
        with errors_name(self.folder / STATE):
            if type(steps) is not int or steps < 0:
                raise ValueError(f"steps must be a whole number of at least 0, got {steps!r:.100}")
            if self.check is not None:
                self.check(progress, steps)

    def _check_identity(self, saved):
        differences = _differences(_flat(saved), _flat(self.identity))
        if differences:
            raise ValueError(
                f"{self.folder} belongs to another run; go on with what that began with, or start "
                f"anew in another folder:{indented(differences)}"
            )

    def note_failure(self, text):
        """Keep what a run that cannot go on says: `failure_of` tells it.

        On a full disk it is not kept: what the run says is more than that.
        """
        with contextlib.suppress(OSError):
            (self.folder / FAILURE).write_text(text, encoding="utf-8")

    def remove(self):
        """Remove the folder, if there is one, so that no half of it is found under its name."""
        if not self.folder.exists():
            return
        being_removed = self.folder.with_name(REMOVED)
        shutil.rmtree(being_removed, ignore_errors=True)
        os.replace(self.folder, being_removed)
        shutil.rmtree(being_removed)


def end_removal(out):
    """Remove what is left in `out` of a checkpoint whose run was killed while it removed it.

    Raises: ValueError if another run writes in `out`.
    """
    being_removed = Path(out) / REMOVED
    if being_removed.exists():
        with only_writer(out):
            shutil.rmtree(being_removed, ignore_errors=True)


def read_state(folder):
    """What JSON holds of the checkpoint in `folder`: {field: value} of the FIELDS.

    Raises: as `restore`, but for what a run is compared with.
    """
    state = load_config(folder, TENSORS, STATE, most=LARGEST_STATE)
    _check_state(folder, state)
    return state


def failure_of(folder):
    """What the run said that failed after it was saved in `folder`; None if none did."""
    path = Path(folder) / FAILURE
    return read_bytes(path, LARGEST_CONFIG).decode(errors="replace") if path.exists() else None


def _check_state(folder, state):
    """Raise ValueError unless this version wrote `state`, what JSON holds of a checkpoint."""
    version = state.get("version")
    if version is None and "rng" in state:
        # Version 0.1 did not say which it was. It alone saved the state of generators.
        version = "0.1"
    if version is not None and version != VERSION:
        raise ValueError(
            f"{folder} was written by minilora {version}, and this is {VERSION}: "
            "go on with that version, or start anew in another folder"
        )
    if state.keys() != FIELDS:
        raise ValueError(f"{folder / STATE} has the fields {sorted(state)}; it is no checkpoint")
    check_fields(f"{folder / STATE}: identity", state["identity"])
    for group, fields in state["identity"].items():
        check_fields(f"{folder / STATE}: identity, its {group}", fields)
    check_fields(f"{folder / STATE}: places", state["places"])


def _copies(arrays):
    """{name: array} as copies, where they are: what comes home from a GPU waits for it."""
    return {name: array.copy() for name, array in arrays.items()}


def _on_host(arrays):
    return {name: to_numpy(array) for name, array in arrays.items()}


def _with_prefix(prefix, tensors):
    return {f"{prefix}{name}": array for name, array in tensors.items()}


def _without_prefix(prefix, tensors):
    """Those tensors whose names begin with `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): array
        for name, array in tensors.items()
        if name.startswith(prefix)
    }


def _flat(identity):
    """{"group field": value} of an identity."""
    return {
        f"{group} {field}": value
        for group, fields in identity.items()
        for field, value in fields.items()
    }


def _differences(saved, current):
    """What two flat identities do not share, as lines with both sides."""
    lines = []
    # Of both, in the order of the first.
    for name in saved | current:
        saved_value = saved.get(name, "absent")
        current_value = current.get(name, "absent")
        if saved_value != current_value:
            lines.append(f"{name}: {saved_value} in the checkpoint, {current_value} now")
    return lines
