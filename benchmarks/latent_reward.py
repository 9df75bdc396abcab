"""Latent reward heads beside other previews: how they rank unfinished trajectories, and what a ranking costs.

    OMP_NUM_THREADS=1 python benchmarks/latent_reward.py [--models shapes-flow shapes-diffusion] [--seeds 0 1 2]
        [--pairs 200] [--out docs/results/latent_reward.json]
    python benchmarks/latent_reward.py --table   # the tables of docs/results/latent_reward.md; samples nothing

A seed draws pairs of pictures of training prompts, which the hidden taste `shapes_taste` labels. From so many
(`--pairs`) four heads are learned:

    rm      the reward model, on pictures
    head    the latent reward head that progrpo ships, on latents of the pictures
    noised  the same features, of x0 projections of the pictures' latents with noise, standardised at each level
    hidden  hidden states of the network at these, likewise: of the middle block of a transformer, the lowest of a U-Net

Groups of 24 of validation prompts then run unpruned: 8 steps of the ODE, and 10 of the SDE. After every step each
preview scores them: `x0 + rm` and `x0 + taste` decode the projection, the latent heads do not, and the probe of
`preview.probe` has learned from 24 other groups with the scores of `rm`. Spearman's correlation is with the final
pictures' taste and with their score by `rm`. Costs are milliseconds per member, measured in turn in one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from progrpo.config import Config, ModelSettings
from progrpo.diffusion.levels import Levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.durable import write_text
from progrpo.policies.base import Policy
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.fitting import FitSettings, fit_ensemble
from progrpo.preferences.reward_model.head import Comparisons, Ensemble
from progrpo.preferences.reward_model.latent import LatentHead, latent_features
from progrpo.preferences.reward_model.shapes import ShapesBackbone
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.rollout.probe import Probe, probe_examples, text_features
from progrpo.rollout.sampling import Record, Sampling, sampling_for
from progrpo.rollout.settings import SamplingSettings
from progrpo.tracking.statistics import spearman
from progrpo.training.build import policy_context, policy_from, resolve_dtype
from progrpo.training.distributed import Ranks
from progrpo.types import Condition, Prompt, Trajectories
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.taste import taste

GROUP, GROUPS, TAUGHT = 24, 10, 24
SETTINGS = {"ode 8": (8, False), "sde 10": (10, True)}
"""The number of steps, and whether they have noise."""
LEVELS = 8
"""The steps of the grid at whose levels pictures get noise."""
AT_ONCE, REPEATS = 64, 30
Previews = dict[tuple[str, int], Tensor]
"""The scores of a group by preview and number of pairs."""
SHOWN = ("x0 + taste", "x0 + rm", "head", "noised", "hidden", "probe")


@dataclass(frozen=True)
class LevelHead:
    """A head on features that are standardised at each noise level of a grid, and between them."""

    ensemble: Ensemble
    sigma_L: Tensor
    mean_LD: Tensor
    std_LD: Tensor

    @classmethod
    def fit(cls, features_LND: Sequence[Tensor], sigma_L: Tensor, preference_M: Tensor) -> LevelHead:
        stacked_LND = torch.stack(list(features_LND)).double()
        mean_LD, std_LD = stacked_LND.mean(1), stacked_LND.std(1) + 1e-6
        standard_LND = (stacked_LND - mean_LD[:, None]) / std_LD[:, None]
        ensemble = fitted(standard_LND.flatten(0, 1).float(), preference_M)
        order_L = sigma_L.argsort()
        return cls(ensemble, sigma_L[order_L].double(), mean_LD[order_L], std_LD[order_L])

    def score(self, features_ND: Tensor, sigma: float) -> Tensor:
        last = len(self.sigma_L) - 1
        above = int(torch.searchsorted(self.sigma_L, sigma).clamp(1, last))
        low, high = self.sigma_L[above - 1 : above + 1].tolist()
        share = min(max((sigma - low) / (high - low), 0.0), 1.0)
        mean_D, std_D = (torch.lerp(t_LD[above - 1], t_LD[above], share) for t_LD in (self.mean_LD, self.std_LD))
        return scores(self.ensemble, (features_ND.double() - mean_D) / std_D)


def fitted(features_ND: Tensor, preference_M: Tensor) -> Ensemble:
    """One head on features of pairs, whose pictures are neighbours; they may repeat, once for each noise level."""
    rows, times = torch.arange(len(features_ND)).view(-1, 2), len(features_ND) // 2 // len(preference_M)
    pairs = Comparisons(
        rows[:, 0],
        rows[:, 1],
        preference_M.repeat(times),
        torch.ones(len(rows), dtype=torch.float64),
        torch.arange(len(preference_M)).repeat(times),
    )
    return fit_ensemble(Features((features_ND,)), pairs, FitSettings(members=1, flip_rate=0.0)).ensemble


def scores(ensemble: Ensemble, features_ND: Tensor) -> Tensor:
    return ensemble.scores(Features((features_ND,))).mean(0)


def middle(policy: Any) -> nn.Module:
    """The block whose output are the hidden states."""
    blocks = getattr(policy.denoiser, "transformer_blocks", None)
    module: nn.Module = policy.denoiser.down_blocks[-1] if blocks is None else blocks[len(blocks) // 2]
    return module


@contextmanager
def captured(policy: Policy) -> Iterator[list[Tensor]]:
    """The hidden states (N, C, h, w) of the network's calls within the block."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        state = next(part for part in reversed(parts) if isinstance(part, Tensor))  # a joint block's text comes first
        if state.ndim == 3:
            side = int(state.shape[1] ** 0.5)
            state = state.transpose(1, 2).unflatten(2, (side, side))
        states.append(state)

    handle = middle(policy).register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def hidden_features(state_NCHW: Tensor) -> Tensor:
    """The means and stds of channels over places, and their means weighted by x, y and x^2 + y^2: (N, 5 C)."""
    x_NCHW = state_NCHW.float()
    y_H, x_W = (torch.linspace(-1, 1, side) for side in x_NCHW.shape[2:])
    square_HW = y_H[:, None].square() + x_W.square()
    weights = (x_W.expand_as(square_HW), y_H[:, None].expand_as(square_HW), square_HW - square_HW.mean())
    weighted = [(x_NCHW * weight).mean((2, 3)) for weight in weights]
    return torch.cat([x_NCHW.mean((2, 3)), x_NCHW.std((2, 3)), *weighted], 1)


class Bench:
    """One model and one seed: its pairs, and the heads that they teach."""

    def __init__(self, model: str, seed: int, sizes: Sequence[int]) -> None:
        config = resolve_dtype(replace(Config(), model=ModelSettings(path=model, dtype="auto")), Ranks())
        self.policy = policy_from(config.model, policy_context(config, Ranks()))
        self.model, self.seed, self.sizes = model, seed, sizes
        self.shapes = ShapesBackbone()
        self.learn()

    def sampling(self, setting: str, record: Record | None = None) -> Sampling:
        steps, noisy = SETTINGS[setting]
        settings = SamplingSettings(num_inference_steps=steps, microbatch=AT_ONCE)
        return sampling_for(self.policy, settings, range(steps if noisy else 0), record or Record())

    def sampled(self, prompts: Sequence[Prompt], size: int, sampling: Sampling, stream: int, **watch: Any) -> Sampled:
        """Groups of `size` that run to their end, with their pictures."""
        condition, key = self.policy.encode(prompts), NoiseKey(self.seed, stream)
        batch = expand(self.policy, torch.arange(len(prompts)), size, sampling, key)
        batch = denoise(Denoiser(self.policy, condition, sampling), batch, key, Meter(), **watch)
        return Sampled(condition, batch, self.pictures(batch.x_NCHW))

    def pictures(self, x0_NCHW: Tensor) -> np.ndarray:
        return decoded(self.policy, x0_NCHW, AT_ONCE).images_NHWC.numpy()

    def rm_features(self, pictures_NHWC: np.ndarray) -> Tensor:
        """The features of the reward model that do not read the prompt, as this taste does not."""
        blocks = self.shapes.features(list(pictures_NHWC), [Prompt("")] * len(pictures_NHWC)).blocks
        return torch.cat(blocks[:2], 1)

    def learn(self) -> None:
        prompts = world.sample_prompts("train", max(self.sizes), self.seed)
        pairs = self.sampled(prompts, 2, self.sampling("ode 8"), 0)
        pictures = [Image.fromarray(picture) for picture in pairs.pictures_NHWC]
        starts = range(0, len(pictures), AT_ONCE)
        latents = torch.cat([self.policy.encode_pictures(pictures[i : i + AT_ONCE]) for i in starts])
        value_M2 = torch.tensor(taste(pairs.pictures_NHWC)).view(-1, 2)
        preference_M = (value_M2[:, 0] > value_M2[:, 1]).double()
        rm_ND, head_ND = self.rm_features(pairs.pictures_NHWC), latent_features(latents)
        levels, noised, hidden = self.with_noise(latents, pairs)
        self.rm, self.head, self.noised, self.hidden = {}, {}, {}, {}
        for size in self.sizes:
            rows, preference = slice(2 * size), preference_M[:size]
            self.rm[size] = fitted(rm_ND[rows], preference)
            self.head[size] = LatentHead(fitted(head_ND[rows], preference))
            self.noised[size] = LevelHead.fit([f[rows] for f in noised], levels.sigma, preference)
            self.hidden[size] = LevelHead.fit([f[rows] for f in hidden], levels.sigma, preference)

    @torch.no_grad()
    def with_noise(self, x0_NCHW: Tensor, pairs: Sampled) -> tuple[Levels, list[Tensor], list[Tensor]]:
        """The levels of a grid, and the two kinds of features of latents with that noise."""
        levels = self.policy.levels(LEVELS)[:LEVELS]
        eps = torch.randn(x0_NCHW.shape, generator=torch.Generator().manual_seed(self.seed))
        condition_N = pairs.condition.take(pairs.batch.group_N)
        noised, hidden = [], []
        for level in (levels[i] for i in range(LEVELS)):
            x = level.alpha * x0_NCHW + level.sigma * eps
            parts = []
            for rows in torch.arange(len(x)).split(AT_ONCE):
                with captured(self.policy) as states:
                    output = self.policy.predict(x[rows], level.timestep, condition_N.take(rows))
                x0 = PREDICTIONS[self.policy.prediction].x0(x[rows], output, level)
                parts.append((latent_features(x0), hidden_features(states[0])))
            noised.append(torch.cat([part[0] for part in parts]))
            hidden.append(torch.cat([part[1] for part in parts]))
        return levels, noised, hidden

    def taught_probe(self, sampling: Sampling, size: int) -> Probe:
        """A probe that has learned from other groups, with their scores by the reward model."""
        probe = Probe(sampling.num_inference_steps)
        for i, prompt in enumerate(world.sample_prompts("train", TAUGHT, self.seed + 100)):
            group = self.sampled([prompt], GROUP, sampling, 100 + i)
            rewards_N = scores(self.rm[size], self.rm_features(group.pictures_NHWC))
            probe.learn(list(probe_examples(group.batch, group.condition, rewards_N).values()))
        return probe

    def measure(self, setting: str) -> list[dict[str, Any]]:
        """Spearman's correlation by step, of each preview with each target."""
        sampling = self.sampling(setting, Record(latent_features=True))
        probes = {size: self.taught_probe(sampling, size) for size in self.sizes}
        rows: dict[tuple[str, int, str], list[list[float]]] = {}
        for i, prompt in enumerate(world.sample_prompts("validation", 480, 0)[: GROUPS * 3][self.seed % 3 :: 3]):
            group, seen = self.watched(prompt, sampling, 1000 + i)
            text_P = text_features(group.condition)
            for step, size in itertools.product(range(len(seen)), self.sizes):
                features = group.batch.latent_features[step]
                seen[step]["probe", size] = probes[size].score(step, features, text_P, group.batch.group_N)
            final_features = self.rm_features(group.pictures_NHWC)
            for size in self.sizes:
                targets = {
                    "taste": torch.tensor(taste(group.pictures_NHWC)),
                    "rm": scores(self.rm[size], final_features),
                }
                for (target, value_N), kind in itertools.product(targets.items(), SHOWN):
                    by_step = [spearman(at[kind, size].numpy(), value_N.numpy()) or 0.0 for at in seen]
                    rows.setdefault((kind, size, target), []).append(by_step)
        return [
            {"kind": kind, "pairs": size, "target": target, "spearman": np.mean(groups, axis=0).round(4).tolist()}
            for (kind, size, target), groups in rows.items()
        ]

    def watched(self, prompt: Prompt, sampling: Sampling, stream: int) -> tuple[Sampled, list[Previews]]:
        """A finished group, and its scores after each step."""
        seen: list[Previews] = []

        def watch(step: int, batch: Trajectories) -> Trajectories:
            seen.append(self.previews(sampling, step, batch))
            return batch

        with captured(self.policy) as self.states:
            return self.sampled([prompt], GROUP, sampling, stream, on_step=watch), seen

    def previews(self, sampling: Sampling, step: int, batch: Trajectories) -> Previews:
        """The scores of a group by each preview but the probe."""
        assert batch.output_NCHW is not None
        x0_NCHW = sampling.process.x0(step, batch.x_NCHW, batch.output_NCHW)
        pictures_NHWC = self.pictures(x0_NCHW)
        rm_ND, taste_N = self.rm_features(pictures_NHWC), torch.tensor(taste(pictures_NHWC))
        sigma, states = float(sampling.process.levels_T1.sigma[step]), self.states[-1]
        seen: Previews = {}
        for size in self.sizes:
            seen["x0 + taste", size] = taste_N
            seen["x0 + rm", size] = scores(self.rm[size], rm_ND)
            seen["head", size] = self.head[size].score(x0_NCHW)
            seen["noised", size] = self.noised[size].score(latent_features(x0_NCHW), sigma)
            seen["hidden", size] = self.hidden[size].score(hidden_features(states), sigma)
        return seen

    def costs(self) -> dict[str, float]:
        """Milliseconds per member: of one network call, and of what each preview adds to it."""
        sampling = self.sampling("sde 10", Record(latent_features=True))
        prompt, size = world.sample_prompts("validation", 1, 0)[0], self.sizes[0]
        probe = Probe(10)
        with captured(self.policy) as states:
            group = self.sampled([prompt], GROUP, sampling, 5000)
        probe.learn(list(probe_examples(group.batch, group.condition, torch.randn(GROUP).double()).values()))
        x, condition = group.batch.x_NCHW, group.condition.take(group.batch.group_N)
        features, text_P = group.batch.latent_features[5], text_features(group.condition)
        pictures_NHWC, timestep = group.pictures_NHWC, self.policy.levels(10).timestep[5]
        timed: dict[str, Callable[[], object]] = {
            "network call": lambda: self.policy.predict(x, timestep, condition),
            "decode": lambda: self.pictures(x),
            "rm": lambda: scores(self.rm[size], self.rm_features(pictures_NHWC)),
            "taste": lambda: taste(pictures_NHWC),
            "head": lambda: self.head[size].score(x),
            "hidden": lambda: self.hidden[size].score(hidden_features(states[5]), 0.5),
            "probe": lambda: probe.score(5, features, text_P, group.batch.group_N),
        }
        taken: dict[str, list[float]] = {name: [] for name in timed}
        with torch.no_grad():
            for _ in range(REPEATS):
                for name, call in timed.items():
                    start = time.perf_counter()
                    call()
                    taken[name].append((time.perf_counter() - start) / GROUP * 1000)
        return {name: round(statistics.median(times), 4) for name, times in taken.items()}


@dataclass(frozen=True)
class Sampled:
    """Finished groups with their conditions and pictures."""

    condition: Condition
    batch: Trajectories
    pictures_NHWC: np.ndarray


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of the page: means over seeds, and costs."""
    lines: list[str] = []
    for model, setting in dict.fromkeys((r["model"], r["setting"]) for r in results if "setting" in r):
        own = [r for r in results if r.get("setting") == setting and r["model"] == model]
        steps = len(own[0]["spearman"])
        for target in ("taste", "rm"):
            lines += ["", f"{model}, {setting} steps, Spearman with the final {target} ({seeds_of(own)} seeds):", ""]
            lines += ["| preview | pairs | " + " | ".join(map(str, range(steps))) + " |", "|---|---|" + "---|" * steps]
            for kind, size in itertools.product(SHOWN, sorted({r["pairs"] for r in own})):
                correlations = [
                    r["spearman"] for r in own if (r["kind"], r["pairs"], r["target"]) == (kind, size, target)
                ]
                mean = np.mean(correlations, axis=0)
                lines.append(f"| {kind} | {size} | " + " | ".join(f"{value:.2f}" for value in mean) + " |")
    for model in dict.fromkeys(r["model"] for r in results):
        own = [r["costs"] for r in results if "costs" in r and r["model"] == model]
        mean = {name: statistics.median(c[name] for c in own) for name in own[0]}
        lines += ["", f"{model}, milliseconds per member:", ""]
        lines += [
            f"- {name}: {value:.3f} ({value / mean['network call']:.3f} network calls)" for name, value in mean.items()
        ]
    return "\n".join(lines)


def seeds_of(results: Sequence[Mapping[str, Any]]) -> int:
    return len({r["seed"] for r in results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="+", type=int, default=[200])
    parser.add_argument("--out", type=Path, default=Path("docs/results/latent_reward.json"))
    parser.add_argument("--table", action="store_true", help="print the tables, and sample nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.table:
        print(tables(results))
        return
    for model, seed in itertools.product(arguments.models, arguments.seeds):
        if any((r["model"], r["seed"]) == (model, seed) for r in results):
            continue
        start = time.monotonic()
        bench = Bench(model, seed, arguments.pairs)
        print(f"{model} {seed}: learned, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        own: list[dict[str, Any]] = [{"model": model, "seed": seed, "costs": bench.costs()}]
        for setting in SETTINGS:
            own += [{"model": model, "seed": seed, "setting": setting, **row} for row in bench.measure(setting)]
            print(f"{model} {seed} {setting}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        results += own
        lines = ",\n".join(json.dumps(row) for row in results)
        write_text(arguments.out, f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
