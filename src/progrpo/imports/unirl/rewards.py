"""Rules of UniRL's rewards: one that the run computes, or those of a server."""

from __future__ import annotations

from progrpo.imports.outcome import Outcome, Setting, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import NearestReward, reward_outcome
from progrpo.messages import quoted

_FIRST_FRAME = "there a video's first frame is scored, here every frame"
_NOT_COMPARED = "its scale has not been compared with ours"
REWARDS = {
    "PickScoreRewardScorer": NearestReward("pickscore"),
    "VideoPickScoreScorer": NearestReward("pickscore", difference=_FIRST_FRAME),
    "HPSv2RewardScorer": NearestReward("hpsv2"),
    "HPSv3RewardScorer": NearestReward("hpsv3", difference=_NOT_COMPARED),
    "ImageRewardScorer": NearestReward("imagereward", difference=_NOT_COMPARED),
    "AestheticRewardScorer": NearestReward("aesthetic", difference=_NOT_COMPARED),
    "ClipRewardScorer": NearestReward("clipscore", difference=_NOT_COMPARED),
    "OCRRewardScorer": NearestReward("ocr", difference=_NOT_COMPARED),
}
_REMOTE = {
    **{name: name for name in ("hpsv2", "hpsv3", "pickscore", "imagereward", "aesthetic", "ocr")},
    **{"unified_reward": "unifiedreward", "clip": "clipscore"},
}
"""Rewards of a server by their names there."""


def reward(setting: Setting) -> Outcome:
    if _is_remote(setting):
        return not_needed("rewards are computed in the run, or by a term's url")
    name = setting.text().rpartition(".")[2]
    nearest = REWARDS.get(name)
    own = nearest.name if nearest else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    return reward_outcome("reward.terms[0]", own, nearest, 1.0)


def reward_batch(setting: Setting) -> Outcome:
    if _is_remote(setting):
        return not_needed("each reward has its own batch size here")
    return to_fields({"reward.terms[0].batch_size": setting.value})


def _is_remote(setting: Setting) -> bool:
    """Whether the rewards are those of a server, which are named in `required_rewards`."""
    return str(setting.all.get("reward.backend._target_")).endswith(".RemoteRewardBackend")


def remote_rewards(setting: Setting) -> Outcome:
    """The outcome of the names of a server's rewards, each a term of ours."""
    if not (isinstance(setting.value, list) and setting.value and all(isinstance(n, str) for n in setting.value)):
        raise ValueError(f"{setting.name} must be a list of names, not {quoted(setting.value)}")
    fields: dict[str, object] = {}
    for i, name in enumerate(setting.value):
        own = _REMOTE.get(name, f"my_rewards:{name if name.isidentifier() else 'reward'}")
        weight = f"reward.backend.config.reward_weights.{name}"
        fields[f"reward.terms[{i}].name"] = own
        fields[f"reward.terms[{i}].weight"] = setting.number(weight) if weight in setting.all else 1.0
    return no_equal(
        "each is our reward of this name, or a function for you to write; scales have not been compared", fields
    )
