"""The `progrpo` command, as `python -m progrpo`."""

import sys

from progrpo.cli import main

sys.argv[0] = "progrpo"  # a run records its command, and the path of this file says nothing
sys.exit(main())
