"""Settings, prompts and a model must be the same in all processes. A difference is refused by its name."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import Config, to_dict
from progrpo.messages import quoted
from progrpo.policies.base import Policy
from progrpo.training import checkpoints
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt

_PLACES = ("model.path", "model.lora", "prompts.source", "eval.prompts")


def require_same_settings(ranks: Ranks, config: Config | None, **options: object) -> None:
    """ValueError where settings differ by process, which would have them wait for each other at different places."""
    settings = {"config": config is not None, **options, **({} if config is None else comparable(config))}
    ranks.require_same({name: quoted(value) for name, value in settings.items()}, "give all the same configuration")


def comparable(config: Config) -> dict[str, object]:
    """The fields that must be the same, by their dotted names.

    The places of a model and of prompts may differ by machine, since their contents are compared. Each process may have
    a device, a server and a cache of its own for a reward.
    """
    flat = checkpoints.flat(to_dict(config))
    for rewards, terms in (("reward.terms", config.reward.terms), ("eval.rewards", config.eval.rewards)):
        flat[rewards] = [replace(term, device="auto", url="", cache="").to_text() for term in terms]
    return {name: value for name, value in flat.items() if name not in _PLACES}


def require_same_prompts(ranks: Ranks, name: str, digest: str, first: Prompt) -> None:
    """ValueError where the prompts differ by process. `name` says what they are for, `digest` is theirs."""
    ranks.require_same(
        {f"the list of {name} prompts": f"{digest[:8]} (it begins with {quoted(first.text)})"},
        "give all the same prompts in the same order: sort what comes out of a set, seed what is shuffled",
    )


def require_same_model(ranks: Ranks, policy: Policy) -> None:
    """ValueError where the model's weights differ by process."""
    ranks.require_same(
        {f"the weights of {name}": fingerprint[:8] for name, fingerprint in policy.fingerprints.items()},
        "load the same model in all: one whose files lack weights gets other random ones in each",
    )
