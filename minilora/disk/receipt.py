"""The receipt beside an adapter: where it comes from, and which tensors it is of. Knows no run.

    {"receipt": 1, "date": "2026-11-27T09:48:37.120Z", "command": "minilora finetune --base ...",
     "tensors": {"file": "adapter_model.safetensors", "sha256": "5e6f..."}, ...}

It lies outside the file of tensors, which so is the same, byte by byte, where two runs give the
same tensors. It names the digest of that file: a receipt of other tensors is noticed.
"""

import hashlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

from .reading import open_regular, read_object

RECEIPT = "receipt.json"
# Of the fields below. Another number is refused: it may mean something else by them.
FORMAT = 1
_LARGEST = sys.float_info.max
# Read at once, to hash a file that is larger than the memory.
_BLOCK = 1 << 20


def date_text(seconds):
    """A time, in seconds since 1970, as receipts have it: 2026-11-27T09:48:37.120Z, in UTC.

    Such texts sort as their times do.
    """
    whole, thousandths = divmod(round(1000 * seconds), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{thousandths:03}Z"


def shown(date):
    """A date of a receipt for people: 2026-11-27 09:48:37, still in UTC."""
    return date[:19].replace("T", " ")


# What a field may hold: a function of its value, and the words for it.


def _is_number(value):
    # No comparison holds for nan. A whole number may be larger than any float.
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def _is_date(value):
    if not isinstance(value, str):
        return False
    # strptime also takes fewer digits, which would not sort.
    match = re.fullmatch(r"([0-9]{4}(?:-[0-9]{2}){2}T[0-9]{2}(?::[0-9]{2}){2})\.[0-9]{3}Z", value)
    if match is None:
        return False
    try:
        time.strptime(match[1], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        # The 31st of February.
        return False
    return True


def _is_hex(length):
    return lambda value: isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value)


def _or_none(kind):
    accepts, need = kind
    return (lambda value: value is None or accepts(value)), f"{need}, or null"


_TEXT = (lambda value: isinstance(value, str), "a text")
_WHOLE = (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number below 2^63")
_NUMBER = (_is_number, "a finite number")
_SIZE = (lambda value: _is_number(value) and value >= 0, "a finite number of at least 0")
_SHA256 = (_is_hex(64), "64 hexadecimal digits")
_FINGERPRINT = (_is_hex(16), "16 hexadecimal digits")
_DIGESTS = (
    lambda value: isinstance(value, list) and all(map(_is_hex(64), value)),
    "a list of texts of 64 hexadecimal digits",
)
_OBJECT = (lambda value: isinstance(value, dict), "an object with fields")
_THIS_FORMAT = (lambda value: type(value) is int and value == FORMAT, f"{FORMAT}")
_A_DATE = (_is_date, "a date in UTC such as 2026-11-27T09:48:37.120Z")

# {field: what it holds}; of an object within, {field: ...} again. `parents` are the SHA-256 of the
# files of tensors that an adapter was made of: the one that a run went on from, those that were
# added. `run` is null where nothing was trained. Losses are in nats per token; `seconds` is what
# the steps took, `tokens` how many they read.
FIELDS = {
    "receipt": _THIS_FORMAT,
    "date": _A_DATE,
    "command": _TEXT,
    "tensors": {"file": _TEXT, "sha256": _SHA256},
    "parents": _DIGESTS,
    "base": {"name": _TEXT, "fingerprint": _or_none(_FINGERPRINT)},
    "run": {
        "data": {
            "path": _TEXT,
            "sha256": _SHA256,
            "trained_on": _TEXT,
            "held_out": _or_none(_TEXT),
        },
        "settings": _OBJECT,
        "arrays": _TEXT,
        "parts": _WHOLE,
        "steps": _WHOLE,
        "tokens": _WHOLE,
        "seconds": _SIZE,
        "losses": {
            "first": _NUMBER,
            "last": _NUMBER,
            "held_out_before": _or_none(_NUMBER),
            "held_out_after": _or_none(_NUMBER),
            "best_step": _or_none(_WHOLE),
        },
    },
    "versions": {"minilora": _TEXT, "python": _TEXT, "numpy": _TEXT},
    "machine": {"processor": _TEXT, "blas": _TEXT},
    "updates": _OBJECT,
}
# These objects may be null.
_MAY_BE_NULL = ("run",)
# {module: this}: ‖ΔW‖, and ‖ΔW‖ / ‖W‖; null for what no float can say, as beside a W of zeros.
UPDATE = {"norm": _or_none(_SIZE), "share": _or_none(_SIZE)}


def check_receipt(where, receipt):
    """Raise ValueError that names `where` and the field unless `receipt` is a dict of FIELDS.

    Fields beside them are left alone: a later version may have more to tell.
    """
    _check_fields(where, receipt, FIELDS, "")
    for module, update in receipt["updates"].items():
        _check_fields(where, update, UPDATE, f"updates.{module:.80}.")


def _check_fields(where, value, fields, prefix):
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: {prefix.rstrip('.') or 'a receipt'} must be an object with fields, got "
            f"{value!r:.80}"
        )
    for field, kind in fields.items():
        if field not in value:
            raise ValueError(f"{where}: it is no whole receipt, it has no field {prefix}{field}")
        if value[field] is None and field in _MAY_BE_NULL:
            continue
        if isinstance(kind, dict):
            _check_fields(where, value[field], kind, f"{prefix}{field}.")
            continue
        accepts, need = kind
        if not accepts(value[field]):
            raise ValueError(f"{where}: {prefix}{field} must be {need}, got {value[field]!r:.80}")


def receipt_bytes(receipt, tensor_file):
    """The bytes of receipt.json for a dict of FIELDS but for `tensors`, which is put in here.

    `tensor_file` is the path of the file of tensors that it is the receipt of.
    Raises: ValueError that names the field which cannot be read again.
    """
    tensors = {"file": Path(tensor_file).name, "sha256": sha256_of(tensor_file)}
    whole = {"receipt": FORMAT, **receipt, "tensors": tensors}
    check_receipt("receipt", whole)
    # In the order of FIELDS, with what else there is after them.
    ordered = {field: whole.pop(field) for field in FIELDS} | whole
    return (json.dumps(ordered, indent=2) + "\n").encode()


def beside_of(receipt):
    """What `save_folder` is to write beside tensors: their receipt, with the fields of `receipt`.

    Nothing for None.
    """
    return {} if receipt is None else {RECEIPT: partial(receipt_bytes, receipt)}


def sha256_of(path):
    """The SHA-256 of a file, as 64 hexadecimal digits. Raises: OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_receipt(path):
    """The receipt in the file `path`, a dict of FIELDS.

    Raises: ValueError that names the file, and the field that is no such thing; OSError.
    """
    receipt = read_object(path)
    check_receipt(path, receipt)
    return receipt


def receipt_of(folder, tensor_file):
    """The receipt in `folder`, None where there is none.

    Raises: ValueError if it is damaged, or is the receipt of other tensors than those in the file
    `tensor_file` of the folder.
    """
    folder = Path(folder)
    if not (folder / RECEIPT).exists():
        return None
    receipt = read_receipt(folder / RECEIPT)
    check_belongs(receipt, folder / RECEIPT, folder / tensor_file)
    return receipt


def check_belongs(receipt, where, tensor_file):
    """Raise ValueError unless `receipt`, called `where`, is of the tensors in a file."""
    expected = receipt["tensors"]["sha256"]
    found = sha256_of(tensor_file)
    if found != expected:
        raise ValueError(
            f"{where} is the receipt of other tensors: it is of SHA-256 {expected[:16]}..., and "
            f"{tensor_file} has {found[:16]}...; take both files from one folder"
        )


def check_receipt_of(tensor_file, receipt):
    """Raise ValueError unless the tensors in a file are those of `receipt`, a dict or a path.

    Raises: as `read_receipt`; TypeError for anything else.
    """
    where = "receipt"
    if isinstance(receipt, dict):
        check_receipt(where, receipt)
    elif isinstance(receipt, (str, Path)):
        where = receipt
        receipt = read_receipt(where)
    else:
        raise TypeError(
            f"receipt must be a dict or the path of a {RECEIPT}, got {type(receipt).__name__}"
        )
    check_belongs(receipt, where, tensor_file)
