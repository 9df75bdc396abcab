"""A small network that ranks unfinished trajectories by their x0 projections, without a decoder or a reward.

Probe-Select (arXiv 2603.02829) found that early latents predict the picture, with probes trained beforehand. This probe
learns during the run, from the trajectories that reach their end. One network serves all steps: late projections, which
are nearly the latents of the rewarded pictures, teach it the reward, and what it learns holds for early ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progrpo.rollout.settings import PreviewSettings
from progrpo.types import Condition, Trajectories

_SIDE = 16
"""The rows and columns of latent features; larger latents are averaged down to these, which bounds memory."""
_TEXT_WIDTH = 128
"""The width of text features; a fixed random matrix maps wider embeddings to it."""
_WIDTH, _CONDITION_WIDTH = 16, 64
"""The channels of the network, and the width of its condition: text and step."""
_KEPT = 128
"""The number of latest groups that it goes on learning from."""
_GROUPS_PER_STEP = 8
"""The groups of one optimizer step, each at a sampling step of its own."""
_PASSES = 3
"""The passes over a new group at each sampling step, on average; more would overfit."""
_LEARNING_RATE, _WEIGHT_DECAY, _AVERAGED = 3e-3, 0.3, 0.98
_DROPOUT = 0.3
"""The dropout of pooled numbers while learning."""
_REMEMBERED = 6
"""The number of last audits whose mean agreement decides."""


@torch.no_grad()
def latent_features(x0_NCHW: Tensor) -> Tensor:
    """The features of x0 projections: float16 (N, C, h, w) on the CPU, h and w even and at most 16.

    A video's are those of its mean frame.
    """
    still = x0_NCHW.float() if x0_NCHW.ndim == 4 else x0_NCHW.float().mean(2)
    height, width = (max(2, min(side, _SIDE) // 2 * 2) for side in still.shape[2:])
    return F.adaptive_avg_pool2d(still, (height, width)).half().cpu()


def text_features(condition: Condition) -> Tensor:
    """The features of texts: float16 (P, tokens, width) on the CPU, at most 128 wide.

    ValueError for a condition without embeddings of texts.
    """
    if "prompt_embeds" not in condition.tensors:
        raise ValueError(
            "preview.probe needs embeddings of texts, and this model's condition has no prompt_embeds; leave it out"
        )
    embeddings = condition.tensors["prompt_embeds"].detach().float().cpu()
    width = embeddings.shape[2]
    if width > _TEXT_WIDTH:
        generator = torch.Generator().manual_seed(width)
        embeddings = embeddings @ torch.randn(width, _TEXT_WIDTH, generator=generator) / width**0.5
    return embeddings.half()


@dataclass(frozen=True)
class ProbeExample:
    """One group of N finished trajectories: latent features by step, the text's features, and final rewards (N,).

    `previews_TN` are the rewards of their previews, where they are known. NaN is missing.
    """

    features_TNCHW: Tensor
    text: Tensor
    rewards_N: Tensor
    previews_TN: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """The example by the names of checkpoints, in which the features are `seen_TNCHW`."""
        rewards = {"rewards_N": self.rewards_N, "previews_TN": self.previews_TN}
        return {"seen_TNCHW": self.features_TNCHW, "text": self.text, **rewards}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ProbeExample:
        return cls(state["seen_TNCHW"], state["text"], state["rewards_N"], state["previews_TN"])


def probe_examples(
    finished: Trajectories, condition: Condition, rewards_N: Tensor, previews_TN: Tensor | None = None
) -> dict[int, ProbeExample]:
    """The example of each group, by its slot; `condition` has one row per group."""
    if not finished.latent_features:
        return {}
    text_P, features_TNCHW = text_features(condition), torch.stack(finished.latent_features)
    if previews_TN is None:
        previews_TN = rewards_N.new_full((len(features_TNCHW), len(rewards_N)), torch.nan)
    examples = {}
    for group in finished.group_N.unique().tolist():
        own = (finished.group_N == group) & features_TNCHW.isfinite().flatten(2).all(2).all(0)
        if not own.any():
            continue
        slot = int(finished.slot_N[own][0])
        examples[slot] = ProbeExample(features_TNCHW[:, own], text_P[group], rewards_N[own], previews_TN[:, own])
    return examples


class LearntState(TypedDict):
    """The networks of a probe, its optimizer, and the examples that it goes on learning from."""

    head: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: int
    lessons: list[dict[str, Tensor]]


class ProbeState(TypedDict):
    """The state of a probe in a checkpoint: its agreement in the last audits, and None before it has learnt."""

    agreement: list[list[float | None]]
    learnt: LearntState | None


class Probe:
    """A probe of T steps, which ranks the members of a group; `seed` draws its first weights."""

    def __init__(self, num_steps: int, seed: int = 0) -> None:
        self.num_steps, self.seed = num_steps, seed
        self._head: _Head | None = None
        self._examples: list[ProbeExample] = []
        self._agreement: list[list[float | None]] = []

    def learn(self, examples: Sequence[ProbeExample]) -> None:
        """Learn from new groups, and again from those that it has kept."""
        new = [example for example in examples if example.rewards_N.isfinite().sum() >= 2]
        if not new:
            return
        if self._head is None:
            self._begin(new[0])
        assert self._head is not None
        for example in new:
            self._head.measure(example)
        self._examples = [*self._examples, *new][-_KEPT:]
        for _ in range(math.ceil(len(new) * self.num_steps * _PASSES / _GROUPS_PER_STEP)):
            self._step(self._head)

    @property
    def has_learnt(self) -> bool:
        """Whether it has learnt from any group."""
        return self._head is not None

    @torch.no_grad()
    def score(self, step: int, features_NCHW: Tensor, texts_P: Tensor, group_N: Tensor) -> Tensor:
        """The scores of the members of P groups after `step`, float64 (N,), comparable within a group only.

        A score depends on the whole group. It is NaN for features that are not finite, which are left out of the group.
        """
        assert self.has_learnt, "learn first"
        step_P, there_N = torch.full((len(texts_P),), step), features_NCHW.isfinite().flatten(1).all(1)
        scores_N = torch.full((len(there_N),), torch.nan, dtype=torch.float64)
        if there_N.any():
            rewards_N2 = self._average(features_NCHW[there_N], texts_P, step_P, group_N[there_N])
            scores_N[there_N] = rewards_N2.sum(1).double()
        return scores_N

    def _begin(self, example: ProbeExample) -> None:
        """Make the network for features of this shape."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self._head = _Head(self.num_steps, example)
        self._average = copy.deepcopy(self._head).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self._head.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, foreach=True
        )
        self._steps = 0

    def _step(self, head: _Head) -> None:
        """Take one optimizer step on some groups, each at a sampling step that is drawn for it."""
        generator = torch.Generator().manual_seed(self._steps)  # so that a resumed run draws alike
        which = torch.randint(len(self._examples), (_GROUPS_PER_STEP,), generator=generator).tolist()
        step_P = torch.randint(self.num_steps, (_GROUPS_PER_STEP,), generator=generator)
        chosen = [(self._examples[i], t) for i, t in zip(which, step_P.tolist(), strict=True)]
        group_N = torch.repeat_interleave(torch.tensor([len(example.rewards_N) for example, _ in chosen]))
        features = torch.cat([example.features_TNCHW[t] for example, t in chosen])
        texts_P = torch.stack([example.text for example, _ in chosen])
        final = torch.cat([example.rewards_N for example, _ in chosen])
        preview = torch.cat([example.previews_TN[t] for example, t in chosen])
        targets_N2 = torch.stack([final, preview], dim=1).double()  # float32 has no digit for 1e9 +- 1
        kept = torch.rand(len(group_N), 2 * _WIDTH, generator=generator) >= _DROPOUT
        predicted_N2 = head(features, texts_P, step_P, group_N, kept / (1 - _DROPOUT))
        there = targets_N2.isfinite()
        error = _centred(predicted_N2, group_N, there) - _centred(targets_N2, group_N, there).float()
        loss = error.where(there, 0.0).square().sum() / there.sum() / head.reward_variance()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        self._average_weights(head)

    @torch.no_grad()
    def _average_weights(self, head: _Head) -> None:
        decay = min(_AVERAGED, self._steps / (self._steps + 9))  # the first steps leave the first weights fast
        torch._foreach_lerp_(list(self._average.parameters()), list(head.parameters()), 1 - decay)
        for average, buffer in zip(self._average.buffers(), head.buffers(), strict=True):
            average.copy_(buffer)

    def watch(self, agreement: Sequence[float | None]) -> None:
        """Note how well it ranked a group that it had not learnt from: Spearman by step, None where there is none.

        A group that has none at any step, such as one whose rewards are all equal, says nothing and is not remembered.
        """
        if all(value is None for value in agreement):
            return
        self._agreement = [*self._agreement, list(agreement)][-_REMEMBERED:]

    def agreement(self, step: int) -> float | None:
        """The mean agreement of the last audits; None before three of them."""
        values = [audit[step] for audit in self._agreement]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) >= 3 else None

    def trusted(self, step: int, threshold: float) -> bool:
        """Whether its agreement, as it was lately measured, reaches the threshold."""
        agreement = self.agreement(step)
        return self.has_learnt and agreement is not None and agreement >= threshold

    def state_dict(self) -> ProbeState:
        learnt: LearntState | None = None
        if self._head is not None:
            learnt = {
                "head": self._head.state_dict(),
                "average": self._average.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "steps": self._steps,
                "lessons": [example.state_dict() for example in self._examples],
            }
        return {"agreement": self._agreement, "learnt": learnt}

    def load_state_dict(self, state: ProbeState) -> None:
        self._agreement = [list(audit) for audit in state["agreement"]]
        self._head, self._examples = None, []
        learnt = state["learnt"]
        if learnt is None:
            return
        self._examples = [ProbeExample.from_state(example) for example in learnt["lessons"]]
        self._begin(self._examples[0])
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
    """A network from features to two predictions: the final reward, and the preview's, which is easier to learn.

    Convolutions over patches of 2 x 2 are scaled and shifted by the text and the step. Their means and stds over places
    are compared within the group, in units of its spread. Names of layers are those of checkpoints.
    """

    squares: Tensor

    def __init__(self, num_steps: int, example: ProbeExample) -> None:
        super().__init__()
        channels, height, width = example.features_TNCHW.shape[2:]
        self.patches = nn.Linear(4 * channels, _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(height // 2, width // 2, _WIDTH))
        self.convolutions = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(2))
        self.tokens = nn.Linear(example.text.shape[1], _CONDITION_WIDTH)
        self.condition = nn.Linear(_CONDITION_WIDTH, _CONDITION_WIDTH)
        self.step = nn.Embedding(num_steps, _CONDITION_WIDTH)
        self.modulation = nn.Linear(_CONDITION_WIDTH, 6 * _WIDTH)
        self.worth = nn.Sequential(nn.Linear(2 * _WIDTH + _CONDITION_WIDTH, 128), nn.GELU(), nn.Linear(128, 2))
        nn.init.normal_(self.step.weight, std=0.1)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        self.latents, self.texts = _Moments(num_steps, channels), _Moments(example.text.shape[1])
        self.register_buffer("squares", torch.zeros(2, dtype=torch.float64))

    def measure(self, example: ProbeExample) -> None:
        """Add an example to the means and stds that features and texts are scaled by, and to the rewards' variance."""
        self.latents.add(example.features_TNCHW.movedim(1, -1).flatten(2))
        self.texts.add(example.text.T)
        rewards = example.rewards_N[example.rewards_N.isfinite()].double()
        self.squares += torch.tensor([(rewards - rewards.mean()).square().sum(), len(rewards)])

    def reward_variance(self) -> float:
        """The variance of rewards within a group."""
        total, count = self.squares.tolist()
        return total / count + 1e-12

    def forward(
        self, features_NCHW: Tensor, texts_P: Tensor, step_P: Tensor, group_N: Tensor, dropout: Tensor | float = 1.0
    ) -> Tensor:
        """Predict the final reward and the preview's: float32 (N, 2). Pooled numbers are multiplied by `dropout`."""
        mean_TC, std_TC = self.latents.mean_std()
        rows = step_P[group_N]
        features = (features_NCHW.float() - mean_TC[rows, :, None, None]) / std_TC[rows, :, None, None]
        mean, std = self.texts.mean_std()
        condition_P = self.condition(F.gelu(self.tokens((texts_P.float() - mean) / std)).mean(1)) + self.step(step_P)
        scale_shift = self.modulation(condition_P).unflatten(1, (3, 2, 1, 1, _WIDTH))[group_N]

        def modulated(h_NHWC: Tensor, layer: int) -> Tensor:
            scale, shift = scale_shift[:, layer].unbind(1)
            return F.gelu(torch.addcmul(shift, F.layer_norm(h_NHWC, (_WIDTH,)), 1 + scale))

        h = modulated(self.patches(F.pixel_unshuffle(features, 2).permute(0, 2, 3, 1)) + self.places, 0)
        for layer, convolution in enumerate(self.convolutions, start=1):
            h = h + modulated(convolution(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), layer)
        mean_NF = h.mean((1, 2))
        std_NF = ((h - mean_NF[:, None, None]).square().mean((1, 2)) + 1e-4).sqrt()
        centred = _centred(torch.cat([mean_NF, std_NF], dim=1), group_N)
        spread_P = (_means(centred.square(), group_N) + 1e-4).sqrt()
        return self.worth(torch.cat([centred / spread_P[group_N] * dropout, condition_P[group_N]], dim=1))


class _Moments(nn.Module):
    """The mean and std at each place, over all numbers that were added."""

    sums: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, *shape, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Add numbers (*shape, any count)."""
        values = values.double()
        ones = torch.full(values.shape[:-1], values.shape[-1], dtype=torch.float64)
        self.sums += torch.stack([ones, values.sum(-1), values.square().sum(-1)])

    def mean_std(self) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


def _centred(values_NK: Tensor, group_N: Tensor, there_NK: Tensor | None = None) -> Tensor:
    """The values less their group's mean over those that are there."""
    return values_NK - _means(values_NK, group_N, there_NK)[group_N]


def _means(values_NK: Tensor, group_N: Tensor, there_NK: Tensor | None = None) -> Tensor:
    """The means of each group up to the last with a row, (P, K); 0 where none is there."""
    there = torch.ones_like(values_NK, dtype=torch.bool) if there_NK is None else there_NK
    groups = values_NK.new_zeros(int(group_N.max()) + 1, values_NK.shape[1])
    total = groups.index_add(0, group_N, values_NK.where(there, 0.0))
    return total / groups.index_add(0, group_N, there.to(groups)).clamp(min=1)
