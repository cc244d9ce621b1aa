"""What errors of the library advise, in the words of the command line. Knows sentences, no command.

A function says what to pass it. Who typed a command can pass nothing, but may give a flag.
"""

import re

# (what is said to who calls a function, what is said to who types a command)
SAID_INSTEAD = (
    (
        r"a smaller r expresses the same updates, or pass allow_large_r=True",
        "a smaller rank (--r) expresses the same updates",
    ),
    (r" \(allow_untrained=True saves it all the same\)", ""),
    (r"; or pass check_base=False if it was changed on purpose", ""),
    (r"accept_base=\[[^]]*\] \((--accept-base [^)]*)\)", r"\1"),
    (r"full=True \(--full\)", "--full"),
    (r"keep=3 \(--keep 3\)", "--keep 3"),
    (r"full=True: it is of adapters", "--full: it is of adapters"),
)


def for_command_line(text):
    """`text`, the message of an error, with flags in the place of what functions are passed."""
    for of_function, of_command in SAID_INSTEAD:
        text = re.sub(of_function, of_command, text)
    # A setting is called as its flag is.
    return re.sub(r"^FineTuneConfig: (\w+) ", _flag, text)


def _flag(found):
    return f"--{found[1].replace('_', '-')} "
