"""A checkpoint alone: it gives everything back to the bit, or refuses it before anything changes."""

import shutil

import numpy as np
import pytest
import strict_array
from strategies import contents, small_gpt, trained_adapter

from minilora import Adam
from minilora.disk.folder import load_folder, save_folder
from minilora.disk.reading import LARGEST_STATE
from minilora.training.checkpoint import REMOVED, STATE, TENSORS, Checkpoint, failure_of, is_checkpoint
from minilora.training.finetune_config import MOST_STEPS
from minilora.training.progress import Progress

IDENTITY = {"settings": {"lr": 0.5, "target": ["q_proj"]}, "base": {"wte.weight": "0123"}}
PROGRESS = {"losses": [2.5, 2.25], "before": None}


def adapter_and_adam(seed, steps=0):
    """An adapter and its optimizer after `steps` steps, whose gradients are drawn."""
    adapter = trained_adapter(small_gpt(), seed)
    adam = Adam(adapter.parameters())
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        for p in adapter.parameters():
            p.grad = rng.standard_normal(p.shape).astype(p.dtype)
        adam.step()
    return adapter, adam


def state_of(adapter, adam):
    """All that a checkpoint is to give back, to the bit."""
    adam_state = adam.state_dict()
    moments = {name: moment.tobytes() for name, moment in adam_state["moments"].items()}
    return contents(adapter), adam_state["steps"], moments


@pytest.fixture
def saved(tmp_path):
    """(folder of a checkpoint after two steps, the state that was saved)."""
    adapter, adam = adapter_and_adam(seed=1, steps=2)
    checkpoint = Checkpoint(tmp_path / "checkpoint", IDENTITY, adapter, adam)
    checkpoint.take_snapshot(PROGRESS)
    checkpoint.save()
    return tmp_path / "checkpoint", state_of(adapter, adam)


def test_a_snapshot_stays_where_the_tensors_are_and_only_saving_waits_for_a_device(tmp_path):
    host, _ = adapter_and_adam(seed=1)
    adapter = host.to_device(strict_array)
    checkpoint = Checkpoint(tmp_path / "checkpoint", IDENTITY, adapter, Adam(adapter.parameters()))
    strict_array.WAITS.clear()
    checkpoint.take_snapshot(PROGRESS)
    assert strict_array.WAITS.total() == 0
    for p in adapter.parameters():
        p.data.fill(0)
    checkpoint.save()
    assert strict_array.WAITS.total() == len(checkpoint.snapshot.arrays)
    _, tensors, _ = load_folder(tmp_path / "checkpoint", TENSORS, STATE)
    for name, array in host.state_dict().items():
        assert np.array_equal(tensors[f"module.{name}"], array)


def changed(folder, change_state=None, change_tensors=None):
    """Save the checkpoint in `folder` again, as two functions have changed it."""
    state, tensors, _ = load_folder(folder, TENSORS, STATE)
    if change_state is not None:
        change_state(state)
    if change_tensors is not None:
        change_tensors(tensors)
    shutil.rmtree(folder)
    save_folder(folder, TENSORS, tensors, STATE, state)


def is_refused(folder, complaint, identity=IDENTITY):
    """Restoring raises ValueError with the `complaint`, and changes nothing; returns the message."""
    adapter, adam = adapter_and_adam(seed=2, steps=1)
    before = state_of(adapter, adam)
    with pytest.raises(ValueError, match=complaint) as refusal:
        Checkpoint(folder, identity, adapter, adam).restore()
    assert state_of(adapter, adam) == before
    return str(refusal.value)


def test_what_was_saved_is_restored_to_the_bit(saved):
    folder, state = saved
    assert is_checkpoint(folder)
    adapter, adam = adapter_and_adam(seed=2, steps=1)
    assert Checkpoint(folder, IDENTITY, adapter, adam).restore() == PROGRESS
    assert state_of(adapter, adam) == state


def test_what_is_saved_is_the_state_at_the_last_snapshot(tmp_path):
    adapter, adam = adapter_and_adam(seed=1, steps=1)
    checkpoint = Checkpoint(tmp_path, IDENTITY, adapter, adam)
    checkpoint.take_snapshot({"n": 0})
    adam.step()
    checkpoint.take_snapshot({"n": 1})
    state = state_of(adapter, adam)
    adam.step()
    checkpoint.save()
    assert checkpoint.saved_steps() == 2
    assert checkpoint.restore() == {"n": 1}
    assert state_of(adapter, adam) == state


def test_the_best_is_a_copy_that_is_restored_and_can_be_taken_back(tmp_path):
    adapter, adam = adapter_and_adam(seed=1, steps=1)
    checkpoint = Checkpoint(tmp_path, IDENTITY, adapter, adam)
    checkpoint.mark_best()
    best = contents(adapter)
    adam.step()
    checkpoint.take_snapshot(PROGRESS)
    checkpoint.save()
    other, other_adam = adapter_and_adam(seed=2)
    restored = Checkpoint(tmp_path, IDENTITY, other, other_adam)
    restored.mark_best()
    restored.restore()
    assert contents(other) == contents(adapter) != best
    restored.take_back_best()
    assert contents(other) == best


@pytest.mark.parametrize("marked", [True, False])
def test_a_best_that_is_absent_or_that_nobody_expects_is_refused(tmp_path, marked):
    adapter, adam = adapter_and_adam(seed=1)
    checkpoint = Checkpoint(tmp_path, IDENTITY, adapter, adam)
    if marked:
        checkpoint.mark_best()
    checkpoint.take_snapshot(PROGRESS)
    checkpoint.save()
    other, other_adam = adapter_and_adam(seed=2)
    before = state_of(other, other_adam)
    restored = Checkpoint(tmp_path, IDENTITY, other, other_adam)
    if not marked:
        restored.mark_best()
    with pytest.raises(ValueError, match="is damaged: 8 arrays do not fit: h.0.attn.q_proj.lora_A"):
        restored.restore()
    assert state_of(other, other_adam) == before


def test_a_large_state_is_saved_as_it_is_and_leaves_no_snapshot(tmp_path):
    adapter, adam = adapter_and_adam(seed=1, steps=1)
    checkpoint = Checkpoint(tmp_path, IDENTITY, adapter, adam)
    checkpoint.save_current(PROGRESS)
    state = state_of(adapter, adam)
    adam.step()
    assert checkpoint.snapshot is None
    assert checkpoint.saved_steps() == 1
    assert checkpoint.restore() == PROGRESS
    assert state_of(adapter, adam) == state


def test_the_state_of_the_longest_run_fits_into_the_files_that_hold_it(tmp_path):
    """Numbers of as many digits as there are, after each step: the sizes grow by the same for each of them."""
    sizes = []
    for n in (100, 200):
        numbers = [1.2345678901234567e-100] * n
        measured = [[MOST_STEPS, numbers[0]]] * n
        progress = Progress(numbers[0], numbers, 10**18, numbers[0], measured, numbers).as_json()
        adapter, adam = adapter_and_adam(0)
        checkpoint = Checkpoint(tmp_path / str(n), IDENTITY, adapter, adam)
        checkpoint.save_current(progress)
        with open(checkpoint.folder / TENSORS, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        sizes.append((header, (checkpoint.folder / STATE).stat().st_size))
    header, state = ((large - small) / 100 * MOST_STEPS for small, large in zip(*sizes, strict=True))
    # safetensors refuses a longer one. A third of it is left for the names of tensors.
    assert header < 100_000_000 * 2 / 3
    assert state < LARGEST_STATE * 2 / 3


def test_where_nothing_was_saved_the_folder_is_named(tmp_path):
    assert not is_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=TENSORS):
        Checkpoint(tmp_path, IDENTITY, *adapter_and_adam(seed=1)).restore()


def test_it_is_removed_with_what_an_earlier_removal_left(saved):
    folder, _ = saved
    (folder.parent / REMOVED).mkdir()
    (folder.parent / REMOVED / TENSORS).write_bytes(b"half")
    Checkpoint(folder, IDENTITY, *adapter_and_adam(seed=1)).remove()
    assert list(folder.parent.iterdir()) == []


# Of another run.


@pytest.mark.parametrize("identity, difference", [
    ({**IDENTITY, "settings": {"lr": 0.25, "target": ["q_proj"]}}, r"settings lr: 0\.5 in the checkpoint, 0\.25 now"),
    ({**IDENTITY, "settings": {"lr": 0.5}}, r"settings target: \['q_proj'\] in the checkpoint, absent now"),
    ({**IDENTITY, "data": {"sha256": "4567"}}, "data sha256: absent in the checkpoint, 4567 now"),
], ids=["another value", "absent now", "absent then"])  # fmt: skip
def test_another_run_is_refused_with_both_sides(saved, identity, difference):
    folder, _ = saved
    message = is_refused(folder, rf"belongs to another run; .*\n  {difference}$", identity)
    assert len(message.splitlines()) == 2


def test_of_many_differences_the_first_are_named_and_the_others_counted(saved):
    folder, _ = saved
    many = {**IDENTITY, "more": {f"field{i}": i for i in range(11)}}
    message = is_refused(folder, "belongs to another run", many)
    assert message.splitlines()[-2:] == ["  more field7: absent in the checkpoint, 7 now", "  ... and 3 more"]


# Of another version, or damaged.


@pytest.mark.parametrize("version", ["0.1", "0.4", "0.5", "0.6", "3.1"])
def test_a_checkpoint_of_another_version_is_refused_in_one_line_that_names_it(saved, version):
    folder, _ = saved
    changed(folder, lambda state: state.update(version=version))
    message = is_refused(folder, f"written by minilora {version}, and this is 0.7: go on with that")
    assert "\n" not in message


def test_version_01_wrote_no_version_and_is_known_by_its_generators(saved):
    folder, _ = saved

    def as_01(state):
        del state["version"]
        state["rng"] = []

    changed(folder, as_01)
    is_refused(folder, r"written by minilora 0\.1")


@pytest.mark.parametrize("field", ["version", "identity", "places", "steps", "progress"])
def test_a_state_without_one_of_its_fields_is_no_checkpoint(saved, field):
    folder, _ = saved
    changed(folder, lambda state: state.pop(field))
    is_refused(folder, "has the fields .*; it is no checkpoint")


@pytest.mark.parametrize("name, complaint", [
    ("adam.m.0", "m.0 is absent"),
    ("module.h.0.mlp.up_proj.lora_A", "is damaged.*h.0.mlp.up_proj.lora_A"),
], ids=["moments", "adapter"])  # fmt: skip
def test_a_tensor_that_is_absent_is_named(saved, name, complaint):
    folder, _ = saved
    changed(folder, change_tensors=lambda tensors: tensors.pop(name))
    is_refused(folder, complaint)


def test_a_tensor_of_another_shape_is_refused(saved):
    folder, _ = saved

    def cut(tensors):
        tensors["adam.v.1"] = tensors["adam.v.1"][1:]

    changed(folder, change_tensors=cut)
    is_refused(folder, "v.1")


@pytest.mark.parametrize("field, value, complaint", [
    ("steps", "2", "checkpoint.json: steps must be a whole number of at least 0, got '2'"),
    ("steps", True, "steps must be"), ("steps", -1, "steps must be"), ("steps", 2.0, "steps must be"),
    ("steps", None, "steps must be"), ("identity", None, "checkpoint.json: identity must be an obj"),
    ("identity", {"settings": 3}, "identity, its settings must be an object with fields, got 3"),
    ("identity", [], "identity must be an object"), ("places", "here", "places must be an object"),
    ("version", [], r"was written by minilora \[\]"),
])  # fmt: skip
def test_a_field_of_another_type_is_refused_by_its_name(saved, field, value, complaint):
    folder, _ = saved
    changed(folder, lambda state: state.update({field: value}))
    is_refused(folder, complaint)


def test_a_run_that_goes_on_has_not_failed(saved):
    folder, state = saved
    adapter, adam = adapter_and_adam(seed=2, steps=1)
    checkpoint = Checkpoint(folder, IDENTITY, adapter, adam)
    checkpoint.note_failure("it cannot go on")
    assert failure_of(folder) == "it cannot go on"
    checkpoint.restore()
    assert failure_of(folder) is None


def test_a_progress_that_cannot_be_is_refused_before_anything_changes(saved):
    folder, _ = saved
    adapter, adam = adapter_and_adam(seed=2, steps=1)
    before = state_of(adapter, adam)
    asked = []

    def check(progress, steps):
        asked.append((progress, steps))
        raise ValueError("it cannot be")

    with pytest.raises(ValueError, match="checkpoint.json: it cannot be"):
        Checkpoint(folder, IDENTITY, adapter, adam, check=check).restore()
    assert asked == [(PROGRESS, 2)] and state_of(adapter, adam) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parameter_that_is_no_number_is_refused(saved, value):
    folder, _ = saved

    def spoil(tensors):
        name = "module.h.1.mlp.up_proj.lora_A"
        tensors[name] = np.where(np.arange(tensors[name].shape[1]) == 1, np.float32(value), tensors[name])

    changed(folder, change_tensors=spoil)
    is_refused(folder, "checkpoint.safetensors: h.1.mlp.up_proj.lora_A holds inf or nan: it is damaged")


@pytest.mark.parametrize("part", ["module", "best"])
def test_so_is_one_of_a_run_that_keeps_its_best_in_both(part, tmp_path):
    adapter, adam = adapter_and_adam(seed=1, steps=1)
    checkpoint = Checkpoint(tmp_path / "c", IDENTITY, adapter, adam)
    checkpoint.mark_best()
    checkpoint.save_current(PROGRESS)

    def spoil(tensors):
        name = f"{part}.h.1.mlp.up_proj.lora_A"
        tensors[name] = np.full_like(tensors[name], np.nan)

    changed(tmp_path / "c", change_tensors=spoil)
    with pytest.raises(ValueError, match="h.1.mlp.up_proj.lora_A holds inf or nan"):
        checkpoint.restore()
