"""VideoReward of VideoAlign (arXiv 2501.13918): a Qwen2-VL-2B with a LoRA that was trained on people's preferences of
videos, converted from the published names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from progrpo.frames import frame_places
from progrpo.messages import quoted
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import hub_file, read_pickle
from progrpo.rewards.questions import question_text
from progrpo.rewards.qwen2vl import (
    VIDEO,
    Qwen2VLReward,
    build_model,
    chat_ids,
    features,
    last_place,
    load_base,
    place_networks,
    token_id,
)
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

FILE = ("KlingTeam/VideoReward", "checkpoint-11352/model.pth", "4f26600130683e6f1de9f5d463887f28e8ef995c")
SHA256 = "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"
BASE = ("Qwen/Qwen2-VL-2B-Instruct", "895c3a49bc3fa70a340399125c650a463535e71c")
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
LEAST_PIXELS, MOST_PIXELS = 128 * 28 * 28, 448 * 448
LORA_SCALE = 128 / 64
FRAMES_A_SECOND, LEAST_FRAMES = 2, 4
RATE_COLUMN, RATE = "fps", 16.0


class VideoAlign(Qwen2VLReward):
    """The sum of (w . h_k - mean_k) / std_k over visual quality, motion quality and text alignment, where h_k is
    Qwen2-VL's feature of the token that stands for k in the question.

    It has no bounds; mean_k and std_k are published. As in the published code, the network sees two frames a second,
    four or more, evenly spaced, with the first and the last. Each is resized to 100,352 to 200,704 pixels, here by
    Pillow. A video has 16 frames a second, unless its prompt's column `fps` says otherwise. The tokens of visual and
    motion quality stand before the prompt, so these two parts do not depend on it. The network computes in bfloat16,
    unless the term says otherwise, with its LoRA merged, and the parts are computed in float32.
    """

    video = True
    parameters = 2_208_563_200
    name = "videoalign"
    parts: Sequence[int] = (0, 1, 2)
    """The places in TOKENS of what is summed."""

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights, and the configuration and tokenizer of Qwen2-VL-2B-Instruct. The weights are a
        pickle: their checksum is tested, and they are read as tensors alone.
        """
        config, tokenizer = load_base(cls.name, BASE, TOKENS)
        model, head = convert_networks(read_pickle(cls.name, hub_file(cls.name, *FILE), SHA256), config)
        return cls(*place_networks(model, head, term), tokenizer, image_processor(), term.network_batch_size)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            _frame_rate(self.name, prompt)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        if pictures_NHWC.ndim == 4 or pictures_NHWC.shape[1] < 2:
            raise Refusal(f"reward {self.name!r} scores videos of two frames or more, and these are single pictures")
        batches = batch_slices(len(prompts), self._batch_size)
        values_NK = [row for batch in batches for row in self._parts(pictures_NHWC[batch], prompts[batch]).tolist()]
        return [Score(sum(row[part] for part in self.parts)) for row in values_NK]

    @torch.no_grad()
    def _parts(self, videos_BFHWC: np.ndarray, prompts: Sequence[Prompt]) -> Tensor:
        """The three parts (B, 3), normalised."""
        seen = [self._patches(v, _frame_rate(self.name, p)) for v, p in zip(videos_BFHWC, prompts, strict=True)]
        merged = self._image_processor.merge_size**2
        question = question_text("videoalign")
        rows = [
            chat_ids(self._tokenizer, VIDEO * (len(patches) // merged), question.replace("{request}", prompt.text))
            for (patches, _), prompt in zip(seen, prompts, strict=True)
        ]
        features_BLD = features(
            self._model,
            rows,
            pixel_values_videos=torch.cat([patches_PD for patches_PD, _ in seen]),
            video_grid_thw=torch.tensor([grid for _, grid in seen]),
        )
        visual, motion, text = (token_id(self._tokenizer, token) for token in TOKENS)
        places_BK = torch.tensor([(row.index(visual), row.index(motion), last_place(row, text)) for row in rows])
        features_BKD = features_BLD[torch.arange(len(rows))[:, None], places_BK]
        raw_BK = self._head(features_BKD.float()).squeeze(-1).cpu()
        normalised_BK: Tensor = (raw_BK - torch.tensor(MEAN)) / torch.tensor(STD)
        return normalised_BK

    def _patches(self, video_FHWC: np.ndarray, rate: float) -> tuple[Tensor, tuple[int, int, int]]:
        """The patches (P, D) of a video, and how many of them lie along time, height and width."""
        frames = list(video_FHWC[seen_frames(len(video_FHWC), rate)])
        inputs = self._image_processor(frames, return_tensors="pt", input_data_format="channels_last")
        _, rows, columns = inputs.image_grid_thw[0].tolist()
        return pair_frames(inputs.pixel_values, len(frames)), (len(frames) // 2, rows, columns)


class VideoAlignVisual(VideoAlign):
    """VideoReward's part of visual quality alone."""

    name = "videoalign_visual"
    parts = (0,)


class VideoAlignMotion(VideoAlign):
    """VideoReward's part of motion quality alone."""

    name = "videoalign_motion"
    parts = (1,)


class VideoAlignText(VideoAlign):
    """VideoReward's part of text alignment alone."""

    name = "videoalign_text"
    parts = (2,)


# --- what the network sees --------------------------------------------------------------------------------------------


def image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's processor for frames of the published size."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS})


def seen_frames(frames: int, rate: float) -> list[int]:
    """The places of the frames that are seen, of a video of `frames` frames, `rate` a second: an even number."""
    most = frames // 2 * 2
    count = min(max(frames / rate * FRAMES_A_SECOND, LEAST_FRAMES), most)
    return frame_places(round(count / 2) * 2, frames)


def pair_frames(patches_PD: Tensor, frames: int) -> Tensor:
    """Turn the patches of frames, each twice as Qwen2-VL has a picture's, into those of pairs of frames.

    D holds 3 colours, then 2 moments, then the pixels of a patch.
    """
    pairs = patches_PD.view(frames // 2, 2, len(patches_PD) // frames, 3, 2, -1)
    return torch.stack([pairs[:, 0, ..., 0, :], pairs[:, 1, ..., 1, :]], dim=-2).reshape(-1, patches_PD.shape[1])


def _frame_rate(reward: str, prompt: Prompt) -> float:
    """The frames a second of a prompt's video. Refusal where its column is no number above 0."""
    value = prompt.columns.get(RATE_COLUMN)
    if value is None:
        return RATE
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise Refusal(
            f"reward {reward!r}: the column {RATE_COLUMN} of the prompt {quoted(prompt.text)} must be the video's"
            f" frames a second, a number above 0, not {quoted(value)}"
        )
    return float(value)


# --- from the published names to transformers' ------------------------------------------------------------------------

_PREFIX, _BASE, _HEAD = "base_model.model.", ".base_layer", "rm_head.weight"


def convert_networks(state: Mapping[str, Tensor], config: Qwen2VLConfig) -> tuple[Qwen2VLModel, nn.Linear]:
    """Convert a checkpoint of the published code, a Qwen2-VL in peft's layout, to transformers' model and the head."""
    merged = merge_lora({name.removeprefix(_PREFIX): weight for name, weight in state.items()})
    head = nn.Linear(merged[_HEAD].shape[1], 1, bias=False)
    head.load_state_dict({"weight": merged[_HEAD]})
    return build_model(merged, config), head


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge peft's LoRA into the weights: W + (alpha / r) B A, in W's dtype."""
    merged = {name.replace(_BASE, ""): weight for name, weight in state.items() if ".lora_" not in name}
    for name, weight in state.items():
        if name.endswith(f"{_BASE}.weight"):
            module = name.removesuffix(f"{_BASE}.weight")
            down, up = (state[f"{module}.lora_{side}.default.weight"].float() for side in ("A", "B"))
            merged[f"{module}.weight"] = (weight.float() + LORA_SCALE * up @ down).to(weight.dtype)
    return merged
