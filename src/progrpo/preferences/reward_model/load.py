"""The choice and the loading of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image

from progrpo.messages import named, quoted
from progrpo.preferences.pairs import Pair
from progrpo.preferences.reward_model.backbone import Backbone
from progrpo.zoo.shapes import world
from progrpo.zoo.splits import SPLITS

SHAPES = "shapes"
LATENT = "latent"
"""The backbone of latent reward heads, which see no pictures."""


def load_backbone(name: str, device: str = "auto", dtype: str = "auto") -> Backbone:
    """Load `shapes`, or the CLIP of a folder or of a hub id, frozen. ValueError where it cannot be had."""
    if name == LATENT:
        raise ValueError(
            "a latent reward head scores the latents of a model, not pictures: train it with --latent MODEL, and name"
            " its folder in preview.latent_reward"
        )
    if name == SHAPES:
        from progrpo.preferences.reward_model.shapes import ShapesBackbone

        return ShapesBackbone()
    from progrpo.preferences.reward_model.clip import ClipBackbone

    return ClipBackbone.from_hub(name, device, dtype)


def chosen_backbone(name: str, pairs: Sequence[Pair]) -> str:
    """The backbone that `name` asks for; for `auto` that of these pairs. ValueError where there is none.

    Nothing is downloaded that was not named.
    """
    if name not in ("auto", SHAPES):
        return name
    strange = next((fault for pair in pairs if (fault := _not_of_shapes(pair))), "")
    if not strange:
        return SHAPES
    if name == SHAPES:
        raise ValueError(
            f"--backbone shapes is for pictures of the built-in models, but {strange}; name a CLIP instead"
        )
    raise ValueError(
        f"these pairs are not of the shapes world, since {strange}; name a CLIP with --backbone: a folder or a hub id,"
        " such as openai/clip-vit-large-patch14 (1.7 GB)"
    )


def _not_of_shapes(pair: Pair) -> str:
    """The reason why a pair is of another world; empty where it is of the shapes world."""
    for path in (pair.image_a, pair.image_b):
        with Image.open(path) as image:
            if image.size != (world.SIZE, world.SIZE):
                return f"{named(path)} is {image.width}x{image.height}, not {world.SIZE}x{world.SIZE}"
    if "objects" not in pair.prompt.columns and pair.prompt.text not in _texts():
        return f"{quoted(pair.prompt.text)} is none of its prompts"
    return ""


@cache
def _texts() -> frozenset[str]:
    splits = (world.prompts(split) for split in SPLITS)
    return frozenset(prompt.text for kinds in splits for prompts in kinds.values() for prompt in prompts)
