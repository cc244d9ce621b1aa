"""`python -m minilora` is the same program as the command `minilora`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
