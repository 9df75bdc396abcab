"""From a name in the recipe to a reward."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial

from progrpo.messages import quoted, raised
from progrpo.registry import UnknownNameError, lacks, load_named
from progrpo.rewards.base import OneRewardSettings, Refusal, Reward


def _shapes(strict_share: float, settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.shapes import ShapesReward

    return ShapesReward(strict_share)


def _of_hub(module: str, kind: str, settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.hub import OnFirstScore

    reward = getattr(importlib.import_module(f"progrpo.rewards.{module}"), kind)
    return OnFirstScore(partial(reward.from_hub, settings))


def _jpeg(sign: int, settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.jpeg import JpegSize

    return JpegSize(sign)


def _ocr(settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.ocr import OCR

    return OCR.make(settings)


def _nsfw(settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.nsfw import NSFW

    return NSFW.make(settings)


def _vlm(settings: OneRewardSettings) -> Reward:
    from progrpo.rewards.vlm import VLMJudge

    return VLMJudge.make(settings)


REWARDS: dict[str, Callable[[OneRewardSettings], Reward]] = {
    "shapes": partial(_shapes, 0.0),
    "shapes_strict": partial(_shapes, 1.0),
    "shapes_mixed": partial(_shapes, 0.5),
    "clipscore": partial(_of_hub, "clipscore", "CLIPScore"),
    "pickscore": partial(_of_hub, "pickscore", "PickScore"),
    "hpsv2": partial(_of_hub, "hpsv2", "HPSv2"),
    "imagereward": partial(_of_hub, "imagereward", "ImageReward"),
    "aesthetic": partial(_of_hub, "aesthetic", "Aesthetic"),
    "ocr": _ocr,
    "geneval": partial(_of_hub, "geneval", "GenEval"),
    "geneval_flow_grpo": partial(_of_hub, "geneval", "GenEvalFlowGRPO"),
    "jpeg_compressibility": partial(_jpeg, -1),
    "jpeg_incompressibility": partial(_jpeg, 1),
    "nsfw": _nsfw,
    "vlm": _vlm,
}

_OF_ANY_MODEL = ("clipscore", "geneval", "geneval_flow_grpo", "vlm")


def load_reward(name: str, settings: OneRewardSettings = OneRewardSettings(), processes: int = 0) -> Reward:  # noqa: B008 (frozen)
    """A built-in reward, or `module:function` found on the Python path or in the current folder.

    With `processes` it scores in so many of its own; with a `url` a server scores, which says itself by what, but for `vlm`, which
    asks its own kind.
    """
    if not isinstance(name, str):
        raise Refusal(
            f"a reward is named by a text such as my_module:redness, not {quoted(name)}; progrpo.train takes functions themselves"
        )
    if settings.url and name != "vlm":
        from progrpo.rewards.remote import RemoteReward

        own = {"model": settings.model, "device": settings.device, "dtype": settings.dtype, "processes": processes}
        if said := [option for option, value in own.items() if value not in ("", "auto", 0)]:
            raise Refusal(
                f"reward {name!r}: its server scores, so {said[0]} would change nothing here; leave it out, and give the"
                " server its own options"
            )
        return RemoteReward.make(name, settings)
    here = _load(name, settings)  # also with processes: so that a wrong name is refused at once
    if processes == 0:
        return here
    if getattr(here, "groupwise", False):
        raise Refusal(f"reward {name!r} ranks a group, which processes would take apart; leave out its processes")
    from progrpo.rewards.processes import InProcesses

    return InProcesses(load_reward, name, processes, settings, bool(getattr(here, "video", False)))


def _load(name: str, settings: OneRewardSettings) -> Reward:
    if name in REWARDS:
        if settings.model and name not in _OF_ANY_MODEL:
            raise Refusal(f"reward {name!r} takes no other model ({', '.join(_OF_ANY_MODEL)} do); leave out model")
        return REWARDS[name](settings)
    try:
        found = load_named(name, {name: "" for name in REWARDS}, "reward", "function")
    except UnknownNameError as error:
        raise Refusal(str(error)) from error.__cause__
    if not callable(found) and not hasattr(found, "score"):
        module, _, attribute = name.partition(":")
        raise Refusal(f"reward {quoted(name)}: {lacks(sys.modules[module], module, attribute)}")
    from progrpo.rewards.function import FunctionReward

    if isinstance(found, type):
        try:
            found = found()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise Refusal(
                f"reward {quoted(name)}: the class cannot be made without arguments: {raised(error)}"
            ) from error
    return FunctionReward(found, settings.batch_size, settings.timeout)
