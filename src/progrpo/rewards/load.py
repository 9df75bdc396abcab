"""From a name in the recipe to a reward."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType

from progrpo.messages import named, nearest, quoted, raised
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
    module_name, attribute = _module_and_attribute(name)
    module = _imported(module_name, name)
    found = getattr(module, attribute, None)
    if not callable(found) and not hasattr(found, "score"):
        raise Refusal(f"reward {quoted(name)}: {_lacks(module, module_name, attribute)}")
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


def refuse_within_import() -> None:
    """Refusal where a reward's module, which is now being imported, starts a run of its own."""
    if name := _importing.get():
        raise Refusal(
            f"reward {quoted(name)}: importing its module starts a run; put what that file does when it is run under"
            ' `if __name__ == "__main__":`'
        )


_importing: ContextVar[str] = ContextVar("importing", default="")


def _module_and_attribute(name: str) -> tuple[str, str]:
    """The two parts of `module:function`; Refusal, with what it should be, for another name."""
    module, colon, attribute = name.partition(":")
    if module.endswith(".py") or os.sep in module:
        raise Refusal(f"reward {quoted(name)}: a module is named as Python imports it; {_as_module(module, attribute)}")
    if colon and all(module.split(".")) and "\0" not in module:
        return module, attribute
    *packages, last = name.split(".")
    dotted = not colon and all(part.isidentifier() for part in (*packages, last))
    of_module = f"; a function {last} of a module is {'.'.join(packages)}:{last}"
    raise Refusal(
        f"reward {quoted(name)} is neither built in ({', '.join(REWARDS)}) nor of the form module:function"
        f"{of_module if packages and dotted else nearest(name, REWARDS)}"
    )


def _as_module(file: str, attribute: str) -> str:
    """How the function of a file is named."""
    path = Path(file.removesuffix(".py"))
    function = attribute or "function"
    if path.is_absolute() or ".." in path.parts:
        return f"write {named(path.name)}:{named(function)}, and add {named(path.parent.resolve())} to PYTHONPATH"
    return f"write {named('.'.join(path.parts))}:{named(function)}"


def _imported(module: str, reward: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    before = _importing.set(reward)
    try:
        return importlib.import_module(module)
    except (KeyboardInterrupt, Refusal):
        raise
    except BaseException as error:  # whatever the module's author let through
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise Refusal(
                f"reward {quoted(reward)}: there is no module {quoted(module)} in this folder or installed"
            ) from None
        raise Refusal(f"reward {quoted(reward)}: its module cannot be imported: {raised(error)}") from error
    finally:
        _importing.reset(before)


def _lacks(module: ModuleType, name: str, attribute: str) -> str:
    """That a module has no such function, and what may be meant."""
    if name == "__main__":
        return (
            f"{quoted(attribute)} is of the script or notebook that named it, which is not what runs here; put it into a module"
            " of its own and name it module:function"
        )
    there = [key for key, value in vars(module).items() if callable(value)]
    file = getattr(module, "__file__", None)
    where = f" (its file is {named(file)})" if file else ""
    return f"the module {quoted(name)} has no function or class {quoted(attribute)}{where}{nearest(attribute, there)}"
