"""The effect of a step along a plan's gradient on rewards.

The gradient is of all survivors, and of those above and those below their group's mean alone.

    python benchmarks/step.py [--recipe quickstart] [--after 4 70] [--prompts 80] [--lengths 1e-4 3e-4]
                              [--seeds 0 1 2] [--json [FILE]]

The policy is a recipe's after so many of its iterations. Each plan's gradient is the sum over prompts of an update's
direction, without DGPO's weight by how decided a group is. A step divides it by the root of AdamW's second moments and
has the given length, as the root mean square over all weights: that of so large a move by AdamW. Then pictures of other
prompts are scored, from the same noise as before.

share       length of this part of the gradient over that of the whole
cosine      that with the whole of `none`
graded      change of the verifier's mean score by the step; `strict` of its verdicts; mean over seeds
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_value import Bench, advantages_of, chosen, trained
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from progrpo.config import Config
from progrpo.policies.load import quiet
from progrpo.recipes import load_recipe
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import evaluate
from progrpo.training.trainer import Trainer
from progrpo.zoo.shapes import world

SIZE = 24
PLANS = {
    "none": Plan(SIZE),
    "24, 6 by final rewards": Plan(SIZE, (), 6),
    "24 -> 6 after 3": Plan(SIZE, (PrunePoint(3, 6),)),
}
PARTS = ("all", "above", "below")


def directions(bench: Bench, prompts: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """AdamW's uphill direction of each plan and part: the gradient over the root of its second moments."""
    objective, gradients = (
        bench.trainer.learner.objective,
        {name: {part: torch.zeros(()) for part in PARTS} for name in PLANS},
    )
    for slot, prompt in enumerate(world.sample_prompts("validation", prompts, seed + 1)):
        whole, seen_TG, final_G = bench.finished(prompt, slot, seed, SIZE)
        for name, plan in PLANS.items():
            rows = chosen(plan, seen_TG, final_G)
            advantages_K = advantages_of(final_G[rows], objective.settings.adv_clip_max)
            for part, there_K in {"above": advantages_K > 0, "below": advantages_K < 0}.items():
                if there_K.any():
                    experience = replace(whole.take(rows[there_K]), advantages_N=advantages_K[there_K].float())
                    gradients[name][part] = gradients[name][part] + bench.gradient(experience)
    for parts in gradients.values():
        parts |= {"above": parts["above"] / bench.root, "below": parts["below"] / bench.root}
        parts["all"] = parts["above"] + parts["below"]
    return gradients


def scores(trainer: Trainer, pictures: int) -> dict[str, float]:
    """The means over validation prompts that enter no direction."""
    sampling = ode(trainer.policy, trainer.config.eval.num_inference_steps, 1.0, 64)
    sampler = Sampler(trainer.policy, trainer.reward, sampling)
    prompts = world.sample_prompts("validation", pictures, 0)
    evaluation = evaluate(sampler, prompts, 0, Ranks())
    return {name: float(evaluation.mean(name) or 0.0) for name in ("graded", "strict")}


def of_seed(config: Config, after: int, options: argparse.Namespace) -> dict[str, Any]:
    trainer = trained(config, after, Ranks())
    gradients, result = directions(Bench(trainer), options.prompts, config.seed), dict[str, Any]()
    parameters = list(trainer.policy.trainable.values())
    start = parameters_to_vector(parameters).detach().clone()
    before, reference = scores(trainer, options.pictures), gradients["none"]["all"]
    for name, parts in gradients.items():
        for part, uphill in parts.items():
            figures = {
                "share": float(uphill.norm() / parts["all"].norm()),
                "cosine": float(cosine_similarity(uphill, reference, dim=0)),
            }
            for length in options.lengths:
                vector_to_parameters(start - uphill * (length / uphill.square().mean().sqrt()), parameters)
                figures |= {f"{k} by {length:g}": v - before[k] for k, v in scores(trainer, options.pictures).items()}
            vector_to_parameters(start, parameters)
            result[f"{name}: {part}"] = figures
            print(f"seed {config.seed} after {after}, {name}: {part}: {figures}", file=sys.stderr, flush=True)
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of all seeds of each plan and part, by iterations."""
    results = dict[str, Any]()
    for after in options.after:
        seeds = [of_seed(replace(load_recipe(options.recipe), seed=seed), after, options) for seed in options.seeds]
        results[str(after)] = {
            row: {figure: [of[row][figure] for of in seeds] for figure in by_figure}
            for row, by_figure in seeds[0].items()
        }
    return results


def table(results: dict[str, Any]) -> str:
    lines = []
    for after, rows in results.items():
        figures = list(next(iter(rows.values())))
        lines += [
            "",
            f"After {after} iterations:",
            "",
            f"| Gradient of | {' | '.join(figures)} |",
            "|---" * (len(figures) + 1) + "|",
        ]
        lines += [
            f"| {row} | {' | '.join(f'{np.mean(by_figure[f]):+.3f}' for f in figures)} |"
            for row, by_figure in rows.items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--after", type=int, nargs="+", default=[4, 70], help="iterations of training before")
    parser.add_argument("--prompts", type=int, default=80, help="of a gradient")
    parser.add_argument("--pictures", type=int, default=256, help="that are scored, one a prompt")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file")
    options = parser.parse_args()
    quiet()
    results = measure(options)
    content = json.dumps({**vars(options), "torch": torch.__version__, "results": results}, indent=1) + "\n"
    if options.json not in (None, "-"):
        Path(options.json).write_text(content)
    print(content if options.json == "-" else table(results))


if __name__ == "__main__":
    main()
