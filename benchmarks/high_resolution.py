"""Decoding, previews and pruning at 512 and 1024 pixels, on narrow networks of SD 3.5, SDXL and FLUX.1.

    python benchmarks/high_resolution.py [--models sd3 sdxl flux] [--sizes 512 1024] [--groups 8 2]
    python benchmarks/high_resolution.py --page     # the tables of the page beside --out; measures nothing

The models are those of `narrow_models.py`. Their weights are random, so that neither pictures nor agreement tell
anything about a trained model.

For each model and size it measures the seconds of each part on one thread (the process' own, since others work on the
machine), the memory of decoding, and how far tiles change pictures. Then groups of `GROUP` members run unpruned through
ten steps, and are previewed after some. Finished parts in `--out` are kept, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import allocated
from narrow_models import NARROW_MODELS, NarrowModel
from preview import Figure, bootstrapped, rounded
from torch import Tensor

from progrpo.config import ModelSettings, RewardTerm, SamplingSettings
from progrpo.durable import write_text
from progrpo.policies.load import load_policy, quiet
from progrpo.repro.page import wrapped
from progrpo.rewards.mixture import RewardMixture, load_mixture
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint, preset
from progrpo.rollout.preview import projected
from progrpo.rollout.prune import ovf
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, Sampling, sampling_for
from progrpo.tracking.statistics import kept_variance, spearman
from progrpo.training.estimate import estimate
from progrpo.types import Condition, Pictures, Prompt, Trajectories
from progrpo.zoo.shapes import world

STEPS, GROUP, KEEP = 10, 8, 4
PREVIEWED = (0, 2, 4, 6, 8)
TILED_AT = 4
"""The step after which previews are decoded in tiles as well."""
MEASURED = 2
"""The pictures whose decoding is measured."""
PLANS = ("none", "flash", "standard")
REWARDS = {"jpeg": RewardTerm("jpeg_incompressibility"), "OCR": RewardTerm("ocr")}
PROMPT = Prompt('a sign that reads "HELLO"')
DECODERS = ("whole", "sliced", "tiled", "tiny")


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median of this process' seconds of a processor."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return round(median(taken), 4)


class Bench:
    """A model at one size."""

    def __init__(self, model: NarrowModel, side: int) -> None:
        self.policy, self.tiled = model.policy(side), model.policy(side, "tiled")
        self.rewards = {name: load_mixture([term], frames=1) for name, term in REWARDS.items()}
        settings = SamplingSettings(num_inference_steps=STEPS, microbatch=2)
        self.sampling: Sampling = sampling_for(self.policy, settings, range(STEPS), Record())

    @torch.no_grad()
    def decoded(self, x0_NCHW: Tensor, decoding: str = "whole") -> Pictures:
        policy = self.tiled if decoding == "tiled" else self.policy
        decode = policy.preview if decoding == "tiny" else policy.decode
        return Pictures.cat([decode(x0_CHW[None]) for x0_CHW in x0_NCHW])

    def scores(self, pictures: Pictures, reward: str = "jpeg") -> Tensor:
        mixture: RewardMixture = self.rewards[reward]
        group_N = torch.zeros(len(pictures.images_NHWC), dtype=torch.int64)
        return mixture.score(pictures.images_NHWC.numpy(), [PROMPT] * len(group_N), group_N).ranking_N

    def units(self) -> dict[str, float]:
        """The seconds of each part, of one picture."""
        policy = self.policy
        condition = policy.encode([PROMPT])
        x = torch.randn(1, *policy.latent_shape)

        def text() -> None:
            policy.family.encode_text(PROMPT.text)

        def call() -> Tensor:
            return policy.predict(x, torch.tensor(500.0), condition)

        @torch.no_grad()
        def sample() -> None:
            call()

        def train() -> None:
            call().square().mean().backward()

        for work in (sample, train):
            work()
        parts = {"text": seconds(text), "network call": seconds(sample), "forward and backward": seconds(train)}
        pictures = self.decoded(x)
        process, output = self.sampling.process, torch.randn_like(x)
        parts["projection"] = seconds(lambda: process.x0(5, x, output))
        for decoding in ("whole", "tiled", "tiny"):
            parts[f"decode, {decoding}"] = seconds(partial(self.decoded, x, decoding))
        for name in self.rewards:
            parts[f"reward, {name}"] = seconds(partial(self.scores, pictures, name))
        return parts

    def memory(self) -> dict[str, float]:
        """The most MB that live at once while `MEASURED` pictures are decoded."""
        x = torch.randn(MEASURED, *self.policy.latent_shape)
        self.policy.pipeline.vae.disable_slicing()
        bytes_by_decoding = {"whole": allocated(lambda: self.policy.decode(x))}
        self.policy.pipeline.vae.enable_slicing()
        bytes_by_decoding["sliced"] = allocated(lambda: self.policy.decode(x))
        self.policy.pipeline.vae.disable_slicing()
        bytes_by_decoding["tiled"] = allocated(lambda: self.tiled.decode(x))
        bytes_by_decoding["tiny"] = allocated(lambda: self.policy.preview(x))
        return {decoding: round(size / 1e6, 1) for decoding, size in bytes_by_decoding.items()}

    def group(self, slot: int) -> dict[str, Any]:
        """One group: the final scores, and those of its previews after some steps."""
        sampler = Sampler(self.policy, self.rewards["jpeg"], self.sampling)
        condition: Condition = self.policy.encode([PROMPT])
        denoiser = sampler.denoiser(condition)
        previews: dict[str, list[float]] = {}

        def watch(step: int, batch: Trajectories) -> Trajectories:
            if step in PREVIEWED:
                x0_NCHW = projected(denoiser, batch, step, 1, Meter())
                for decoding in ("whole", "tiled") if step == TILED_AT else ("whole",):
                    previews[f"{decoding}@{step}"] = self.scores(self.decoded(x0_NCHW, decoding)).tolist()
            return batch

        batch = expand(self.policy, torch.tensor([slot]), GROUP, self.sampling, NoiseKey(0, 0))
        batch = denoise(denoiser, batch, NoiseKey(0, 0), Meter(), watch)
        whole, tiled = self.decoded(batch.x_NCHW), self.decoded(batch.x_NCHW, "tiled")
        difference = (whole.images_NHWC.float() - tiled.images_NHWC.float()).abs()
        return {
            "previews": previews,
            "final": self.scores(whole).tolist(),
            "final, tiled": self.scores(tiled).tolist(),
            "largest difference": difference.max().item(),
            "mean difference": round(difference.mean().item(), 2),
            "spread of pixels": round(whole.images_NHWC.float().std().item(), 2),
        }


def trained() -> dict[str, float]:
    """The effect of tiles (32 of 64 pixels) on the pictures and the plan's choice of the trained `shapes-flow`."""
    prompts, plan = world.sample_prompts("validation", 8, seed=0), Plan(12, (PrunePoint(2, 8), PrunePoint(4, 6)))
    rewards = load_mixture([RewardTerm("shapes_match")], frames=1)
    kept: list[set[tuple[int, int]]] = []
    pictures: list[Tensor] = []
    latents: Tensor | None = None
    for decoding in ("whole", "tiled"):
        policy = load_policy(ModelSettings(decoding=decoding))
        settings = SamplingSettings(num_inference_steps=6, microbatch=24)
        sampler = Sampler(policy, rewards, sampling_for(policy, settings, range(6), Record()), plan)
        with torch.no_grad():
            rolled = rollout(sampler, prompts, torch.arange(len(prompts)), NoiseKey(0, 0), Meter())
        living = rolled.trajectories
        kept.append(set(zip(living.group_N.tolist(), living.member_N.tolist(), strict=True)))
        latents = living.x_NCHW if latents is None else latents
        pictures.append(policy.decode(latents).images_NHWC.float())
    difference = (pictures[0] - pictures[1]).abs()
    return {
        "largest difference": difference.max().item(),
        "mean difference": round(difference.mean().item(), 2),
        "kept by both": round(len(kept[0] & kept[1]) / len(kept[0]), 3),
        "groups": len(prompts),
    }


def planned(model: NarrowModel, side: int) -> dict[str, Any]:
    """The figures of `progrpo plan` for the published model at this size: PFLOP of an iteration, and GB of decoding."""
    figures: dict[str, Any] = {}
    for decoding in ("whole", "sliced", "tiled"):
        plan = estimate(model.config(side, decoding), "h100", 0.35, 1)
        figures[decoding] = {
            "pflops": {name: round(value, 2) for name, value in plan["pflops_per_iteration"].items()},
            "decoding_gb": round(plan["memory_gb"]["decoding"], 3),
        }
    return figures


def measure(models: Sequence[str], sizes: Sequence[int], groups: Sequence[int], out: Path) -> None:
    """Measure what is missing in the file, model by model and size by size."""
    results = json.loads(out.read_text()) if out.exists() else {}

    def keep() -> None:
        write_text(out, json.dumps(results, separators=(",", ":")) + "\n")

    if "shapes-flow" not in results:
        results["shapes-flow"] = trained()
        keep()
    for name, (side, number) in product(models, zip(sizes, groups, strict=True)):
        model = NARROW_MODELS[name]
        entry = results.setdefault(name, {}).setdefault(str(side), {"groups": []})
        bench = Bench(model, side)
        parts = (("units", bench.units), ("memory", bench.memory), ("planned", partial(planned, model, side)))
        for part, work in parts:
            if part not in entry:
                entry[part] = work()
                keep()
                print(name, side, part, entry[part], flush=True)
        for slot in range(len(entry["groups"]), number):
            entry["groups"].append(bench.group(slot))
            keep()
            print(name, side, "group", slot, flush=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def chosen(scores: Sequence[float]) -> list[int]:
    """The members that OVF keeps by these scores."""
    scores_PN = torch.tensor([scores], dtype=torch.float64)
    everyone = torch.ones_like(scores_PN, dtype=torch.bool)
    kept: list[int] = ovf(scores_PN, KEEP, everyone, torch.zeros(1, dtype=torch.int64)).indices_PK[0].tolist()
    return kept


def agreement(groups: Sequence[dict[str, Any]], name: str, final: str = "final") -> Figure:
    """Spearman's correlation and V of a preview over groups."""
    rows = []
    for group in groups:
        seen = group["previews"].get(name, group.get(name))
        finals = group[final]
        best = kept_variance(finals, chosen(finals))
        rows.append([rounded(spearman(seen, finals)), kept_variance(finals, chosen(seen)), best])
    return bootstrapped(rows)


def overlap(groups: Sequence[dict[str, Any]], names: tuple[str, str]) -> float:
    """The share of the members kept by one decoder that the other keeps too."""
    pairs = [[set(chosen(group["previews"].get(name, group.get(name)))) for name in names] for group in groups]
    return sum(len(a & b) for a, b in pairs) / (KEEP * len(pairs))


def shares(units: dict[str, float], plan: str, decoding: str) -> dict[str, float]:
    """The seconds of one prompt's rollout and update by part, from the parts' own seconds and the plan's counts."""
    cost = preset(plan, STEPS).predict(STEPS, STEPS - 1, False, 1, frozenset(), 1)
    decode = units[f"decode, {decoding}"]
    return {
        "text": units["text"],
        "network calls": cost.nfe * units["network call"],
        "previews": cost.previews * (units["projection"] + decode + units["reward, OCR"]),
        "final decodes": (cost.decodes - cost.previews)
        * units["decode, tiled" if decoding == "tiled" else "decode, whole"],
        "rewards (OCR)": (cost.reward_calls - cost.previews) * units["reward, OCR"],
        "update": cost.trained_steps * units["forward and backward"],
    }


def tables(results: dict[str, Any]) -> str:
    entries = {
        f"{model.title}, {side}": entry
        for name, model in NARROW_MODELS.items()
        for side, entry in results.get(name, {}).items()
    }
    parts = [_parts(entries), _memory(entries), _all_shares(entries), _agreements(entries), _in_tiles(entries)]
    own = results["shapes-flow"]
    trained_model = wrapped(
        f"On the trained `shapes-flow` (64 pixels in tiles of 32, {own['groups']} groups of 12, of which the plan"
        f" keeps 6): largest difference {own['largest difference']:.0f}, mean {own['mean difference']:.1f} of 255;"
        f" {100 * own['kept by both']:.0f} % of those kept are the same."
    )
    return "\n\n".join([*parts, trained_model, _predictions(entries)])


Entries = Mapping[str, dict[str, Any]]
"""The measurements, by model and size."""


def _parts(entries: Entries) -> str:
    names = next(iter(entries.values()))["units"]
    rows = [_row(name, [f"{entry['units'][name]:.3g}" for entry in entries.values()]) for name in names]
    return _table("Core seconds of one picture, or of one row of a call:", "part", entries, rows)


def _memory(entries: Entries) -> str:
    rows = [
        _row(decoding, [f"{entry['memory'][decoding]:,.1f}" for entry in entries.values()]) for decoding in DECODERS
    ]
    title = f"The most memory that lives while {MEASURED} pictures are decoded, in MB:"
    return _table(title, "decoding", entries, rows)


def _all_shares(entries: Entries) -> str:
    rows, columns = [], dict.fromkeys(shares(next(iter(entries.values()))["units"], "none", "whole"))
    for title, entry in entries.items():
        for plan in PLANS:
            for decoding in ("whole",) if plan == "none" else ("whole", "tiled", "tiny"):
                taken = shares(entry["units"], plan, decoding)
                whole = sum(taken.values())
                cells = [f"{100 * value / whole:.1f} %" for value in taken.values()]
                rows.append(
                    _row(f"{title}: {plan if plan == 'none' else f'{plan}, {decoding}'}", [*cells, f"{whole:,.0f}"])
                )
    title = "Shares of one prompt's iteration, by plan and decoder of previews:"
    return _table(title, "plan", [*columns, "core seconds"], rows)


def _agreements(entries: Entries) -> str:
    rows: dict[str, list[str]] = {"Spearman": [], "V": []}
    # one group has no standard error
    several = [len(entry["groups"]) > 1 for entry in entries.values()]
    for name in (*(f"whole@{step}" for step in PREVIEWED), f"tiled@{TILED_AT}", "final, tiled"):
        figures = [agreement(entry["groups"], name) for entry in entries.values()]
        errors = [f" ± {f.spearman_error:.2f}" if more else "" for f, more in zip(figures, several, strict=True)]
        label = name.replace("@", ", after step ")
        cells = [f"{f.spearman:.2f}{error}" for f, error in zip(figures, errors, strict=True)]
        rows["Spearman"].append(_row(label, cells))
        rows["V"].append(_row(label, [f"{figure.variance:.2f}" for figure in figures]))
    rows["Spearman"].append(_row("groups", [str(len(entry["groups"])) for entry in entries.values()]))
    titles = {
        "Spearman": f"Spearman's correlation of previews with final rewards (jpeg, groups of {GROUP}; mean ± standard"
        " error):",
        "V": "V of the choice by previews, over that of the choice by final rewards:",
    }
    parts = [_table(wrapped(title), "preview", entries, rows[name]) for name, title in titles.items()]
    return "\n\n".join(parts)


def _in_tiles(entries: Entries) -> str:
    rows = []
    for figure in ("largest difference", "mean difference", "spread of pixels"):
        pick = max if figure.startswith("largest") else median
        rows.append(_row(figure, [f"{pick(g[figure] for g in entry['groups']):.1f}" for entry in entries.values()]))
    for label, pair in (
        (f"the same kept, after step {TILED_AT}", (f"whole@{TILED_AT}", f"tiled@{TILED_AT}")),
        ("the same kept, by finals", ("final", "final, tiled")),
    ):
        rows.append(_row(label, [f"{100 * overlap(entry['groups'], pair):.0f} %" for entry in entries.values()]))
    return _table("Pictures in tiles against whole ones, in steps of 255:", "figure", entries, rows)


def _predictions(entries: Entries) -> str:
    stages = [(f"{stage}, share of operations", "whole", stage) for stage in ("sampling", "decoding", "update")]
    stages.append(("decoding in tiles, share", "tiled", "decoding"))
    rows = [_row(label, [_planned_share(entry, *of) for entry in entries.values()]) for label, *of in stages]
    for decoding in ("whole", "sliced", "tiled"):
        gb = [f"{entry['planned'][decoding]['decoding_gb']:.2f} GB" for entry in entries.values()]
        rows.append(_row(f"memory of decoding, {decoding}", gb))
    recipes = ", ".join(f"{model.title} by `{model.recipe}`" for model in NARROW_MODELS.values())
    title = wrapped(f"What `progrpo plan` predicts of the published models ({recipes}; each with its recipe's plan):")
    return _table(title, "figure", entries, rows)


def _table(title: str, first: str, columns: Iterable[str], rows: Sequence[str]) -> str:
    return "\n".join([title, "", *_head(first, list(columns)), *rows])


def _planned_share(entry: dict[str, Any], decoding: str, stage: str) -> str:
    pflops = entry["planned"][decoding]["pflops"]
    return f"{100 * pflops[stage] / sum(pflops.values()):.1f} %"


def _head(first: str, others: Sequence[str]) -> list[str]:
    return [_row(first, others), "|---" * (1 + len(others)) + "|"]


def _row(first: str, others: Sequence[str]) -> str:
    return f"| {' | '.join([first, *others])} |"


def write_page(page: Path, text: str) -> None:
    """Write the tables between the page's two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- tables:begin -->\n")
    _, end, after = rest.partition("<!-- tables:end -->")
    write_text(page, f"{before}{begin}{text}\n{end}{after}")
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(NARROW_MODELS), default=list(NARROW_MODELS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--groups", nargs="*", type=int, default=[8, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/high_resolution.json"))
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.page:
        write_page(args.out.with_suffix(".md"), tables(json.loads(args.out.read_text())))
        return
    quiet()
    torch.set_num_threads(1)
    measure(args.models, args.sizes, args.groups, args.out)


if __name__ == "__main__":
    main()
