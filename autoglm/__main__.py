"""python -m autoglm: the same as the autoglm command."""

from __future__ import annotations

import sys

from autoglm.cli import main

if __name__ == "__main__":
    sys.exit(main())
