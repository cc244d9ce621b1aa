"""The versions of an adapter: older ones kept in its folder, found, put back. Knows no base.

    my-adapter/                                         the adapter that is used
    my-adapter/versions/20261127T094837.120Z-5e6f1a2b/  one from before, whole, with its receipt

A version is a copy that gets its name in one rename, and an adapter is put back as it is saved: a
kill at any moment leaves in my-adapter the one from before or the one from after, whole. The time
of a version's folder says when a newer adapter took its place: by it they are sorted.
"""

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from .adapter_file import CONFIG, TENSORS, read_adapter
from .checks import full_disk_names, listed
from .folder import (
    UNFINISHED,
    check_places,
    config_path,
    place_copies,
    sync_file,
    sync_folder,
)
from .reading import LARGEST_CONFIG, read_bytes
from .receipt import RECEIPT, date_text, read_receipt, receipt_of, sha256_of, shown
from .tensor_file import read_metadata

VERSIONS = "versions"
# Beside the two files of an adapter: what its run left with it. A version takes them along.
BESIDE = (RECEIPT, "run.json")
# The form of the names that `_new_place` gives: nothing else in `versions` is ours to remove.
_OURS = re.compile(r"[0-9]{8}T[0-9]{6}[.][0-9]{3}Z-[0-9a-f]{8}(-[0-9]+)?")
# The name of a version that is being removed.
_REMOVED = ".minilora-removed"
# Of a digest, in the name of a version, and where people are shown one.
SHOWN_DIGITS = 8
# So many say which digest is meant, at least.
LEAST_DIGITS = 4


@dataclass(frozen=True)
class Version:
    """An adapter in a folder, seen from outside.

    digest: the SHA-256 of its file of tensors. receipt: as `read_receipt`, or None; problem: what
    is wrong with the one that lies there, or None. date: that of the receipt; without one, when the
    tensors were written, in the same form.
    """

    folder: Path
    digest: str
    date: str
    receipt: dict | None
    problem: str | None


def is_adapter(folder):
    """Does `folder` hold the tensors of an adapter?"""
    return (Path(folder) / TENSORS).is_file()


def version_in(folder):
    """The Version that the adapter in `folder` is. Raises: OSError if there is none."""
    folder = Path(folder)
    receipt = None
    problem = None
    try:
        receipt = receipt_of(folder, TENSORS)
    except (ValueError, OSError) as error:
        problem = str(error)
    if receipt is None:
        date = date_text((folder / TENSORS).stat().st_mtime)
        return Version(folder, sha256_of(folder / TENSORS), date, None, problem)
    return Version(folder, receipt["tensors"]["sha256"], receipt["date"], receipt, None)


def kept_versions(folder):
    """The Versions that are kept in `folder`, the one in use last at the end."""
    place = Path(folder) / VERSIONS
    if not place.is_dir():
        return []
    # What a link leads to is kept elsewhere, by somebody else.
    inside = [path for path in place.iterdir() if path.name[0] != "." and not path.is_symlink()]
    versions = [version_in(path) for path in inside if is_adapter(path)]
    return sorted(versions, key=_when_kept)


def _when_kept(version):
    return version.folder.stat().st_mtime_ns, version.date, version.folder.name


def check_keeps(folder):
    """Raise ValueError unless the adapter in `folder` can become a version, and another take over.

    Whoever trains that other one asks before.
    """
    place = Path(folder) / VERSIONS
    if place.is_symlink():
        raise ValueError(
            f"{place} is a link, and versions are kept and removed in the folder of their adapter "
            "alone; put the folder itself there"
        )
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file, where versions are kept; give it another name")
    check_places(folder, (*BESIDE, TENSORS, CONFIG))


def keep(folder):
    """Copy the adapter in `folder` among its versions, unless it is there; returns the Version.

    A newer adapter is about to take its place: it becomes the last of the versions.
    Raises: as `check_keeps`, before anything is copied; OSError that names the file that there was
    no room for.
    """
    folder = Path(folder)
    kept = copy_kept(folder)
    now = time.time_ns()
    os.utime(kept.folder, ns=(now, now))
    return kept


def copy_kept(folder):
    """As `keep`, but a copy that is there stays in its place among the versions."""
    folder = Path(folder)
    check_keeps(folder)
    _remove_what_kills_left(folder)
    current = version_in(folder)
    for version in kept_versions(folder):
        if _are_one(current, version):
            return version
    place = _new_place(folder, current)
    staging = place.with_name(UNFINISHED)
    staging.mkdir(parents=True)
    try:
        for name, path in _files_of(folder).items():
            with full_disk_names(place / name):
                # With its date, by which a version without a receipt is shown.
                shutil.copy2(path, staging / name)
                sync_file(staging / name)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(staging)
    os.replace(staging, place)
    sync_folder(place.parent)
    sync_folder(folder)
    return version_in(place)


def _remove_what_kills_left(folder):
    """Remove a version that was half copied, and one that was half removed."""
    for name in (UNFINISHED, _REMOVED):
        shutil.rmtree(folder / VERSIONS / name, ignore_errors=True)


def _new_place(folder, version):
    """A folder for a copy of the Version, among those that are kept, which does not exist yet."""
    # Not every system allows a colon in a name.
    stamp = version.date.replace("-", "").replace(":", "")
    first = folder / VERSIONS / f"{stamp}-{version.digest[:SHOWN_DIGITS]}"
    place = first
    number = 1
    # The same tensors of the same date, if their configuration or receipt was edited since.
    while os.path.lexists(place):
        number += 1
        place = first.with_name(f"{first.name}-{number}")
    return place


def _files_of(folder):
    """{name: path} of the files of an adapter that `folder` has."""
    paths = {name: folder / name for name in (*BESIDE, TENSORS)}
    paths[CONFIG] = config_path(folder, TENSORS, CONFIG)
    return {name: path for name, path in paths.items() if path.is_file()}


def _are_one(current, version):
    """Is the `version` a copy of the adapter in use, with its receipt?

    A save that was killed leaves the next receipt beside the adapter from before. That one is not
    of these tensors, and its version has its own.
    """
    if current.digest != version.digest or current.receipt not in (None, version.receipt):
        return False
    config = config_path(current.folder, TENSORS, CONFIG)
    kept = version.folder / CONFIG
    return kept.is_file() and read_bytes(config, LARGEST_CONFIG) == read_bytes(kept, LARGEST_CONFIG)


def drop_oldest(folder, most, spare=()):
    """Remove the oldest versions in `folder` beyond `most`; returns their folders.

    Those in the folders `spare` stay. Folders to which somebody else gave their names stay as well,
    and are not counted; nor is a copy of the adapter in use, of which one stays.
    """
    folder = Path(folder)
    _remove_what_kills_left(folder)
    used = sha256_of(folder / TENSORS)
    spared = {Path(path).resolve() for path in spare}
    copies = []
    others = []
    for version in kept_versions(folder):
        if _OURS.fullmatch(version.folder.name):
            places = copies if version.digest == used else others
            places.append(version.folder)
    removable = [place for place in others if place.resolve() not in spared]
    dropped = removable[: max(0, len(others) - most)]
    dropped += [place for place in copies[:-1] if place.resolve() not in spared]
    being_removed = folder / VERSIONS / _REMOVED
    for place in dropped:
        # So that no half of it is ever found under its name.
        os.replace(place, being_removed)
        shutil.rmtree(being_removed)
    return dropped


def find_version(folder, to=None):
    """The Version kept in `folder` that `to` means; without it, the last before the one in use.

    `to` is the path of a receipt or of a folder with an adapter, or the first digits of the digest
    of a file of tensors.
    Raises: ValueError that lists what is kept if there is none, or if several are meant.
    """
    folder = Path(folder)
    current = version_in(folder)
    kept = kept_versions(folder)
    if to is None:
        older = _older_than(current, kept)
        if not older:
            raise ValueError(
                f"{folder}: no version is older than the one in use, {_named(current)}"
                f"{_kept_words(kept)}"
            )
        return older[-1]
    found = [version for version in kept if _leads_into(to, version.folder)]
    if not found:
        prefix = _digest_meant(to)
        found = [version for version in kept if version.digest.startswith(prefix)]
        if len({version.digest for version in found}) > 1:
            names = listed(map(_named, found), most=6)
            raise ValueError(f"{folder}: {to} may be {names}; give more digits")
        if not found and not current.digest.startswith(prefix):
            raise ValueError(f"{folder}: no version has the digest {prefix}{_kept_words(kept)}")
    if not found or _are_one(current, found[-1]):
        raise ValueError(f"{folder}: {_named(current)} is the one in use")
    return found[-1]


def _older_than(current, kept):
    """Those of the `kept` versions that were in use before the current one."""
    for i, version in enumerate(kept):
        if _is_copy(version, current):
            # It was put back: what was kept after it is newer.
            return kept[:i]
    return [version for version in kept if version.digest != current.digest]


def _is_copy(version, current):
    """Was the one in use put back from this version? Then it has its date, and no equal one has."""
    if version.digest != current.digest:
        return False
    dates = [(place.folder / TENSORS).stat().st_mtime_ns for place in (version, current)]
    return dates[0] == dates[1]


def _leads_into(to, folder):
    """Is the path `to` the `folder`, or a file in it?"""
    path = Path(to)
    place = path.parent if path.is_file() else path
    return place.is_dir() and place.samefile(folder)


def _digest_meant(to):
    """The digest that `to` stands for, or its first digits."""
    path = Path(to)
    # A path that exists comes first, as everywhere.
    if path.is_dir() and is_adapter(path):
        return sha256_of(path / TENSORS)
    if path.is_file():
        return read_receipt(path)["tensors"]["sha256"]
    digits = str(to).lower()
    if len(digits) < LEAST_DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise ValueError(
            f"{to} is no receipt, no folder of an adapter, and no digest: that has hexadecimal "
            f"digits, {LEAST_DIGITS} of them at least"
        )
    return digits


def _named(version):
    return f"{version.digest[:SHOWN_DIGITS]} of {shown(version.date)}"


def _kept_words(kept):
    if not kept:
        return ", and none is kept (finetune --keep keeps some)"
    return f"; kept are {listed(map(_named, kept), most=6)}: name one with to= (--to)"


def check_put_back(version):
    """Raise ValueError or OSError unless `version` can be put back.

    As `read_adapter` for one that is damaged; and for an adapter whose tensors do not say which
    configuration is theirs: while its two files get their names, a reader could take one for the
    other's.
    """
    read_adapter(version.folder)
    metadata = read_metadata(version.folder / TENSORS) or {}
    if "minilora.config" not in metadata:
        raise ValueError(
            f"{version.folder} was written by another program, and cannot be put back in a way "
            f"that no kill disturbs; copy its {TENSORS} and {CONFIG} by hand, and remove "
            f"{' and '.join(BESIDE)} of the one in use"
        )


def put_back(folder, version):
    """Make a kept `version` the adapter in `folder`; returns the Version that was in use until now.

    That one is copied among the versions first, and no version is removed.
    Raises: as `check_put_back`, before anything changes.
    """
    folder = Path(folder)
    check_put_back(version)
    before = copy_kept(folder)
    names = _files_of(version.folder)
    for name in BESIDE:
        if name not in names:
            # It is of the one before, with which it is kept.
            (folder / name).unlink(missing_ok=True)
    beside = [name for name in BESIDE if name in names]
    place_copies(version.folder, folder, TENSORS, CONFIG, beside)
    return before
