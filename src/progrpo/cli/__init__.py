"""The `progrpo` command: `entry` runs it, `options` parses, `output` prints.

Commands import torch only when they run.
"""

from progrpo.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
