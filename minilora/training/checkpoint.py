"""What a run that was killed needs to go on, to the same last bit. Knows no data and no loop.

Nothing is kept of the batches: they follow from the seed and the number of steps done.
"""

import os
import shutil
from collections import namedtuple
from pathlib import Path

from ..backend import to_numpy
from ..disk.folder import load_folder, save_folder
from ..fits import indented
from ..tensor import check_same_layout

# The first version of this library that wrote checkpoints as they are written here.
VERSION = "0.4"
TENSORS = "checkpoint.safetensors"
STATE = "checkpoint.json"
# A folder that is being removed has this name instead of its own.
REMOVED = ".checkpoint.done"

# Copies of all tensors, {name: array}, and what JSON holds: {"steps": ..., "progress": ...}.
Snapshot = namedtuple("Snapshot", "arrays state")


def is_checkpoint(folder):
    """Does `folder` hold a saved state to go on from?"""
    return (Path(folder) / TENSORS).exists()


class Checkpoint:
    """The state of a run: the tensors of `adapter`, the moments and steps of `adam`, the progress.

    A snapshot is taken after each step, in memory, where a step that is cut in half cannot touch
    it. The last snapshot is saved now and then, and when the run is interrupted.

    `identity` is what must be the same when the run goes on: {group: {field: value}}, of values
    that JSON gives back as they were.
    """

    def __init__(self, folder, identity, adapter, adam):
        self.folder = Path(folder)
        self.identity = identity
        self.adapter = adapter
        self.adam = adam
        self.snapshot = None

    @property
    def steps(self):
        """How many steps were done at the last snapshot."""
        return self.snapshot.state["steps"]

    def take_snapshot(self, progress):
        """Copy the state as it is now. `progress` is for JSON, and must not change afterwards."""
        adam_state = self.adam.state_dict()
        arrays = {f"adapter.{name}": a for name, a in self.adapter.state_dict().items()}
        arrays |= {f"adam.{name}": a for name, a in adam_state["moments"].items()}
        copies = {name: to_numpy(a).copy() for name, a in arrays.items()}
        state = {"steps": adam_state["steps"], "progress": progress}
        # In one assignment: Ctrl-C finds the old snapshot or the new one, whole.
        self.snapshot = Snapshot(copies, state)

    def save(self):
        """Write the last snapshot. A kill at any moment leaves this one or the one saved before."""
        state = {"version": VERSION, "identity": self.identity, **self.snapshot.state}
        save_folder(self.folder, TENSORS, self.snapshot.arrays, STATE, state)

    def restore(self):
        """Put adapter and Adam back as they were saved; returns the progress saved with them.

        Raises: FileNotFoundError if nothing was saved. ValueError, before anything changes, if the
        folder is damaged or was written by another version, or with both sides of what differs if
        it belongs to another run.
        """
        state, tensors, _ = load_folder(self.folder, TENSORS, STATE)
        self._check_version(state)
        self._check_identity(state["identity"])
        factors = _without_prefix("adapter.", tensors)
        moments = _without_prefix("adam.", tensors)
        where = f"{self.folder / TENSORS} is damaged"
        check_same_layout(where, factors, self.adapter.state_dict())
        self.adam.load_state_dict({"steps": state["steps"], "moments": moments})
        self.adapter.load_state_dict(factors)
        return state["progress"]

    def _check_version(self, state):
        version = state.get("version")
        if version is None and "rng" in state:
            # Version 0.1 did not say which it was. It alone saved the state of generators.
            version = "0.1"
        if version is not None and version != VERSION:
            raise ValueError(
                f"{self.folder} was written by minilora {version}, and this is {VERSION}: "
                "go on with that version, or start anew in another folder"
            )
        if state.keys() != {"version", "identity", "steps", "progress"}:
            raise ValueError(
                f"{self.folder / STATE} has the fields {sorted(state)}; it is no checkpoint"
            )

    def _check_identity(self, saved):
        differences = _differences(_flat(saved), _flat(self.identity))
        if differences:
            raise ValueError(
                f"{self.folder} belongs to another run; go on with what that began with, or start "
                f"anew in another folder:{indented(differences)}"
            )

    def remove(self):
        """Remove the folder, so that no half of it is ever found under its name."""
        being_removed = self.folder.with_name(REMOVED)
        shutil.rmtree(being_removed, ignore_errors=True)
        os.replace(self.folder, being_removed)
        shutil.rmtree(being_removed)


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
