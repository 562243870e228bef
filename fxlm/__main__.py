"""`python -m fxlm` and the `fxlm` command."""

import sys

from fxlm.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
