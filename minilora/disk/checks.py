"""What the readers of files share: errors that show both sides and name the file. Opens no file."""

import contextlib
import json


def listed(names, most):
    """The names for a message, `most` of them at the most: "a, b, c and 3 more"."""
    names = list(names)
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


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


def json_object(where, text):
    """The JSON object in `text`, None for no text; ValueError that names `where` for the rest."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{where}: expected an object with fields, got {kind}")
    return value


@contextlib.contextmanager
def errors_name(where):
    """An error of what stands below names `where`: the file that its values were read from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
