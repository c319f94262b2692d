"""`python -m counterflow`, which is the command."""

import sys

from counterflow.cli import main

sys.exit(main())
