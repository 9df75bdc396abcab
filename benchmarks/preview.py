"""Previews of unfinished trajectories: how they rank a group, and the network calls that they take.

    python benchmarks/preview.py [--models shapes-flow shapes-diffusion] [--settings sde window ode] [--groups 24]
        [--out docs/results/previews.json]
    python benchmarks/preview.py --page   # the tables and the picture of docs/results/previews.md; samples nothing

A setting says which of the ten steps have noise: `sde` all (GRPO), `window` the first three, `ode` none (DGPO, AWM).
`--groups` groups of 24 of each model and setting run unpruned on validation prompts, all kinds in turn. PARTS says
which previews are taken after which step: the projection (1 part), the ODE in 2 or more parts, and a probe. The ODE in
n parts after step 0 is a draft of n steps from the same initial noise. The probe learns from each group once it has
been scored, as a run's probe learns from audits. A process begins with a probe that knows nothing; the number of groups
that it has learnt from is kept with its scores.

Of each preview the file keeps Spearman's correlation with the final reward and V, the variance of the final rewards of
the 12 members that OVF chooses by the preview, over that of all 24. Finished groups are kept, so that the same command
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import charts
import numpy as np
import torch
from torch import Tensor

from progrpo.config import Config, ModelSettings
from progrpo.durable import write_text
from progrpo.policies.base import Policy
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import projected, score
from progrpo.rollout.probe import Probe, probe_examples, text_features
from progrpo.rollout.prune import ovf
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, sampling_for
from progrpo.rollout.settings import SamplingSettings
from progrpo.tracking.statistics import kept_variance, paired_difference, spearman
from progrpo.training.build import policy_context, policy_from, resolve_dtype
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.shapes import world

PAGE = Path("docs/results/previews.md")
PICTURE = Path("docs/images/previews.png")
MODELS = ("shapes-flow", "shapes-diffusion")
REWARDS = ("shapes_mixed", "shapes_match")
STEPS, GROUP, KEEP = 10, 24, 12
SEED, MOST = 0, 480
STOCHASTIC = {"sde": range(STEPS), "window": range(3), "ode": range(0)}
"""The steps with noise, by setting."""
PROJECTED = range(8)
"""The steps after which the projection and the probe rank; later ones are nearly the end."""
PARTS: dict[str, dict[int, range]] = {
    "sde": {1: PROJECTED, 2: range(2, 6), 3: range(2, 5)},
    "window": {1: PROJECTED, 2: range(2, 6), 3: range(2, 5), 4: range(3, 4)},
    "ode": {1: PROJECTED, 2: range(1, 5), 3: range(4), 4: range(2), 5: range(1)},
}
"""The steps after which the ODE leads to a preview, by its number of parts."""
TAUGHT = 12
"""The groups that a probe has learnt from before its scores count."""
RESAMPLED = 2000
COLOURS = {"x0": "#1e6ebe", "ode 2": "#1e8c50", "ode 3": "#dc8c1e", "ode 4": "#c83c32", "ode 5": "#8246aa"}
COLOURS |= {"probe": "#80868f"}


class Group(TypedDict):
    """One group's figures, a row of [Spearman, V] per reward, by "kind@step"; V alone for the choice by finals."""

    model: str
    setting: str
    slot: int
    learnt: int
    previews: dict[str, list[list[float | None]]]
    finals: list[float | None]


class Results:
    """The finished groups of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: list[Group] = json.loads(path.read_text()) if path.exists() else []

    def of(self, model: str, setting: str) -> list[Group]:
        return [g for g in self.groups if (g["model"], g["setting"]) == (model, setting)]

    def add(self, group: Group) -> None:
        self.groups.append(group)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(g, separators=(",", ":")) for g in self.groups)
        write_text(self.path, f"[\n{lines}\n]\n")


def load_policy(model: str) -> Policy:
    """A built-in model, in the dtype that is fast here."""
    config = resolve_dtype(replace(Config(), model=ModelSettings(path=model, dtype="auto")), Ranks())
    return policy_from(config.model, policy_context(config, Ranks()))


class Bench:
    """One model under one setting, with a probe per reward."""

    def __init__(self, model: str, setting: str) -> None:
        self.model, self.setting = model, setting
        policy = load_policy(model)
        settings = SamplingSettings(num_inference_steps=STEPS, microbatch=GROUP)
        sampling = sampling_for(policy, settings, STOCHASTIC[setting], Record(latent_features=True))
        self.sampler = Sampler(policy, load_mixture([RewardTerm(name) for name in REWARDS], frames=1), sampling)
        self.probes = [Probe(STEPS) for _ in REWARDS]
        self.learnt = 0

    def group(self, prompt: Prompt, slot: int) -> Group:
        """Sample one group, score its previews, and let the probes learn from it."""
        sampler, key = self.sampler, NoiseKey(SEED, 0)
        condition = sampler.policy.encode([prompt])
        denoiser = sampler.denoiser(condition)
        scores_NR: dict[str, Tensor] = {}

        def rewards(x0_NCHW: Tensor) -> Tensor:
            group_N = torch.zeros(len(x0_NCHW), dtype=torch.int64)
            return score(sampler, [prompt], group_N, x0_NCHW, Meter())[1].rewards_NR

        def watch(step: int, batch: Trajectories) -> Trajectories:
            for parts, steps in PARTS[self.setting].items():
                if step in steps:
                    x0_NCHW = projected(denoiser, batch, step, parts, Meter())
                    scores_NR[f"{kind_of(parts)}@{step}"] = rewards(x0_NCHW)
            return batch

        batch = expand(sampler.policy, torch.tensor([slot]), GROUP, sampler.sampling, key)
        batch = denoise(denoiser, batch, key, Meter(), watch)
        final_NR, text_P = rewards(batch.x_NCHW), text_features(condition)
        for step in PROJECTED if self.learnt else ():
            ranked = [p.score(step, batch.latent_features[step], text_P, batch.group_N) for p in self.probes]
            scores_NR[f"probe@{step}"] = torch.stack(ranked, dim=1)
        entry = Group(
            model=self.model,
            setting=self.setting,
            slot=slot,
            learnt=self.learnt,
            previews={name: agreement(seen_NR, final_NR) for name, seen_NR in scores_NR.items()},
            finals=[v for _, v in agreement(final_NR, final_NR)],
        )
        previews_TNR = torch.full((STEPS, *final_NR.shape), torch.nan, dtype=torch.float64)
        previews_TNR[list(PROJECTED)] = torch.stack([scores_NR[f"x0@{step}"] for step in PROJECTED])
        for r, probe in enumerate(self.probes):
            probe.learn(list(probe_examples(batch, condition, final_NR[:, r], previews_TNR[..., r]).values()))
        self.learnt += 1
        return entry


def kind_of(parts: int) -> str:
    return "x0" if parts == 1 else f"ode {parts}"


def agreement(seen_NR: Tensor, final_NR: Tensor) -> list[list[float | None]]:
    """Spearman's correlation and V for each reward; None where all final rewards are equal."""
    return [
        [rounded(spearman(seen_N.numpy(), final_N.numpy())), rounded(chosen_variance(seen_N, final_N))]
        for seen_N, final_N in zip(seen_NR.T, final_NR.T, strict=True)
    ]


def chosen_variance(seen_N: Tensor, final_N: Tensor) -> float | None:
    """V of OVF's choice by these scores."""
    everyone = torch.ones(1, len(seen_N), dtype=torch.bool)
    chosen_PK = ovf(seen_N[None], KEEP, everyone, torch.zeros(1, dtype=torch.int64)).indices_PK
    return kept_variance(final_N.numpy(), chosen_PK[0].tolist())


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


@dataclass(frozen=True)
class Figure:
    """The mean of Spearman's correlation and of V relative to the choice by finals, with standard errors."""

    spearman: float
    spearman_error: float
    variance: float
    variance_error: float
    groups: int


def figure(groups: Iterable[Group], name: str, reward: int) -> Figure | None:
    """A preview's figure over the groups that have it; None for fewer than two."""
    enough = [g for g in groups if name in g["previews"] and (not name.startswith("probe") or g["learnt"] >= TAUGHT)]
    rows = [[*g["previews"][name][reward], g["finals"][reward]] for g in enough]
    return bootstrapped(rows) if len(rows) > 1 else None


def bootstrapped(rows: Iterable[Sequence[float | None]]) -> Figure:
    """The figure of groups, each a row of Spearman's correlation, V and V by finals, by the bootstrap over groups.

    A preview that is equal for all members tells nothing, so its correlation is 0. Groups whose final rewards are equal
    are left out.
    """
    values = np.array([(rho or 0.0, v, best) for rho, v, best in rows if best is not None], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    resampled = values[drawn].mean(axis=1)
    rho, v, best = values.mean(axis=0).tolist()
    rho_error, v_error = resampled[:, 0].std(), (resampled[:, 1] / resampled[:, 2]).std()
    return Figure(rho, float(rho_error), v / best, float(v_error), len(values))


def calls(kind: str, step: int) -> int:
    """The network calls that a member has had when it is ranked: the trajectory's own, and the preview's."""
    return step + 1 + (int(kind.split()[1]) - 1 if kind.startswith("ode") else 0)


def cost(kind: str, step: int) -> float:
    """The network calls of a group that goes on with 12 of 24 members, over those of 24 that are all finished."""
    return (GROUP * calls(kind, step) + KEEP * (STEPS - step - 1)) / (GROUP * STEPS)


def names_of(setting: str) -> list[tuple[str, int]]:
    """The kinds of previews of a setting with their steps."""
    drawn = [(kind_of(parts), step) for parts, steps in PARTS[setting].items() for step in steps]
    return [*drawn, *(("probe", step) for step in PROJECTED)]


def table(results: Results, setting: str) -> list[str]:
    """A row per preview: calls before the choice, cost, and Spearman and V of each model and reward."""
    columns = [(model, r) for model in MODELS for r in range(len(REWARDS))]
    heads = [f"{model.removeprefix('shapes-')}, {REWARDS[r].removeprefix('shapes_')}" for model, r in columns]
    lines = [
        "| preview | after step | calls | cost | " + " | ".join(heads) + " |",
        "|---|---|---|---|" + "---|" * len(heads),
    ]
    for kind, step in names_of(setting):
        figures = [figure(results.of(model, setting), f"{kind}@{step}", r) for model, r in columns]
        if not any(figures):
            continue
        row = [kind, str(step), str(calls(kind, step)), f"{cost(kind, step):.2f}", *map(words, figures)]
        lines.append("| " + " | ".join(row) + " |")
    counts = [f"{len(results.of(model, setting))} groups of {model}" for model in MODELS]
    return [*lines, "", f"{', '.join(counts)}."]


def at_equal_cost(results: Results) -> list[str]:
    """The paired differences of projections and previews by sub-steps that cost as much, counted by their size."""
    counts = {"projection": 0, "within": 0, "sub-steps": 0}
    for setting, model, r in itertools.product(STOCHASTIC, MODELS, range(len(REWARDS))):
        groups = [g for g in results.of(model, setting) if g["finals"][r] is not None]
        for kind, step in names_of(setting):
            rivals = [s for s in PROJECTED if math.isclose(cost("x0", s), cost(kind, step))]
            if not kind.startswith("ode") or not rivals or len(groups) < 2:
                continue
            by_parts, by_projection = (
                [g["previews"][name][r][0] or 0.0 for g in groups] for name in (f"{kind}@{step}", f"x0@{rivals[0]}")
            )
            difference = paired_difference(by_parts, by_projection)
            better = "projection" if difference.value > 0 else "sub-steps"
            counts["within" if abs(difference.value) <= 2 * difference.error else better] += 1
    return [
        f"Of {sum(counts.values())} pairs of equal cost (by setting, model, reward and sub-steps) the projection ranks",
        f"better by more than two standard errors in {counts['projection']}, the sub-steps in {counts['sub-steps']}.",
    ]


def words(of: Figure | None) -> str:
    return "" if of is None else f"{of.spearman:.2f} ± {of.spearman_error:.2f}, {of.variance:.2f}"


def write_page(results: Results) -> None:
    """Write the tables between the page's marks, and the picture."""
    page = PAGE.read_text(encoding="utf-8")
    parts = {setting: table(results, setting) for setting in STOCHASTIC} | {"equal": at_equal_cost(results)}
    for mark, lines in parts.items():
        begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]
    write_text(PAGE, page)
    charts.save(picture(results), PICTURE)


def picture(results: Results) -> charts.Figure:
    """Spearman's correlation by network calls before the choice: a field per model and reward (row) and setting.

    Bars are of one standard error.
    """
    rows = [(model, r) for model in MODELS for r in range(len(REWARDS))]
    drawing, fields = charts.drawn(9.6, 1.6 * len(rows), len(rows), len(STOCHASTIC))
    for (model, r), row in zip(rows, fields, strict=True):
        for setting, field in zip(STOCHASTIC, row, strict=True):
            for kind, points in lines_of(results.of(model, setting), setting, r).items():
                at = [count for count, _ in points]
                means, errors = ([getattr(f, name) for _, f in points] for name in ("spearman", "spearman_error"))
                field.errorbar(at, means, errors, color=COLOURS[kind], marker="o", markersize=3, label=kind)
            field.set_xlim(0.8, len(PROJECTED) + 0.2)
            field.set_ylim(0, 1)
            field.set_xticks(range(1, len(PROJECTED) + 1))
        row[0].set_ylabel(f"{model}\n{REWARDS[r]}")
    for setting, top, bottom in zip(STOCHASTIC, fields[0], fields[-1], strict=True):
        top.set_title(setting, loc="left")
        bottom.set_xlabel("network calls before the choice")
    drawing.supylabel("Spearman's correlation of previews and final rewards", size=10)
    charts.add_legend(drawing)
    return drawing


def lines_of(groups: Sequence[Group], setting: str, reward: int) -> dict[str, list[tuple[int, Figure]]]:
    """The figures of each kind by the calls before the choice."""
    lines: dict[str, list[tuple[int, Figure]]] = {}
    for kind, step in names_of(setting):
        point = figure(groups, f"{kind}@{step}", reward)
        if point is not None:
            lines.setdefault(kind, []).append((calls(kind, step), point))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--settings", nargs="+", default=list(STOCHASTIC))
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("docs/results/previews.json"))
    parser.add_argument("--page", action="store_true", help="write the page and its picture, and sample nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out)
    if arguments.page:
        write_page(results)
        return
    benches = [Bench(model, setting) for setting in arguments.settings for model in arguments.models]
    prompts = world.sample_prompts("validation", MOST, SEED)
    for slot in range(arguments.groups):
        for bench in benches:
            if any(g["slot"] == slot for g in results.of(bench.model, bench.setting)):
                continue
            start = time.process_time()
            results.add(bench.group(prompts[slot], slot))
            spent = time.process_time() - start
            print(f"{bench.model} {bench.setting} {slot}: {spent:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
