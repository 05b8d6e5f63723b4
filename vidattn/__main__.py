"""`python -m vidattn`: the command line."""

import sys

from vidattn.cli import main

sys.exit(main())
