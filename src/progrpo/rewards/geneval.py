"""GenEval: whether a picture holds the objects that its prompt names, in number, colour and place (arXiv
2310.11513).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.clip import VIT_L, batch_slices, center_crop, load_tokenizer
from progrpo.rewards.geneval_rules import (
    COLORS,
    THRESHOLD,
    ClauseMatch,
    Detection,
    coco_label,
    flow_grpo_credit,
    parse_requirements,
    partial_credit,
    score_detections,
    with_aliases,
)
from progrpo.rewards.hub import HubReward, fetching, load_pretrained, place
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

DETECTOR = ("facebook/mask2former-swin-tiny-coco-instance", "22c4a2f15dc88149b8b8d9f4d42c54431fbd66f6")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Detector:
    """A frozen detector of objects: a Mask2Former that segments instances, or a model that finds boxes."""

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor, batch_size: int = 16) -> None:
        self._model = model.eval().requires_grad_(False)
        self._image_processor = image_processor
        self._batch_size = batch_size
        self._labels = {i: coco_label(label) for i, label in model.config.id2label.items()}
        self.labels = with_aliases(set(self._labels.values()))

    def detect(self, pictures_NHWC: np.ndarray) -> list[list[Detection]]:
        """Detect the objects of each picture that score THRESHOLD or more, in no order."""
        batches = batch_slices(len(pictures_NHWC), self._batch_size)
        return [detections for batch in batches for detections in self._detect(pictures_NHWC[batch])]

    @torch.no_grad()
    def _detect(self, pictures_BHWC: np.ndarray) -> list[list[Detection]]:
        inputs = self._image_processor(list(pictures_BHWC), input_data_format="channels_last", return_tensors="pt")
        outputs = self._model(inputs.pixel_values.to(self._model.device, self._model.dtype))
        # in float32, and on the CPU because transformers makes the masks there
        outputs = type(outputs)(**{n: t.float().cpu() for n, t in outputs.items() if isinstance(t, Tensor)})
        shapes = [pictures_BHWC.shape[1:3]] * len(pictures_BHWC)
        if isinstance(self._model, Mask2FormerForUniversalSegmentation):
            maps = self._image_processor.post_process_instance_segmentation(
                outputs, threshold=THRESHOLD, return_binary_maps=True
            )
            return [self._from_masks(result, shape) for result, shape in zip(maps, shapes, strict=True)]
        boxes = self._image_processor.post_process_object_detection(outputs, threshold=THRESHOLD, target_sizes=shapes)
        return [self._from_boxes(result) for result in boxes]

    def _from_masks(self, result: Mapping[str, Any], shape: tuple[int, int]) -> list[Detection]:
        segments = result["segments_info"]
        if not segments:
            return []  # then the segmentation has another shape
        masks_NHW = (
            torch.nn.functional.interpolate(result["segmentation"][None], shape, mode="nearest")[0].bool().numpy()
        )
        return [
            Detection(self._labels[segment["label_id"]], segment["score"], bounding_box(mask_HW), mask_HW)
            for segment, mask_HW in zip(segments, masks_NHW, strict=True)
            if mask_HW.any()
        ]

    def _from_boxes(self, result: Mapping[str, Tensor]) -> list[Detection]:
        rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
        return [Detection(self._labels[label], score, tuple(box)) for label, score, box in rows]


def bounding_box(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask. Its right and lower edges are those of the last pixels."""
    rows = np.flatnonzero(mask_HW.any(1))
    columns = np.flatnonzero(mask_HW.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class Colors:
    """The colours of objects by a frozen CLIP: of each the one whose texts are nearest to the object's crop."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessorPil) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._directions: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture_HWC: np.ndarray, objects: Sequence[Detection], label: str) -> list[str]:
        side = self._image_processor.crop_size["height"]
        crops = [center_crop(crop_object(picture_HWC, detection), side) for detection in objects]
        inputs = self._image_processor(crops, input_data_format="channels_last", return_tensors="pt")
        pixels_BCHW = inputs.pixel_values.to(self._model.device, self._model.dtype)
        f_BD = self._model.get_image_features(pixels_BCHW).pooler_output.float()
        if label not in self._directions:
            self._directions[label] = torch.stack([self._direction(color, label) for color in COLORS])
        return [COLORS[i] for i in (f_BD @ self._directions[label].T).argmax(1).tolist()]

    def _direction(self, color: str, label: str) -> Tensor:
        """The mean of the templates' text features, each of unit length, scaled to unit length again."""
        texts = [template.format(color=color, label=label) for template in TEMPLATES]
        length = self._model.config.text_config.max_position_embeddings
        ids_TL = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        g_TD = self._model.get_text_features(ids_TL.to(self._model.device)).pooler_output.float()
        return torch.nn.functional.normalize(torch.nn.functional.normalize(g_TD, dim=-1).mean(0), dim=-1)


def crop_object(picture_HWC: np.ndarray, detection: Detection) -> np.ndarray:
    """The object's box of the picture. Pixels outside the object's mask, where there is one, are grey (#999)."""
    if detection.mask_HW is not None:
        picture_HWC = np.where(detection.mask_HW[:, :, None], picture_HWC, np.uint8(0x99))
    height, width = picture_HWC.shape[:2]
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left = min(max(left, 0), width - 1)
    top = min(max(top, 0), height - 1)
    return picture_HWC[top : max(bottom, top + 1), left : max(right, left + 1)]


class GenEval(HubReward):
    """GenEval's verdict and a value in 0..1 (`partial_credit`), by a detector of objects and a CLIP for their colours.

    Prompts have GenEval's columns: include, a list of {"class", "count", "color"?, "position"?}, and perhaps exclude
    and tag. Thresholds, the rules for position and number, CLIP ViT-L/14 and its texts are the published ones. The
    detector is another: transformers' Mask2Former with Swin-T (GenEval: mmdet's with Swin-S), with masks of 384 pixels
    a side before they are resized. So scores compare with each other, and not with published ones.
    """

    takes_model = True

    def __init__(self, detector: Detector, colors: Colors) -> None:
        self._detector, self._colors = detector, colors

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors).

        By default the detector computes in float32, because its thresholds are sharp.
        """
        exact = replace(term, dtype="float32") if term.dtype == "auto" else term
        model, image_processor = _load_detector(*(term.model, "main") if term.model else DETECTOR)
        clip = load_pretrained(CLIPModel, "geneval", *VIT_L)
        colors = Colors(place(clip, term), load_tokenizer("geneval", *VIT_L), CLIPImageProcessorPil())
        return cls(Detector(place(model, exact), image_processor, term.network_batch_size), colors)

    def credit(self, matches: Sequence[ClauseMatch], absent: Sequence[bool]) -> float:
        return partial_credit(matches, absent)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            parse_requirements(prompt, self._detector.labels)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        requirements = [parse_requirements(prompt, self._detector.labels) for prompt in prompts]
        detections = self._detector.detect(pictures_NHWC)
        return [
            score_detections(required, detected, partial(self._colors, picture_HWC), self.credit)
            for required, detected, picture_HWC in zip(requirements, detections, pictures_NHWC, strict=True)
        ]


class GenEvalFlowGRPO(GenEval):
    """GenEval's verdict with Flow-GRPO's value (`flow_grpo_credit`)."""

    def credit(self, matches: Sequence[ClauseMatch], absent: Sequence[bool]) -> float:
        return flow_grpo_credit(matches, absent)


def _load_detector(name: str, revision: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    with fetching("geneval", name):
        kind = AutoConfig.from_pretrained(name, revision=revision).model_type
        if kind == "mask2former":
            # the size at which Mask2Former is trained and measured on COCO; the hub's copies say 384 by 384
            size = {"shortest_edge": 800, "longest_edge": 1333}
            model = load_pretrained(Mask2FormerForUniversalSegmentation, "geneval", name, revision)
            return model, AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil", size=size)
        if kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            model = load_pretrained(AutoModelForObjectDetection, "geneval", name, revision)
            return model, AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
    raise Refusal(
        f"reward 'geneval': {name} is a {kind}, not a detector of objects; name a Mask2Former, a DETR or an RT-DETR"
    )
