"""A reward as stages take it, without what its term would put around it."""

from __future__ import annotations

from progrpo.rewards.base import Reward
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardTerm


def mixture_of_one(reward: Reward, name: str = "reward") -> RewardMixture:
    """A mixture of this reward alone."""
    return RewardMixture([Component(RewardTerm(name), reward)])
