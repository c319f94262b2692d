"""python -m counterflow: the command line."""

import sys

from counterflow.cli import main

sys.exit(main())
