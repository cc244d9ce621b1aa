"""What the readers of files share: errors that show both sides and name the file. Opens no file."""

import contextlib
import errno
import json

# The disk is full, or what one user or one file may take of it is used up.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What no configuration has, so that nobody must think of it again: whole numbers beyond every
# float, and values so deep inside others that Python cannot show them.
MOST_DIGITS = 300
DEEPEST = 50
_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"


def listed(names, most):
    """The names for a message, `most` of them at the most: "a, b, c and 3 more"."""
    names = list(names)
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def counted(number, noun):
    """A number of things in words: "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def check_same_tensors(where, present, expected):
    """Raise ValueError with both sides unless two {name: shape} agree, or two lists of names."""
    absent = [name for name in expected if name not in present]
    superfluous = [name for name in present if name not in expected]
    misshapen = []
    if isinstance(expected, dict):
        for name in present:
            if name in expected and present[name] != expected[name]:
                misshapen.append(f"{name} is {present[name]}, not {expected[name]}")
    differences = []
    for kind, names in (
        ("absent", absent),
        ("superfluous", superfluous),
        ("misshapen", misshapen),
    ):
        if names:
            differences.append(f"{kind}: {listed(sorted(names), most=6)}")
    if differences:
        raise ValueError(f"{where}: do not match. {'; '.join(differences)}")


def parse_json(text, **options):
    """The value of a JSON text, which is a text or bytes; `options` are those of `json.loads`.

    NaN, Infinity and 1e400 are read, as `json` does: who uses a number asks whether it is finite.
    Raises: ValueError for what is no JSON, for a whole number that no float can hold, and for what
    is nested deeper than any file that is read here: who shows or compares it would fail on it.
    """
    try:
        value = json.loads(text, parse_int=_whole_number, **options)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    layer = [value]
    for _ in range(DEEPEST):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return value
    raise ValueError(_TOO_DEEP)


def _whole_number(digits):
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, and {MOST_DIGITS} are read")
    return int(digits)


def _inside(value):
    """The lists and objects that are parts of a value of JSON."""
    parts = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list):
        parts = value
    return [part for part in parts if isinstance(part, (dict, list))]


def each_key_once(items):
    """The dict of a JSON object, as an `object_pairs_hook`: of equal keys Python takes the last.

    Raises: ValueError that names the key which comes twice.
    """
    fields = {}
    for key, value in items:
        if key in fields:
            raise ValueError(f"the key {key!r:.100} comes twice")
        fields[key] = value
    return fields


def json_object(where, text, **options):
    """The JSON object in `text`, None for no text; ValueError that names `where` for the rest.

    `options` are those of `json.loads`.
    """
    if text is None:
        return None
    try:
        value = parse_json(text, **options)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{where}: expected an object with fields, got {kind}")
    return value


def check_fields(where, value, names=()):
    """Raise ValueError that names `where` unless a value of JSON is an object with these fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with fields, got {value!r:.100}")
    absent = [name for name in names if name not in value]
    if absent:
        raise ValueError(f"{where} must have the fields {listed(absent, most=6)}")


def json_texts(where, text):
    """{name: word} of the JSON object in `text`, None for no text.

    Raises: ValueError that names `where` for anything else, and for a word that cannot be printed.
    """
    texts = json_object(where, text)
    for name, value in (texts or {}).items():
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(f"{where}: {name!r:.100} must have a word, got {value!r:.100}")
    return texts


@contextlib.contextmanager
def errors_name(where):
    """An error of what stands below names `where`: the file that its values were read from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


@contextlib.contextmanager
def full_disk_names(path):
    """An error of a full disk names `path`, the file that there was no room for."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def library_errors(where):
    """What the library `tokenizers` raises here is a ValueError that begins with `where`."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust's is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{where}: {error}") from None
        raise
