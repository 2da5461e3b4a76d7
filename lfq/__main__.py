"""`python -m lfq` is `lfq`."""

import sys

from .cli import main

sys.exit(main())
