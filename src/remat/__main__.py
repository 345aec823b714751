"""`python -m remat`: the command line, where the script `remat` is not on the path."""

from __future__ import annotations

from remat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
