"""The aesthetic predictor v2.5: how much people like a picture, whatever its prompt, from a SigLIP's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from progrpo.rewards.aesthetic import Aesthetic
from progrpo.rewards.base import Refusal, Reward
from progrpo.rewards.clip import build_head
from progrpo.rewards.hub import load_pretrained, own_weights, place, require_own_weights
from progrpo.rewards.settings import RewardTerm

SIGLIP = ("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3")
WIDTHS = (1024, 128, 64, 16, 1)
"""The outputs of the head's linear layers."""


class AestheticV25(Aesthetic):
    """h(f / |f|) for pooled features f of SigLIP so400m (patches of 14, 384 pixels) and five linear layers h: a rating,
    about 1..10; its authors call 5.5 and more great.

    The value is the published one. As in the published code, pictures are resized to a square of 384 pixels, whatever
    their shape. The head is published as a pickle without a checksum, so the term brings it.
    """

    takes_model = True
    takes_sha256 = True
    parameters = 429_546_785  # of SigLIP's half that sees pictures, and of the head

    @classmethod
    def make(cls, term: RewardTerm) -> Reward:
        require_own_weights(term, "its head")
        return super().make(term)

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load SigLIP's published weights (safetensors), and the head from the file that the term names."""
        model = load_pretrained(SiglipVisionModel, term.name, *SIGLIP)
        head = convert_head(term, own_weights(term), model.config.hidden_size)
        head = place(head, replace(term, dtype="float32"))
        return cls(place(model, term), head, image_processor(model.config.image_size), term.network_batch_size)

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self._model(pixels_BCHW.to(self._model.device)).pooler_output
        return features_BD


def image_processor(side: int) -> SiglipImageProcessorPil:
    """SigLIP's processor, which resizes a picture to a square and does not keep its shape."""
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def convert_head(term: RewardTerm, state: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Build the published head: `scoring_head.0`, `.2`, ..., `.8`. Refusal where the file holds anything else."""
    shapes = {
        f"scoring_head.{2 * i}.{kind}": shape
        for i, (inputs, outputs) in enumerate(zip((width, *WIDTHS), WIDTHS, strict=False))
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,)))
    }
    wrong = {name for name, shape in shapes.items() if name not in state or state[name].shape != shape}
    if wrong := wrong or state.keys() - shapes.keys():
        raise Refusal(
            f"reward {term.name!r}: {Path(term.model)} is not the published head, since {min(wrong)} is missing, of"
            " another size or unknown; give aesthetic_predictor_v2_5.pth, or that file as safetensors"
        )
    return build_head(state)
