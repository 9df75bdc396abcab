"""Recipes: vetted configurations, as functions. `progrpo recipes` shows the first line of each docstring."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from progrpo.config import Config, config_from_json
from progrpo.messages import named, nearest
from progrpo.recipes.built_in import preferences, quickstart, shapes_diffusion, smoke, words_flow
from progrpo.recipes.flux import (
    flux2_klein_pickscore,
    flux_pickscore,
    flux_pickscore_24gb,
    flux_pickscore_48gb,
    flux_pickscore_80gb,
    kontext_vlm,
)
from progrpo.recipes.qwen_image import qwen_image_edit
from progrpo.recipes.sana import sana_pickscore
from progrpo.recipes.stable_diffusion import (
    sd3,
    sd14_hpsv2,
    sd35m_awm,
    sd35m_geneval,
    sd35m_hpsv2,
    sd35m_ocr,
    sd35m_pickscore,
    sd35m_pickscore_24gb,
    sd35m_pickscore_48gb,
    sd35m_pickscore_80gb,
)
from progrpo.recipes.wan import wan22_pickscore, wan_pickscore
from progrpo.recipes.z_image import z_image_pickscore

RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "shapes-diffusion": shapes_diffusion,
    "words-flow": words_flow,
    "preferences": preferences,
    "sd14-hpsv2": sd14_hpsv2,
    "sd35m-pickscore": sd35m_pickscore,
    "sd35m-pickscore-24gb": sd35m_pickscore_24gb,
    "sd35m-pickscore-48gb": sd35m_pickscore_48gb,
    "sd35m-pickscore-80gb": sd35m_pickscore_80gb,
    "sd35m-hpsv2": sd35m_hpsv2,
    "sd35m-geneval": sd35m_geneval,
    "sd35m-ocr": sd35m_ocr,
    "sd35m-awm": sd35m_awm,
    "flux-pickscore": flux_pickscore,
    "flux-pickscore-24gb": flux_pickscore_24gb,
    "flux-pickscore-48gb": flux_pickscore_48gb,
    "flux-pickscore-80gb": flux_pickscore_80gb,
    "kontext-vlm": kontext_vlm,
    "flux2-klein-pickscore": flux2_klein_pickscore,
    "z-image-pickscore": z_image_pickscore,
    "qwen-image-edit": qwen_image_edit,
    "sana-pickscore": sana_pickscore,
    "wan-pickscore": wan_pickscore,
    "wan22-pickscore": wan22_pickscore,
    "sd3": sd3,
    "smoke": smoke,
}


_MOST_BYTES = 1_000_000  # a configuration takes about 3,000


def describe(name: str) -> str:
    """One line about a shipped recipe."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]


def load_recipe(name: str) -> Config:
    """The configuration of a shipped recipe, of a JSON file, or of a run folder (its config.json)."""
    if name in RECIPES:
        return RECIPES[name]()
    # unlike Path's methods, those of os.path do not raise for a name that is too long or holds a NUL
    of_run = os.path.isdir(name)
    path = Path(name, "config.json") if of_run else Path(name)
    if not os.path.isfile(path):
        raise ValueError(
            f"{named(name)} is no recipe ({', '.join(RECIPES)}), config file or run folder{nearest(name, RECIPES)}"
        )
    try:
        return config_from_json(_read_text(path), of_run)
    except OSError as error:
        raise ValueError(f"{named(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{named(path)}: not UTF-8 text; save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from None


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"over {_MOST_BYTES // 10**6} MB, so no configuration; give a recipe's JSON or a run folder")
    return content.decode("utf-8-sig")
