"""A file of settings: JSON or TOML, with a command's flags for names. Knows flags, and no command.

    {"base": "smollm2", "alpha": 16, "target": ["q_proj", "v_proj"], "rank-pattern": {"v_proj": 4}}

What stands in it is read as if it had been typed, by the same parser: so it is checked in the same
way, and refused in the same words behind the name of the file.
"""

from pathlib import Path

from ..disk.checks import each_key_once, json_object
from ..disk.reading import read_bytes
from .parser import Assignments

# A file that is larger holds something else.
MOST_BYTES = 2**20
# What only a person can say.
NOT_IN_FILES = ("config", "help", "no-log", "resume")


def read_settings(path, parser):
    """{name: value} of the settings in the file `path`, as `parser.parse_args` names them.

    Raises: OSError if it cannot be read; ValueError for another kind of file, or one that is
    damaged; ImportError for a TOML before Python 3.11; and as `parser` does for a name that is no
    flag of it, with the nearest one, for a flag that has a value already, and for a value that the
    flag does not take.
    """
    parser.where = f"{path}: "
    words = []
    name_of = {}
    for name, value in _fields(Path(path)).items():
        flag = _flag(parser, name)
        if flag in name_of:
            parser.error(f"{name_of[flag]} and {name} are one setting; leave out one of the two")
        name_of[flag] = name
        words += _words(parser, flag, name, value)
    given = vars(parser.parse_args(words))
    return {name: value for name, value in given.items() if value is not None}


def _fields(path):
    """The object that is in the file."""
    if path.suffix.lower() not in (".json", ".toml"):
        raise ValueError(f"{path}: settings are a .json or a .toml file")
    content = read_bytes(path, MOST_BYTES)
    if path.suffix.lower() == ".json":
        return json_object(path, content, object_pairs_hook=each_key_once)
    try:
        import tomllib
    except ImportError:
        raise ImportError(
            f"{path}: to read TOML takes Python 3.11 or newer; write the same as a .json"
        ) from None
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def _flag(parser, name):
    """The flag that a field of the file is called after."""
    flag = f"--{name.replace('_', '-')}"
    if flag.removeprefix("--") in NOT_IN_FILES:
        parser.error(f"{name} is said on the command line, not in a file")
    if flag not in parser.flags:
        meant = parser.nearest_flag(flag, besides=NOT_IN_FILES)
        hint = "" if meant is None else f": did you mean {meant.removeprefix('--')}?"
        parser.error(f"there is no setting {name!r}{hint}")
    return flag


def _words(parser, flag, name, value):
    """The words of a command line that say the same as a field of the file."""
    action = parser.actions_of[flag]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{name} must be true or false, got {value!r}")
        return [flag] if value else []
    if isinstance(value, dict) and isinstance(action, Assignments):
        return [f"{flag}={key}={_text(parser, name, item)}" for key, item in value.items()]
    if isinstance(value, list) and action.nargs == "+":
        if not value:
            parser.error(f"{name} is empty; leave it out")
        return [f"{flag}={_text(parser, name, item)}" for item in value]
    return [f"{flag}={_text(parser, name, value)}"]


def _text(parser, name, value):
    """A value as it is typed. Numbers come back to the bit."""
    if isinstance(value, (bool, list, dict)) or not isinstance(value, (str, int, float)):
        parser.error(f"{name} must be a number or a text, got {value!r}")
    if value == "--":
        # argparse would drop it, and say nothing.
        parser.error(f"{name} cannot be '--', which ends the options of a command; write ./--")
    return str(value)
