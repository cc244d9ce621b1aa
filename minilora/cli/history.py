"""Which adapters there are, from when and how good, by their receipts; and an older one put back.

Knows receipts and folders, no tensors.
"""

import json
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from ..disk.adapter_file import CONFIG, TENSORS, read_fingerprint
from ..disk.checks import counted, listed
from ..disk.folder import end_save, load_config
from ..disk.lock import only_writer
from ..disk.peft import digest_of
from ..disk.receipt import shown
from ..disk.tensor_file import read_metadata
from ..disk.versions import (
    SHOWN_DIGITS,
    VERSIONS,
    check_put_back,
    find_version,
    is_adapter,
    kept_versions,
    put_back,
    version_in,
)
from ..training.checkpoint import end_removal
from .folders import check_source, unfinished_run
from .messages import LONGEST_LINE, in_a_line, one_line, shortened

NO_FINGERPRINT = "no fingerprint"
# Of a command, in characters: it may be as long as its writer likes.
LONGEST_COMMAND = 1000
# Of a name in the list, where one that is long would widen the lines of all.
LONGEST_NAME = 60
# A number that is larger is no loss and no time of a run: it is shown with its exponent.
LARGEST = 1e9
# So many of the adapters that one was made of are named.
MOST_PARENTS = 4


class _Row(NamedTuple):
    """An adapter in the list: a Version, the fingerprint of its base in words, the base's name."""

    version: object
    fingerprint: str
    base: str


def history(folders, log):
    """Print the adapters in and below `folders`, kept versions too, by base and date.

    Raises: FileNotFoundError if a folder does not exist, or if there is no adapter in any.
    """
    rows = [_row(version) for version in _all_versions(folders)]
    if not rows:
        raise FileNotFoundError(
            f"there is no adapter in or below {', '.join(map(str, folders))}: no folder has "
            f"{TENSORS}{''.join(map(unfinished_run, folders))}"
        )
    by_base = {}
    for row in sorted(rows, key=lambda row: row.version.date):
        key = row.base if row.fingerprint == NO_FINGERPRINT else row.fingerprint
        by_base.setdefault(key, []).append(row)
    for of_base in by_base.values():
        # Of several names of one base the last.
        log(f"base {_told(of_base[-1].base)}, {of_base[-1].fingerprint}")
        _log_table([row.version for row in of_base], log)


def _all_versions(folders):
    """The Version of each adapter in and below `folders`; of one in use no copy is listed."""
    versions = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is no folder; give one with adapters in it")
        for place, inside, _ in os.walk(folder):
            inside[:] = sorted(name for name in inside if name != VERSIONS and name[0] != ".")
            if not is_adapter(place):
                continue
            used = version_in(place)
            versions[used.folder.resolve()] = used
            for version in kept_versions(place):
                if version.digest != used.digest:
                    versions[version.folder.resolve()] = version
    return list(versions.values())


def _row(version):
    if version.receipt is not None:
        base = version.receipt["base"]
        fingerprint = NO_FINGERPRINT
        if base["fingerprint"] is not None:
            fingerprint = f"fingerprint {base['fingerprint']}"
        return _Row(version, fingerprint, base["name"])
    fingerprint = NO_FINGERPRINT
    name = "of another program"
    try:
        name = str(load_config(version.folder, TENSORS, CONFIG)["base_model_name_or_path"])
        metadata = read_metadata(version.folder / TENSORS) or {}
        digests = read_fingerprint(version.folder, metadata)
        if digests is not None:
            fingerprint = f"fingerprint {digest_of(digests)}"
    except (ValueError, OSError, KeyError):
        # What cannot be read is listed all the same: `inspect` tells what is wrong with it.
        pass
    return _Row(version, fingerprint, name)


def _log_table(versions, log):
    """Print a line for each of some Versions of one base, in their order."""
    lines = [("date (UTC)", "steps", "last loss", "held out", "data", "tensors", "adapter")]
    for version in versions:
        date = shown(version.date)
        digest = version.digest[:SHOWN_DIGITS]
        cells = ("-", "-", "-", "no receipt")
        if version.receipt is not None:
            cells = _cells(version.receipt)
        elif version.problem is not None:
            cells = ("-", "-", "-", "a wrong receipt")
        lines.append((date, *cells, digest, in_a_line(str(version.folder))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            # Numbers stand on the right.
            cells.append(f"{cell:>{width}}" if i in (1, 2, 3) else f"{cell:<{width}}")
        log(f"  {'  '.join(cells)}".rstrip())
    for version in versions:
        if version.problem is not None:
            log(f"  {in_a_line(version.problem)}")


def _cells(receipt):
    """Steps, loss, held-out loss and data of a receipt, as texts."""
    run = receipt["run"]
    if run is None:
        # Added up from others, or taken out of a model.
        made_of = ", ".join(digest[:SHOWN_DIGITS] for digest in receipt["parents"][:MOST_PARENTS])
        return ("-", "-", "-", f"made of {made_of}" if made_of else "-")
    held_out = run["losses"]["held_out_after"]
    data = run["data"]
    return (
        _number(run["steps"], "d"),
        _number(run["losses"]["last"], ".4f"),
        "-" if held_out is None else _number(held_out, ".4f"),
        f"{_told(Path(data['path']).name, LONGEST_NAME)} {data['sha256'][:SHOWN_DIGITS]}",
    )


def _told(text, most=LONGEST_LINE):
    """A text of a receipt as a part of a line: its writer may have put anything there."""
    return shortened(in_a_line(text), most)


def _number(value, form):
    """A number of a receipt as `form` has it; a few digits of one that no run could have."""
    return format(value, form if abs(value) < LARGEST else ".4g")


def rollback(folder, to, log):
    """Make an older version the adapter in `folder`, keep the one there, and print what was done.

    `to` and errors: as `find_version` and `put_back`; as `check_source` for a folder that holds no
    adapter.
    """
    check_source(folder, "adapter")
    folder = Path(folder)
    end_removal(folder)
    with only_writer(folder):
        end_save(folder)
        version = find_version(folder, to)
        before = put_back(folder, version)
    log(f"{folder}: the adapter is now {told(version)}")
    log(f"the one before is kept in {before.folder}: {told(before)}")
    try:
        check_put_back(before)
    except (ValueError, OSError) as error:
        log(f"it cannot be put back: {one_line(error)}")
        return
    command = f"minilora rollback {shlex.quote(str(folder))} --to {before.digest[:SHOWN_DIGITS]}"
    log(f"to take it back: {command}")


def told(version):
    """A Version in a few words: its digest, and what its receipt says."""
    words = f"{version.digest[:SHOWN_DIGITS]}, {shown(version.date)} UTC"
    if version.problem is not None:
        return f"{words}, with a wrong receipt: {_told(version.problem, LONGEST_COMMAND)}"
    if version.receipt is None:
        return f"{words}, without a receipt"
    _, loss, held_out, data = _cells(version.receipt)
    run = version.receipt["run"]
    if run is None:
        return words if data == "-" else f"{words}, {data}"
    words += f", {counted(run['steps'], 'step')} on {data}, last loss {loss}"
    return words if held_out == "-" else f"{words}, held out {held_out}"


def summary(receipt):
    """What `inspect` shows of a receipt, as (title, text) pairs."""
    versions = receipt["versions"]
    machine = receipt["machine"]
    when = f"{shown(receipt['date'])} UTC"
    made_by = (
        f"minilora {versions['minilora']}, NumPy {versions['numpy']}, Python {versions['python']}; "
        f"{machine['processor']}; {machine['blas']}"
    )
    if receipt["run"] is not None:
        when += f": {_run_in_words(receipt['run'])}"
        made_by += f"; {receipt['run']['arrays']}, {counted(receipt['run']['parts'], 'part')}"
    parents = receipt["parents"]
    if parents:
        digests = [digest[:SHOWN_DIGITS] for digest in parents]
        relation = "made of" if receipt["run"] is None else "gone on from"
        when += f"; {relation} the tensors {listed(digests, MOST_PARENTS)}"
    entries = {"receipt": when, "command": _told(receipt["command"], LONGEST_COMMAND)}
    if receipt["run"] is not None:
        entries["settings"] = _told(_settings(receipt["run"]["settings"]), LONGEST_COMMAND)
    entries["made by"] = _told(made_by, LONGEST_COMMAND)
    return list(entries.items())


def _settings(settings):
    """{setting: value} in a line: alpha=16.0, target=["q_proj"], rslora=true."""
    words = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        words.append(f"{name}={text}")
    return ", ".join(words)


def _run_in_words(run):
    losses = {}
    for name in ("first", "last", "held_out_before", "held_out_after"):
        loss = run["losses"][name]
        losses[name] = None if loss is None else _number(loss, ".4f")
    data = run["data"]
    # The run itself told means of some steps, which tell more than two steps do.
    learned = f"loss {losses['first']} -> {losses['last']} nats per token (first and last step)"
    if run["steps"] == 1:
        learned = f"loss {losses['last']} nats per token"
    if None not in losses.values():
        learned += f", held out {losses['held_out_before']} -> {losses['held_out_after']}"
    if run["losses"]["best_step"] is not None:
        learned += f", the best, after step {run['losses']['best_step']}"
    return (
        f"{counted(run['steps'], 'step')} in {_number(run['seconds'], ',.0f')} s on "
        f"{_told(data['path'])} ({data['sha256'][:SHOWN_DIGITS]}: {_told(data['trained_on'])}); "
        f"{learned}"
    )
