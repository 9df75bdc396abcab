"""The work of a suite's evaluation: pictures, scores and distances of one model after another, batch by batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from progrpo.config import EvalSettings
from progrpo.policies.base import Policy
from progrpo.rewards.base import Judge
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rollout.sampling import Sampling
from progrpo.suites.formats import SuitePrompt
from progrpo.suites.records import Key, MeasuresRecord, ModelFolder, PictureRecord
from progrpo.suites.results import Grid
from progrpo.suites.statistics import pairwise_distance, pairwise_square_distance, vendi
from progrpo.tracking.console import Console
from progrpo.training.checks import check_failures
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import COMPARED, Measures, draw, judged, ode_path, velocity_distance
from progrpo.training.pictures import diversity
from progrpo.training.suite_inputs import DiversityInputs
from progrpo.training.trained_model import ModelChoice, ode_by, warn_of_cuts
from progrpo.types import Pictures, Prompt, Trajectories

_MAX_MISSING = 0.5
_SCORED_AT_ONCE = 64  # pictures
_SAID_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Todo:
    """The missing parts of a folder: prompts to draw, drawn prompts that lack scores, and rewards to score by."""

    draw: Sequence[SuitePrompt]
    score: Sequence[SuitePrompt]
    rewards: Sequence[str]


@dataclass(frozen=True)
class ModelPath:
    """This process' part of the paths of a model without noise, on the CPU, and what its network's output means."""

    prompts: Sequence[SuitePrompt]
    path: Sequence[Trajectories]
    meaning: tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class SuiteWork:
    """The evaluation of models one by one, with the same prompts, rewards, sampling settings and processes."""

    grid: Grid
    rewards: Sequence[Component]
    judge: Judge | None
    settings: EvalSettings
    negative_prompt: str
    ranks: Ranks
    console: Console = field(repr=False)

    @cached_property
    def reward_names(self) -> list[str]:
        return [component.term.name for component in self.rewards]

    @cached_property
    def compared(self) -> Sequence[SuitePrompt]:
        """The prompts on whose paths the distance to the base is measured."""
        return self.grid.prompts[:COMPARED]

    def evaluate(self, model: ModelChoice, folder: ModelFolder, base_id: str | None) -> ModelPath | None:
        """Complete a model's folder. Its path is given where the distance to the base is not known yet."""
        todo, has_kl = self.ranks.from_main(lambda: (self._todo(folder), self._has_kl(folder, base_id)))
        needs_path = base_id is not None and not has_kl
        policy = self._load(model) if todo.draw or needs_path else None
        self._complete(policy, folder, todo)
        return self._path(policy) if policy is not None and needs_path else None

    def evaluate_base(
        self,
        base: ModelChoice,
        folder: ModelFolder,
        base_id: str,
        paths: Sequence[tuple[ModelFolder, ModelPath | None]],
    ) -> list[str]:
        """Complete the base's folder, and measure how far from it each path is. Notes on paths it has no part in."""
        todo = self.ranks.from_main(lambda: self._todo(folder))
        open_paths = [(of, path) for of, path in paths if path is not None]
        policy = self._load(base) if todo.draw or open_paths else None
        self._complete(policy, folder, todo)
        notes: list[str] = []
        for of, path in open_paths:
            assert policy is not None
            if path.meaning != _meaning(policy):
                notes.append(f"the distance of {of.path.name} to {base.name} is left out: their latents differ")
                self.console.warn(notes[-1])
                continue
            distances = dict(self.ranks.gather(list(self._distances(policy, path).items())))
            if self.ranks.is_main:
                kl = {str(place): value for place, value in distances.items()}
                of.measures.write({**of.measures.read(), "kl": kl, "kl_to": base_id})
        return notes

    # --- pictures and scores ------------------------------------------------------------------------------------------

    def _todo(self, folder: ModelFolder) -> Todo:
        records, names = folder.read(), self.reward_names
        lacking = {
            item.place: [name for key in self._keys(item) for name in names if _lacks(records.get(key), name)]
            for item in self.grid.prompts
        }
        open_prompts = [item for item in self.grid.prompts if lacking[item.place]]
        there = {item.place: all(folder.has_picture(key) for key in self._keys(item)) for item in open_prompts}
        lacking_rewards = {name for names_of_place in lacking.values() for name in names_of_place}
        return Todo(
            [item for item in open_prompts if not there[item.place]],
            [item for item in open_prompts if there[item.place]],
            [name for name in names if name in lacking_rewards],
        )

    def _keys(self, item: SuitePrompt) -> list[Key]:
        return [(item.place, member) for member in range(self.grid.per_prompt)]

    def _complete(self, policy: Policy | None, folder: ModelFolder, todo: Todo) -> None:
        scorer = _Scorer.of(self.rewards, todo.rewards, self.judge)
        each = self.grid.per_prompt
        done, total, said = 0, each * (len(todo.draw) + len(todo.score)), time.monotonic()
        sampling = None if policy is None else ode_by(policy, self.settings)
        drawn_at_once = 1 if sampling is None else max(1, sampling.microbatch // each)
        rounds = [
            *self._rounds(todo.draw, drawn_at_once, drawn=True),
            *self._rounds(todo.score, max(1, _SCORED_AT_ONCE // each), drawn=False),
        ]
        for batch, drawn in rounds:
            own = self._batch(policy, sampling, folder, batch, drawn, scorer) if batch else ([], {})
            for records, pictures in self.ranks.gather([own]):
                done += len(records)
                if self.ranks.is_main:
                    folder.write(records, pictures)
            if done == total or time.monotonic() - said > _SAID_EVERY:
                said = time.monotonic()
                self.console.say(f"{folder.path.name}: {done:,} of {total:,} pictures")
        if total:
            for mixture in scorer.mixtures:
                check_failures(self.ranks.gather([mixture.failures()]), _MAX_MISSING, "the evaluation")

    def _rounds(
        self, prompts: Sequence[SuitePrompt], at_once: int, drawn: bool
    ) -> list[tuple[Sequence[SuitePrompt], bool]]:
        """This process' batch in each round; an empty one where others have more."""
        batches = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        own = [batches[i] for i in self.ranks.deal(len(batches)).tolist()]
        count = -(-len(batches) // self.ranks.world)
        return [(own[i] if i < len(own) else [], drawn) for i in range(count)]

    def _batch(
        self,
        policy: Policy | None,
        sampling: Sampling | None,
        folder: ModelFolder,
        batch: Sequence[SuitePrompt],
        drawn: bool,
        scorer: _Scorer,
    ) -> tuple[list[PictureRecord], dict[Key, np.ndarray]]:
        keys = [key for item in batch for key in self._keys(item)]
        prompts = [item.prompt for item in batch for _ in range(self.grid.per_prompt)]
        if drawn:
            assert policy is not None and sampling is not None
            places = torch.tensor([item.place for item in batch])
            texts = [item.prompt for item in batch]
            pictures = draw(policy, sampling, texts, places, self.settings.seed, self.grid.per_prompt)
        else:
            pictures = _stacked([folder.picture(key) for key in keys])
        images_NHWC, there = pictures.images_NHWC.numpy(), pictures.there_N.tolist()
        made = {key: images_NHWC[n] for n, key in enumerate(keys) if drawn and there[n]}
        return scorer.records(pictures, prompts, keys), made

    def _load(self, model: ModelChoice) -> Policy:
        _free()
        policy = model.load(self.ranks, self.negative_prompt)
        if policy.edits or len(policy.latent_shape) != 3:
            kind = "changes pictures" if policy.edits else "makes videos"
            raise ValueError(f"{model.name} {kind}, and suites are of pictures from a text alone")
        warn_of_cuts(policy, [item.prompt for item in self.grid.prompts], self.ranks)
        return policy

    # --- the distance to the base -------------------------------------------------------------------------------------

    def _has_kl(self, folder: ModelFolder, base_id: str | None) -> bool:
        measures, places = folder.measures.read(), {str(item.place) for item in self.compared}
        return measures.get("kl_to") == base_id and {*measures.get("kl", {})} == places

    def _path(self, policy: Policy) -> ModelPath:
        own = [self.compared[i] for i in self.ranks.deal(len(self.compared)).tolist()]
        if not own:
            return ModelPath([], [], _meaning(policy))
        places = torch.tensor([item.place for item in own])
        sampling = ode_by(policy, self.settings)
        path = ode_path(policy, [item.prompt for item in own], places, sampling, self.settings.seed)
        return ModelPath(own, [batch.to("cpu") for batch in path], _meaning(policy))

    def _distances(self, policy: Policy, path: ModelPath) -> dict[int, float]:
        """The mean over steps of the distance on the path of each prompt, by its place."""
        if not path.prompts:
            return {}
        here = [batch.to(policy.device) for batch in path.path]
        prompts = [item.prompt for item in path.prompts]
        apart_N = velocity_distance(policy, here, prompts, ode_by(policy, self.settings)).mean(0)
        pairs = zip(path.prompts, apart_N.tolist(), strict=True)
        return {item.place: value for item, value in pairs if np.isfinite(value)}

    # --- diversity ----------------------------------------------------------------------------------------------------

    def measure_diversity(self, folder: ModelFolder, by: DiversityInputs) -> None:
        """Write how far apart the pictures of each prompt are, if that is not written yet."""
        records = folder.read()
        there = {item.place: [key for key in self._keys(item) if records[key]["there"]] for item in self.grid.prompts}
        measures = folder.measures.read()
        made_by = f"{by.description}, {sum(map(len, there.values()))} of {sorted(there)}"
        if measures.get("made_by") == made_by:
            return
        spread: dict[str, dict[str, float]] = {}
        seen: list[np.ndarray] = []
        for place, keys in there.items():
            if not keys:
                continue
            images_NHWC = np.stack([folder.picture(key) for key in keys])
            of_place: dict[str, float | None] = {"diversity": diversity(images_NHWC)}
            if by.lpips is not None:
                of_place["lpips"] = pairwise_square_distance(by.lpips(images_NHWC))
            if by.features is not None:
                seen.append(by.features(images_NHWC))
                of_place["distance"] = pairwise_distance(seen[-1])
                of_place["vendi"] = vendi(seen[-1]) if len(keys) > 1 else None
            spread[str(place)] = {name: value for name, value in of_place.items() if value is not None}
        new: MeasuresRecord = {"diversity": spread, "made_by": made_by}
        if seen:
            new["vendi_of_all"] = vendi(np.concatenate(seen))
        if "kl" in measures:
            new |= {"kl": measures["kl"], "kl_to": measures["kl_to"]}
        folder.measures.write(new)


@dataclass(frozen=True)
class _Scorer:
    """The rewards that score pictures in this command: the first one, whose verdict may count, and the others."""

    first: RewardMixture
    others: RewardMixture | None
    judge: Judge | None
    gives_verdict: bool

    @classmethod
    def of(cls, rewards: Sequence[Component], names: Sequence[str], judge: Judge | None) -> _Scorer:
        """The scorer by these of the rewards. The verdict is that of the first of all."""
        chosen = [component for component in rewards if component.term.name in names] or list(rewards[:1])
        others = RewardMixture(chosen[1:]) if chosen[1:] else None
        gives_verdict = chosen[0] is rewards[0]
        return cls(RewardMixture(chosen[:1]), others, judge if gives_verdict else None, gives_verdict)

    @property
    def mixtures(self) -> list[RewardMixture]:
        return [self.first, *([self.others] if self.others else [])]

    def records(self, pictures: Pictures, prompts: Sequence[Prompt], keys: Sequence[Key]) -> list[PictureRecord]:
        (first,) = self.first.weights
        results: list[PictureRecord] = []
        made = judged(pictures, prompts, self.first, Measures(self.judge, self.others))
        for key, record, there in zip(keys, made, pictures.there_N.tolist(), strict=True):
            rewards = {first: record["graded"], **record["held_out"]}
            result: PictureRecord = {"place": key[0], "member": key[1], "there": there, "rewards": rewards}
            verdict: PictureRecord = {"strict": record["strict"], "judge": record["judge"]}
            results.append({**result, **verdict} if self.gives_verdict else result)
        return results


def _lacks(record: PictureRecord | None, name: str) -> bool:
    """Whether a picture has no score yet. One that could not be given is asked for again; a lost picture has none."""
    if record is None:
        return True
    return name not in record["rewards"] or (record["there"] and record["rewards"][name] is None)


def _stacked(images: Sequence[np.ndarray]) -> Pictures:
    images_NHWC = torch.from_numpy(np.stack(images))
    return Pictures(images_NHWC, torch.ones(len(images_NHWC), dtype=torch.bool))


def _meaning(policy: Policy) -> tuple[str, tuple[int, ...]]:
    return policy.prediction, tuple(policy.latent_shape)


def _free() -> None:
    """Free a model that nobody holds any more before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
