"""GenEval: its rules on detections by hand, and its networks, of random weights, against the published formulas."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

import progrpo
from progrpo.config import RewardTerm
from progrpo.recipes import load_recipe
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.clip import VIT_L
from progrpo.rewards.geneval import (
    DETECTOR,
    Colors,
    Detector,
    GenEval,
    GenEvalFlowGRPO,
    _load_detector,
    bounding_box,
    crop_object,
)
from progrpo.rewards.geneval_rules import (
    COLORS,
    Clause,
    Detection,
    Requirements,
    flow_grpo_credit,
    parse_requirements,
    relations,
    score_detections,
)
from progrpo.types import Prompt

# --- where one box lies as seen from another --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
        ((50, 50, 60, 60), (0, 0, 10, 10), {"right of", "below"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),  # the same place
        ((0, 0, 40, 10), (8, 0, 48, 10), set()),  # 8 apart, which is the margin: 0.1 (40 + 40)
        ((0, 0, 40, 10), (9, 0, 49, 10), set()),  # 1 beyond it of 9: not more than half
        ((0, 0, 40, 10), (15, 0, 55, 10), set()),  # 7 of 15
        ((0, 0, 40, 10), (16, 0, 56, 10), set()),  # 8 of 16, half
        ((0, 0, 40, 10), (17, 0, 57, 10), {"left of"}),  # 9 of 17
        ((0, 0, 10, 40), (0, 17, 10, 57), {"above"}),  # the margin is by direction: here of heights
        ((0, 0, 10, 10), (30, 60, 40, 70), {"above"}),  # dx 28 and dy 58 of 67
        ((0, 0, 100, 4), (60, 0, 64, 4), set()),  # inside: centres 12 apart, margin 10.4
    ],
)
def test_relations(box, other, expected):
    assert relations(box, other) == expected


def test_relations_are_the_published_formula():
    generator, combinations = np.random.default_rng(0), set()
    for _ in range(2000):
        x0, y0, a0, b0 = generator.uniform(0, 100, 4)
        w, h, v, u = generator.uniform(1, 80, 4)
        dx, dy = (x0 + w / 2) - (a0 + v / 2), (y0 + h / 2) - (b0 + u / 2)
        length = (dx**2 + dy**2) ** 0.5
        expected = set()
        for d, sizes, names in ((dx, w + v, ("left of", "right of")), (dy, h + u, ("above", "below"))):
            if max(abs(d) - 0.1 * sizes, 0) / length > 0.5:
                expected.add(names[int(d > 0)])
        assert relations((x0, y0, x0 + w, y0 + h), (a0, b0, a0 + v, b0 + u)) == expected
        combinations.add(frozenset(expected))
    assert len(combinations) == 9  # every combination


# --- what is right ----------------------------------------------------------------------------------------------------


def see(label: str, score: float = 0.95, x: float = 0.0, color: str = "red") -> Detection:
    """An object of 10 by 10 pixels at x, with its colour where `painted` finds it."""
    detection = Detection(label, score, (x, 0.0, x + 10.0, 10.0))
    PAINT[id(detection)] = color
    KEPT.append(detection)
    return detection


PAINT: dict[int, str] = {}
KEPT: list[Detection] = []  # so that no identity is used twice


def painted(objects, label):
    assert objects
    return [PAINT[id(o)] for o in objects]


def unasked(objects, label):
    raise AssertionError("nobody asked for colours")


def dogs(count, **about):
    return [see("dog", 0.99 - 0.01 * i, 20.0 * i, **about) for i in range(count)]


ONE, TWO, THREE = (Requirements((Clause("dog", n),)) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("demand", "seen", "value", "passed"),
    [
        (ONE, 0, 0.0, False),
        (ONE, 1, 1.0, True),
        (ONE, 2, 0.0, True),  # GenEval asks for enough, the value for the number
        (TWO, 1, 0.5, False),
        (TWO, 3, 0.5, True),
        (THREE, 1, 1 / 3, False),
        (THREE, 2, 2 / 3, False),
        (THREE, 4, 2 / 3, True),
        (THREE, 7, 0.0, True),  # no less than 0
        (Requirements((Clause("dog", 3),), (Clause("dog", 4),)), 3, 1.0, True),
        (Requirements((Clause("dog", 3),), (Clause("dog", 4),)), 4, 2 / 3, False),  # the count's own check is enough
        (Requirements((Clause("dog", 16),)), 20, 1.0, True),  # no more than 16 of a class are looked at
        (Requirements((Clause("dog", 1),), (Clause("dog", 17),)), 20, 0.0, True),
    ],
)
def test_counts(demand, seen, value, passed):
    score = score_detections(demand, [*dogs(seen), see("cat")], unasked)
    assert (score.value, score.passed) == (pytest.approx(value), passed)


def test_what_is_not_certain_enough_is_not_there():
    seen = [see("dog", 0.95), see("dog", 0.9), see("dog", 0.31), see("dog", 0.3)]
    assert score_detections(Requirements((Clause("dog", 3),)), seen, unasked) == Score(
        1.0, True
    )  # above 0.3, and not at it
    assert score_detections(Requirements((Clause("dog", 1),), threshold=0.9), seen, unasked) == Score(1.0, True)
    assert score_detections(Requirements((Clause("dog", 2),), threshold=0.9), seen, unasked) == Score(0.5, False)


def test_classes_have_several_names():
    seen = [see("mouse"), see("airplane")]
    demand = Requirements((Clause("computer mouse", 1), Clause("aeroplane", 1)), (Clause("airplane", 2),))
    assert score_detections(demand, seen, unasked) == Score(1.0, True)


@pytest.mark.parametrize(("cats", "value", "passed"), [(0, 1.0, True), (1, 1.0, True), (2, 0.5, False)])
def test_an_excluded_class_that_nobody_counts_is_a_check(cats, value, passed):
    demand = Requirements((Clause("dog", 1),), (Clause("cat", 2),))
    assert score_detections(demand, [see("dog")] + [see("cat") for _ in range(cats)], unasked) == Score(value, passed)


@pytest.mark.parametrize(
    ("count", "colors", "value", "passed"),
    [
        (1, ["red"], 1.0, True),
        (1, ["blue"], 0.5, False),
        (1, [], 0.0, False),
        (2, ["red", "red"], 1.0, True),
        (2, ["red", "blue"], 0.75, False),
        (2, ["red"], 0.25, False),  # of the colour nothing where the count is wrong
        (1, ["red", "blue"], 0.0, True),  # the most certain one is looked at
        (1, ["blue", "red"], 0.0, False),
        (2, ["red", "red", "blue"], 0.25, True),
    ],
)
def test_colors(count, colors, value, passed):
    seen = [see("dog", 0.9 - 0.1 * i, color=color) for i, color in enumerate(colors)]
    score = score_detections(Requirements((Clause("dog", count, "red"),)), seen[::-1], painted)  # in no order
    assert (score.value, score.passed) == (pytest.approx(value), passed)


BESIDE = Requirements((Clause("cat", 1), Clause("dog", 1, None, ("left of", 0))))


@pytest.mark.parametrize(
    ("seen", "value", "passed"),
    [
        ([see("dog"), see("cat", x=50)], 1.0, True),
        ([see("dog", x=50), see("cat")], 2 / 3, False),
        ([see("dog")], 1 / 3, False),
        ([see("cat")], 1 / 3, False),
        ([], 0.0, False),
        ([see("dog", 0.8), see("dog", 0.7, x=90), see("cat", x=50)], 1 / 3, True),  # the most certain dog is right
        ([see("dog", 0.7), see("dog", 0.8, x=90), see("cat", x=50)], 1 / 3, False),
        ([see("dog"), see("cat", 0.8, x=50), see("cat", 0.7, x=-50)], 1 / 3, True),  # the value's target must be exact
    ],
)
def test_positions(seen, value, passed):
    score = score_detections(BESIDE, seen, unasked)
    assert (score.value, score.passed) == (pytest.approx(value), passed)


def test_all_pairs_must_be_in_position():
    demand = Requirements((Clause("cat", 2), Clause("dog", 2, None, ("left of", 0))))
    cats = [see("cat", x=100), see("cat", x=150)]
    assert score_detections(demand, [see("dog"), see("dog", x=50), *cats], unasked) == Score(1.0, True)
    assert score_detections(demand, [see("dog"), see("dog", x=125), *cats], unasked) == Score(2 / 3, False)


def test_a_target_of_the_wrong_color_is_no_target():
    demand = Requirements((Clause("cat", 1, "blue"), Clause("dog", 1, "red", ("left of", 0))))
    assert score_detections(demand, [see("dog"), see("cat", x=50, color="blue")], painted) == Score(1.0, True)
    assert score_detections(demand, [see("dog"), see("cat", x=50, color="red")], painted) == Score(3 / 5, False)
    assert score_detections(demand, [see("dog", color="blue"), see("cat", x=50, color="blue")], painted) == Score(
        3 / 5, False
    )


def test_a_later_mistake_does_not_mend_an_earlier_one():
    assert score_detections(Requirements((Clause("dog", 1), Clause("cat", 1))), [see("cat")], unasked) == Score(
        0.5, False
    )


# --- Flow-GRPO's value: numbers worked out by hand after its authors' reward server -----------------------------------


def flow_grpo(demand, seen, colors_of=unasked):
    return score_detections(demand, seen, colors_of, flow_grpo_credit)


@pytest.mark.parametrize(
    ("demand", "seen", "value", "passed"),
    [
        (ONE, 0, 0.0, False),
        (ONE, 1, 1.0, True),
        (ONE, 2, 0.0, True),
        (ONE, 3, -1.0, True),  # below 0, and further with every object too many
        (ONE, 16, -14.0, True),
        (ONE, 20, -14.0, True),  # no more than 16 are looked at
        (TWO, 1, 0.5, False),
        (TWO, 5, -0.5, True),
        (THREE, 4, 2 / 3, True),
        (THREE, 7, -1 / 3, True),
        (Requirements((Clause("dog", 1),), (Clause("cat", 1),)), 1, 1.0, False),  # what is excluded counts for nothing
    ],
)
def test_flow_grpos_counts(demand, seen, value, passed):
    score = flow_grpo(demand, [*dogs(seen), see("cat")])
    assert (score.value, score.passed) == (pytest.approx(value), passed)


@pytest.mark.parametrize(
    ("count", "colors", "value"),
    [
        (1, ["red"], 1.0),
        (1, ["blue"], 0.5),
        (1, [], 0.0),  # 0 for the number, 0 for the colour
        (2, ["red", "blue"], 0.75),
        (2, ["red"], 0.25),
        (1, ["red", "red"], 0.0),
        (1, ["red", "red", "red"], -0.5),  # (-1 + 0) / 2
    ],
)
def test_flow_grpos_colors(count, colors, value):
    seen = [see("dog", 0.9 - 0.1 * i, color=color) for i, color in enumerate(colors)]
    assert flow_grpo(Requirements((Clause("dog", count, "red"),)), seen, painted).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("seen", "value"),
    [
        ([see("dog"), see("cat", x=50)], 1.0),  # 1 and 1 for the numbers, 1 for the place
        ([see("dog", x=50), see("cat")], 0.75),  # 1, 1, 0 and another 1
        ([see("dog")], 1 / 3),  # 0; 1 and 0, for there is no target
        ([see("cat")], 1 / 3),  # 1; 0 and 0 for the place
        ([see("dog"), see("cat", x=50), see("cat", x=70), see("cat", x=90)], 0.0),  # -1; 1 and 0
        ([], 0.0),
    ],
)
def test_flow_grpos_positions(seen, value):
    assert flow_grpo(BESIDE, seen).value == pytest.approx(value)


def test_flow_grpo_asks_for_no_position_where_a_color_is_wrong():
    demand = Requirements((Clause("cat", 1), Clause("dog", 1, "red", ("left of", 0))))
    assert flow_grpo(demand, [see("dog", color="blue"), see("cat", x=50)], painted).value == pytest.approx(2 / 3)
    target = Requirements((Clause("cat", 1, "blue"), Clause("dog", 1, None, ("left of", 0))))
    assert flow_grpo(target, [see("dog"), see("cat", x=50)], painted).value == pytest.approx(2 / 4)  # 1, 0; 1, 0


def test_each_value_has_its_own_name():
    detector = SimpleNamespace(labels={"dog"}, detect=lambda pictures: [dogs(3)] * len(pictures))
    prompt = Prompt("a dog", {"include": [{"class": "dog", "count": 1}]})
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    rewards = [kind(detector, unasked) for kind in (GenEval, GenEvalFlowGRPO)]  # type: ignore[arg-type]
    values = [reward.score(pictures, [prompt])[0] for reward in rewards]
    assert values == [Score(0.0, True), Score(-1.0, True)]
    assert load_recipe("sd35m-geneval").reward.terms == (RewardTerm("geneval_flow_grpo"),)


# --- what a prompt demands --------------------------------------------------------------------------------------------

LABELS = {"dog", "cat", "dining table", "mouse", "computer mouse"}


def test_demands_of_the_published_metadata():
    columns = {
        "tag": "color_attr",
        "include": [
            {"class": "dog", "count": 1, "color": "red", "position": None},
            {"class": "computer mouse", "count": 2, "color": None, "position": ["left of", 0]},
        ],
        "exclude": None,  # what a table has where a row has no such column
    }
    first, second = Clause("dog", 1, "red"), Clause("computer mouse", 2, None, ("left of", 0))
    assert parse_requirements(Prompt("", columns), LABELS) == Requirements((first, second), (), 0.3)
    columns = {"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}
    assert parse_requirements(Prompt("", columns), LABELS) == Requirements(
        (Clause("cat", 3),), (Clause("cat", 4),), 0.9
    )


DOG = {"class": "dog", "count": 1}


def test_names_are_known_however_they_are_written():
    columns = {
        "tag": "Counting ",
        "include": [
            {"class": "Computer\u00a0Mouse", "count": 1, "color": "Red"},
            {"class": "\uff24\uff4f\uff47", "count": 2, "color": " blue", "position": ["Left  of", 0]},
        ],
    }
    mouse, dog = Clause("computer mouse", 1, "red"), Clause("dog", 2, "blue", ("left of", 0))
    assert parse_requirements(Prompt("", columns), LABELS) == Requirements((mouse, dog), (), 0.9)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({}, "it has no column include; add one, such as"),
        ({"include": None}, "it has no column include"),
        ({"include": []}, "it has no column include"),
        ({"include": "dog"}, "include must be a list of objects such as"),
        ({"include": DOG}, "include must be a list of objects such as"),
        ({"include": ["dog"]}, "include must be a list of objects such as"),
        ({"include": [DOG], "exclude": "cat"}, "exclude must be a list of objects such as"),
        (
            {"include": [DOG, {"class": "diningtable", "count": 1}]},
            r"'diningtable' of include\[1\]; did you mean dining",
        ),
        ({"include": [{"class": "zzz", "count": 1}]}, "'zzz' of include.*; it knows cat, computer mouse, dining table"),
        ({"include": [{"count": 1}]}, "does not know the class None"),
        ({"include": [DOG], "exclude": [{"class": "dag", "count": 1}]}, r"'dag' of exclude\[0\]; did you mean dog?"),
        ({"include": [{"class": "dog"}]}, r"the count of include\[0\] is None; give a whole number"),
        ({"include": [{"class": "dog", "count": 0}]}, "is 0; give"),
        ({"include": [{"class": "dog", "count": 1.5}]}, "is 1.5; give"),
        ({"include": [{"class": "dog", "count": True}]}, "is True; give"),
        ({"include": [DOG | {"color": "beige"}]}, "is 'beige'; give one of red, orange"),
        ({"include": [DOG | {"position": ["left of", 0]}]}, r"the position of include\[0\] is .*entry before it"),
        (
            {"include": [DOG, DOG | {"position": ["beside", 0]}]},
            r"position of include\[1\] is .*one of left of, right of",
        ),
        ({"include": [DOG, DOG | {"position": ["above", -1]}]}, "entry before it"),
        ({"include": [DOG, DOG | {"position": "left of"}]}, "entry before it"),
        ({"include": [DOG, DOG | {"position": ["above", 0, 1]}]}, "entry before it"),
    ],
)
def test_columns_that_are_refused(columns, problem):
    with pytest.raises(Refusal, match=f"reward 'geneval' cannot judge the prompt 'a photo': .*{problem}") as refusal:
        parse_requirements(Prompt("a photo", columns), LABELS)
    assert "\n" not in str(refusal.value)


# --- the detector -----------------------------------------------------------------------------------------------------

SHAPE = (48, 72)


def drawn(count: int = 5, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    pictures = np.random.default_rng(0).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    pictures.flags.writeable = False
    return pictures


def small_mask2former() -> Mask2FormerForUniversalSegmentation:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = ["stage1", "stage2", "stage3", "stage4"]
        swin = SwinConfig(
            embed_dim=16, depths=[1] * 4, num_heads=[2] * 4, window_size=4, image_size=64, out_features=stages
        )
        config = Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            num_queries=12,
            id2label={0: "cat", 1: "dog", 2: "diningtable"},
        )
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 40  # so that some are certain and some are not
        for name, weight in model.named_parameters():
            if "mask_embedder" in name:
                weight *= 3
    return model


def mask2former_processor() -> Mask2FormerImageProcessorPil:
    return Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32)


@torch.no_grad()
def published_instances(model, picture: np.ndarray) -> list[tuple[str, float, np.ndarray]]:
    """Mask2Former's instances by hand: class probability times the mean probability of the mask's pixels."""
    resized = np.asarray(Image.fromarray(picture).resize((96, 64), Image.Resampling.BILINEAR)) / 255
    pixels = (torch.tensor(resized) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    outputs = model(pixel_values=pixels.permute(2, 0, 1)[None].float())
    names = ["cat", "dog", "dining table"]
    pairs = [
        (float(p), query, names[c])
        for query, row in enumerate(outputs.class_queries_logits[0].softmax(-1))
        for c, p in enumerate(row[:-1])
    ]
    instances = []
    for probability, query, name in sorted(pairs, reverse=True)[:12]:
        logits = torch.nn.functional.interpolate(outputs.masks_queries_logits[:, [query]], (384, 384), mode="bilinear")
        inside = logits[0, 0] > 0
        if not inside.any():
            continue
        score = probability * float(logits[0, 0].sigmoid()[inside].mean())
        rows = np.arange(SHAPE[0]) * 384 // SHAPE[0]
        columns = np.arange(SHAPE[1]) * 384 // SHAPE[1]
        if score >= 0.3:
            instances.append((name, score, inside.numpy()[np.ix_(rows, columns)]))
    return instances


def test_detections_are_the_published_instances():
    model, pictures = small_mask2former().eval(), drawn()
    detector = Detector(model, mask2former_processor(), batch_size=2)
    assert detector.labels == {"cat", "dog", "dining table", "diningtable"}
    total = 0
    for detections, picture in zip(detector.detect(pictures), pictures, strict=True):
        expected = published_instances(model, picture)
        assert len(detections) == len(expected)
        for one, (name, score, mask) in zip(
            sorted(detections, key=lambda d: -d.score), sorted(expected, key=lambda e: -e[1]), strict=True
        ):
            assert (one.label, one.score) == (name, pytest.approx(score, abs=1e-4))
            assert one.mask_HW is not None
            assert one.mask_HW.shape == SHAPE
            assert np.mean(one.mask_HW != mask) < 0.01  # the odd pixel whose logit is about 0
            assert one.box == bounding_box(one.mask_HW)
        total += len(detections)
    assert 5 < total < 60  # some of all 60


def test_no_detections():
    model = small_mask2former()
    with torch.no_grad():
        model.class_predictor.weight *= 0
    assert Detector(model, mask2former_processor()).detect(drawn(2)) == [[], []]


def test_a_detector_in_half_precision():
    detections = Detector(small_mask2former().bfloat16(), mask2former_processor()).detect(drawn(2))
    assert all(detections) and all(type(d.score) is float for one in detections for d in one)


def test_a_box():
    mask = np.zeros((6, 9), bool)
    mask[2:4, 5] = mask[3, 3] = True
    assert bounding_box(mask) == (3.0, 2.0, 6.0, 4.0)


def small_yolos() -> YolosForObjectDetection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        places = {"image_size": [64, 96], "patch_size": 16, "num_detection_tokens": 6}
        model = YolosForObjectDetection(
            YolosConfig(**sizes, **places, id2label={0: "N/A", 1: "dog", 2: "aeroplane"}, initializer_range=0.5)
        )
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].weight *= 8
    return model


def test_detections_of_a_model_of_boxes():
    model, pictures = small_yolos().eval(), drawn(3)
    processor = YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    total = 0
    for detections, picture in zip(Detector(model, processor, 2).detect(pictures), pictures, strict=True):
        made = processor([picture], input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            outputs = model(pixel_values=made.pixel_values)
        expected = []
        for logits, (x, y, w, h) in zip(outputs.logits[0], outputs.pred_boxes[0].tolist(), strict=True):
            score, label = logits.softmax(-1)[:-1].max(-1)
            if score > 0.3:
                box = (72 * (x - w / 2), 48 * (y - h / 2), 72 * (x + w / 2), 48 * (y + h / 2))
                expected.append((["N/A", "dog", "airplane"][int(label)], float(score), box))
        assert [d.label for d in detections] == [label for label, _, _ in expected]
        assert [d.score for d in detections] == pytest.approx([score for _, score, _ in expected], abs=1e-4)
        assert all(d.mask_HW is None for d in detections)
        boxes = [edge for d in detections for edge in d.box]
        assert boxes == pytest.approx([edge for _, _, box in expected for edge in box], abs=1e-3)
        total += len(detections)
    assert 0 < total < 18


# --- colours ----------------------------------------------------------------------------------------------------------

LETTERS = [*string.ascii_lowercase, "-", *(f"{letter}</w>" for letter in string.ascii_lowercase), "-</w>"]
VOCABULARY = {token: i for i, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])}
LENGTH = 40


def small_clip() -> CLIPModel:
    both = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_act": "gelu", "initializer_factor": 4.0}
    text = {"vocab_size": 56, "max_position_embeddings": LENGTH, "bos_token_id": 54, "eos_token_id": 55}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 32, "intermediate_size": 64, **both, **text},
                vision_config={"hidden_size": 48, "intermediate_size": 96, "patch_size": 56, **both},
                projection_dim=24,
            )
        ).eval()


def small_colors() -> Colors:
    return Colors(small_clip(), CLIPTokenizer(vocab=VOCABULARY, merges=[]), CLIPImageProcessorPil())


def ids(text: str) -> list[int]:
    words = text.replace("-", " - ").split()
    tokens = [letter for word in words for letter in (*word[:-1], f"{word[-1]}</w>")]
    return [VOCABULARY[token] for token in ("<|startoftext|>", *tokens, "<|endoftext|>")]


@torch.no_grad()
def published_color(model: CLIPModel, picture: np.ndarray, detection: Detection, label: str) -> str:
    """Of one object: PIL composes and crops it, and each colour has the mean of its three texts."""
    image = Image.fromarray(picture)
    if detection.mask_HW is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(detection.mask_HW))
    image = image.crop(detection.box)
    short = min(image.size)  # then open_clip's, which is torchvision's Resize and CenterCrop
    image = image.resize((int(224 * image.width / short), int(224 * image.height / short)), Image.Resampling.BICUBIC)
    left, top = (round((length - 224) / 2.0) for length in image.size)
    pixels = torch.tensor(np.asarray(image.crop((left, top, left + 224, top + 224)))) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    seen = model.get_image_features(((pixels - mean) / std).permute(2, 0, 1)[None]).pooler_output[0]
    cosines = []
    for color in COLORS:
        texts = (
            f"a photo of a {color} {label}",
            f"a photo of a {color}-colored {label}",
            f"a photo of a {color} object",
        )
        embeds = [model.get_text_features(torch.tensor([ids(text)])).pooler_output[0] for text in texts]
        middle = sum(t / t.norm() for t in embeds)
        cosines.append(float(middle @ seen / middle.norm()))
    return COLORS[int(np.argmax(cosines))]


def test_colors_are_the_published_classifier():
    picture, generator = drawn(1, (60, 90))[0], np.random.default_rng(1)
    objects = []
    for i in range(24):
        left, top = generator.integers(0, 50, 2)
        box = (float(left), float(top), float(left + generator.integers(8, 40)), float(min(60, top + 9)))
        objects.append(Detection("dog", 1.0, box, generator.random((60, 90)) < 0.1 * (i % 10) if i % 3 else None))
    colors, model = small_colors(), small_clip()
    for label in ("dog", "dining table"):
        expected = [published_color(model, picture, detection, label) for detection in objects]
        assert colors(picture, objects, label) == expected
        assert len(set(expected)) > 2


def test_crops():
    picture = drawn(1, (20, 30))[0]
    mask = np.zeros((20, 30), bool)
    mask[5, 6] = True
    crop = crop_object(picture, Detection("dog", 1.0, (5.0, 5.0, 8.0, 6.0), mask))
    assert crop.tolist() == [[[153] * 3, picture[5, 6].tolist(), [153] * 3]]
    for box in ((-3.0, -2.0, 40.0, 50.0), (31.0, 21.0, 33.0, 24.0), (4.2, 4.2, 4.3, 4.3), (-9.0, -9.0, -5.0, -5.0)):
        assert (
            crop_object(picture, Detection("dog", 1.0, box)).size > 0
        )  # of boxes that reach out of it, or have no pixel
    assert crop_object(picture, Detection("dog", 1.0, (-3.0, -2.0, 40.0, 50.0))).tolist() == picture.tolist()


# --- all together -----------------------------------------------------------------------------------------------------

INCLUDE = [{"class": "cat", "count": 2, "color": "red"}, {"class": "dog", "count": 4, "position": ["above", 0]}]


def geneval(batch_size: int = 16) -> GenEval:
    return GenEval(Detector(small_mask2former(), mask2former_processor(), batch_size), small_colors())


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}", {"include": INCLUDE[: 1 + i % 2], "tag": "position"}) for i in range(count)]


def test_scores_do_not_see_each_other():
    pictures = drawn()
    before = pictures.copy()
    scores = geneval(2).score(pictures, prompts(5))
    alone = [geneval().score(pictures[i : i + 1], [prompts(5)[i]])[0] for i in range(5)]
    assert scores == alone
    assert len({s.value for s in scores}) > 1
    assert all(type(s.value) is float and type(s.passed) is bool for s in scores)
    assert np.array_equal(pictures, before)
    strided = np.ascontiguousarray(pictures.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    assert geneval().score(strided, prompts(5)) == scores


def test_each_picture_is_judged_by_its_own_prompt_and_colors():
    pictures, looked = drawn(4), []
    asked = [Prompt("", {"include": [{"class": c, "count": 1, "color": "red"}]}) for c in ("cat", "dog", "dog", "cat")]
    detector = Detector(small_mask2former(), mask2former_processor())

    def look(picture, objects, label):
        looked.append((picture.tolist(), label, [o.label for o in objects]))
        return ["red" if np.array_equal(picture, pictures[1]) else "blue"] * len(objects)

    scores = GenEval(detector, look).score(pictures, asked)  # type: ignore[arg-type]
    assert [s.passed for s in scores] == [False, True, False, False]
    labels = ["cat", "dog", "dog", "cat"]
    assert looked == [(p.tolist(), label, [label]) for p, label in zip(pictures, labels, strict=True)]


def test_no_pictures_no_scores():
    assert geneval().score(drawn()[:0], []) == []


def test_one_bad_prompt_is_refused_before_any_work():
    reward = geneval()
    reward._detector.detect = None  # type: ignore[method-assign, assignment]
    with pytest.raises(Refusal, match="'prompt': the detector does not know the class 'car'"):
        reward.score(drawn(2), [*prompts(1), Prompt("prompt", {"include": [{"class": "car", "count": 1}]})])


def test_weights_are_frozen_and_dropout_is_off():
    reward = geneval()
    for model in (reward._detector._model, reward._colors._model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())


# --- from the hub's cache, without a network --------------------------------------------------------------------------

SCRIPT = """
import json, sys
import numpy as np
from progrpo.rewards.base import Refusal
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.geneval import GenEval
from progrpo.types import Prompt
pictures, include = np.load(sys.argv[1]), json.loads(sys.argv[2])
for model in sys.argv[3:]:
    try:
        reward = GenEval.from_hub(RewardTerm("geneval", device="cpu", model=model))
        scores = reward.score(pictures, [Prompt("", {"include": include})] * len(pictures))
        size, dtype = dict(reward._detector._image_processor.size), str(reward._detector._model.dtype)
        print(json.dumps([[s.value for s in scores], {n: v for n, v in size.items() if v}, dtype]))
    except Refusal as refusal:
        print(json.dumps(str(refusal)))
"""


def snapshot(cache: Path, repository: str, revision: str) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


def from_hub(cache: Path, *models: str) -> list:
    np.save(cache / "pictures.npy", drawn(2))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    environment["PYTHONPATH"] = str(Path(progrpo.__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, str(cache / "pictures.npy"), json.dumps(INCLUDE), *models]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('"', "["))]


@pytest.mark.slow
def test_from_the_cache_without_a_network(tmp_path):
    published, boxes, clip = snapshot(tmp_path, *DETECTOR), tmp_path / "boxes", snapshot(tmp_path, *VIT_L)
    small_mask2former().save_pretrained(published)
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}, size_divisor=32).save_pretrained(published)
    small_yolos().save_pretrained(boxes)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(boxes)
    small_clip().save_pretrained(clip)
    (clip / "vocab.json").write_text(json.dumps(VOCABULARY))
    (clip / "merges.txt").write_text("#version: 0.2\n")

    own, other, wrong, missing = from_hub(tmp_path, "", str(boxes), str(clip), "nobody/nothing")
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32)
    here = GenEval(Detector(small_mask2former(), processor), small_colors())
    expected = [s.value for s in here.score(drawn(2), [Prompt("", {"include": INCLUDE})] * 2)]
    assert own == [pytest.approx(expected), {"shortest_edge": 800, "longest_edge": 1333}, "torch.float32"]
    assert other.startswith("reward 'geneval' cannot judge the prompt '': the detector does not know the class 'cat'")
    assert wrong == (
        f"reward 'geneval': {clip} is a clip, not a detector of objects; name a Mask2Former, a DETR or an RT-DETR"
    )
    assert missing.startswith("reward 'geneval': there is no cached copy of nobody/nothing, and the Hugging Face hub")


def test_a_detector_whose_file_has_other_names_is_refused(tmp_path):
    small_yolos().save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    _load_detector(str(tmp_path), "main")
    file = tmp_path / "model.safetensors"
    save_file({f"module.{name}": weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(
        Refusal, match=rf"^reward 'geneval': {tmp_path} is no YolosForObjectDetection, it has no \S+ of"
    ):
        _load_detector(str(tmp_path), "main")
