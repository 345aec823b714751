"""`python -m remat.cli`, where the script `remat` is not on the path."""

import sys

from remat.cli import main

sys.exit(main())
