"""From a name in the recipe to a reward."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from progrpo.rewards.base import Reward


def _shapes(strict_share: float) -> Reward:
    from progrpo.rewards.shapes import ShapesReward

    return ShapesReward(strict_share)


def _pickscore() -> Reward:
    from progrpo.rewards.clip import OnFirstScore
    from progrpo.rewards.pickscore import PickScore

    return OnFirstScore(PickScore.from_hub)


def _hpsv2() -> Reward:
    from progrpo.rewards.clip import OnFirstScore
    from progrpo.rewards.hpsv2 import HPSv2

    return OnFirstScore(HPSv2.from_hub)


REWARDS: dict[str, Callable[[], Reward]] = {
    "shapes": lambda: _shapes(0.0),
    "shapes_strict": lambda: _shapes(1.0),
    "shapes_mixed": lambda: _shapes(0.5),
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
}


def load_reward(name: str, processes: int = 0) -> Reward:
    """A built-in reward, or `module:function` found on the Python path or in the current folder.

    With `processes` it scores in so many of its own.
    """
    here = _load(name)  # also with processes: so that a wrong name is refused at once
    if processes == 0:
        return here
    from progrpo.rewards.processes import InProcesses

    return InProcesses(load_reward, name, processes)


def _load(name: str) -> Reward:
    if name in REWARDS:
        return REWARDS[name]()
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"reward.name {name!r} is neither built in ({', '.join(REWARDS)}) nor of the form module:function"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module is there, something that it imports is not
        raise ValueError(
            f"reward.name {name!r}: there is no module {module_name!r} in this folder or installed"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward.name {name!r}: the module {module_name!r} has no function {attribute!r}")
    from progrpo.rewards.function import FunctionReward

    return FunctionReward(function)
