"""What a run that was killed needs to go on to the same last bit: a folder that is whole at every moment.

Nothing is kept of the batches: they follow from the seed and the number of steps done.
"""

import os
import shutil
from pathlib import Path

from ..backend import to_numpy
from ..disk.folder import load_folder, save_folder
from ..nn import check_same_layout

VERSION = "0.2"  # the first version of this library that wrote checkpoints as they are written here
ENDED = ".checkpoint.done"  # the name it goes by while it is taken away
TENSORS, STATE = "checkpoint.safetensors", "checkpoint.json"


def is_checkpoint(folder):
    """Is there a saved state in `folder` to go on from?"""
    return (Path(folder) / TENSORS).exists()


class Checkpoint:
    """The state of a run, noted after each step in memory, where a step cut in half cannot touch it, and saved at will.

    `identity` is {group: {field: value}} of what JSON holds: what must be the same when the run goes on. The state is
    the tensors of `adapter`, the moments and steps of `adam`, and what is noted with it.
    """

    def __init__(self, folder, identity, adapter, adam):
        self.folder, self.identity = Path(folder), identity
        self.adapter, self.adam = adapter, adam
        self.arrays, self.state = {}, {}

    steps = property(lambda self: self.state["steps"])  # done when the state was noted

    def note(self, progress):
        """Note the state as it is now, with `progress`, a value that JSON holds and that nobody changes afterwards."""
        arrays = {f"adapter.{name}": p.data for name, p in self.adapter.named_parameters()}
        adam = self.adam.state_dict()
        arrays |= {f"adam.{name}": moment for name, moment in adam["moments"].items()}
        copies = {name: to_numpy(a).copy() for name, a in arrays.items()}
        state = {"steps": adam["steps"], "progress": progress}
        self.arrays, self.state = copies, state  # at once: Ctrl-C finds the one or the other

    def save(self):
        """Write what was noted last. A kill at any moment leaves this state or the one saved before."""
        state = {"version": VERSION, "identity": self.identity, **self.state}
        save_folder(self.folder, TENSORS, self.arrays, STATE, state)

    def restore(self):
        """Put everything back as it was saved; returns the progress noted with it.

        Raises: ValueError, before anything changes, if the folder is damaged, or with both sides of what differs if it
        is of another run; FileNotFoundError if there is none.
        """
        saved, tensors, _ = load_folder(self.folder, TENSORS, STATE)
        version = saved.get("version", "0.1" if "rng" in saved else VERSION)
        if version != VERSION:
            raise ValueError(f"{self.folder} was written by minilora {version}, and this is {VERSION}: go on with that "
                             "version, or start anew in another folder")
        if saved.keys() != {"version", "identity", "steps", "progress"}:
            raise ValueError(f"{self.folder / STATE} has the fields {sorted(saved)}; it is no checkpoint")
        odd = _differences(saved["identity"], self.identity)
        if odd:
            more = f"\n  ... and {len(odd) - 8} more" * (len(odd) > 8)
            raise ValueError(f"{self.folder} is of another run; go on with what that began with, or start anew in "
                             "another folder:\n  " + "\n  ".join(odd[:8]) + more)
        moments = {n.removeprefix("adam."): a for n, a in tensors.items() if n.startswith("adam.")}
        factors = {n.removeprefix("adapter."): a for n, a in tensors.items() if n.startswith("adapter.")}
        where = f"{self.folder / TENSORS} is damaged"
        check_same_layout(where, factors, self.adapter.state_dict())
        self.adam.load_state_dict({"steps": saved["steps"], "moments": moments})
        self.adapter.load_state_dict(factors)
        return saved["progress"]

    def remove(self):
        """Take the folder away, at once, so that no half of it is ever found under its name."""
        gone = self.folder.with_name(ENDED)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.folder, gone)
        shutil.rmtree(gone)


def _differences(saved, now):
    """What two identities do not share, as lines with both sides."""
    flat = [{f"{group} {field}": value for group, fields in sides.items() for field, value in fields.items()}
            for sides in (saved, now)]
    return [f"{name}: {flat[0].get(name, 'absent')} in the checkpoint, {flat[1].get(name, 'absent')} now"
            for name in flat[0] | flat[1] if flat[0].get(name, "absent") != flat[1].get(name, "absent")]
