"""GenEval: does the picture hold the objects that its prompt names, in number, colour and place? (arXiv 2310.11513)"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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

from progrpo.prompts.texts import folded
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.clip import VIT_L, middle_of, tokenizer_of
from progrpo.rewards.hub import HubReward, fetching, placed, pretrained
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

DETECTOR = ("facebook/mask2former-swin-tiny-coco-instance", "22c4a2f15dc88149b8b8d9f4d42c54431fbd66f6")

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
THRESHOLD = 0.3  # a detection counts if it scores more
COUNTING_THRESHOLD = 0.9  # where the prompt is about a number
MOST = 16  # objects of a class, the most certain ones
MARGIN = 0.1  # of the summed sizes of two boxes: so far apart are their centres at least where one is beside the other
RELATIONS = ("left of", "right of", "above", "below")

_COCO = {  # the names that GenEval and some detectors have for COCO's classes
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


# --- what a prompt demands --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, all of a colour, each in a relation to all objects of an earlier clause."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Demand:
    """What a picture must hold, and what it must not: so many objects of a class or more."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    threshold: float = THRESHOLD


def demand_of(prompt: Prompt, labels: Collection[str]) -> Demand:
    """A prompt's columns, as in GenEval's metadata, for a detector that knows `labels`; Refusal where they are not like that."""
    include, exclude = (prompt.columns.get(name) for name in ("include", "exclude"))
    if not include:
        raise _unreadable(prompt, 'it has no column include; add one, such as [{"class": "dog", "count": 2}]')
    clauses = _clauses(prompt, "include", include, labels), _clauses(prompt, "exclude", exclude or [], labels)
    counting = folded(str(prompt.columns.get("tag"))) == "counting"
    return Demand(*clauses, COUNTING_THRESHOLD if counting else THRESHOLD)


def _clauses(prompt: Prompt, column: str, entries: Any, labels: Collection[str]) -> tuple[Clause, ...]:
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        raise _unreadable(prompt, f'{column} must be a list of objects such as {{"class": "dog", "count": 2}}')
    return tuple(_clause(prompt, f"{column}[{i}]", i, entry, labels) for i, entry in enumerate(entries))


def _clause(prompt: Prompt, where: str, index: int, entry: Mapping[str, Any], labels: Collection[str]) -> Clause:
    given, count, shade, position = (entry.get(name) for name in ("class", "count", "color", "position"))
    label, color = _known(given, labels), _known(shade, COLORS)
    if label is None:
        near = difflib.get_close_matches(str(given), labels)
        known = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(sorted(labels))}"
        raise _unreadable(prompt, f"the detector does not know the class {given!r} of {where}; {known}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _unreadable(prompt, f"the count of {where} is {count!r}; give a whole number of 1 or more")
    if shade is not None and color is None:
        raise _unreadable(prompt, f"the color of {where} is {shade!r}; give one of {', '.join(COLORS)}")
    if position is None:
        return Clause(label, count, color)
    match position:
        case [name, int(target)] if (relation := _known(name, RELATIONS)) and 0 <= target < index:
            return Clause(label, count, color, (relation, target))
    raise _unreadable(
        prompt,
        f"the position of {where} is {position!r}; give one of {', '.join(RELATIONS)} and the number of an entry before it",
    )


def _known(given: Any, names: Collection[str]) -> str | None:
    """The one of the names that is meant, however it is written; None if none is."""
    if not isinstance(given, str) or given in names:
        return given if isinstance(given, str) else None
    return next((name for name in names if folded(name) == folded(given)), None)


def _unreadable(prompt: Prompt, problem: str) -> Refusal:
    return Refusal(f"reward 'geneval' cannot judge the prompt {prompt.text!r}: {problem}")


# --- what a picture shows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Detection:
    """An object of a COCO class: its box (left, top, right, bottom) in pixels, and its pixels where the detector tells them."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray | None = None


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where `box` lies as seen from `other`.

    With d = (dx, dy) from centre to centre, each of its parts is brought nearer to 0 by MARGIN times the boxes' summed size
    in that direction; what is left of it counts if it is more than |d| / 2. Both parts may.
    """
    corners_2x2x2 = np.array([box, other], dtype=float).reshape(2, 2, 2)
    offset_2 = np.subtract(*corners_2x2x2.mean(1))
    sizes_2 = np.abs(corners_2x2x2[:, 1] - corners_2x2x2[:, 0]).sum(0)
    left_2 = np.sign(offset_2) * np.maximum(np.abs(offset_2) - MARGIN * sizes_2, 0)
    if np.all(np.abs(left_2) < 1e-3):
        return set()
    dx, dy = left_2 / np.linalg.norm(offset_2)
    return {name for name, part in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if part > 0.5}


@dataclass(frozen=True, eq=False)
class Finding:
    """What a picture holds for a clause: the objects of its class, the most certain first, 16 at most.

    `colored` counts those with the clause's colour among the first `clause.count`; all count where it names none, and none where
    there are fewer.
    """

    clause: Clause
    objects: Sequence[Detection]
    colored: int

    @property
    def enough(self) -> bool:
        return len(self.objects) >= self.clause.count

    @property
    def exact(self) -> bool:
        return len(self.objects) == self.clause.count

    @property
    def deviation(self) -> float:
        """Objects too many or too few, a share of those that are asked for."""
        return abs(len(self.objects) - self.clause.count) / self.clause.count


def matched(findings: Sequence[Finding], counted: Callable[[Finding], bool]) -> list[Sequence[Detection]]:
    """The objects looked at for each clause, where `counted`, their colour and their position are right; else none."""
    groups: list[Sequence[Detection]] = []
    for finding in findings:
        clause, group = finding.clause, finding.objects[: finding.clause.count]
        right = counted(finding) and finding.colored == clause.count
        if right and clause.position is not None:
            relation, target = clause.position
            pairs = [(one, other) for one in group for other in groups[target]]
            right = bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)
        groups.append(group if right else [])
    return groups


Credit = Callable[[Sequence[Finding], Sequence[bool]], float]


def partial_credit(findings: Sequence[Finding], absent: Sequence[bool]) -> float:
    """The mean of all checks, each in 0..1; `absent`: of each excluded class that no clause counts, whether it is not there.

    For a clause that asks for n objects of which the picture has m, max(0, 1 - |m - n| / n); if it names a colour, the share of
    objects that have it, and if it names a position, 1 where all of them are there; both 0 where m is not n. An excluded class
    that no clause counts is a check too. The parts are Flow-GRPO's, the bounds and the zeros are this project's.
    """
    checks: list[float] = []
    for finding, group in zip(findings, matched(findings, lambda f: f.enough), strict=True):
        clause = finding.clause
        checks.append(max(0.0, 1 - finding.deviation))
        if clause.color is not None:
            checks.append(finding.exact * finding.colored / clause.count)
        if clause.position is not None:
            checks.append(float(bool(group) and finding.exact and findings[clause.position[1]].exact))
    checks += map(float, absent)
    return sum(checks) / len(checks)


def flow_grpo_credit(findings: Sequence[Finding], absent: Sequence[bool]) -> float:
    """Flow-GRPO's reward (arXiv 2505.05470), as its authors' public reward server gives it: at most 1, and below 0 where a
    class has more than twice the objects that are asked for.

    It is the mean of these numbers. For a clause that asks for n objects of which the picture has m, 1 - |m - n| / n. Where m
    is not n, one 0 if it names a colour or a position. Where m is n, the share of objects with its colour, if it names one; and,
    if it names a position and colours are right, 0 where the target is not as asked, 1 where all are in position, and 0 and 1
    where they are not. What is excluded counts for nothing.
    """
    parts: list[float] = []
    groups = matched(findings, lambda f: f.exact)
    for finding, group in zip(findings, groups, strict=True):
        clause = finding.clause
        parts.append(1 - finding.deviation)
        if not finding.exact:
            parts += [0.0] * (clause.color is not None or clause.position is not None)
            continue
        if clause.color is not None:
            parts.append(finding.colored / clause.count)
        if clause.position is not None and finding.colored == clause.count:
            placed = [1.0] if group else [0.0, 1.0]
            parts += placed if groups[clause.position[1]] else [0.0]
    return sum(parts) / len(parts)


def judge(
    demand: Demand,
    detections: Sequence[Detection],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
    credit: Credit = partial_credit,
) -> Score:
    """The score of a picture with these detections; `colors_of` tells the colours of objects of a class.

    `passed` is GenEval's verdict. Its most certain objects are looked at: of each class as many as are asked for, and more may
    be there if `exclude` does not forbid them. The value is what `credit` gives.
    """
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        if found.score > demand.threshold:
            objects.setdefault(found.label, []).append(found)
    findings = [_finding(clause, objects, colors_of) for clause in demand.include]
    counted = {_coco(clause.label) for clause in demand.include}
    absent = [(c, len(objects.get(_coco(c.label), [])[:MOST]) < c.count) for c in demand.exclude]
    passed = all(matched(findings, lambda f: f.enough)) and all(away for _, away in absent)
    return Score(credit(findings, [away for c, away in absent if _coco(c.label) not in counted]), passed)


def _finding(
    clause: Clause,
    objects: Mapping[str, Sequence[Detection]],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
) -> Finding:
    there = objects.get(_coco(clause.label), [])[:MOST]
    if len(there) < clause.count:
        return Finding(clause, there, 0)
    if clause.color is None:
        return Finding(clause, there, clause.count)
    return Finding(clause, there, colors_of(there[: clause.count], clause.label).count(clause.color))


def _coco(label: str) -> str:
    return _COCO.get(label, label)


# --- the networks -----------------------------------------------------------------------------------------------------


class Detector:
    """A frozen detector of objects: a Mask2Former that segments instances, or a model that finds boxes."""

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor, batch_size: int = 16) -> None:
        self._model = model.eval().requires_grad_(False)
        self._image_processor = image_processor
        self._batch_size = batch_size
        self._label_of = {i: _coco(label) for i, label in model.config.id2label.items()}
        known = set(self._label_of.values())
        self.labels = known | {other for other, label in _COCO.items() if label in known}

    def detect(self, pictures_NHWC: np.ndarray) -> list[list[Detection]]:
        """The objects of each picture that score THRESHOLD or more, in no order."""
        parts = [pictures_NHWC[i : i + self._batch_size] for i in range(0, len(pictures_NHWC), self._batch_size)]
        return [found for part in parts for found in self._detect(part)]

    @torch.no_grad()
    def _detect(self, pictures_BHWC: np.ndarray) -> list[list[Detection]]:
        made = self._image_processor(list(pictures_BHWC), input_data_format="channels_last", return_tensors="pt")
        outputs = self._model(made.pixel_values.to(self._model.device, self._model.dtype))
        # In float32, and on the CPU because transformers makes the masks there.
        outputs = type(outputs)(**{n: t.float().cpu() for n, t in outputs.items() if isinstance(t, Tensor)})
        shapes = [pictures_BHWC.shape[1:3]] * len(pictures_BHWC)
        if isinstance(self._model, Mask2FormerForUniversalSegmentation):
            maps = self._image_processor.post_process_instance_segmentation(
                outputs, threshold=THRESHOLD, return_binary_maps=True
            )
            return [self._of_masks(found, shape) for found, shape in zip(maps, shapes, strict=True)]
        boxes = self._image_processor.post_process_object_detection(outputs, threshold=THRESHOLD, target_sizes=shapes)
        return [self._of_boxes(found) for found in boxes]

    def _of_masks(self, found: Mapping[str, Any], shape: tuple[int, int]) -> list[Detection]:
        if not (segments := found["segments_info"]):
            return []  # and then the map is not one of each object
        masks_NHW = (
            torch.nn.functional.interpolate(found["segmentation"][None], shape, mode="nearest")[0].bool().numpy()
        )
        return [
            Detection(self._label_of[segment["label_id"]], segment["score"], box_of(mask_HW), mask_HW)
            for segment, mask_HW in zip(segments, masks_NHW, strict=True)
            if mask_HW.any()
        ]

    def _of_boxes(self, found: Mapping[str, Tensor]) -> list[Detection]:
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Detection(self._label_of[label], score, tuple(box)) for label, score, box in rows]


def box_of(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask; its right and lower edges are those of the last pixels."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class Colors:
    """The colour of an object by a frozen CLIP: the one whose texts are nearest to the object's crop, the rest of it grey."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessorPil) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._directions: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture_HWC: np.ndarray, objects: Sequence[Detection], label: str) -> list[str]:
        side = self._image_processor.crop_size["height"]
        crops = [middle_of(crop_of(picture_HWC, found), side) for found in objects]
        made = self._image_processor(crops, input_data_format="channels_last", return_tensors="pt")
        pixels_BCHW = made.pixel_values.to(self._model.device, self._model.dtype)
        f_BD = self._model.get_image_features(pixels_BCHW).pooler_output.float()
        if label not in self._directions:
            self._directions[label] = torch.stack([self._direction(color, label) for color in COLORS])
        return [COLORS[i] for i in (f_BD @ self._directions[label].T).argmax(1).tolist()]

    def _direction(self, color: str, label: str) -> Tensor:
        """Of unit length: the mean of the templates' text features, each of unit length before."""
        texts = [template.format(color=color, label=label) for template in TEMPLATES]
        length = self._model.config.text_config.max_position_embeddings
        ids_TL = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        g_TD = self._model.get_text_features(ids_TL.to(self._model.device)).pooler_output.float()
        return torch.nn.functional.normalize(torch.nn.functional.normalize(g_TD, dim=-1).mean(0), dim=-1)


def crop_of(picture_HWC: np.ndarray, found: Detection) -> np.ndarray:
    """The object's box out of the picture, with what is not the object in grey (#999) where the detector tells that."""
    if found.mask_HW is not None:
        picture_HWC = np.where(found.mask_HW[:, :, None], picture_HWC, np.uint8(0x99))
    height, width = picture_HWC.shape[:2]
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return picture_HWC[top : max(bottom, top + 1), left : max(right, left + 1)]


class GenEval(HubReward):
    """The value that `credit` gives, and GenEval's verdict (`judge`), of what a detector and a CLIP see.

    Prompts have GenEval's columns: include, a list of {"class", "count", "color"?, "position"?}, and perhaps exclude and tag.
    As published: thresholds, the rules for position and number, CLIP ViT-L/14 and its texts. Unlike it, the detector is
    transformers' Mask2Former with Swin-T (GenEval: mmdet's with Swin-S), whose masks have 384 pixels a side before they are
    resized: scores compare with each other, and not with published ones.
    """

    takes_model = True

    def __init__(self, detector: Detector, colors: Colors) -> None:
        self._detector, self._colors = detector, colors

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """The published weights (safetensors). The detector computes in float32 if nothing else is said: thresholds are sharp."""
        exact = replace(term, dtype="float32") if term.dtype == "auto" else term
        model, image_processor = _detector_of(*(term.model, "main") if term.model else DETECTOR)
        clip = pretrained(CLIPModel, "geneval", *VIT_L)
        colors = Colors(placed(clip, term), tokenizer_of("geneval", *VIT_L), CLIPImageProcessorPil())
        return cls(Detector(placed(model, exact), image_processor, term.network_batch_size), colors)

    def credit(self, findings: Sequence[Finding], absent: Sequence[bool]) -> float:
        return partial_credit(findings, absent)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            demand_of(prompt, self._detector.labels)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        demands = [demand_of(prompt, self._detector.labels) for prompt in prompts]
        seen = self._detector.detect(pictures_NHWC)
        return [
            judge(demand, detections, partial(self._colors, picture_HWC), self.credit)
            for demand, detections, picture_HWC in zip(demands, seen, pictures_NHWC, strict=True)
        ]


class GenEvalFlowGRPO(GenEval):
    """The same, with Flow-GRPO's value (`flow_grpo_credit`)."""

    def credit(self, findings: Sequence[Finding], absent: Sequence[bool]) -> float:
        return flow_grpo_credit(findings, absent)


def _detector_of(name: str, revision: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    with fetching("geneval", name):
        kind = AutoConfig.from_pretrained(name, revision=revision).model_type
        common: dict[str, Any] = {"revision": revision}
        if kind == "mask2former":
            # The size at which Mask2Former is trained and measured on COCO; the hub's copies say 384 by 384.
            size = {"shortest_edge": 800, "longest_edge": 1333}
            model = pretrained(Mask2FormerForUniversalSegmentation, "geneval", name, revision)
            return model, AutoImageProcessor.from_pretrained(name, backend="pil", size=size, **common)
        if kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            model = pretrained(AutoModelForObjectDetection, "geneval", name, revision)
            return model, AutoImageProcessor.from_pretrained(name, backend="pil", **common)
    raise Refusal(
        f"reward 'geneval': {name} is a {kind}, not a detector of objects; name a Mask2Former, a DETR or an RT-DETR"
    )
