"""The search for a setting that teaches: it trains trials for so many seconds each, measured on validation prompts.

    python benchmarks/search.py [--trials NAME ...] [--seeds 0] [--seconds 240] [--out docs/results/search.json]

A trial is the default configuration with some fields changed; TRIALS below names those that were run. Seconds are of
training alone: evaluation, set-up and audits are left out. Finished trials in `--out` are kept and not run again, so
that the same command goes on where it was stopped. `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from progrpo.checks import check
from progrpo.config import Config, from_dict, to_dict
from progrpo.durable import write_text
from progrpo.recipes import load_recipe
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.tracking.records import Metrics, metric
from progrpo.training.build import (
    eval_prompts,
    judge_for,
    policy_context,
    policy_from,
    ranking_from,
    resolve_dtype,
    train_order,
)
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import Measures, evaluate, kl_to_reference
from progrpo.training.inputs import held_out_rewards
from progrpo.training.trainer import Trainer
from progrpo.zoo import WEIGHTS

Changes = Mapping[str, Any]


def changed(base: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """The settings `base` with the fields of `changes`, section by section."""
    return {
        **base,
        **{k: changed(base[k], v) if isinstance(v, Mapping) and k in base else v for k, v in changes.items()},
    }


def rewarded(name: str) -> Changes:
    return {"reward": {"terms": [{"name": name}]}}


# Noise and training at the first three of eight steps, no pruning
WINDOW: Changes = {
    "iterations": 1000,
    "model": {"dtype": "bfloat16"},
    "prompts": {"per_iteration": 12},
    "sampling": {"num_inference_steps": 8, "sde_window": "first"},
    "plan": {"preset": "custom", "group_size": 16},
    "optim": {"lr": 1e-3, "ema_decay": 0.8},
}
# The same, and half of a larger group goes when the window is past
PRUNE = changed(WINDOW, {"plan": {"group_size": 24, "prune": [[4, 12]]}})
# The ODE, half of the group pruned
FINAL = changed(PRUNE, {"sampling": {"sde_window": "auto"}})
DGPO = changed(FINAL, {"objective": {"name": "dgpo"}})
# Two times a picture instead of four, and no pull to the reference: half the training's cost
CHEAP = changed(DGPO, {"objective": {"dgpo": {"draws": 2, "kl_beta": 0.0}}})
MIXED: Changes = rewarded("shapes_mixed")
# All of the denoiser's weights
FULL = changed(CHEAP, {**MIXED, "model": {"weights": "full"}, "optim": {"lr": 2e-4}})
ONE = changed(FULL, {"objective": {"dgpo": {"draws": 1}}})
# The objectives side by side, each with the defaults that its paper gave it
OBJECTIVE = changed(FINAL, {**MIXED, "model": {"weights": "full"}, "optim": {"lr": 2e-4}})
# Half the rate, falling from the start, and gradients cut where they are usual: at 2e-4 one seed of three fell back
CALM: Changes = {"iterations": 80, "optim": {"lr": 1e-4, "decay": 1.0, "max_grad_norm": 0.1, "ema_decay": 0.9}}
# Half the quickstart's rate, and no pull to the reference
HALF_AS_FAST: Changes = {"objective": {"dgpo": {"kl_beta": 0.0}}, "optim": {"lr": 1e-4}}
# The quickstart until November 2026: twice the prompts, eight steps, pruned
FORMER: Changes = {
    "iterations": 80,
    "prompts": {"per_iteration": 12},
    "sampling": {"num_inference_steps": 8},
    "plan": {"group_size": 24, "prune": [[4, 12]]},
    **HALF_AS_FAST,
    "eval": {"every": 10},
    "checkpoint": {"every": 10},
}
TODAY = to_dict(load_recipe("quickstart"))
# The quickstart of 1 December 2026: nothing is pruned, and the reward is half the strict verdict
DECEMBER = changed(
    TODAY,
    {
        "iterations": 220,
        "reward": {"terms": [{**TODAY["reward"]["terms"][0], "name": "shapes_mixed"}]},
        "plan": {"prune": []},
        "optim": {"lr": 2e-4},
        "audit": {"every": 25},
        "eval": {"every": 55},
        "checkpoint": {"every": 25},
    },
)
# Six of the twelve are stopped after the third of six calls
EARLY = changed(DECEMBER, {"iterations": 370, "plan": {"prune": [[2, 6]]}})
# The same by the match without thresholds
MATCH = changed(DECEMBER, rewarded("shapes_match"))
MATCH_EARLY = changed(MATCH, {"iterations": 310, "plan": {"prune": [[2, 6]]}})
# The quickstart of 30 November 2026, with each group's own deviation
GROUPS = changed(
    DECEMBER,
    {
        "iterations": 150,
        "objective": {"advantage": "group", "dgpo": {"dpo_beta": 100.0, "time_fraction": 0.6}},
        "eval": {"every": 50},
    },
)
# Its groups in a third of the updates, without audits
SIX = changed(GROUPS, {**HALF_AS_FAST, "iterations": 75, "audit": {"every": 0}})
# Audits as often as a plan is judged well, where the plan may follow them and where it may not
QUICKSTART = changed(changed(GROUPS, FORMER), {"audit": {"every": 5}})
SMALL = changed(QUICKSTART, {"iterations": 230, "prompts": {"per_iteration": 6}, "audit": {"every": 0}})
# The diffusion model's recipe until December 2026
UNET = changed(GROUPS, {**FORMER, "iterations": 50, "model": {"path": "shapes-diffusion"}, "audit": {"every": 10}})
# That of 1 December 2026: plain groups, and a reward that is half the strict verdict
UNET_SMALL = changed(
    DECEMBER,
    {
        "iterations": 110,
        "model": {"path": "shapes-diffusion"},
        "optim": {"lr": 1e-4},
    },
)
UNET_MATCH = changed(UNET_SMALL, rewarded("shapes_match"))

TRIALS: dict[str, Changes] = {
    "quickstart of 1 December": DECEMBER,
    # as much work: half of the twelve are stopped before the last call
    "quickstart, late": changed(DECEMBER, {"iterations": 330, "plan": {"prune": [[4, 6]]}}),
    "quickstart, 6 of 12 after 2": EARLY,
    "quickstart, 6 of 12 after 2, at 3e-4": changed(EARLY, {"optim": {"lr": 3e-4}}),
    "quickstart, at 3e-4": changed(DECEMBER, {"optim": {"lr": 3e-4}}),
    "match": MATCH,
    "match, at 3e-4": changed(MATCH, {"optim": {"lr": 3e-4}}),
    "match, 6 of 12 after 2": MATCH_EARLY,
    "match, 6 of 12 after 2, at 3e-4": changed(MATCH_EARLY, {"optim": {"lr": 3e-4}}),  # the quickstart
    "match, 6 of 12 after 2, at 3e-4, 280 updates": changed(MATCH_EARLY, {"iterations": 280, "optim": {"lr": 3e-4}}),
    "match, six, at 3e-4": changed(MATCH, {"iterations": 440, "plan": {"group_size": 6}, "optim": {"lr": 3e-4}}),
    "quickstart, own deviations": GROUPS,
    "quickstart, one draw": changed(GROUPS, {"objective": {"dgpo": {"draws": 1}}}),
    "quickstart, half the weight for negatives": changed(GROUPS, {"objective": {"dgpo": {"negative_weight": 0.5}}}),
    "quickstart, lr 3e-4": changed(GROUPS, {"optim": {"lr": 3e-4}}),
    "quickstart, later levels": changed(GROUPS, {"objective": {"dgpo": {"time_fraction": 0.8}}}),
    "quickstart, early levels": changed(GROUPS, {"objective": {"dgpo": {"time_fraction": 0.4}}}),
    # whole groups are stopped: those whose previews' scores differ least
    "quickstart, 6 of 10 prompts": changed(
        GROUPS, {"prompts": {"per_iteration": 10}, "plan": {"prune": [[2, 12]], "keep_groups": 6}}
    ),
    "quickstart, batch std": changed(GROUPS, {"objective": {"advantage": "batch"}}),
    "quickstart, signal": changed(GROUPS, {"prompts": {"order": "signal"}}),
    "quickstart, dpo_beta 30": changed(GROUPS, {"objective": {"dgpo": {"dpo_beta": 30.0}}}),
    "quickstart, dpo_beta 10": changed(GROUPS, {"objective": {"dgpo": {"dpo_beta": 10.0}}}),
    "quickstart, 220 iterations": changed(GROUPS, {"iterations": 220}),
    "quickstart audited": QUICKSTART,
    # as long an iteration without pruning: groups of 16, all of whom are finished and trained on
    "quickstart unpruned": changed(QUICKSTART, {"plan": {"group_size": 16, "prune": []}}),
    # as long an iteration again, of more prompts: 24 of each are begun and 6 trained
    "quickstart of few": changed(QUICKSTART, {"prompts": {"per_iteration": 17}, "plan": {"prune": [[3, 6]]}}),
    # as long a run of shorter iterations: half the prompts, pruned as they are; or of each as much as 11 unpruned
    # members take
    "quickstart short": changed(SMALL, {"iterations": 160}),
    "quickstart small": changed(SMALL, {"plan": {"prune": [[3, 6]]}}),
    "quickstart small, half the rate": changed(SMALL, {"plan": {"prune": [[3, 6]]}, "optim": {"lr": 5e-5}}),
    "quickstart small, unpruned": changed(SMALL, {"plan": {"group_size": 11, "prune": []}}),
    # as much work again: the six are chosen later, in fewer iterations
    "quickstart small, later": changed(SMALL, {"iterations": 195, "plan": {"prune": [[5, 6]]}}),
    # the same six of 24, but chosen by how they end; and six that nobody chose
    "quickstart small, by final rewards": changed(SMALL, {"plan": {"prune": [], "final_keep": 6}}),
    "quickstart small, six": changed(SMALL, {"plan": {"group_size": 6, "prune": []}}),
    "six steps": SIX,
    "six steps, half the weight for negatives": changed(SIX, {"objective": {"dgpo": {"negative_weight": 0.5}}}),
    "six steps, elbo": changed(SIX, {"objective": {"name": "elbo", "elbo": {"draws": 2}}}),
    "six steps, 12 of 24": changed(SIX, {"iterations": 63, "plan": {"group_size": 24, "prune": [[2, 12]]}}),
    "quickstart adaptive": changed(QUICKSTART, {"plan": {"adaptive": True}}),
    "quickstart pruned early, adaptive": changed(QUICKSTART, {"plan": {"adaptive": True, "prune": [[1, 12]]}}),
    "grpo": WINDOW,
    "grpo prune": PRUNE,
    "grpo prune mixed": changed(PRUNE, MIXED),
    "grpo prune signal": changed(PRUNE, {"prompts": {"order": "signal"}}),
    "grpo prune signal mixed": changed(PRUNE, {**MIXED, "prompts": {"order": "signal"}}),
    "grpo prune full": changed(PRUNE, {"model": {"weights": "full"}, "optim": {"lr": 2e-4}}),
    **{
        f"objective {name}": changed(OBJECTIVE, {"objective": {"name": name}})
        for name in ("nft", "awm", "dgpo", "elbo")
    },
    "objective grpo": changed(OBJECTIVE, {"sampling": {"sde_window": "first"}}),
    "nft": changed(FINAL, {"objective": {"name": "nft"}}),
    "awm": changed(FINAL, {"objective": {"name": "awm"}}),
    "elbo": changed(FINAL, {"objective": {"name": "elbo"}}),
    "dgpo": DGPO,
    "dgpo mixed": changed(DGPO, MIXED),
    "dgpo strict": changed(DGPO, rewarded("shapes_strict")),
    "dgpo signal": changed(DGPO, {"prompts": {"order": "signal"}}),
    "dgpo lr 5e-4": changed(DGPO, {"optim": {"lr": 5e-4}}),
    "dgpo lr 2e-3": changed(DGPO, {"optim": {"lr": 2e-3}}),
    "dgpo full 2e-4": changed(DGPO, {"model": {"weights": "full"}, "optim": {"lr": 2e-4}}),
    "dgpo cheap": CHEAP,
    "dgpo cheap mixed": changed(CHEAP, MIXED),
    "dgpo one draw mixed": changed(CHEAP, {**MIXED, "objective": {"dgpo": {"draws": 1}}}),
    "dgpo cheap mixed lr 2e-3": changed(CHEAP, {**MIXED, "optim": {"lr": 2e-3}}),
    "dgpo cheap mixed unpruned": changed(CHEAP, {**MIXED, "plan": {"group_size": 16, "prune": []}}),
    "dgpo cheap mixed signal": changed(CHEAP, {**MIXED, "prompts": {"order": "signal"}}),
    "dgpo cheap mixed ten steps": changed(CHEAP, {**MIXED, "sampling": {"num_inference_steps": 10}}),
    "dgpo cheap mixed full 2e-4": FULL,
    "dgpo cheap mixed full 1e-4": changed(FULL, {"optim": {"lr": 1e-4}}),
    "dgpo cheap mixed full 4e-4": changed(FULL, {"optim": {"lr": 4e-4}}),
    "dgpo one draw mixed full 2e-4": ONE,
    "dgpo one draw mixed full 2e-4 signal": changed(ONE, {"prompts": {"order": "signal"}}),
    "dgpo one draw mixed full 1e-4": changed(ONE, {"optim": {"lr": 1e-4}}),
    "calm one draw": changed(ONE, CALM),
    "calm two draws": changed(FULL, CALM),
    "dgpo one draw mixed full 2e-4 unpruned": changed(ONE, {"plan": {"group_size": 16, "prune": []}}),
    "dgpo one draw mixed full 2e-4 six steps": changed(
        ONE, {"sampling": {"num_inference_steps": 6}, "plan": {"prune": [[3, 12]]}}
    ),
    "dgpo one draw mixed lora 1e-3": changed(ONE, {"model": {"weights": "lora"}, "optim": {"lr": 1e-3}}),
    "dgpo cheap mixed full 2e-4 signal": changed(FULL, {"prompts": {"order": "signal"}}),
    "unet": UNET,
    "unet 80 iterations": changed(UNET, {"iterations": 80}),
    "unet lr 4e-5": changed(UNET, {"optim": {"lr": 4e-5}}),
    "unet nft": changed(UNET, {"objective": {"name": "nft"}}),
    "unet small, 110 iterations": UNET_SMALL,
    "unet match": UNET_MATCH,
    "unet match, 6 of 12 after 2": changed(UNET_MATCH, {"iterations": 165, "plan": {"prune": [[2, 6]]}}),
    "unet match, late": changed(UNET_MATCH, {"iterations": 152, "plan": {"prune": [[4, 6]]}}),
    "unet grpo": changed(UNET, {"objective": {"name": "grpo"}, "sampling": {"sde_window": "first"}}),
}


def config_of(changes: Changes, seed: int) -> Config:
    config = from_dict(changed(to_dict(Config()), {"audit": {"every": 0}, **changes, "seed": seed}))
    check(config)
    return config


def run(config: Config, seconds: float, every: float, pictures: int, by: str = "seconds") -> list[dict[str, Any]]:
    """The validation figures against seconds of training, first those of the base.

    They are measured `every` so many seconds of training, or with `by` iterations so many of these.
    """
    ranks = Ranks()
    config = resolve_dtype(config, ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    ranking = ranking_from(config.objective, config.reward)
    reward = load_mixture(config.reward.terms, config.reward.frames, ranking)
    trainer = Trainer(config, policy, reward, train_order(config.prompts, config.seed), ranks)
    prompts = eval_prompts("shapes", "validation", pictures)
    measures = Measures(judge_for("shapes"), held_out_rewards(config), diverse=pictures // 8)
    sampler = Sampler(policy, reward, ode(policy, config.eval.num_inference_steps, 1.0, 64))
    spent, cpu, due = 0.0, 0.0, 0.0
    curve: list[dict[str, Any]] = []
    norms: list[float] = []
    policy.named_weights.snapshot("base")
    while True:
        over = spent >= seconds or trainer.iteration >= config.iterations
        done = spent if by == "seconds" else trainer.iteration
        if done >= due or over:
            weights = trainer.learner.evaluated_weights
            with policy.weights(weights):
                evaluation = evaluate(sampler, prompts, config.eval.seed, ranks, measures)
            figures = {name: evaluation.mean(name) for name in ("strict", "graded", "judge", "diversity")}
            figures |= evaluation.held_out()
            if "reference" not in policy.named_weights:  # a learner that does not need it lets it go
                policy.named_weights.snapshot("reference", "base")
            figures["kl"] = kl_to_reference(policy, weights, prompts, sampler.sampling, config.eval.seed)
            figures["grad_norm"], norms = mean(norms) if norms else None, []
            counted = trainer.totals.counted
            work = {"nfe": counted.nfe, "previews": counted.previews, "trained_steps": counted.trained_steps}
            at = {"seconds": round(spent, 1), "cpu_seconds": round(cpu, 1), "iterations": trainer.iteration}
            curve.append({**at, **work, **_rounded(figures)})
            if config.plan.follows_audits:
                plan = trainer.plan
                curve[-1] |= {
                    "group_size": plan.group_size,
                    "prune": [[p.step, p.keep] for p in plan.prune],
                    "final_keep": plan.final_keep,
                }
            print("   ", curve[-1], flush=True)
            due = done + every
        if over:
            return curve
        began = time.process_time()
        record = trainer.step().record
        cpu += time.process_time() - began
        spent += number_of(record, "seconds") - number_of(record, "time/audit")
        norms.append(number_of(record, "update/grad_norm"))


def number_of(record: Metrics, name: str) -> float:
    """The number of a metric that each iteration has."""
    number = metric(record, name)
    assert number is not None, name
    return number


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}


def base_model(config: Config) -> str:
    """The strict accuracy on the model card: results of another base are not comparable."""
    return str(json.loads((WEIGHTS / config.model.path / "figures.json").read_text())["test"]["10 steps"]["strict"])


def table(results: list[dict[str, Any]]) -> str:
    """A row per trial: the strict accuracy after so many seconds of training.

    Where there are several seeds, it has mean and std (ddof 1).
    """
    lines = ["| Trial | Seeds | Strict by seconds of training |", "|---|---|---|"]
    for name in dict.fromkeys(r["trial"] for r in results):
        curves = [r["curve"] for r in results if r["trial"] == name]
        points = [_point(at) for at in zip(*curves, strict=False)]
        lines.append(f"| {name} | {len(curves)} | {', '.join(points)} |")
    return "\n".join(lines)


def _point(at: tuple[dict[str, Any], ...]) -> str:
    strict = [p["strict"] for p in at]
    spread = f" ± {stdev(strict):.3f}" if len(strict) > 1 else ""
    return f"{mean(p['seconds'] for p in at):.0f} s: {mean(strict):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--every", type=float, default=40, help="seconds or iterations between evaluations")
    parser.add_argument("--by", choices=("seconds", "iterations"), default="seconds")
    parser.add_argument("--pictures", type=int, default=256, help="of each evaluation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("docs/results/search.json"))
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.table:
        print(table(results))
        return
    for seed in options.seeds:
        for name in options.trials:
            config = config_of(TRIALS[name], seed)
            key = {
                "trial": name,
                "changes": json.loads(json.dumps(TRIALS[name])),
                "seed": seed,
                "base": base_model(config),
                "pictures": options.pictures,
                "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
            }
            if any(key.items() <= r.items() for r in results):
                continue
            print(f"{name}, seed {seed}", flush=True)
            curve = run(config, options.seconds, options.every, options.pictures, options.by)
            # another search may have written meanwhile
            results = json.loads(options.out.read_text()) if options.out.exists() else []
            results.append({**key, "curve": curve})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
