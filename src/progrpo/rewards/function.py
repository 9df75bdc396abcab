"""A plain Python function or class as a reward, the way TRL's users write them."""

from __future__ import annotations

import inspect
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from progrpo.messages import quoted, raised
from progrpo.prompts.pictures import COLUMN, pictures
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer, require_columns
from progrpo.rewards.loop import finished
from progrpo.types import GIVEN, Prompt

_CLOSING = 30.0  # seconds that an async close() may take
_PICTURES, _TEXTS = "pictures", "texts"
_NAMES = {**GIVEN, "pictures": _PICTURES, "videos": _PICTURES, "texts": _TEXTS}


def adapted(value: object, batch_size: int | None = None, timeout: float | None = None) -> Reward:
    """A user's reward: a `Reward` as it is, a function or an object with a method `score` as a FunctionReward."""
    return value if isinstance(value, Reward) else FunctionReward(value, batch_size, timeout)


def can_score(value: object) -> bool:
    return callable(value) or hasattr(value, "score")


def instance_of(kind: type, name: str) -> object:
    """An object of a user's class, which `name` stands for. Refusal where its constructor raises."""
    try:
        return kind()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Refusal(f"reward {quoted(name)}: the class cannot be made without arguments: {raised(error)}") from error


def qualified_name(value: object) -> str:
    """`module:function` of a function, `module:Class` of an object, with letters alone that a name may have."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return re.sub(r"[^\w.:]", "_", f"{named.__module__}:{named.__qualname__}")  # `<lambda>`, `<locals>`


class FunctionReward(Reward):
    """`function(images, prompts, **columns) -> sequence of float | None`, plain or async, or an object with it as `score`.

    `images` (or `pictures`, `videos`) are PIL pictures and `prompts` (or `texts`) texts, wherever they stand; the texts may be left
    out. Where none of these names is there, they are the first two parameters. A column reaches the function as a list under its own name if the
    function has a parameter of that name (or takes `**kwargs`); that of source pictures, `image`, holds PIL pictures in RGB.
    None, NaN and infinities are missing scores; a `Score` may be returned for a number, to say more. Whatever else is returned is
    a WrongAnswer. An object's `load()` is called once before its first score (what it raises is a Refusal), its `close()` when the
    run ends. What is async runs on one event loop, so that clients and locks made once serve every call. `needed` names the columns that every prompt must have, which `check` sees to. With an attribute `groupwise = True` the pictures of one call are a group's, as a ranking needs them.
    With `video = True` an image is a whole video, a uint8 array (F, H, W, 3), and a picture one of a single frame.
    """

    def __init__(self, function: Any, batch_size: int | None = None, timeout: float | None = None) -> None:
        """`batch_size`: pictures of a call at most; None: all that there are. `timeout`: seconds after which an async call is
        cancelled; None: never. Refusal for what cannot be given pictures.
        """
        if isinstance(function, type):
            raise Refusal(
                f"reward {function.__qualname__} is a class; give an object of it, {function.__qualname__}(...)"
            )
        self.function: Callable[..., Any] = getattr(function, "score", function)
        if not callable(self.function):
            raise Refusal(f"reward {function!r} is neither a function nor an object with a method score")
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.video = bool(getattr(function, "video", False))
        self._whole, self._batch_size, self._timeout = function, batch_size, timeout
        self._loaded, self._one = False, threading.Lock()
        self._called = getattr(self.function, "__qualname__", "function")
        parameters = _parameters(self.function, self._called)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._bound = _bound(parameters, self._takes_all)
        if not {_PICTURES} & {*self._bound.in_order, *self._bound.by_name.values()}:
            raise Refusal(f"reward {self._called} takes no pictures; give it a parameter `images`")
        if "completions" in self._bound.guessed:  # a function that was written for TRL
            raise Refusal(
                f"reward {self._called} takes `completions`, which are a language model's; pictures come as `images`"
            )
        columns = [p for p in parameters if _has_a_name(p) and p.name not in self._bound.names]
        self._names = {p.name for p in columns}
        self.needed = sorted(p.name for p in columns if p.default is p.empty)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        self._load()
        columns = self._columns(prompts)
        size = len(prompts) if self._batch_size is None or self.groupwise else self._batch_size
        parts = [slice(i, i + size) for i in range(0, len(prompts), size)] if prompts else []
        until = math.inf if self._timeout is None else time.monotonic() + self._timeout
        return [s for part in parts for s in self._call(pictures_NHWC[part], prompts[part], columns, part, until)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._columns(prompts)
        require_columns(self._called, self.needed, prompts)
        self._load()

    def close(self) -> None:
        if hasattr(self._whole, "close"):
            closed = self._whole.close()
            if inspect.isawaitable(closed):
                finished(closed, _CLOSING)

    def _load(self) -> None:
        with self._one:
            if not self._loaded and hasattr(self._whole, "load"):
                try:
                    loaded = self._whole.load()
                    if inspect.isawaitable(loaded):
                        finished(loaded)
                except (Refusal, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    raise Refusal(f"reward {self._called}: its load() failed: {raised(error)}") from error
            self._loaded = True

    def _call(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        columns: dict[str, list[Any]],
        part: slice,
        until: float,
    ) -> list[Score]:
        if self.video:
            images: list[Any] = list(pictures_NHWC if pictures_NHWC.ndim == 5 else pictures_NHWC[:, None])
        else:
            images = [Image.fromarray(p) for p in pictures_NHWC]
        told = {name: pictures(values[part]) if name == COLUMN else values[part] for name, values in columns.items()}
        given = {_PICTURES: images, _TEXTS: [p.text for p in prompts]}
        told |= {name: given[what] for name, what in self._bound.by_name.items()}
        values = self.function(*(given[what] for what in self._bound.in_order), **told)
        if inspect.isawaitable(values):
            values = finished(values, None if until == math.inf else max(0.0, until - time.monotonic()))
        return self._scores(values, len(prompts))

    def _scores(self, values: Any, count: int) -> list[Score]:
        """The answer of a call as `count` scores; WrongAnswer where it is none, which asking again would not mend."""
        length = _length(values)
        if length != count:
            returned = f"{type(values).__name__!r}, no scores" if length is None else f"{length} scores"
            mend = "await it" if inspect.isawaitable(values) else "return one each, a list of numbers or None"
            raise WrongAnswer(f"reward {self._called} returned {returned} for {count} pictures; {mend}")
        scores = [_score(value) for value in values]
        if None in scores:
            first = scores.index(None)
            value = next(value for i, value in enumerate(values) if i == first)
            mend = "return a number or None for each"
            if inspect.isawaitable(value):
                mend = "await them: return await asyncio.gather(*them)"
                _close(values)
            raise WrongAnswer(
                f"reward {self._called} returned {quoted(value)}, of type {type(value).__name__!r}, as the score of picture"
                f" {first} of {count}; {mend}"
            )
        return [score for score in scores if score is not None]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The columns that the function takes, as lists; None where a prompt has no such column. Refusal where it is not clear what it takes."""
        there = {name for p in prompts for name in p.columns}
        if unclear := sorted((self._bound.names & there) - GIVEN.keys()):
            raise Refusal(
                f"reward {self._called}: {unclear[0]!r} would be given the pictures or the texts, and the prompts have a"
                " column of that name; call what takes these `images` and `prompts`"
            )
        there -= self._bound.names
        wanted = (there if self._takes_all else there & self._names).union(self.needed)
        return {name: [p.columns.get(name) for p in prompts] for name in sorted(wanted)}


@dataclass(frozen=True)
class _Bound:
    """How a function is given the pictures and the texts."""

    by_name: Mapping[str, str]
    in_order: Sequence[str]
    guessed: Sequence[str]
    """The parameters that are taken to be for them by their place alone."""

    @property
    def names(self) -> set[str]:
        """The parameters that are for no column."""
        return {*self.by_name, *self.guessed}


def _bound(parameters: Sequence[inspect.Parameter], takes_all: bool) -> _Bound:
    by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: _NAMES[p.name] for p in parameters if p.name in _NAMES and _has_a_name(p)}
    in_order, guessed = list[str](), list[str]()
    if not by_name:
        any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        in_order = [_PICTURES, _TEXTS][: 2 if any_number else len(by_place)]
        guessed = by_place[:2]
    elif _PICTURES not in by_name.values():
        guessed = [name for name in by_place if name not in by_name][:1]
        by_name |= dict.fromkeys(guessed, _PICTURES)
    if takes_all:  # by name, as it does the columns
        told = {*in_order, *by_name.values()}
        by_name |= {name: what for name, what in GIVEN.items() if what not in told}
    return _Bound(by_name, in_order, guessed)


def _parameters(function: Callable[..., Any], called: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of some that are written in C
        raise Refusal(
            f"reward {called} does not say what it takes; call it in a function of images and prompts"
        ) from None


def _has_a_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _length(values: Any) -> int | None:
    """How many values there are; None where they have no order, or are no values."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        return None
    try:
        return len(values)
    except TypeError:  # also of an array without dimensions
        return None


def _score(value: Any) -> Score | None:
    """A user's value as a score; None for what is no number: a text, a list, several numbers, what must be awaited."""
    score = value if isinstance(value, Score) else Score(value)
    if isinstance(score.value, str | bytes):
        return None
    try:
        return score.plain()
    except (TypeError, ValueError):
        return None


def _close(values: Iterable[Any]) -> None:
    """Coroutines that nobody will await, of which Python would warn one by one."""
    for value in values:
        if inspect.iscoroutine(value):
            value.close()
