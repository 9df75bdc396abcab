"""`python -m progrpo` is the `progrpo` command."""

import sys

from progrpo.cli import main

sys.argv[0] = "progrpo"  # a run records its command, and this file's name says nothing
sys.exit(main())
