"""Pictures and figures of a model that no run has chosen settings for, in one process and in several."""

from __future__ import annotations

import numpy as np
from PIL import Image

from progrpo.cli import main


def test_the_end_of_a_long_prompt_changes_the_picture(tiny_sd3, tmp_path):
    begins, found = "a red cat beside a green bird and ", []
    for end in ("a blue dog under a tree of green birds", "nothing at all but a great deal of red"):
        out = str(tmp_path / end[:4])
        assert main(["sample", str(tiny_sd3), "--prompt", begins + end, "--out", out, "--num-inference-steps", "4"]) == 0
        found.append(np.asarray(Image.open(f"{out}/000-00.png"), int))
    assert np.abs(found[0] - found[1]).max() > 1
