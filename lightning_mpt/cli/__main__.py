"""`python -m lightning_mpt.cli`."""

import sys

from . import main

sys.exit(main())
