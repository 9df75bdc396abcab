"""The loading of rewards: from a term of the configuration to its reward."""

from __future__ import annotations

import sys
from functools import partial

from progrpo.messages import quoted
from progrpo.registry import UnknownNameError, lacks, load_named
from progrpo.rewards.base import Refusal, Reward
from progrpo.rewards.function import adapted, can_score, made
from progrpo.rewards.settings import REWARDS, RewardTerm


def load_reward(term: RewardTerm) -> Reward:
    """Load a built-in reward, or `module:function` (or a class) from the Python path or the current folder.

    With `processes` it scores in so many processes of its own. With a `url` a `progrpo serve-reward` scores. Refusal
    where the term cannot be had.
    """
    if not isinstance(term.name, str):
        raise Refusal(
            f"a reward is named by a text such as my_module:redness, not {quoted(term.name)};"
            " progrpo.train takes functions themselves"
        )
    if term.is_served:
        return _served(term)
    reward = _load_here(term)  # also with processes: so that a wrong name is refused at once
    if term.processes == 0:
        return reward
    if reward.groupwise:
        raise Refusal(f"reward {term.name!r} ranks a group, which processes would take apart; leave out its processes")
    from progrpo.rewards.processes import ProcessPoolReward

    return ProcessPoolReward(_load_here, term, reward)


def _served(term: RewardTerm) -> Reward:
    from progrpo.rewards.remote import RemoteReward

    own = {
        "model": term.model,
        "device": term.device,
        "dtype": term.dtype,
        "processes": term.processes,
        "sha256": term.sha256,
    }
    if given := [option for option, value in own.items() if value not in ("", "auto", 0)]:
        raise Refusal(
            f"reward {term.name!r}: its server scores, so {given[0]} would change nothing here; leave it out, and"
            " give the server its own options"
        )
    return RemoteReward.make(term)


def _load_here(term: RewardTerm) -> Reward:
    """Load the reward into this process."""
    try:
        value: object = load_named(term.name, REWARDS, "reward", "function")
    except UnknownNameError as error:
        raise Refusal(str(error)) from error.__cause__
    if isinstance(value, type) and issubclass(value, Reward):
        if term.model and not value.takes_model:
            raise Refusal(f"reward {term.name!r} takes no other model; leave out model")
        if term.sha256 and not value.takes_sha256:
            raise Refusal(f"reward {term.name!r} takes no checksum; leave out sha256")
        return value.make(term) if term.name in REWARDS else made(partial(value.make, term), term.name)
    if not can_score(value):
        module, _, attribute = term.name.partition(":")
        raise Refusal(f"reward {quoted(term.name)}: {lacks(sys.modules[module], module, attribute)}")
    if given := [option for option in ("model", "sha256") if getattr(term, option)]:
        raise Refusal(
            f"reward {quoted(term.name)} takes no {given[0]}, which only a progrpo.rewards.base.Reward does; leave it"
            " out"
        )
    if isinstance(value, type):
        value = made(value, term.name)
    return adapted(value, term.batch_size, term.timeout)
