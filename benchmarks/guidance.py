"""A model's own best over sampling steps and guidance, with which a gain by training must be compared.

    python benchmarks/guidance.py [shapes-flow | RUN] [--pictures 512] [--json]

Every pair is measured on half as many validation prompts. The best pair, with the plain setting beside it, is measured
on the test prompts that runs are measured on, in the dtype of the quickstart on this machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product

from progrpo.config import EvalSettings
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.training.build import (
    eval_prompts,
    judge_for,
    policy_context,
    policy_from,
    resolve_dtype,
)
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import Measures, evaluate
from progrpo.training.trained_model import ModelChoice

STEPS, SCALES = (10, 40), (1.0, 2.0, 3.0, 4.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="shapes-flow")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ranks, reward, judge = Ranks(), load_mixture([RewardTerm("shapes")], frames=1), judge_for("shapes")
    model = ModelChoice(options.target)
    config = model.config
    if config.model.path == options.target:  # no run: as the quickstart would load it
        auto = resolve_dtype(replace(config, model=replace(config.model, dtype="auto")), ranks)
        policy = policy_from(auto.model, policy_context(auto, ranks))
    else:
        policy = model.load(ranks)

    def measured(split: str, pictures: int, steps: int, scale: float) -> dict[str, float | None]:
        prompts = eval_prompts("shapes", split, pictures)
        sampler = Sampler(policy, reward, ode(policy, steps, scale, 64))
        evaluation = evaluate(sampler, prompts, EvalSettings().seed, ranks, Measures(judge))
        return {name: round(evaluation.mean(name) or 0, 4) for name in ("strict", "graded", "judge")}

    validation = {(n, w): measured("validation", options.pictures // 2, n, w) for n, w in product(STEPS, SCALES)}
    best = max(validation, key=lambda pair: validation[pair]["strict"] or 0)
    result = {
        "target": options.target,
        "pictures": options.pictures,
        "validation_strict": {f"{n} steps, guidance {w:g}": v["strict"] for (n, w), v in validation.items()},
        "test": {
            f"{n} steps, guidance {w:g}": measured("test", options.pictures, n, w)
            for n, w in dict.fromkeys([(10, 1.0), best])
        },
    }
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
