"""`python -m progrpo` is the `progrpo` command."""

import sys

from progrpo.cli import main

sys.exit(main())
