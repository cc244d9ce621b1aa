"""Receipts: what is written is read, and any value in any field is a receipt or is refused by its name."""

import copy
import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, receipt_fields, small_gpt, trained_adapter

from minilora import load_adapter, save_adapter
from minilora.cli.history import summary, told
from minilora.disk.receipt import (
    FIELDS,
    RECEIPT,
    check_receipt,
    check_receipt_of,
    date_text,
    read_receipt,
    receipt_bytes,
    receipt_of,
    sha256_of,
)
from minilora.disk.versions import Version

TENSORS = "adapter_model.safetensors"


def unheard(account):
    """Nobody hears what a load says."""


@pytest.fixture
def tensors(tmp_path):
    """A file of tensors, as far as a receipt can tell."""
    path = tmp_path / TENSORS
    path.write_bytes(b"some tensors")
    return path


def test_a_receipt_names_the_tensors_it_is_of_and_is_read_as_it_was_written(tensors, tmp_path):
    text = receipt_bytes(receipt_fields(), tensors)
    (tmp_path / RECEIPT).write_bytes(text)
    receipt = read_receipt(tmp_path / RECEIPT)
    assert receipt == {"receipt": 1, **receipt_fields(), "tensors": {"file": TENSORS, "sha256": sha256_of(tensors)}}
    assert list(receipt) == list(FIELDS)
    assert receipt_of(tmp_path, TENSORS) == receipt
    check_receipt_of(tensors, receipt)
    check_receipt_of(tensors, tmp_path / RECEIPT)
    check_receipt_of(tensors, str(tmp_path / RECEIPT))


def test_what_a_later_version_has_to_tell_is_kept(tensors, tmp_path):
    (tmp_path / RECEIPT).write_bytes(receipt_bytes(receipt_fields(mood="good"), tensors))
    assert read_receipt(tmp_path / RECEIPT)["mood"] == "good"


def test_where_nothing_was_trained_there_is_no_run(tensors, tmp_path):
    fields = receipt_fields(run=None, parents=["ab" * 32, "cd" * 32], base={"name": "b", "fingerprint": None})
    (tmp_path / RECEIPT).write_bytes(receipt_bytes(fields, tensors))
    receipt = read_receipt(tmp_path / RECEIPT)
    assert receipt["run"] is None and len(receipt["parents"]) == 2
    assert summary(receipt)[0][1].endswith("; made of the tensors abababab, cdcdcdcd")


def test_a_receipt_of_other_tensors_is_noticed(tensors, tmp_path):
    (tmp_path / RECEIPT).write_bytes(receipt_bytes(receipt_fields(), tensors))
    receipt = read_receipt(tmp_path / RECEIPT)
    tensors.write_bytes(b"some tensorz")
    for call in (
        lambda: receipt_of(tmp_path, TENSORS), lambda: check_receipt_of(tensors, receipt),
        lambda: check_receipt_of(tensors, tmp_path / RECEIPT),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"of other tensors: .*{TENSORS} has {sha256_of(tensors)[:16]}"):
            call()


def test_a_folder_without_a_receipt_has_none(tmp_path):
    assert receipt_of(tmp_path, TENSORS) is None


@pytest.mark.parametrize("receipt", [7, None, [], b"x"], ids=str)
def test_what_is_neither_a_receipt_nor_a_path_is_refused(receipt, tensors):
    with pytest.raises(TypeError, match=r"receipt must be a dict or the path of a receipt\.json, got "):
        check_receipt_of(tensors, receipt)


def places(receipt):
    """Every place in a receipt, as a list of keys: of fields, and of fields of fields."""
    found = []
    for field, value in receipt.items():
        found.append([field])
        if isinstance(value, dict) and field != "settings":
            found += [[field, *rest] for rest in places(value)]
    return found


def with_value(receipt, place, value):
    """A copy of a receipt with `value` in a place."""
    changed = copy.deepcopy(receipt)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return changed


WHOLE = {"receipt": 1, **receipt_fields(), "tensors": {"file": TENSORS, "sha256": "cd" * 32}}
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e400, -1e400, float("nan"), 10**400, -(10**400), "", "x", "a" * 16,
    "A" * 16, "a" * 64, "g" * 64, "2026-02-31T09:48:37.120Z", "2026-1-1T9:48:37.120Z", "2026-11-27T09:48:37Z", "\x1b",
    [], [1], {}, {"a": 1}, {"a": {"norm": 1, "share": 0}},
]  # fmt: skip


@pytest.mark.parametrize("place", places(WHOLE), ids=".".join)
def test_any_value_in_any_place_is_a_receipt_or_is_refused_by_the_name_of_the_field(place):
    n_refused = 0
    for value in ODD_VALUES:
        changed = with_value(WHOLE, place, value)
        try:
            check_receipt("r.json", changed)
        except ValueError as error:
            assert str(error).startswith("r.json: ") and ".".join(place) in str(error)
            n_refused += 1
            continue
        # Then everything that is made of receipts can be made of this one.
        version = Version(Path("a"), changed["tensors"]["sha256"], changed["date"], changed, None)
        texts = [told(version), *(text for entry in summary(changed) for text in entry)]
        assert all(isinstance(text, str) for text in texts)
    assert n_refused


@pytest.mark.parametrize("place", places(WHOLE), ids=".".join)
def test_a_field_that_is_absent_is_named(place):
    changed = copy.deepcopy(WHOLE)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    del inside[place[-1]]
    if place[0] == "updates" and len(place) == 2:
        check_receipt("r.json", changed)
        return
    with pytest.raises(ValueError, match=f"^r.json: it is no whole receipt, it has no field {'.'.join(place)}$"):
        check_receipt("r.json", changed)


NO_RECEIPTS = [b"", b"[1]", b"{", b"7", b"\xff", b"[" * 100_000, b'{"receipt": 2}', b'{"a": %s}' % (b"9" * 5000)]


@pytest.mark.parametrize("text", NO_RECEIPTS, ids=lambda text: str(text[:16]))
def test_a_file_that_is_no_receipt_is_named(text, tmp_path):
    (tmp_path / RECEIPT).write_bytes(text)
    with pytest.raises(ValueError, match=r"receipt\.json"):
        read_receipt(tmp_path / RECEIPT)


def test_a_receipt_that_could_not_be_read_again_is_not_written(tensors):
    for changes in ({"parents": "none"}, {"updates": None}, {"run": {}}, {"date": "yesterday"}):
        with pytest.raises(ValueError, match=f"receipt: .*{next(iter(changes))}"):
            receipt_bytes(receipt_fields(**changes), tensors)


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_dates_sort_as_their_times_do(first, second):
    assert (date_text(first) < date_text(second)) == (round(1000 * first) < round(1000 * second))
    check_receipt("r", {**WHOLE, "date": date_text(first)})


def test_a_date_is_in_utc():
    assert date_text(0) == "1970-01-01T00:00:00.000Z" and date_text(1795772917.1204) == "2026-11-27T09:48:37.120Z"


def test_the_digest_of_a_file_is_that_of_sha256sum(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Beside an adapter.


def test_an_adapter_is_saved_with_its_receipt_and_loaded_against_it(tmp_path):
    base = small_gpt()
    save_adapter(trained_adapter(base), tmp_path, receipt=receipt_fields())
    receipt = receipt_of(tmp_path, TENSORS)
    assert receipt["command"] == receipt_fields()["command"]
    for given_receipt in (receipt, tmp_path / RECEIPT):
        load_adapter(tmp_path, base, receipt=given_receipt, say=unheard)
    save_adapter(trained_adapter(base, seed=2), tmp_path / "other", receipt=receipt_fields())
    for given_receipt in (receipt, tmp_path / RECEIPT):
        with pytest.raises(ValueError, match="is the receipt of other tensors"):
            load_adapter(tmp_path / "other", base, receipt=given_receipt, say=unheard)


def test_the_receipt_changes_no_byte_of_the_tensors_and_no_load_asks_for_one(tmp_path):
    base = small_gpt()
    save_adapter(trained_adapter(base), tmp_path / "with", receipt=receipt_fields())
    save_adapter(trained_adapter(base), tmp_path / "without")
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["adapter_config.json", TENSORS]
    loaded = [load_adapter(tmp_path / name, base, say=unheard) for name in ("with", "without")]
    assert bits(loaded[0]) == bits(loaded[1])


@given(st.binary(min_size=1, max_size=64), st.integers(0))
def test_one_flipped_bit_of_the_tensors_is_noticed(content, place):
    flipped = bytearray(content)
    flipped[place % len(content)] ^= 1 << place % 8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        path.write_bytes(flipped)
        receipt = with_value(WHOLE, ["tensors", "sha256"], hashlib.sha256(content).hexdigest())
        with pytest.raises(ValueError, match="other tensors"):
            check_receipt_of(path, receipt)


# The properties can fail.


def test_planted_a_field_that_takes_anything_is_seen(monkeypatch):
    monkeypatch.setitem(FIELDS["run"], "seconds", (lambda value: True, "anything"))
    with pytest.raises((TypeError, ValueError, AssertionError)):
        test_any_value_in_any_place_is_a_receipt_or_is_refused_by_the_name_of_the_field(["run", "seconds"])
