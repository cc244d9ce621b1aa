"""What errors of the library advise, in the words of the command line. Knows sentences, no command.

A function says what to pass it. Who typed a command can pass nothing, but may give a flag.
"""

import re

from .finetune_options import flag_of

# (what is said to who calls a function, what is said to who types a command)
SAID_INSTEAD = (
    (r" expresses the same updates, or pass allow_large_r=True", " expresses the same updates"),
    (r"a smaller r expresses", "a smaller rank (--r) expresses"),
    (r"a smaller r in rank_pattern expresses", "a smaller rank (--rank-pattern) expresses"),
    # What stands at the beginning is of a flag: of a file, its name would stand there.
    (
        r"(^|minilora's names: )target_modules (\[.*?\] match no Linear layer) \(a string is a "
        r"regex for whole names; a list holds endings\)",
        r"\1--target-regex \2 (it is for whole names; --target takes endings)",
    ),
    (r"(^|minilora's names: )target_modules (\[.*?\] match no Linear layer)", r"\1--target \2"),
    (r"^target_modules ", "--target-regex "),
    (r"^(rank|alpha)_pattern ", r"--\1-pattern "),
    (r"^init_adapter: ", ""),
    (r" \(allow_untrained=True saves it all the same\)", ""),
    (r"; or pass check_base=False if it was changed on purpose", ""),
    (r"accept_base=\[[^]]*\] \((--accept-base [^)]*)\)", r"\1"),
    (r"full=True \(--full\)", "--full"),
    (r"keep=3 \(--keep 3\)", "--keep 3"),
    (r"log_file=None, --no-log", "--no-log"),
    (r"to= \(--to\)", "--to"),
    (r"full=True: it is of adapters", "--full: it is of adapters"),
)


def for_command_line(text):
    """`text`, the message of an error, with flags in the place of what functions are passed."""
    for of_function, of_command in SAID_INSTEAD:
        text = re.sub(of_function, of_command, text)
    # A setting is called as its flag is.
    return re.sub(r"^FineTuneConfig: (\w+)", lambda found: flag_of(found[1]), text)
