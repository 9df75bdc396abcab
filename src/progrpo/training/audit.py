"""Audits: a group that runs unpruned and is previewed at every step, so that previews can be compared with its end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from progrpo.rewards.base import Scorer
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.preview import preview
from progrpo.rollout.probe import Probe, ProbeExample, probe_examples, text_features
from progrpo.rollout.prune import Selector, ovf, uniform
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.settings import PreviewSettings
from progrpo.rollout.sharding import NOT_SHARDED
from progrpo.tracking.records import AuditRecord
from progrpo.tracking.statistics import hit_rate, kept_variance, spearman
from progrpo.types import Condition, Prompt, Rollout, Trajectories


@dataclass(frozen=True)
class Audit:
    """The scores of T previews (T, G) and of the final pictures (G,), with pictures uint8 (G, T+1, H, W, 3).

    `scores_TG` belong to one-step projections through the full decoder, `used_TG` to the previews that the run decides
    by, `probe_TG` to a probe. `examples` are for the probe to learn from. `kept_uniform` and `kept_ovf` are the members
    that these selectors keep by final rewards: as many as the plan's survivors, or half where the plan keeps all.
    `chosen_TK` are those that the run's selector takes from the whole group by the previews of each step, and `best_TK`
    the choices of as many by final rewards with the largest variance: the plan's keep at its points, elsewhere the
    number above.
    """

    prompt: Prompt
    scores_TG: Tensor
    final_G: Tensor
    pictures_GSHWC: np.ndarray
    stopped_at: list[int | None]
    kept_uniform: list[int]
    kept_ovf: list[int]
    chosen_TK: list[list[int]]
    best_TK: list[list[int]]
    used_TG: Tensor
    probe_TG: Tensor | None
    examples: dict[int, ProbeExample]
    preview_seconds: float | None
    """The seconds of a preview that the run decides by; None where they are not decoded otherwise than pictures."""

    def agreement(self) -> list[float | None]:
        """Spearman's correlation of each step's previews with final rewards; None where the group has no variance."""
        return self._ranked(self.scores_TG)

    def used_agreement(self) -> list[float | None]:
        """Spearman's correlation for the previews that the run decides by."""
        return self._ranked(self.used_TG)

    def probe_agreement(self) -> list[float | None] | None:
        """Spearman's correlation for the probe's scores; None without a probe that has learnt."""
        return None if self.probe_TG is None else self._ranked(self.probe_TG)

    def hit_rate(self, step: int, keep: int) -> float | None:
        """The share of the `keep` members at both ends of the final rewards that previews put at the same end."""
        return hit_rate(self.used_TG[step].numpy(), self.final_G.numpy(), keep)

    def variance(self) -> list[float | None]:
        """V of each step's choice: the variance of its final rewards in units of all. None where all are equal."""
        return self._variances(self.chosen_TK)

    def variance_final(self) -> list[float | None]:
        """The largest V of as many members, by step: that of a choice by final rewards."""
        return self._variances(self.best_TK)

    def _variances(self, chosen_TK: list[list[int]]) -> list[float | None]:
        return [kept_variance(self.final_G.numpy(), members) for members in chosen_TK]

    def _ranked(self, scores_TG: Tensor) -> list[float | None]:
        return [spearman(scores.numpy(), self.final_G.numpy()) for scores in scores_TG]

    def record(self, iteration: int) -> AuditRecord:
        return {
            "iteration": iteration,
            "prompt": self.prompt.text,
            "steps": list(range(len(self.scores_TG))),
            "scores": self.scores_TG.tolist(),
            "used": self.used_TG.tolist(),
            "final": self.final_G.tolist(),
            "stopped_at": self.stopped_at,
            "kept_uniform": self.kept_uniform,
            "kept_ovf": self.kept_ovf,
            "keep": [len(members) for members in self.chosen_TK],
            "variance": self.variance(),
            "variance_final": self.variance_final(),
        }


class GroupWatch:
    """The previews of a slot's group after every network call, scored by `reward`. Sampling goes on as it would
    without.

    `meter` counts what the previews take.
    """

    def __init__(self, prompt: Prompt, slot: int, reward: Scorer) -> None:
        self.meter = Meter()
        self._used = Meter()
        """The cost of the previews by which the run decides, where they are others."""
        self._prompt = prompt
        self._slot = slot
        self._reward = reward
        self._seen: list[_Seen] = []

    def begin(self, sampler: Sampler) -> Sampler:
        """Forget what was seen; the sampler that finishes every member of the plan's groups and shows them."""
        self.meter = Meter()
        self._used = Meter()
        self._seen = []
        self._sampler = replace(sampler, reward=self._reward).with_max_batch(sampler.plan.group_size)
        self._condition = sampler.policy.encode([self._prompt])
        plain = Plan(sampler.plan.group_size)
        return replace(sampler, plan=plain, sharding=NOT_SHARDED, peers=NOT_SHARDED, observe=self.observe)

    def observe(self, step: int, batch: Trajectories) -> None:
        """Preview the group after the network call of `step`, if it is in the batch."""
        rows = (batch.slot_N == self._slot).nonzero().flatten()
        if not len(rows):  # another wave's
            return
        group = batch.take(rows)
        group = replace(group, group_N=torch.zeros_like(group.group_N))
        settings = self._sampler.preview_settings
        sampler = replace(self._sampler, probe=None)
        plain = replace(sampler, preview_settings=PreviewSettings(), latent_reward=None)
        images_NHWC, scores_N = self._preview(plain, group, step, self.meter)
        assert images_NHWC is not None
        differs = settings.decoder == "tiny" or settings.ode_steps > 1 or sampler.latent_reward is not None
        used_N = scores_N
        if differs:
            meter = Meter()
            _, used_N = self._preview(sampler, group, step, meter)
            self._used.add(meter)
            self.meter.add(meter)
        self._seen.append(_Seen(images_NHWC, scores_N, used_N))

    def _preview(self, sampler: Sampler, group: Trajectories, step: int, meter: Meter) -> tuple[Tensor | None, Tensor]:
        return preview(sampler, [self._prompt], self._condition, group, step, meter)

    def audit(self, rolled: Rollout, key: NoiseKey) -> Audit:
        """The audit of the watched group, of which the rollout has every member."""
        rows = (rolled.trajectories.slot_N == self._slot).nonzero().flatten()
        batch, sampler = rolled.trajectories.take(rows), self._sampler
        batch = replace(batch, group_N=torch.zeros_like(batch.group_N))
        plan, final_G = sampler.plan, rolled.finalists.take(rows).ranking_N
        scores_TG = torch.stack([seen.scores_G for seen in self._seen])
        keep = plan.survivors if plan.survivors < plan.group_size else max(2, plan.group_size // 2)
        slot_P = torch.tensor([self._slot])
        seeds_P = key.group_seeds(slot_P, sampler.sampling.num_inference_steps)
        probed = _probed(sampler.probe, batch, self._condition)
        trusted = sampler.probed_steps
        decided = [probed[t] if probed and t in trusted else seen.used_G for t, seen in enumerate(self._seen)]
        keep_T = [plan.keep_after(step) or keep for step in range(len(decided))]
        seeds_T = [key.group_seeds(slot_P, step) for step in range(len(decided))]
        pictures = [*(seen.images_GHWC for seen in self._seen), rolled.pictures.take(rows).images_NHWC]
        return Audit(
            prompt=self._prompt,
            scores_TG=scores_TG,
            final_G=final_G,
            pictures_GSHWC=torch.stack(pictures, dim=1).numpy(),
            stopped_at=stops(plan, decided, final_G, sampler.selector, key, slot_P),
            kept_uniform=_kept(uniform, final_G, keep, seeds_P),
            kept_ovf=_kept(ovf, final_G, keep, seeds_P),
            chosen_TK=[_kept(sampler.selector, *at) for at in zip(decided, keep_T, seeds_T, strict=True)],
            best_TK=[_kept(ovf, final_G, *at) for at in zip(keep_T, seeds_T, strict=True)],
            used_TG=torch.stack(decided),
            probe_TG=None if probed is None else torch.stack(probed),
            examples=probe_examples(batch, self._condition, final_G, scores_TG),
            preview_seconds=self._preview_seconds(),
        )

    def _preview_seconds(self) -> float | None:
        previews = self._used.cost.previews
        return self._used.seconds["preview"] / previews if previews else None


@dataclass(frozen=True)
class _Seen:
    """A group after a network call: its pictures, their scores, and the scores by which the run decides."""

    images_GHWC: Tensor
    scores_G: Tensor
    used_G: Tensor


def _probed(probe: Probe | None, batch: Trajectories, condition: Condition) -> list[Tensor] | None:
    """The probe's scores of the group at each step; None without a probe that has learnt."""
    if probe is None or not probe.has_learnt:
        return None
    text_P = text_features(condition)
    return [probe.score(t, features, text_P, batch.group_N) for t, features in enumerate(batch.latent_features)]


def _kept(selector: Selector, scores_G: Tensor, keep: int, seeds_P: Tensor) -> list[int]:
    selection = selector(scores_G[None], keep, torch.ones(1, len(scores_G), dtype=torch.bool), seeds_P)
    return selection.indices_PK[selection.valid_PK].tolist()


def stops(
    plan: Plan, scores: list[Tensor], final_G: Tensor, selector: Selector, key: NoiseKey, slot_P: Tensor
) -> list[int | None]:
    """The step after whose network call the plan stops each member; T by final rewards, None for survivors."""
    stopped: list[int | None] = [None] * plan.group_size
    living = list(range(plan.group_size))
    points = [(p.step, p.keep, scores[p.step]) for p in plan.active_points()]
    if plan.final_keep is not None:
        points.append((len(scores), plan.final_keep, final_G))
    for step, keep, scores_G in points:
        kept = {living[i] for i in _kept(selector, scores_G[living], keep, key.group_seeds(slot_P, step))}
        for member in set(living) - kept:
            stopped[member] = step
        living = [member for member in living if member in kept]
    return stopped
