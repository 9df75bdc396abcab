"""Evaluations of a policy on held-out prompts, by the ODE and with the same noise every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.frames import still_pictures
from progrpo.policies.base import Policy
from progrpo.rewards.base import Judge, Scorer
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Sampling
from progrpo.tracking.records import EvaluationRecord
from progrpo.training.distributed import Ranks
from progrpo.training.pictures import diversity, saturation, sharpness
from progrpo.types import Pictures, Prompt, Scores, Trajectories

DIVERSE_PROMPTS = 64
STATISTICS = ("sharpness", "saturation")
COMPARED = 16
"""The prompts whose pictures are sampled once more to see how far the weights went."""
_GROUP = 4  # pictures of a prompt that diversity is measured on


class Figures(TypedDict):
    """The means of an evaluation over its pictures, None where no picture has a value."""

    pictures: int
    graded: float | None
    strict: float | None
    judge: float | None
    diversity: float | None
    strict_by_kind: dict[str, float]
    held_out: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """A record per picture, in the order of the prompts, and the first pictures."""

    records: Sequence[EvaluationRecord]
    pictures_NHWC: np.ndarray

    def column(self, name: str) -> list[float | None]:
        """The value of each picture, None where there is none."""
        return [_number(record, name) for record in self.records]

    def mean(self, name: str) -> float | None:
        """The mean over the pictures that have a value, None if none has."""
        return _mean(self.column(name))

    def held_out(self) -> dict[str, float | None]:
        """The means of the rewards that are not trained on, by name."""
        names = dict.fromkeys(name for record in self.records for name in record.get("held_out", {}))
        return {name: _mean([record["held_out"][name] for record in self.records]) for name in names}

    def strict_by_kind(self) -> dict[str, float]:
        """The share of pictures that pass, by the kind of their prompt."""
        passed: dict[str, list[bool]] = {}
        for record in self.records:
            kind, strict = record["kind"], record["strict"]
            if kind and strict is not None:
                passed.setdefault(kind, []).append(strict)
        return {kind: sum(values) / len(values) for kind, values in passed.items()}

    def figures(self) -> Figures:
        return {
            "pictures": len(self.records),
            "graded": self.mean("graded"),
            "strict": self.mean("strict"),
            "judge": self.mean("judge"),
            "diversity": self.mean("diversity"),
            "strict_by_kind": self.strict_by_kind(),
            "held_out": self.held_out(),
        }


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Measures:
    """The measures of an evaluation beside its reward: a second judge, and rewards that are not trained on.

    Diversity is measured for the first `diverse` prompts, on more pictures of them. The first `pictures` are kept.
    """

    judge: Judge | None = None
    held_out: Scorer | None = None
    diverse: int = 0
    pictures: int = 48


def evaluate(
    sampler: Sampler, prompts: Sequence[Prompt], seed: int, ranks: Ranks, measures: Measures = Measures()
) -> Evaluation:
    """Evaluate one picture per prompt. Noise is keyed by the prompt's place, so it depends on the seed alone."""
    own = ranks.deal(len(prompts))
    results: list[_Result] = []
    for places in own.split(sampler.sampling.microbatch) if len(own) else ():  # splitting nothing gives one empty part
        results += _results(sampler, prompts, places, seed, measures)
    watched = own[own < measures.diverse]
    for places in watched.split(max(1, sampler.sampling.microbatch // _GROUP)) if len(watched) else ():
        values = dict(zip(places.tolist(), _diversities(sampler, prompts, places, seed), strict=True))
        for place, record, _ in results:
            record["diversity"] = values.get(place, record["diversity"])
    results = sorted(ranks.gather(results), key=lambda result: result[0])
    pictures = [picture for _, _, picture in results if picture is not None]
    return Evaluation([record for _, record, _ in results], np.stack(pictures))


_Result = tuple[int, EvaluationRecord, np.ndarray | None]
"""A prompt's place, its record, and its picture if that is kept."""


def _results(
    sampler: Sampler, prompts: Sequence[Prompt], places: Tensor, seed: int, measures: Measures
) -> list[_Result]:
    """The results of the prompts at some places."""
    batch = [prompts[i] for i in places.tolist()]
    pictures = draw(sampler.policy, sampler.sampling, batch, places, seed)
    images_NHWC = still_pictures(pictures.images_NHWC.numpy())
    records = judged(pictures, batch, sampler.reward, measures)
    return [
        (place, records[n], images_NHWC[n] if place < measures.pictures else None)
        for n, place in enumerate(places.tolist())
    ]


def draw(
    policy: Policy, sampling: Sampling, prompts: Sequence[Prompt], places: Tensor, seed: int, count: int = 1
) -> Pictures:
    """Draw `count` pictures of each prompt, prompt-major. `places` (P,) are the prompts' places, which key the noise.

    A picture depends on the seed, its place and its number alone, up to rounding.
    """
    key = NoiseKey(seed, 0)
    denoiser = Denoiser(policy, policy.encode(prompts), sampling)
    final = denoise(denoiser, expand(policy, places, count, sampling, key), key, Meter())
    return decoded(policy, final.x_NCHW, sampling.microbatch)


def judged(
    pictures: Pictures, prompts: Sequence[Prompt], reward: Scorer, measures: Measures = Measures()
) -> list[EvaluationRecord]:
    """The record of each picture, of the prompt at the same place; its diversity is left open."""
    scored = _Scored(pictures, prompts)
    images_NHWC, there = still_pictures(pictures.images_NHWC.numpy()), pictures.there_N.tolist()
    scores = scored.by(reward)
    graded, strict = _listed(scores.value_N), _listed(scores.passed_N)
    verdicts = _verdicts(measures.judge, images_NHWC, prompts, there)
    held_out = _held_out(measures.held_out, scored)
    records: list[EvaluationRecord] = []
    for n, prompt in enumerate(prompts):
        passed = strict[n]
        records.append(
            {
                "prompt": prompt.text,
                "kind": _kind(prompt.columns),
                "graded": graded[n],
                "strict": None if passed is None else bool(passed),
                "judge": verdicts[n],
                "held_out": held_out[n],
                "sharpness": sharpness(images_NHWC[n]) if there[n] else None,
                "saturation": saturation(images_NHWC[n]) if there[n] else None,
                "diversity": None,
            }
        )
    return records


@dataclass(frozen=True)
class _Scored:
    """The pictures of some prompts, each a group of its own."""

    pictures: Pictures
    prompts: Sequence[Prompt]

    def by(self, reward: Scorer) -> Scores:
        images_NHWC, pictures = self.pictures.images_NHWC.numpy(), self.pictures
        groups = torch.arange(len(self.prompts))
        return reward.score(images_NHWC, self.prompts, groups, pictures.there_N, pictures.fault)


def _diversities(sampler: Sampler, prompts: Sequence[Prompt], places: Tensor, seed: int) -> list[float | None]:
    """The diversity of each of these prompts' pictures."""
    batch = [prompts[i] for i in places.tolist()]
    pictures = draw(sampler.policy, sampler.sampling, batch, places, seed, _GROUP)
    images_NHWC, there_N = still_pictures(pictures.images_NHWC.numpy()), pictures.there_N.numpy()
    return [diversity(images_NHWC[rows][there_N[rows]]) for rows in np.split(np.arange(len(there_N)), len(places))]


@torch.no_grad()
def kl_to_reference(
    policy: Policy, weights: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> float | None:
    """The mean square distance of velocities under `weights` to the reference's, in squared latent units.

    It is measured on the paths of the first prompts under these weights. An SDE's KL divergence from the reference is
    proportional to it, with a factor for each step's noise (arXiv 2505.05470). None without a reference.
    """
    if "reference" not in policy.named_weights:
        return None
    first = prompts[:COMPARED]
    with policy.weights(weights):
        path = ode_path(policy, first, torch.arange(len(first)), sampling, seed)
    with policy.weights("reference"):
        apart = velocity_distance(policy, path, first, sampling)
    apart = apart[apart.isfinite()]
    return float(apart.mean()) if len(apart) else None


def ode_path(
    policy: Policy, prompts: Sequence[Prompt], places: Tensor, sampling: Sampling, seed: int
) -> list[Trajectories]:
    """One trajectory of each prompt after the network call of each step. `places` (P,) key the noise."""
    key, path = NoiseKey(seed, 0), list[Trajectories]()

    def note(step: int, batch: Trajectories) -> Trajectories:
        path.append(batch)
        return batch

    denoiser = Denoiser(policy, policy.encode(prompts), sampling)
    denoise(denoiser, expand(policy, places, 1, sampling, key), key, Meter(), note)
    return path


def velocity_distance(
    policy: Policy, path: Sequence[Trajectories], prompts: Sequence[Prompt], sampling: Sampling
) -> Tensor:
    """The mean square distances (T, N) of this policy's velocities to those of the path, at the path's latents.

    The path may be another policy's, whose network's output has the same meaning.
    """
    process, size = sampling.process, min(sampling.microbatch, len(prompts))
    denoiser = Denoiser(policy, policy.encode(prompts), sampling)
    distances: list[Tensor] = []
    for step, batch in enumerate(path):
        assert batch.output_NCHW is not None
        weight = PREDICTIONS[process.prediction].velocity_weight(process.levels_T1[step])
        before = denoiser.predict(batch.x_NCHW, process.timestep(step, batch.x_NCHW), batch.group_N, size)
        distances.append(mean_square(batch.output_NCHW - before).cpu() * weight)
    return torch.stack(distances)


def _listed(values_N: Tensor) -> list[float | None]:
    """The values, None where one is missing."""
    return [value if math.isfinite(value) else None for value in values_N.tolist()]


def _verdicts(
    judge: Judge | None, images_NHWC: np.ndarray, prompts: Sequence[Prompt], there: Sequence[bool]
) -> list[bool | None]:
    """The judge's verdict on each picture; None without a judge, and for a picture that is missing."""
    rows = [n for n, is_there in enumerate(there) if is_there]
    passed = judge.passes(images_NHWC[rows], [prompts[n] for n in rows]) if judge and rows else []
    verdicts = dict(zip(rows, passed, strict=False))
    return [verdicts.get(n) for n in range(len(prompts))]


def _held_out(reward: Scorer | None, scored: _Scored) -> list[dict[str, float | None]]:
    """Each held-out reward's value of each picture, by name."""
    if reward is None:
        return [{} for _ in scored.prompts]
    return [dict(zip(reward.weights, _listed(row), strict=True)) for row in scored.by(reward).rewards_NR]


def _kind(columns: Mapping[str, object]) -> str | None:
    kind = columns.get("kind")
    return kind if isinstance(kind, str) else None
