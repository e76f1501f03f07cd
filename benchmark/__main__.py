"""`python -m moebench` is the command `moebench`."""

from __future__ import annotations

import sys

from moebench.cli import main

if __name__ == "__main__":
    sys.exit(main())
