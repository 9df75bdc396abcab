"""Measure a policy on held-out prompts by the ODE, with the same noise every time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from progrpo.config import Config, EvalSettings, RewardTerm, check, from_python
from progrpo.diffusion.gaussian import mean_square
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.diffusion.process import Process
from progrpo.frames import still
from progrpo.messages import named
from progrpo.packing import of_one_shape
from progrpo.policies.base import Policy
from progrpo.prompts.load import unread
from progrpo.prompts.pictures import check_sources
from progrpo.rewards.base import Judge, Scorer
from progrpo.rewards.mixture import close_all
from progrpo.rollout.denoise import Sampling, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.tracking.console import Console
from progrpo.tracking.records import EvaluationRecord
from progrpo.training.build import config_of, eval_prompts, judge_for, scorer_from, trained_policy
from progrpo.training.checkpoints import digest
from progrpo.training.checks import check_failures, fault_of
from progrpo.training.distributed import Ranks, lost_in_words
from progrpo.training.equal_inputs import require_same_prompts
from progrpo.training.pictures import diversity, saturation, sharpness
from progrpo.types import Prompt, Trajectories

DIVERSE_PROMPTS = 64
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {"sharpness": sharpness, "saturation": saturation}
_GROUP = 4  # pictures of a prompt that diversity is measured on
_COMPARED = 16  # prompts whose pictures are sampled once more to see how far the weights went


@dataclass(frozen=True)
class Evaluation:
    """A record a picture (prompt, kind, graded, strict, judge, held_out, sharpness, saturation, diversity), in the order of the prompts, and the first pictures.

    `held_out` has the values of rewards that are not trained on, by name; `diversity` is there for the first prompts: see `diversity`.
    """

    records: list[EvaluationRecord]
    pictures_NHWC: np.ndarray

    def column(self, name: str) -> list[float | None]:
        """One value a picture, None where there is none."""
        values = [cast(Mapping[str, float | None], record).get(name) for record in self.records]
        return [None if value is None else float(value) for value in values]

    def mean(self, name: str) -> float | None:
        """Over the records that have a value, None if none has."""
        values = [value for value in self.column(name) if value is not None]
        return sum(values) / len(values) if values else None

    def held_out(self) -> dict[str, float | None]:
        """Means of the rewards that are not trained on, by name."""
        names = dict.fromkeys(name for r in self.records for name in r.get("held_out", {}))
        means: dict[str, float | None] = {}
        for name in names:
            values = [value for r in self.records if (value := r["held_out"][name]) is not None]
            means[name] = sum(values) / len(values) if values else None
        return means

    def strict_by_kind(self) -> dict[str, float]:
        passed: dict[str, list[float]] = {}
        for record in self.records:
            kind, strict = record["kind"], record["strict"]
            if kind and strict is not None:
                passed.setdefault(kind, []).append(float(strict))
        return {kind: sum(values) / len(values) for kind, values in passed.items()}

    def figures(self) -> dict[str, Any]:
        return {
            "pictures": len(self.records),
            "graded": self.mean("graded"),
            "strict": self.mean("strict"),
            "judge": self.mean("judge"),
            "diversity": self.mean("diversity"),
            "strict_by_kind": self.strict_by_kind(),
            "held_out": self.held_out(),
        }


def ode(
    policy: Policy, num_inference_steps: int, guidance_scale: float, microbatch: int, shift: float | None = None
) -> Sampling:
    """Deterministic sampling on the model's own grid: the flow's ODE, or DDIM."""
    process = Process(
        policy.prediction, "ddim", policy.levels(num_inference_steps, shift), (0.0,) * num_inference_steps
    )
    told = policy.embeds_guidance
    return Sampling(process, guidance_scale=guidance_scale, embedded_guidance=told, microbatch=microbatch)


def asked_for(
    own: EvalSettings, num_inference_steps: int | None, guidance_scale: float | None, seed: int | None
) -> EvalSettings:
    """How a run evaluates itself, with what a user says otherwise."""
    return replace(
        own,
        num_inference_steps=own.num_inference_steps if num_inference_steps is None else num_inference_steps,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
        seed=own.seed if seed is None else seed,
    )


def away_from(own: Config | None, negative_prompt: str | None, guidance_scale: float) -> str:
    """The text that guidance leads away from: a run's own, if no other is given. ValueError for one that has no effect."""
    if negative_prompt and guidance_scale == 1:
        raise ValueError(
            "--negative-prompt has no effect at a guidance scale of 1; give --guidance-scale above 1, or leave it out"
        )
    if negative_prompt is None:
        return own.sampling.negative_prompt if own is not None and guidance_scale > 1 else ""
    return negative_prompt


def rows_at_once(policy: Policy) -> int:
    """Of a network call, where no run has chosen: a video is as large as a batch of pictures."""
    return 64 if len(policy.latent_shape) == 3 else 1


def evaluate(
    policy: Policy,
    reward: Scorer,
    judge: Judge | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    ranks: Ranks,
    pictures: int = 48,
    diverse: int = 0,
    held_out: Scorer | None = None,
) -> Evaluation:
    """One picture a prompt. Noise is keyed by the prompt's place, so before and after start from the same.

    For the first `diverse` prompts, diversity is measured on more pictures of them.
    """
    mine = ranks.deal(len(prompts))
    found: list[tuple[int, dict[str, Any], np.ndarray | None]] = []
    for places in mine.split(sampling.microbatch) if len(mine) else ():  # splitting nothing gives one empty part
        batch = [prompts[i] for i in places.tolist()]
        start = expand(policy, places, 1, sampling, NoiseKey(seed, 0))
        final = denoise(policy, policy.encode(batch), start, sampling, NoiseKey(seed, 0), Meter())
        made = decoded(policy, final.x_NCHW, sampling.microbatch)
        shown = made.images_NHWC.numpy(), batch, places, made.there_N, made.fault  # each a group of its own
        images_NHWC, there, scores = still(shown[0]), made.there_N.tolist(), reward.score(*shown)
        verdicts = _verdicts(judge, images_NHWC, batch, there)
        graded, strict, others = (_listed(scores.value_N), _listed(scores.passed_N), _parts(held_out, *shown))
        for n, i in enumerate(places.tolist()):
            record = {
                "prompt": batch[n].text,
                "kind": _kind(batch[n].columns),
                "graded": graded[n],
                "strict": None if strict[n] is None else bool(strict[n]),
                "judge": verdicts[n],
                "held_out": others[n],
                **{name: measure(images_NHWC[n]) if there[n] else None for name, measure in STATISTICS.items()},
                "diversity": None,
            }
            found.append((i, record, images_NHWC[n] if i < pictures else None))
    watched = mine[mine < diverse]
    for places in watched.split(max(1, sampling.microbatch // _GROUP)) if len(watched) else ():
        of_place = dict(zip(places.tolist(), _diversities(policy, prompts, places, sampling, seed), strict=True))
        for i, record, _ in found:
            record["diversity"] = of_place.get(i, record["diversity"])
    found = sorted(ranks.gather(found), key=lambda item: item[0])
    records = cast(list[EvaluationRecord], [record for _, record, _ in found])
    return Evaluation(records, np.stack([image for _, _, image in found if image is not None]))


def _diversities(
    policy: Policy, prompts: Sequence[Prompt], places: Tensor, sampling: Sampling, seed: int
) -> list[float | None]:
    key, condition = NoiseKey(seed, 0), policy.encode([prompts[i] for i in places.tolist()])
    final = denoise(policy, condition, expand(policy, places, _GROUP, sampling, key), sampling, key, Meter())
    made = decoded(policy, final.x_NCHW, sampling.microbatch)
    images_NHWC, there_N = still(made.images_NHWC.numpy()), made.there_N.numpy()
    return [diversity(images_NHWC[rows][there_N[rows]]) for rows in np.split(np.arange(len(there_N)), len(places))]


@torch.no_grad()
def kl_to_reference(
    policy: Policy, weights: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> float | None:
    """Mean square distance of velocities under `weights` to those of the reference, in squared latent units; None without a reference.

    It is measured where these weights lead the first prompts: at the latents of each step. An SDE's KL divergence from the
    reference is proportional to it, with a factor of each step's noise (arXiv 2505.05470).
    """
    if "reference" not in policy.named_weights:
        return None
    places, key = torch.arange(min(_COMPARED, len(prompts))), NoiseKey(seed, 0)
    condition, path = policy.encode([prompts[i] for i in places.tolist()]), list[Trajectories]()

    def note(step: int, batch: Trajectories) -> Trajectories:
        path.append(batch)
        return batch

    with policy.weights(weights):
        denoise(policy, condition, expand(policy, places, 1, sampling, key), sampling, key, Meter(), note)
    process, distances = sampling.process, list[Tensor]()
    with policy.weights("reference"):
        for step, batch in enumerate(path):
            assert batch.output_NCHW is not None
            weight = PREDICTIONS[process.prediction].velocity_weight(process.levels_T1[step])
            before = [
                policy.predict(x, process.timestep(step, x), told, sampling.guidance_scale)
                for rows in of_one_shape(len(places), min(sampling.microbatch, len(places)))
                for x, told in [(batch.x_NCHW[rows], condition.take(rows.to(policy.device)))]
            ]
            apart = batch.output_NCHW - torch.cat(before)[: len(places)]
            distances.append(mean_square(apart).cpu() * weight)
    apart_N = torch.cat(distances)
    there_N = apart_N.isfinite()
    return float(apart_N[there_N].mean()) if there_N.any() else None


def _listed(values_N: Tensor) -> list[float | None]:
    """Without those that are missing."""
    return [value if math.isfinite(value) else None for value in values_N.tolist()]


def _verdicts(
    judge: Judge | None, images_NHWC: np.ndarray, prompts: Sequence[Prompt], there: Sequence[bool]
) -> list[bool | None]:
    """What a judge says of each picture that is there."""
    rows = [n for n, is_there in enumerate(there) if is_there]
    passed = judge.passes(images_NHWC[rows], [prompts[n] for n in rows]) if judge and rows else []
    found = dict(zip(rows, passed, strict=False))
    return [found.get(n) for n in range(len(prompts))]


def _parts(
    held_out: Scorer | None,
    images_NHWC: np.ndarray,
    prompts: Sequence[Prompt],
    places: Tensor,
    there_N: Tensor,
    fault: str,
) -> list[dict[str, float | None]]:
    """What each held-out reward gives each picture."""
    if held_out is None:
        return [{} for _ in prompts]
    rewards_NR = held_out.score(images_NHWC, prompts, places, there_N, fault).rewards_NR
    return [dict(zip(held_out.weights, _listed(row), strict=True)) for row in rewards_NR]


def _kind(columns: Mapping[str, Any]) -> str | None:
    kind = columns.get("kind")
    return kind if isinstance(kind, str) else None


def _harmful(term: RewardTerm) -> bool:
    """Whether a reward does more than to load published weights and to look at pictures."""
    return ":" in term.name or bool(term.url or term.cache)


def _require_names(
    target: str, lora: Path | None, config: Config, prompts: str | None, reward: Sequence[str] | None
) -> None:
    """ValueError, with the command to give, where a run of `progrpo.train` has no name of what is asked for."""
    objects, run = from_python(config), lora or target
    unnamed = lora is None and "model.path" in objects
    options = ["--prompts FILE"] * (not prompts and "eval.prompts" in objects)
    options += ["--reward NAME"] * (not reward and "reward.terms" in objects)
    if unnamed or options:
        words = " ".join(["MODEL" if unnamed else target, *([f"--lora {run}"] if unnamed or lora else []), *options])
        raise ValueError(
            f"{named(run)} is a run of progrpo.train, which was given objects where a name is needed here: progrpo eval {words}"
        )


def warn_of_cuts(policy: Policy, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Warn of what the pipeline itself would do otherwise, and of cut prompts: on stderr, for results go to stdout."""
    cuts = policy.truncation([prompt.text for prompt in prompts]).in_words()
    for said in filter(None, (policy.ignored, cuts, unread(prompts))):
        Console(0, enabled=ranks.is_main, file=sys.stderr).warn(said)


@torch.no_grad()
def evaluate_model(
    target: str,
    *,
    lora: Path | None,
    prompts: str | None,
    column: str | None,
    reward: Sequence[str] | None,
    split: str,
    pictures: int,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int | None = None,
    negative_prompt: str | None = None,
    revision: str = "",
    variant: str = "",
) -> dict[str, Any] | None:
    """Figures of a model, with a LoRA or what a run has trained if `lora` names it, or of a run's trained weights, on `pictures` prompts.

    For None a run's own prompts, rewards, steps, guidance, negative prompt and seed of its evaluations, of a model the configuration's defaults.

    Several processes share the prompts out, and the figures are given to the main one alone.

    A run folder may be a stranger's: a reward of its own that is code, asks a server or writes scores is used only if `reward` names it.
    """
    config = config_of(target, lora)
    _require_names(target, lora, config, prompts, reward)
    prompts = prompts or config.eval.prompts
    if reward:
        terms, harmful = tuple(map(RewardTerm.from_text, reward)), []
        others = tuple(term for term in config.eval.rewards if not _harmful(term))
        config = replace(config, eval=replace(config.eval, rewards=others))
    else:
        terms, harmful = config.reward.terms, [t for t in (*config.reward.terms, *config.eval.rewards) if _harmful(t)]
    if harmful:
        raise ValueError(
            f"{named(target)} is measured by {named(harmful[0].to_text())}, which runs code of yours, asks a server or writes scores:"
            " if you trust that, give --reward with it; else another reward"
        )
    wanted = asked_for(config.eval, num_inference_steps, guidance_scale, seed)
    away = away_from(config, negative_prompt, wanted.guidance_scale)
    config = replace(config, reward=replace(config.reward, terms=terms), eval=wanted)
    config = replace(config, sampling=replace(config.sampling, negative_prompt=away))
    check(config)
    frames, others = config.reward.frames, config.eval.rewards
    reward_of, held_out = scorer_from(terms, frames), scorer_from(others, frames) if others else None
    chosen = eval_prompts(prompts, split, pictures, column or config.eval.column)
    with ExitStack() as ending, lost_in_words(lambda: "give the command again"):
        ending.callback(close_all, (reward_of, held_out), Console(0, file=sys.stderr).warn)
        for scorer in filter(None, (reward_of, held_out)):
            scorer.check(chosen)
        ranks = Ranks()
        require_same_prompts(ranks, "evaluation", digest(chosen), chosen[0])
        policy = trained_policy(target, lora, ranks, revision, variant, away)
        if policy.edits:
            check_sources(chosen)
        warn_of_cuts(policy, chosen, ranks)
        sampling = ode(policy, wanted.num_inference_steps, wanted.guidance_scale, rows_at_once(policy))
        result = evaluate(
            policy,
            reward_of,
            judge_for(prompts),
            chosen,
            sampling,
            wanted.seed,
            ranks,
            diverse=DIVERSE_PROMPTS,
            held_out=held_out,
        )
        failures = [ranks.gather([scorer.failures()]) for scorer in filter(None, (reward_of, held_out))]
        for found in failures:
            check_failures(found, config.reward.max_missing, "the evaluation")
        ranks.leave()
    if not ranks.is_main:
        return None
    return {
        "target": target,
        "num_inference_steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        **({"negative_prompt": away} if away else {}),
        "seed": wanted.seed,
        **result.figures(),
        **(
            {"missing_pictures": lost, "fault": fault_of(failures[0])}
            if (lost := sum(f.lost for f in failures[0]))
            else {}
        ),
    }
