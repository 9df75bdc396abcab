"""GenEval's rules (arXiv 2310.11513): the objects that a prompt asks for, and the score of detected ones. No
networks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from progrpo.prompts.texts import folded
from progrpo.rewards.base import Refusal, Score
from progrpo.types import Prompt

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3  # a detection counts if it scores more
COUNTING_THRESHOLD = 0.9  # the same where the prompt is about a number
MOST = 16  # objects of a class, the most certain ones
MARGIN = 0.1  # the least distance of the centres of boxes beside each other, over the boxes' summed size
RELATIONS = ("left of", "right of", "above", "below")

_COCO = {  # names in GenEval and in some detectors, and COCO's own
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


def coco_label(label: str) -> str:
    """COCO's own name of a class."""
    return _COCO.get(label, label)


def with_aliases(labels: Collection[str]) -> set[str]:
    """COCO's names, and the other names of the same classes."""
    return {*labels, *(alias for alias, label in _COCO.items() if label in labels)}


# --- the prompt's requirements ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """A number of objects of a class, all of one colour, each in a relation to all objects of an earlier clause."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Requirements:
    """The objects that a picture must hold, and the numbers of objects from which on it fails."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    threshold: float = THRESHOLD


def parse_requirements(prompt: Prompt, labels: Collection[str]) -> Requirements:
    """Read a prompt's columns, which are GenEval's metadata, for a detector that knows `labels`. Refusal for others."""
    include = prompt.columns.get("include")
    exclude = prompt.columns.get("exclude")
    if not include:
        raise _unreadable(prompt, 'it has no column include; add one, such as [{"class": "dog", "count": 2}]')
    counting = folded(str(prompt.columns.get("tag"))) == "counting"
    return Requirements(
        _clauses(prompt, "include", include, labels),
        _clauses(prompt, "exclude", exclude or [], labels),
        COUNTING_THRESHOLD if counting else THRESHOLD,
    )


def _clauses(prompt: Prompt, column: str, entries: object, labels: Collection[str]) -> tuple[Clause, ...]:
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        raise _unreadable(prompt, f'{column} must be a list of objects such as {{"class": "dog", "count": 2}}')
    return tuple(_clause(prompt, f"{column}[{i}]", i, entry, labels) for i, entry in enumerate(entries))


def _clause(prompt: Prompt, path: str, index: int, entry: Mapping[str, object], labels: Collection[str]) -> Clause:
    given_label, count, given_color, position = (entry.get(name) for name in ("class", "count", "color", "position"))
    label = _known(given_label, labels)
    color = _known(given_color, COLORS)
    if label is None:
        near = difflib.get_close_matches(str(given_label), labels)
        known = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(sorted(labels))}"
        raise _unreadable(prompt, f"the detector does not know the class {given_label!r} of {path}; {known}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _unreadable(prompt, f"the count of {path} is {count!r}; give a whole number of 1 or more")
    if given_color is not None and color is None:
        raise _unreadable(prompt, f"the color of {path} is {given_color!r}; give one of {', '.join(COLORS)}")
    if position is None:
        return Clause(label, count, color)
    match position:
        case [name, int(target)] if (relation := _known(name, RELATIONS)) and 0 <= target < index:
            return Clause(label, count, color, (relation, target))
    raise _unreadable(
        prompt,
        f"the position of {path} is {position!r}; give one of {', '.join(RELATIONS)} and the number of an entry"
        " before it",
    )


def _known(value: object, names: Collection[str]) -> str | None:
    """The name among `names` that a value means, however it is written; None if there is none."""
    if not isinstance(value, str):
        return None
    if value in names:
        return value
    return next((name for name in names if folded(name) == folded(value)), None)


def _unreadable(prompt: Prompt, problem: str) -> Refusal:
    return Refusal(f"reward 'geneval' cannot judge the prompt {prompt.text!r}: {problem}")


# --- the picture's objects --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Detection:
    """An object of a COCO class: its box (left, top, right, bottom) in pixels, and its mask where the detector has
    one.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray | None = None


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The relations of `box` to `other`.

    Let d = (dx, dy) go from the centre of `other` to the centre of `box`. Each of its components is brought nearer to 0
    by MARGIN times the boxes' summed size in that direction. It counts if more than |d| / 2 is left; both may count.
    """
    corners_2x2x2 = np.array([box, other], dtype=float).reshape(2, 2, 2)
    offset_2 = np.subtract(*corners_2x2x2.mean(1))
    sizes_2 = np.abs(corners_2x2x2[:, 1] - corners_2x2x2[:, 0]).sum(0)
    left_2 = np.sign(offset_2) * np.maximum(np.abs(offset_2) - MARGIN * sizes_2, 0)
    if np.all(np.abs(left_2) < 1e-3):
        return set()
    dx, dy = left_2 / np.linalg.norm(offset_2)
    return {name for name, distance in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if distance > 0.5}


@dataclass(frozen=True, eq=False)
class ClauseMatch:
    """The objects of a clause's class in a picture, the most certain first, 16 at most.

    `colored` is the number of the first `clause.count` objects with the clause's colour. All of them count where it
    names none, and none where there are fewer objects.
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
        """The number of objects too many or too few, over the number that is asked for."""
        return abs(len(self.objects) - self.clause.count) / self.clause.count


def fulfilled(matches: Sequence[ClauseMatch], counted: Callable[[ClauseMatch], bool]) -> list[Sequence[Detection]]:
    """The objects of each clause whose number (`counted`), colour and position are right; none for another clause."""
    groups: list[Sequence[Detection]] = []
    for match in matches:
        clause = match.clause
        group = match.objects[: clause.count]
        right = counted(match) and match.colored == clause.count
        if right and clause.position is not None:
            relation, target = clause.position
            pairs = [(one, other) for one in group for other in groups[target]]
            right = bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)
        groups.append(group if right else [])
    return groups


# --- the value --------------------------------------------------------------------------------------------------------

Credit = Callable[[Sequence[ClauseMatch], Sequence[bool]], float]
"""A value of the matches of all clauses, and of whether each excluded class without a clause is absent."""


def partial_credit(matches: Sequence[ClauseMatch], absent: Sequence[bool]) -> float:
    """The mean of all checks, each in 0..1. The checks are Flow-GRPO's; the bounds and the zeros are this project's.

    For a clause that asks for n objects where the picture has m, there are up to three:

    - max(0, 1 - |m - n| / n);
    - if it names a colour, the share of objects with it, or 0 where m is not n;
    - if it names a position, 1 where all objects are in it, or 0 where one is not, or where m is not n.

    An excluded class that no clause counts is a check too.
    """
    checks: list[float] = []
    for match, group in zip(matches, fulfilled(matches, lambda m: m.enough), strict=True):
        clause = match.clause
        checks.append(max(0.0, 1 - match.deviation))
        if clause.color is not None:
            checks.append(match.exact * match.colored / clause.count)
        if clause.position is not None:
            checks.append(float(bool(group) and match.exact and matches[clause.position[1]].exact))
    checks += map(float, absent)
    return sum(checks) / len(checks)


def flow_grpo_credit(matches: Sequence[ClauseMatch], absent: Sequence[bool]) -> float:
    """Flow-GRPO's reward (arXiv 2505.05470), as its authors' public reward server computes it.

    It is at most 1, and below 0 where a class has more than twice the objects that are asked for. It is the mean of
    these numbers, for a clause that asks for n objects where the picture has m:

    - 1 - |m - n| / n;
    - where m is not n, one 0 if the clause names a colour or a position;
    - where m is n, the share of objects with its colour, if it names one;
    - where m is n, colours are right and it names a position: 0 where the target is not as asked, else 1 where all
      objects are in position, and two numbers, 0 and 1, where they are not.

    Excluded classes do not count.
    """
    numbers: list[float] = []
    groups = fulfilled(matches, lambda m: m.exact)
    for match, group in zip(matches, groups, strict=True):
        clause = match.clause
        numbers.append(1 - match.deviation)
        if not match.exact:
            numbers += [0.0] * (clause.color is not None or clause.position is not None)
            continue
        if clause.color is not None:
            numbers.append(match.colored / clause.count)
        if clause.position is not None and match.colored == clause.count:
            in_position = [1.0] if group else [0.0, 1.0]
            numbers += in_position if groups[clause.position[1]] else [0.0]
    return sum(numbers) / len(numbers)


def score_detections(
    requirements: Requirements,
    detections: Sequence[Detection],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
    credit: Credit = partial_credit,
) -> Score:
    """Score a picture by its detections: the value is `credit`'s, and `passed` is GenEval's verdict.

    The verdict looks at the most certain objects of each class, as many as are asked for. More may be there, unless
    `exclude` forbids them. `colors_of` gives the colours of objects of a class.
    """
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > requirements.threshold:
            objects.setdefault(detection.label, []).append(detection)
    matches = [_match(clause, objects, colors_of) for clause in requirements.include]
    counted = {coco_label(clause.label) for clause in requirements.include}
    absent = [(c, len(objects.get(coco_label(c.label), [])[:MOST]) < c.count) for c in requirements.exclude]
    passed = all(fulfilled(matches, lambda m: m.enough)) and all(away for _, away in absent)
    return Score(credit(matches, [away for c, away in absent if coco_label(c.label) not in counted]), passed)


def _match(
    clause: Clause,
    objects: Mapping[str, Sequence[Detection]],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
) -> ClauseMatch:
    present = objects.get(coco_label(clause.label), [])[:MOST]
    if len(present) < clause.count:
        return ClauseMatch(clause, present, 0)
    if clause.color is None:
        return ClauseMatch(clause, present, clause.count)
    return ClauseMatch(clause, present, colors_of(present[: clause.count], clause.label).count(clause.color))
