"""From a name in the recipe to a reward."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from progrpo.rewards.base import Refusal, Reward, RewardSettings
from progrpo.words import quoted, raised


def _shapes(strict_share: float, settings: RewardSettings) -> Reward:
    from progrpo.rewards.shapes import ShapesReward

    return ShapesReward(strict_share)


def _of_hub(module: str, kind: str, settings: RewardSettings) -> Reward:
    from progrpo.rewards.hub import OnFirstScore

    reward = getattr(importlib.import_module(f"progrpo.rewards.{module}"), kind)
    return OnFirstScore(partial(reward.from_hub, settings))


def _jpeg(sign: int, settings: RewardSettings) -> Reward:
    from progrpo.rewards.jpeg import JpegSize

    return JpegSize(sign)


def _ocr(settings: RewardSettings) -> Reward:
    from progrpo.rewards.ocr import OCR

    return OCR.make(settings)


def _nsfw(settings: RewardSettings) -> Reward:
    from progrpo.rewards.nsfw import NSFW

    return NSFW.make(settings)


def _vlm(settings: RewardSettings) -> Reward:
    from progrpo.rewards.vlm import VLMJudge

    return VLMJudge.make(settings)


REWARDS: dict[str, Callable[[RewardSettings], Reward]] = {
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


def load_reward(name: str, settings: RewardSettings = RewardSettings(), processes: int = 0) -> Reward:  # noqa: B008 (frozen)
    """A built-in reward, or `module:function` found on the Python path or in the current folder.

    With `processes` it scores in so many of its own; with a `url` a server scores, which says itself by what, but for `vlm`, which
    asks its own kind.
    """
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


def _load(name: str, settings: RewardSettings) -> Reward:
    if name in REWARDS:
        if settings.model and name not in _OF_ANY_MODEL:
            raise Refusal(f"reward {name!r} takes no other model ({', '.join(_OF_ANY_MODEL)} do); leave out model")
        return REWARDS[name](settings)
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(module_name.split(".")) or "\0" in module_name:
        raise Refusal(
            f"reward {quoted(name)} is neither built in ({', '.join(REWARDS)}) nor of the form module:function"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module's author let through
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise Refusal(
                f"reward {quoted(name)}: there is no module {quoted(module_name)} in this folder or installed"
            ) from None
        raise Refusal(f"reward {quoted(name)}: its module cannot be imported: {raised(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found) and not hasattr(found, "score"):
        raise Refusal(
            f"reward {quoted(name)}: the module {quoted(module_name)} has no function or class {quoted(attribute)}"
        )
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
