"""The registry of model families: each entry fits a pipeline of diffusers, and none is imported for another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from progrpo.policies.family import ModelFamily
from progrpo.policies.geometry import Geometry
from progrpo.policies.load import FAMILIES, load_policy
from progrpo.policies.sd3 import SD3
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import sizes
from progrpo.registry import load_named


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_is_a_family_of_a_pipeline(name):
    family = load_named(name, FAMILIES, "the pipeline")
    assert issubclass(family, ModelFamily) and not family.__abstractmethods__
    assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline) and f"`{name}`" in family.__doc__


@pytest.mark.slow
def test_a_family_is_not_imported_for_another():
    script = (
        "import sys; from progrpo.policies.load import family_of, locate;"
        " print(family_of(locate('shapes-flow')).__name__);"
        " print([name for name in sys.modules if name.rpartition('.')[2] in ('flux', 'wan', 'stable_diffusion')"
        " and name.startswith('progrpo.policies')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SD3", "[]"]


class AnotherFamily(SD3):
    """A family that is known by its line in the registry alone."""


def test_a_family_takes_one_file_and_one_line(tiny_sd3: Path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "StableDiffusion3Pipeline", f"{__name__}:AnotherFamily")
    settings = ModelSettings(str(tiny_sd3), lora_rank=2, max_sequence_length=8, resolution=16)
    assert isinstance(load_policy(settings).family, AnotherFamily)
    assert sizes(settings, 1, 1, 1).trained > 0


def test_a_model_without_a_size_of_its_own_needs_one():
    geometry = Geometry(channels=4, pixels_per_latent=8, default_size=None)
    assert geometry.picture_size(64) == (64, 64)
    with pytest.raises(ValueError, match=r"^model\.resolution: this model names no size of its own; give one"):
        geometry.picture_size(None)
