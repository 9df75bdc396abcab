"""Trials of a run's model: a prompt's picture before and after training, and a group under any plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from progrpo.config import Config, EvalSettings, ObjectiveSettings, PlanSettings, stochastic_steps
from progrpo.frames import still_pictures
from progrpo.prompts.load import load_prompts
from progrpo.rewards.base import Refusal
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.preview import decoded
from progrpo.rollout.prune import ovf
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, sampling_for
from progrpo.studio.model import TunedModel
from progrpo.tracking.files import encode
from progrpo.tracking.grids import audit_sheet
from progrpo.tracking.records import AuditRecord
from progrpo.tracking.statistics import kept_variance
from progrpo.training.audit import Audit, GroupWatch, stops
from progrpo.training.build import eval_prompts, ranking_from
from progrpo.training.evaluate_model import with_rewards
from progrpo.training.trained_model import ModelChoice, ode_by
from progrpo.types import Prompt
from progrpo.zoo.worlds import WORLDS

_SLOT = torch.tensor([0])
_EXAMPLES = 60


@dataclass(frozen=True)
class Weights:
    """The name of a run's weights and the strength of what training changed."""

    name: str
    strength: float


@dataclass(frozen=True)
class Shot:
    """A picture (H, W, 3) uint8, None where its numbers are not finite, and its rewards by name, NaN where missing."""

    picture: np.ndarray | None
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """A group under a plan: its record and sheet for a film, and what the plan saves and keeps.

    `nfe` and `plain_nfe` are network calls with the plan and without. `variance` is that of the survivors' rewards in
    units of the group's, and `best_variance` that of as many members chosen by final rewards. None: all are equal.
    """

    record: AuditRecord
    sheet: np.ndarray
    survivors: int
    nfe: int
    plain_nfe: int
    variance: float | None
    best_variance: float | None


def trusted_config(run: Path, rewards: Sequence[str]) -> Config:
    """The configuration of a run with these rewards, or its own, and without names of code that is not progrpo's.

    A run folder may be a stranger's. ValueError for a reward of its own that would run code, and is not named.
    """
    choice = ModelChoice(str(run))
    config = with_rewards(choice, choice.config, rewards, "studio")
    config = replace(config, prompts=replace(config.prompts, pairs=""))  # a trial samples
    if rewards:
        config = replace(config, reward=replace(config.reward, noise=""))  # it may name one of the run's own
    if ":" in config.plan.preset:
        config = replace(config, plan=PlanSettings(preset="none"))
    if ":" in config.plan.selector:
        config = replace(config, plan=replace(config.plan, selector="ovf"))
    if ":" in config.sampling.sampler:
        config = replace(config, sampling=replace(config.sampling, sampler="auto"))
    if ":" in config.objective.name:
        config = replace(config, objective=ObjectiveSettings())
    return config


class Studio:
    """A run's model and reward, to try prompts with. The group that was sampled last stays: another plan is quick."""

    def __init__(self, run: Path, config: Config) -> None:
        """`config` is the run's, with rewards that may be used. ValueError where there is nothing to try."""
        self.config = config
        known = _prompts(config.eval)
        self.examples = list(known)[:_EXAMPLES]
        """Texts of prompts that the run was measured on."""
        self._prompts = known | _prompts_of_world(config.eval)
        ranking = ranking_from(config.objective, config.reward)
        self.reward = load_mixture(config.reward.terms, config.reward.frames, ranking)
        self.model = TunedModel(run)
        self._group: tuple[object, Audit] | None = None

    def prompt(self, text: str) -> Prompt:
        """The prompt of a text, with the columns that rewards need where the text is a known prompt's."""
        return self._prompts.get(text, Prompt(text))

    def refusal(self, text: str) -> str:
        """The reason why the reward cannot score a prompt; empty where it can."""
        try:
            self.reward.check([self.prompt(text)])
        except Refusal as refusal:
            return str(refusal)
        return ""

    @torch.no_grad()
    def draw(self, text: str, weights: Weights, settings: EvalSettings) -> Shot:
        """The picture of a prompt, drawn as the run's evaluations draw."""
        policy, prompt = self.model.show(weights.name, weights.strength), self.prompt(text)
        sampling, key = ode_by(policy, settings), NoiseKey(settings.seed, 0)
        start = expand(policy, _SLOT, 1, sampling, key)
        final = denoise(Denoiser(policy, policy.encode([prompt]), sampling), start, key, Meter())
        pictures = decoded(policy, final.x_NCHW, 1)
        rewards: dict[str, float] = {}
        if not self.refusal(text):
            scores = self.reward.score(pictures.images_NHWC.numpy(), [prompt], final.group_N, pictures.there_N)
            rewards = dict(zip(self.reward.weights, scores.rewards_NR[0].tolist(), strict=True))
        is_there = bool(pictures.there_N[0])
        return Shot(still_pictures(pictures.images_NHWC)[0].numpy() if is_there else None, rewards)

    def outcome(self, text: str, weights: Weights, seed: int, plan: Plan, selector: str) -> Outcome:
        """A group of the prompt under a plan, sampled as in the run's first iteration.

        ValueError for a plan that cannot be run, and for a prompt that the reward cannot score.
        """
        steps = self.config.sampling.num_inference_steps
        plan.validate(steps)
        if refusal := self.refusal(text):
            raise ValueError(refusal)
        audit, key = self._audit(text, weights, seed, plan.group_size), NoiseKey(seed, 0)
        stopped = stops(
            plan,
            list(audit.used_TG),
            audit.final_G,
            replace(self.config.plan, selector=selector).load_selector(),
            key,
            _SLOT,
        )
        survivors = [member for member, step in enumerate(stopped) if step is None]
        best = ovf(audit.final_G[None], len(survivors), torch.ones(1, plan.group_size, dtype=torch.bool), _SLOT)
        pairs = self.config.sampling.in_pairs
        final = audit.final_G.numpy()
        return Outcome(
            record=json.loads(encode({**audit.record(0), "stopped_at": stopped})),
            sheet=audit_sheet(audit.pictures_GSHWC),
            survivors=len(survivors),
            nfe=plan.predict(steps, 0, pairs).nfe,
            plain_nfe=Plan(plan.group_size).predict(steps, 0, pairs).nfe,
            variance=kept_variance(final, survivors),
            best_variance=kept_variance(final, best.indices_PK[best.valid_PK].tolist()),
        )

    @torch.no_grad()
    def _audit(self, text: str, weights: Weights, seed: int, group_size: int) -> Audit:
        """The group when nobody is stopped, previewed after every network call."""
        asked = (text, weights, seed, group_size)
        if self._group is None or self._group[0] != asked:
            policy, key = self.model.show(weights.name, weights.strength), NoiseKey(seed, 0)
            sampling = sampling_for(policy, self.config.sampling, stochastic_steps(self.config, 0), Record())
            watch = GroupWatch(self.prompt(text), 0, self.reward)
            sampler = watch.begin(Sampler(policy, self.reward, sampling, Plan(group_size)))
            rolled = rollout(sampler, [self.prompt(text)], _SLOT, key, Meter())
            self._group = (asked, watch.audit(rolled, key))
        return self._group[1]


def _prompts(settings: EvalSettings) -> dict[str, Prompt]:
    return {prompt.text: prompt for prompt in eval_prompts(settings.prompts, "test", _EXAMPLES, settings.column)}


def _prompts_of_world(settings: EvalSettings) -> dict[str, Prompt]:
    """All prompts of a built-in world by their texts, where the run is measured on them."""
    if settings.prompts not in WORLDS:
        return {}
    splits = [load_prompts(settings.prompts, split) for split in ("train", "validation", "test")]
    return {prompt.text: prompt for by_kind in splits for prompts in by_kind.values() for prompt in prompts}
