"""A small network that ranks unfinished trajectories by their x0 projections, without a decoder or a reward.

That early latents tell how a picture will turn out is what Probe-Select found (arXiv 2603.02829), with probes trained beforehand. This
one learns during the run, from the trajectories that reach their end. One network serves all steps: late projections, nearly
the latents whose pictures were rewarded, teach it the reward, and what they teach holds for early ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progrpo.rollout.settings import PreviewSettings
from progrpo.types import Condition, Trajectories

_SIDE = 16
"""Rows and columns of a latent that are looked at; larger ones are averaged down to so many, which bounds what is kept."""
_TEXT_WIDTH = 128
"""Wider text embeddings are mapped to so many numbers a token by a fixed random matrix."""
_WIDTH, _TOLD = 16, 64
"""Channels of the network, and numbers that say what was asked for and at which step."""
_KEPT = 128
"""Groups that it goes on learning from, the latest."""
_TOGETHER = 8
"""Groups of one step of the optimizer, each at a sampling step of its own."""
_PASSES = 3
"""How often a new group is seen at each sampling step, in the mean; more only learn the groups by heart."""
_LEARNING_RATE, _WEIGHT_DECAY, _AVERAGED = 3e-3, 0.3, 0.98
_LEFT_OUT = 0.3
"""The share of pooled numbers that a learning row goes without (dropout)."""
_REMEMBERED = 6
"""Audits whose mean agreement decides."""


@torch.no_grad()
def latent_features(x0_NCHW: Tensor) -> Tensor:
    """What a probe sees of x0 projections: float16 (N, C, h, w) on the CPU, h and w even and at most 16; a video's mean frame."""
    still = x0_NCHW.float() if x0_NCHW.ndim == 4 else x0_NCHW.float().mean(2)
    height, width = (max(2, min(side, _SIDE) // 2 * 2) for side in still.shape[2:])
    return F.adaptive_avg_pool2d(still, (height, width)).half().cpu()


def text_features(condition: Condition) -> Tensor:
    """What a probe is told: float16 (P, tokens, width) on the CPU, at most 128 wide."""
    told = condition.tensors["prompt_embeds"].detach().float().cpu()
    if (width := told.shape[2]) > _TEXT_WIDTH:
        told = told @ torch.randn(width, _TEXT_WIDTH, generator=torch.Generator().manual_seed(width)) / width**0.5
    return told.half()


@dataclass(frozen=True)
class ProbeExample:
    """N finished trajectories of one group: latent_features by step (T, N, C, h, w), its text (tokens, width), final rewards (N,).

    `previews_TN` are the rewards of their previews, where they are known. NaN is missing.
    """

    seen_TNCHW: Tensor
    text: Tensor
    rewards_N: Tensor
    previews_TN: Tensor


def probe_examples(
    finished: Trajectories, condition: Condition, rewards_N: Tensor, previews_TN: Tensor | None = None
) -> dict[int, ProbeExample]:
    """One of each group, by its slot; `condition` has a row a group."""
    if not finished.latent_features:
        return {}
    told, seen_TNCHW = text_features(condition), torch.stack(finished.latent_features)
    if previews_TN is None:
        previews_TN = rewards_N.new_full((len(seen_TNCHW), len(rewards_N)), torch.nan)
    found = {}
    for group in finished.group_N.unique().tolist():
        own = (finished.group_N == group) & seen_TNCHW.isfinite().flatten(2).all(2).all(0)
        if not own.any():
            continue
        lesson = ProbeExample(seen_TNCHW[:, own], told[group], rewards_N[own], previews_TN[:, own])
        found[int(finished.slot_N[own][0])] = lesson
    return found


class Probe:
    """Of T steps; `seed` draws its first weights."""

    def __init__(self, num_steps: int, seed: int = 0) -> None:
        self.num_steps, self.seed = num_steps, seed
        self._head: _Head | None = None
        self._lessons: list[ProbeExample] = []
        self._agreement: list[list[float | None]] = []

    def learn(self, lessons: Sequence[ProbeExample]) -> None:
        """From groups that are new, and from those that it has kept."""
        new = [lesson for lesson in lessons if lesson.rewards_N.isfinite().sum() >= 2]
        if not new:
            return
        if self._head is None:
            self._begin(new[0])
        assert self._head is not None
        for lesson in new:
            self._head.measure(lesson)
        self._lessons = [*self._lessons, *new][-_KEPT:]
        for _ in range(math.ceil(len(new) * self.num_steps * _PASSES / _TOGETHER)):
            self._step(self._head)

    @property
    def knows(self) -> bool:
        """Whether it has learnt anything."""
        return self._head is not None

    @torch.no_grad()
    def score(self, step: int, seen_NCHW: Tensor, texts_P: Tensor, group_N: Tensor) -> Tensor:
        """float64 (N,) of latent_features at P groups after `step`, comparable within a group only, and made by comparing it.

        NaN of a glance that is not finite, which the group is not compared with.
        """
        assert self.knows, "learn first"
        step_P, there_N = torch.full((len(texts_P),), step), seen_NCHW.isfinite().flatten(1).all(1)
        scores_N = torch.full((len(there_N),), torch.nan, dtype=torch.float64)
        if there_N.any():
            found = self._average(seen_NCHW[there_N], texts_P, step_P, group_N[there_N])
            scores_N[there_N] = found.sum(1).double()
        return scores_N

    def _begin(self, lesson: ProbeExample) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self._head = _Head(self.num_steps, lesson)
        self._average = copy.deepcopy(self._head).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self._head.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, foreach=True
        )
        self._steps = 0

    def _step(self, head: _Head) -> None:
        drawn = torch.Generator().manual_seed(self._steps)  # so that a resumed run draws alike
        which = torch.randint(len(self._lessons), (_TOGETHER,), generator=drawn).tolist()
        step_P = torch.randint(self.num_steps, (_TOGETHER,), generator=drawn)
        chosen = [(self._lessons[i], t) for i, t in zip(which, step_P.tolist(), strict=True)]
        group_N = torch.repeat_interleave(torch.tensor([len(lesson.rewards_N) for lesson, _ in chosen]))
        seen = torch.cat([lesson.seen_TNCHW[t] for lesson, t in chosen])
        final = torch.cat([lesson.rewards_N for lesson, _ in chosen])
        preview = torch.cat([lesson.previews_TN[t] for lesson, t in chosen])
        wanted_N2 = torch.stack([final, preview], dim=1).double()  # float32 has no digit for 1e9 +- 1
        left = torch.rand(len(group_N), 2 * _WIDTH, generator=drawn) >= _LEFT_OUT
        said_N2 = head(
            seen, torch.stack([lesson.text for lesson, _ in chosen]), step_P, group_N, left / (1 - _LEFT_OUT)
        )
        there = wanted_N2.isfinite()
        off = _centred(said_N2, group_N, there) - _centred(wanted_N2, group_N, there).float()
        loss = off.where(there, 0.0).square().sum() / there.sum() / head.reward_variance()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        kept = min(_AVERAGED, self._steps / (self._steps + 9))  # the first steps leave the first weights fast
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.parameters()), list(head.parameters()), 1 - kept)
            for average, buffer in zip(self._average.buffers(), head.buffers(), strict=True):
                average.copy_(buffer)

    def watch(self, agreement: Sequence[float | None]) -> None:
        """Note how well it ranked a group that it had not learnt from: Spearman by step, None where there is none."""
        self._agreement = [*self._agreement, list(agreement)][-_REMEMBERED:]

    def agreement(self, step: int) -> float | None:
        """Mean over the last audits; None before three of them."""
        seen = [a for audit in self._agreement if (a := audit[step]) is not None]
        return sum(seen) / len(seen) if len(seen) >= 3 else None

    def trusted(self, step: int, threshold: float) -> bool:
        """Whether its agreement, as it was lately measured, reaches the threshold."""
        found = self.agreement(step)
        return self.knows and found is not None and found >= threshold

    def state_dict(self) -> dict[str, Any]:
        learnt = None
        if self._head is not None:
            learnt = {
                "head": self._head.state_dict(),
                "average": self._average.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "steps": self._steps,
                "lessons": [dict(vars(lesson)) for lesson in self._lessons],
            }
        return {"agreement": self._agreement, "learnt": learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._agreement = [list(audit) for audit in state["agreement"]]
        self._head, self._lessons = None, []
        if (learnt := state["learnt"]) is None:
            return
        self._lessons = [ProbeExample(**lesson) for lesson in learnt["lessons"]]
        self._begin(self._lessons[0])
        assert self._head is not None
        self._head.load_state_dict(learnt["head"])
        self._average.load_state_dict(learnt["average"])
        self._optimizer.load_state_dict(learnt["optimizer"])
        self._steps = learnt["steps"]


def trusted_steps(probe: Probe | None, settings: PreviewSettings) -> frozenset[int]:
    """The steps at which a probe ranks in place of previews."""
    if probe is None:
        return frozenset()
    return frozenset(step for step in range(probe.num_steps) if probe.trusted(step, settings.probe_threshold))


class _Head(nn.Module):
    """From latent_features to what each is worth within its group: its final reward, and its preview's, which is easier to learn.

    Convolutions over patches of 2 x 2, scaled and shifted by the text and the step, then what differs from place to place, in
    units of the group's spread.
    """

    squares: Tensor

    def __init__(self, num_steps: int, lesson: ProbeExample) -> None:
        super().__init__()
        channels, height, width = lesson.seen_TNCHW.shape[2:]
        self.patches = nn.Linear(4 * channels, _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(height // 2, width // 2, _WIDTH))
        self.convolutions = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(2))
        self.tokens = nn.Linear(lesson.text.shape[1], _TOLD)
        self.told = nn.Linear(_TOLD, _TOLD)
        self.step = nn.Embedding(num_steps, _TOLD)
        self.modulation = nn.Linear(_TOLD, 6 * _WIDTH)
        self.worth = nn.Sequential(nn.Linear(2 * _WIDTH + _TOLD, 128), nn.GELU(), nn.Linear(128, 2))
        nn.init.normal_(self.step.weight, std=0.1)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        self.latents, self.texts = _Moments(num_steps, channels), _Moments(lesson.text.shape[1])
        self.register_buffer("squares", torch.zeros(2, dtype=torch.float64))

    def measure(self, lesson: ProbeExample) -> None:
        """What is seen and told is taken in units of its spread over all lessons."""
        self.latents.add(lesson.seen_TNCHW.movedim(1, -1).flatten(2))
        self.texts.add(lesson.text.T)
        rewards = lesson.rewards_N[lesson.rewards_N.isfinite()].double()
        self.squares += torch.tensor([(rewards - rewards.mean()).square().sum(), len(rewards)])

    def reward_variance(self) -> float:
        """Within a group."""
        total, count = self.squares.tolist()
        return total / count + 1e-12

    def forward(
        self, seen_NCHW: Tensor, texts_P: Tensor, step_P: Tensor, group_N: Tensor, dropout: Tensor | float = 1.0
    ) -> Tensor:
        """float32 (N, 2): the final reward, and the preview's. `dropout` times the pooled numbers is what is read of them."""
        mean_TC, std_TC = self.latents.mean_std()
        rows = step_P[group_N]
        seen = (seen_NCHW.float() - mean_TC[rows, :, None, None]) / std_TC[rows, :, None, None]
        mean, std = self.texts.mean_std()
        told_P = self.told(F.gelu(self.tokens((texts_P.float() - mean) / std)).mean(1)) + self.step(step_P)
        scale_shift = self.modulation(told_P).unflatten(1, (3, 2, 1, 1, _WIDTH))[group_N]

        def modulated(h_NHWC: Tensor, layer: int) -> Tensor:
            scale, shift = scale_shift[:, layer].unbind(1)
            return F.gelu(torch.addcmul(shift, F.layer_norm(h_NHWC, (_WIDTH,)), 1 + scale))

        h = modulated(self.patches(F.pixel_unshuffle(seen, 2).permute(0, 2, 3, 1)) + self.places, 0)
        for layer, convolution in enumerate(self.convolutions, start=1):
            h = h + modulated(convolution(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), layer)
        mean_NF = h.mean((1, 2))
        std_NF = ((h - mean_NF[:, None, None]).square().mean((1, 2)) + 1e-4).sqrt()
        off = _centred(torch.cat([mean_NF, std_NF], dim=1), group_N)
        spread_P = (_means(off.square(), group_N) + 1e-4).sqrt()
        return self.worth(torch.cat([off / spread_P[group_N] * dropout, told_P[group_N]], dim=1))


class _Moments(nn.Module):
    """Mean and std of many numbers a place, over all that were added."""

    sums: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, *shape, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """(*shape, any number)."""
        values = values.double()
        ones = torch.full(values.shape[:-1], values.shape[-1], dtype=torch.float64)
        self.sums += torch.stack([ones, values.sum(-1), values.square().sum(-1)])

    def mean_std(self) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


def _centred(values_NK: Tensor, group_N: Tensor, there_NK: Tensor | None = None) -> Tensor:
    """Less the group's mean, which is of those that are there."""
    return values_NK - _means(values_NK, group_N, there_NK)[group_N]


def _means(values_NK: Tensor, group_N: Tensor, there_NK: Tensor | None = None) -> Tensor:
    """Of each group up to the last that has a row, (P, K); 0 where nobody is there."""
    there = torch.ones_like(values_NK, dtype=torch.bool) if there_NK is None else there_NK
    groups = values_NK.new_zeros(int(group_N.max()) + 1, values_NK.shape[1])
    total = groups.index_add(0, group_N, values_NK.where(there, 0.0))
    return total / groups.index_add(0, group_N, there.to(groups)).clamp(min=1)
