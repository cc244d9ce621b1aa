"""Versions of an adapter: kept, found and put back, and whatever kills that leaves one of them whole and loses none."""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bits, receipt_fields, small_gpt, trained_adapter

from minilora import load_adapter, save_adapter
from minilora.disk import versions
from minilora.disk.adapter_file import CONFIG, TENSORS
from minilora.disk.receipt import RECEIPT, read_receipt, sha256_of
from minilora.disk.tensor_file import read_tensors
from minilora.disk.versions import (
    VERSIONS,
    drop_oldest,
    find_version,
    is_adapter,
    keep,
    kept_versions,
    put_back,
    version_in,
)

BASE = small_gpt()
SEEDS = {seed: trained_adapter(BASE, seed) for seed in range(1, 6)}


def save(folder, seed, receipt=True, run=True):
    """The adapter of a seed is saved in the folder, with the receipt of that day of December, and its run."""
    fields = receipt_fields(f"2026-12-{seed:02}T00:00:00.000Z", steps=seed) if receipt else None
    save_adapter(SEEDS[seed], folder, receipt=fields)
    if run:
        (folder / "run.json").write_text(json.dumps({"seed": seed}))


def seed_in(folder):
    """Which seed's adapter it is that the folder holds, whole; receipt and run must not be another's."""
    loaded = load_adapter(folder, BASE, say=lambda account: None)
    [seed] = [seed for seed, adapter in SEEDS.items() if bits(adapter) == bits(loaded)]
    return seed


def seeds_of(kept):
    return [seed_in(version.folder) for version in kept]


def with_versions(folder, n, **how):
    """The adapter of seed n in a folder, which keeps those before."""
    for seed in range(1, n + 1):
        if seed > 1:
            keep(folder)
        save(folder, seed, **how)
    return folder


def digest(folder):
    return sha256_of(folder / TENSORS)


def test_a_version_is_a_copy_with_all_that_belongs_to_it_and_is_sorted_by_its_date(tmp_path):
    folder = with_versions(tmp_path / "a", 3)
    kept = kept_versions(folder)
    assert seeds_of(kept) == [1, 2] and seed_in(folder) == 3
    for seed, version in enumerate(kept, 1):
        assert version.receipt["run"]["steps"] == seed and version.problem is None
        assert version.digest == digest(version.folder)
        names = {path.name for path in version.folder.iterdir()}
        assert names == {TENSORS, CONFIG, RECEIPT, "run.json"}
        assert json.loads((version.folder / "run.json").read_text()) == {"seed": seed}
        assert version.folder.name == f"202612{seed:02}T000000.000Z-{version.digest[:8]}"


def test_what_is_kept_already_is_not_kept_twice(tmp_path):
    folder = with_versions(tmp_path / "a", 2)
    first = keep(folder)
    assert keep(folder) == first and seeds_of(kept_versions(folder)) == [1, 2]


@pytest.mark.parametrize("name, field", [(CONFIG, "base_model_name_or_path"), (RECEIPT, "command")])
def test_what_was_edited_since_is_another_version_and_in_nobodys_way(name, field, tmp_path):
    save(tmp_path, 1)
    first = keep(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "moved"}))
    second = keep(tmp_path)
    assert keep(tmp_path) == second != first and seeds_of(kept_versions(tmp_path)) == [1, 1]
    told = [json.loads((version.folder / name).read_text())[field] for version in (first, second)]
    assert told[1] == "moved" != told[0]


def test_without_a_receipt_the_date_is_that_of_the_tensors(tmp_path):
    save(tmp_path, 1, receipt=False)
    os.utime(tmp_path / TENSORS, (1000.5, 1000.5))
    version = keep(tmp_path)
    assert version.date == "1970-01-01T00:16:40.500Z" and version.receipt is None and version.problem is None
    assert version_in(version.folder).date == version.date, "the copy is as old as what it was made of"


def test_a_receipt_of_other_tensors_is_a_problem_and_no_receipt(tmp_path):
    save(tmp_path, 1)
    receipt = (tmp_path / RECEIPT).read_bytes()
    save(tmp_path, 2)
    (tmp_path / RECEIPT).write_bytes(receipt)
    version = version_in(tmp_path)
    assert version.receipt is None and "is the receipt of other tensors" in version.problem
    (tmp_path / RECEIPT).write_bytes(b"{}")
    assert "it has no field receipt" in version_in(tmp_path).problem


# Which one is meant.


def test_the_version_before_the_one_in_use_is_the_last_that_is_older(tmp_path):
    folder = with_versions(tmp_path / "a", 3)
    assert seed_in(find_version(folder).folder) == 2
    put_back(folder, find_version(folder))
    assert seed_in(folder) == 2 and seed_in(find_version(folder).folder) == 1
    put_back(folder, find_version(folder))
    with pytest.raises(ValueError, match="no version is older than the one in use, .*; kept are .*, .*, "):
        find_version(folder)
    shutil.rmtree(folder / VERSIONS)
    with pytest.raises(ValueError, match="and none is kept"):
        find_version(folder)


def test_a_version_is_named_by_its_receipt_its_folder_or_its_first_digits(tmp_path):
    folder = with_versions(tmp_path / "a", 3)
    first, second = kept_versions(folder)
    receipt = first.folder / RECEIPT
    for to in (first.folder, receipt, str(receipt), first.digest, first.digest[:6].upper()):
        assert find_version(folder, to) == first
    assert find_version(folder, second.digest[:12]) == second


def test_the_folder_that_is_named_is_the_one_that_is_meant(tmp_path):
    """Not another one of the same tensors."""
    folder = with_versions(tmp_path / "a", 2)
    [first] = kept_versions(folder)
    shutil.copytree(first.folder, folder / VERSIONS / "copy")
    for place in (first.folder, folder / VERSIONS / "copy"):
        for to in (place, place / RECEIPT):
            assert find_version(folder, to).folder == place


@pytest.mark.parametrize("name", [None, RECEIPT])
def test_the_one_in_use_is_not_put_back_from_its_own_copy(name, tmp_path):
    folder = with_versions(tmp_path / "a", 2)
    put_back(folder, find_version(folder))
    for to in (digest(folder), kept_versions(folder)[0].folder, folder):
        with pytest.raises(ValueError, match="is the one in use"):
            find_version(folder, to if name is None or to == digest(folder) else to / name)


@pytest.mark.parametrize("to, says", [
    ("abc", "no receipt, no folder of an adapter, and no digest"), ("", "no digest"), ("wxyz", "no digest"),
    ("0" * 64, "no version has the digest 0+; kept are"),
])  # fmt: skip
def test_what_names_no_version_is_refused_with_what_is_kept(to, says, tmp_path):
    folder = with_versions(tmp_path / "a", 3)
    with pytest.raises(ValueError, match=says):
        find_version(folder, to)


def test_the_one_in_use_and_digits_of_several_are_refused(tmp_path, monkeypatch):
    folder = with_versions(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="is the one in use"):
        find_version(folder, digest(folder)[:8])
    kept = kept_versions(folder)
    alike = [replace(version, digest=f"abcd{i}{version.digest[5:]}") for i, version in enumerate(kept)]
    monkeypatch.setattr(versions, "kept_versions", lambda folder: alike)
    with pytest.raises(ValueError, match="abcd may be abcd0... of .*, abcd1... of .*; give more digits"):
        find_version(folder, "abcd")


# Put back.


def test_a_version_is_put_back_whole_and_nothing_is_lost(tmp_path):
    folder = with_versions(tmp_path / "a", 3)
    tensors = (kept_versions(folder)[0].folder / TENSORS).read_bytes()
    before = put_back(folder, kept_versions(folder)[0])
    assert seed_in(folder) == 1 and seed_in(before.folder) == 3 and (folder / TENSORS).read_bytes() == tensors
    assert seeds_of(kept_versions(folder)) == [1, 2, 3], "no version was removed"
    assert version_in(folder).receipt["run"]["steps"] == 1
    assert json.loads((folder / "run.json").read_text()) == {"seed": 1}
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG, RECEIPT, "run.json", VERSIONS}
    put_back(folder, before)
    assert seed_in(folder) == 3 and seeds_of(kept_versions(folder)) == [1, 2, 3]


def test_what_the_one_before_had_beside_it_goes_with_it(tmp_path):
    folder = with_versions(tmp_path / "a", 2, receipt=False, run=False)
    os.utime(folder / TENSORS, (2e9, 2e9))
    keep(folder)
    save(folder, 3)
    put_back(folder, kept_versions(folder)[0])
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG, VERSIONS}
    put_back(folder, [version for version in kept_versions(folder) if version.receipt][0])
    assert version_in(folder).receipt["run"]["steps"] == 3
    assert json.loads((folder / "run.json").read_text()) == {"seed": 3}


def test_an_adapter_of_another_program_is_kept_and_not_put_back(tmp_path):
    from safetensors.numpy import save_file

    save(tmp_path, 1, receipt=False, run=False)
    tensors, _ = read_tensors(tmp_path / TENSORS)
    save_file({name: array.copy() for name, array in tensors.items()}, tmp_path / TENSORS, {"format": "pt"})
    theirs = keep(tmp_path)
    save(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="another program, .*by hand, and remove receipt.json and run.json of"):
        put_back(tmp_path, theirs)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", [
    lambda place: (place / CONFIG).unlink(),
    lambda place: (place / CONFIG).write_text("{"),
    lambda place: (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:-1]),
    lambda place: (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:-1] + b"x"),
])  # fmt: skip
def test_a_damaged_version_does_not_take_the_place_of_a_good_one(damage, tmp_path):
    folder = with_versions(tmp_path / "a", 2)
    [version] = kept_versions(folder)
    damage(version.folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, FileNotFoundError), match=version.folder.name):
        put_back(folder, version)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_oldest_beyond_the_most_are_dropped_and_never_the_one_in_use(tmp_path):
    folder = with_versions(tmp_path / "a", 5)
    assert drop_oldest(folder, 4) == []
    dropped = drop_oldest(folder, 2)
    assert len(dropped) == 2 and seeds_of(kept_versions(folder)) == [3, 4] and seed_in(folder) == 5
    put_back(folder, kept_versions(folder)[0])
    assert seeds_of(kept_versions(folder)) == [3, 4, 5] and drop_oldest(folder, 2) == []
    assert len(drop_oldest(folder, 1)) == 1 and seeds_of(kept_versions(folder)) == [3, 5]


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["train", "back", "back to the first"]), max_size=7), st.integers(1, 3))
def test_whatever_was_done_before_the_one_last_in_use_is_kept(steps, most):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save(folder, 1)
        for step in steps:
            if step == "train":
                used = seed_in(folder)
                following = used % 5 + 1
                keep(folder)
                save(folder, following)
                drop_oldest(folder, most)
                assert seeds_of(kept_versions(folder))[-1] == used == seed_in(find_version(folder).folder)
            elif any(version.digest != digest(folder) for version in kept_versions(folder)):
                before = all_seeds(folder)
                with contextlib.suppress(ValueError):
                    put_back(folder, find_version(folder) if step == "back" else kept_versions(folder)[0])
                assert all_seeds(folder) == before


def test_folders_that_the_user_put_among_the_versions_stay(tmp_path):
    folder = with_versions(tmp_path / "a", 4)
    for name in ("best", "20261201T000000.000Z", "notes-of-mine"):
        shutil.copytree(kept_versions(folder)[0].folder, folder / VERSIONS / name)
    assert len(drop_oldest(folder, 1)) == 2
    assert {"best", "20261201T000000.000Z", "notes-of-mine"} < {path.name for path in (folder / VERSIONS).iterdir()}


def test_a_version_that_is_spared_stays_and_counts(tmp_path):
    folder = with_versions(tmp_path / "a", 4)
    first, second, third = [version.folder for version in kept_versions(folder)]
    assert drop_oldest(folder, 2, [first]) == [second] and drop_oldest(folder, 1, [first]) == [third]
    assert drop_oldest(folder, 0, [first]) == []


def test_a_full_disk_leaves_no_half_of_a_version_and_names_the_file(tmp_path, monkeypatch):
    folder = with_versions(tmp_path / "a", 2)

    def no_room(source, target):
        raise OSError(28, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copy2", no_room)
    with pytest.raises(OSError, match=r"No space left on device: '.*versions/2026.*"):
        keep(folder)
    assert len(list((folder / VERSIONS).iterdir())) == 1


def test_a_version_without_a_configuration_is_in_nobodys_way(tmp_path):
    save(tmp_path, 1)
    first = keep(tmp_path)
    (first.folder / CONFIG).unlink()
    assert keep(tmp_path).folder != first.folder


def test_what_is_half_a_version_or_none_is_passed_over(tmp_path):
    folder = with_versions(tmp_path / "a", 2)
    (folder / VERSIONS / ".unfinished").mkdir()
    (folder / VERSIONS / ".unfinished" / TENSORS).write_bytes(b"half")
    (folder / VERSIONS / "notes").mkdir()
    (folder / VERSIONS / "mine.txt").write_text("mine")
    assert seeds_of(kept_versions(folder)) == [1]
    save(folder, 3)
    keep(folder)
    assert seeds_of(kept_versions(folder)) == [1, 3] and (folder / VERSIONS / "mine.txt").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_versions_that_a_link_leads_to_are_neither_listed_nor_removed_nor_added_to(tmp_path):
    folder = with_versions(tmp_path / "a", 2)
    of_another = with_versions(tmp_path / "another", 3)
    (folder / VERSIONS / "linked").symlink_to(kept_versions(of_another)[0].folder)
    assert seeds_of(kept_versions(folder)) == [1] and len(drop_oldest(folder, 0)) == 1
    shutil.rmtree(folder / VERSIONS)
    (folder / VERSIONS).symlink_to(of_another / VERSIONS)
    with pytest.raises(ValueError, match="versions is a link, and versions are kept and removed"):
        keep(folder)
    assert seeds_of(kept_versions(of_another)) == [1, 2]


@pytest.mark.parametrize("name", [RECEIPT, "run.json", CONFIG, VERSIONS])
def test_what_is_in_the_way_of_an_adapter_and_its_versions_is_told_before_anything_changes(tmp_path, name):
    folder = tmp_path / "a"
    save(folder, 1)
    if name == VERSIONS:
        (folder / name).write_text("mine")
    else:
        (folder / name).unlink()
        (folder / name).mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"{name} is a (file|folder), where"):
        keep(folder)
    assert sorted(folder.rglob("*")) == before


# Killed at any moment.


class Moments:
    """Copies of a folder after every operation on files that changes it."""

    def __init__(self, folder, copies, monkeypatch):
        self.folder = folder
        self.copies = copies
        self.found = []
        self.is_copying = False
        for owner, name in ((os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (shutil, "copy2"),
                            (shutil, "copyfile"), (shutil, "rmtree"), (os, "fsync")):  # fmt: skip
            monkeypatch.setattr(owner, name, self.followed(getattr(owner, name)))

    def followed(self, real):
        def call(*arguments, **options):
            result = real(*arguments, **options)
            if not self.is_copying:
                self.is_copying = True
                self.found.append(self.copies / f"{len(self.found)}")
                shutil.copytree(self.folder, self.found[-1])
                self.is_copying = False
            return result

        return call


def moments(folder, copies, monkeypatch, change):
    """The folder after each operation on files in `change(folder)`."""
    with monkeypatch.context() as patch:
        seen = Moments(folder, copies, patch)
        change(folder)
    assert len(seen.found) > 10
    return seen.found


def all_seeds(folder):
    """The seeds of the adapter and its versions."""
    return {seed_in(folder), *seeds_of(kept_versions(folder))}


def roll_back(folder):
    put_back(folder, next(version for version in kept_versions(folder) if seed_in(version.folder) == 1))


def train_once_more(folder):
    """What finetune --keep 2 does at its end: the adapter of seed 4 takes the place of that of seed 3."""
    keep(folder)
    save(folder, 4, run=False)
    drop_oldest(folder, 2)


@pytest.mark.parametrize("change, old, new, least", [
    (roll_back, 3, 1, {1, 2, 3}),
    (train_once_more, 3, 4, {2, 3}),
])  # fmt: skip
def test_a_kill_at_any_moment_leaves_one_whole_and_loses_none(change, old, new, least, tmp_path, monkeypatch):
    folder = with_versions(tmp_path / "a", 3)
    found = moments(folder, tmp_path / "moments", monkeypatch, change)
    seeds = [seed_in(moment) for moment in found]
    assert set(seeds) == {old, new} and seeds == sorted(seeds, key=[old, new].index)
    for moment in found:
        assert all_seeds(moment) >= least
        # The next command takes it from there, over whatever was left behind.
        change(moment)
        assert seed_in(moment) == new and all_seeds(moment) >= least
        assert version_in(moment).receipt["run"]["steps"] == new
        for version in kept_versions(moment):
            assert version.receipt["run"]["steps"] == seed_in(version.folder)
        assert not list(moment.rglob(".*")), "nothing of the kill is left"
        digests = [version.digest for version in kept_versions(moment)]
        assert len(digests) == len(set(digests)), "nothing is there twice"


# The properties can fail.


def test_planted_a_rollback_that_moves_the_version_is_seen(tmp_path, monkeypatch):
    def moved(source, folder, tensor_file, config_file, beside):
        for name in (*beside, tensor_file, config_file):
            os.replace(source / name, folder / name)

    monkeypatch.setattr(versions, "place_copies", moved)
    with pytest.raises((AssertionError, ValueError, TypeError, OSError)):
        test_a_kill_at_any_moment_leaves_one_whole_and_loses_none(roll_back, 3, 1, {1, 2, 3}, tmp_path, monkeypatch)


def test_planted_a_version_that_grows_under_its_name_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "UNFINISHED", "20261231T000000.000Z-half")
    with pytest.raises((AssertionError, ValueError, TypeError, OSError)):
        test_a_kill_at_any_moment_leaves_one_whole_and_loses_none(roll_back, 3, 1, {1, 2, 3}, tmp_path, monkeypatch)


def test_a_folder_without_tensors_is_no_adapter(tmp_path):
    assert not is_adapter(tmp_path) and kept_versions(tmp_path) == []
    save(tmp_path, 1)
    assert is_adapter(tmp_path) and read_receipt(tmp_path / RECEIPT)["run"]["steps"] == 1
