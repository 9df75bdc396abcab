"""Rewards in plain Python: a function, or an object with a method `score`, as users of TRL write them.

Only this file reads the attributes of a user's objects.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from PIL import Image

from progrpo.messages import quoted, raised
from progrpo.prompts.pictures import IMAGE_COLUMN, open_pictures
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer, require_columns
from progrpo.rewards.loop import finished
from progrpo.types import GIVEN, Prompt

T = TypeVar("T")

_CLOSING = 30.0  # seconds that an async close() may take
_PICTURES, _TEXTS = "pictures", "texts"
_NAMES = {**GIVEN, "pictures": _PICTURES, "videos": _PICTURES, "texts": _TEXTS}


def adapted(value: object, batch_size: int | None = None, timeout: float | None = None) -> Reward:
    """Return a `Reward` as it is, and a function or an object with a method `score` as a FunctionReward."""
    return value if isinstance(value, Reward) else FunctionReward(value, batch_size, timeout)


def can_score(value: object) -> bool:
    return callable(value) or hasattr(value, "score")


def made(make: Callable[[], T], name: str) -> T:
    """Make an object of the user's class with this name. Refusal where that raises."""
    try:
        return make()
    except (Refusal, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Refusal(f"reward {quoted(name)}: the class cannot be made without arguments: {raised(error)}") from error


def qualified_name(value: object) -> str:
    """`module:function` of a function and `module:Class` of an object, with `_` for what no name may have."""
    owner = value if hasattr(value, "__qualname__") else type(value)
    return re.sub(r"[^\w.:]", "_", f"{owner.__module__}:{owner.__qualname__}")  # `<lambda>`, `<locals>`


class FunctionReward(Reward):
    """`function(images, prompts, **columns) -> sequence of float | None`, plain or async, or an object's `score`.

    - Pictures and texts: parameters named `images` (or `pictures`, `videos`) take PIL pictures, and those named
      `prompts` (or `texts`) texts. The texts may be left out. A function with none of these names takes both as its
      first two parameters.
    - Columns: a parameter with a column's name (or `**kwargs`) takes that column as a list. The column `image` holds
      source pictures, as PIL pictures in RGB. `needed` lists the parameters without a default: `check` refuses a
      prompt that lacks such a column.
    - Answers: None, NaN and infinities are missing scores. A `Score` may be returned in place of a number. Anything
      else is a WrongAnswer.
    - Objects: `load()` is called once, before the first score, and `close()` when the run ends. What `load()` raises
      is a Refusal.
    - Async: everything runs on one event loop, so that clients and locks made once serve every call.
    - Attributes: with `groupwise = True` a call has the pictures of one group. With `video = True` an image is a whole
      video, a uint8 array (F, H, W, 3); a picture is then a video of one frame.
    """

    def __init__(self, function: object, batch_size: int | None = None, timeout: float | None = None) -> None:
        """Inspect the function's parameters. Refusal where it cannot take pictures.

        `batch_size` is the most pictures of a call; None: no limit. An async call is cancelled after `timeout` seconds;
        None: never.
        """
        if isinstance(function, type):
            raise Refusal(
                f"reward {function.__qualname__} is a class; give an object of it, {function.__qualname__}(...)"
            )
        score = getattr(function, "score", function)
        if not callable(score):
            raise Refusal(f"reward {function!r} is neither a function nor an object with a method score")
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.video = bool(getattr(function, "video", False))
        self._object = function
        self._function: Callable[..., object] = score
        self._name = getattr(score, "__qualname__", "function")
        self._batch_size = batch_size
        self._timeout = timeout
        self._loaded = False
        self._lock = threading.Lock()
        parameters = _parameters(score, self._name)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._binding = _bind(parameters, self._takes_all)
        if not self._binding.has_pictures:
            raise Refusal(f"reward {self._name} takes no pictures; give it a parameter `images`")
        if "completions" in self._binding.guessed:  # a function that was written for TRL
            raise Refusal(
                f"reward {self._name} takes `completions`, which are a language model's; pictures come as `images`"
            )
        columns = [p for p in parameters if _can_be_named(p) and p.name not in self._binding.names]
        self._column_names = {p.name for p in columns}
        self.needed = sorted(p.name for p in columns if p.default is p.empty)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        self._load()
        columns = self._columns(prompts)
        size = self._batch_size or len(prompts)
        if self.groupwise:
            size = len(prompts)
        deadline = math.inf if self._timeout is None else time.monotonic() + self._timeout
        scores: list[Score] = []
        for start in range(0, len(prompts), max(size, 1)):
            batch = slice(start, start + size)
            batch_columns = {name: values[batch] for name, values in columns.items()}
            scores += self._call(pictures_NHWC[batch], prompts[batch], batch_columns, deadline)
        return scores

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._columns(prompts)
        require_columns(self._name, self.needed, prompts)
        self._load()

    def close(self) -> None:
        if hasattr(self._object, "close"):
            closed = self._object.close()
            if inspect.isawaitable(closed):
                finished(closed, _CLOSING)

    def _load(self) -> None:
        with self._lock:
            if not self._loaded and hasattr(self._object, "load"):
                try:
                    loaded = self._object.load()
                    if inspect.isawaitable(loaded):
                        finished(loaded)
                except (Refusal, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    raise Refusal(f"reward {self._name}: its load() failed: {raised(error)}") from error
            self._loaded = True

    def _call(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        columns: Mapping[str, list[object]],
        deadline: float,
    ) -> list[Score]:
        if self.video:
            images: list[object] = list(pictures_NHWC if pictures_NHWC.ndim == 5 else pictures_NHWC[:, None])
        else:
            images = [Image.fromarray(p) for p in pictures_NHWC]
        inputs: dict[str, object] = {_PICTURES: images, _TEXTS: [p.text for p in prompts]}
        arguments: dict[str, object] = {
            name: open_pictures(v) if name == IMAGE_COLUMN else v for name, v in columns.items()
        }
        arguments |= {name: inputs[kind] for name, kind in self._binding.by_name.items()}
        answers = self._function(*(inputs[kind] for kind in self._binding.in_order), **arguments)
        if inspect.isawaitable(answers):
            answers = finished(answers, None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        return self._scores(answers, len(prompts))

    def _scores(self, answers: object, count: int) -> list[Score]:
        """The answers of a call as `count` scores. WrongAnswer where they are none, which a retry would not mend."""
        length = _length(answers)
        if length != count:
            returned = f"{type(answers).__name__!r}, no scores" if length is None else f"{length} scores"
            mend = "await it" if inspect.isawaitable(answers) else "return one each, a list of numbers or None"
            raise WrongAnswer(f"reward {self._name} returned {returned} for {count} pictures; {mend}")
        values = list(cast(Iterable[object], answers))
        scores: list[Score] = []
        for i, value in enumerate(values):
            score = _score(value)
            if score is None:
                mend = "return a number or None for each"
                if inspect.isawaitable(value):
                    mend = "await them: return await asyncio.gather(*them)"
                    _close_coroutines(values)
                raise WrongAnswer(
                    f"reward {self._name} returned {quoted(value)}, of type {type(value).__name__!r}, as the score of"
                    f" picture {i} of {count}; {mend}"
                )
            scores.append(score)
        return scores

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[object]]:
        """The columns that the function takes, as lists, with None where a prompt has no such column.

        Refusal where a column has the name of the parameter that takes the pictures or the texts.
        """
        present = {name for p in prompts for name in p.columns}
        if unclear := sorted((self._binding.names & present) - GIVEN.keys()):
            raise Refusal(
                f"reward {self._name}: {unclear[0]!r} would be given the pictures or the texts, and the prompts have a"
                " column of that name; call what takes these `images` and `prompts`"
            )
        present -= self._binding.names
        taken = present if self._takes_all else present & self._column_names
        return {name: [p.columns.get(name) for p in prompts] for name in sorted(taken.union(self.needed))}


# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Binding:
    """The parameters of a function that take the pictures and the texts."""

    by_name: Mapping[str, str]
    in_order: Sequence[str]
    guessed: Sequence[str]
    """The parameters that take them by their place alone."""

    @property
    def has_pictures(self) -> bool:
        return _PICTURES in (*self.in_order, *self.by_name.values())

    @property
    def names(self) -> set[str]:
        """The parameters that take no column."""
        return {*self.by_name, *self.guessed}


def _bind(parameters: Sequence[inspect.Parameter], takes_all: bool) -> _Binding:
    by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: _NAMES[p.name] for p in parameters if p.name in _NAMES and _can_be_named(p)}
    in_order: list[str] = []
    guessed: list[str] = []
    if not by_name:
        any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        in_order = [_PICTURES, _TEXTS][: 2 if any_number else len(by_place)]
        guessed = by_place[:2]
    elif _PICTURES not in by_name.values():
        guessed = [name for name in by_place if name not in by_name][:1]
        by_name |= dict.fromkeys(guessed, _PICTURES)
    if takes_all:  # `**kwargs` takes pictures and texts by name, as it does the columns
        bound = {*in_order, *by_name.values()}
        by_name |= {name: kind for name, kind in GIVEN.items() if kind not in bound}
    return _Binding(by_name, in_order, guessed)


def _parameters(function: Callable[..., object], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions that are written in C
        raise Refusal(
            f"reward {name} does not say what it takes; call it in a function of images and prompts"
        ) from None


def _can_be_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


# --- answers ----------------------------------------------------------------------------------------------------------


def _length(answers: object) -> int | None:
    """The number of values; None where they have no order, or are no values."""
    if isinstance(answers, str | bytes | bytearray | Mapping | Set):
        return None
    try:
        return len(cast(Sized, answers))
    except TypeError:  # also of an array without dimensions
        return None


def _score(value: object) -> Score | None:
    """A user's value as a score; None where it is no number: a text, a list, several numbers, an awaitable."""
    score = value if isinstance(value, Score) else Score(cast(float, value))
    if isinstance(score.value, str | bytes):
        return None
    try:
        return score.plain()
    except (TypeError, ValueError):
        return None


def _close_coroutines(values: Iterable[object]) -> None:
    """Close coroutines that nobody will await; Python would warn of each."""
    for value in values:
        if inspect.iscoroutine(value):
            value.close()
