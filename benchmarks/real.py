"""Stable Diffusion 3.5 Medium towards legible text, by plan and objective, at equal GPU-hours: with one command.

    python benchmarks/real.py --dry-run              # the predicted GPU-hours, and nothing else
    python benchmarks/real.py [--hours 24] [--seeds 0 1 2] [--arms NAME ...] [--push-to OWNER/NAME]
    python benchmarks/real.py --rehearse             # the same code on a built-in model, in minutes on a CPU
    python benchmarks/real.py --page                 # the page from its JSON; runs nothing

It wants a GPU of 80 GB, the hub (a token that may read the model) and an installation with `progrpo[ocr]`. It trains
each arm with each seed for so many GPU-hours of sampling, previews, rewards and updates (of audits too, where the plan
follows them), evaluates on the way, and writes OUT/real.json, OUT/real.md and two pictures. The same command goes on
where it was stopped. Several GPUs: start it once for each with other `--arms` or `--seeds`, then once more with all,
since what is finished is not run again.

The prompts are Flow-GRPO's, fetched unless `--prompts` and `--eval-prompts` name files. Held-out judges that cannot be
had are named and left out. `--push-to` sends the page, and each run's configuration, metrics, card and weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from progrpo.checks import check
from progrpo.cli.output import show
from progrpo.config import (
    AuditSettings,
    Config,
    EvalSettings,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
    to_dict,
)
from progrpo.durable import write_text
from progrpo.policies.load import quiet
from progrpo.publish.push import push, write_repository
from progrpo.recipes import sd35m_ocr
from progrpo.repro.arms import folder_of
from progrpo.repro.budget import BEGINNING, predict, processes, train_for, training_seconds
from progrpo.repro.campaign import finished, record
from progrpo.repro.page import Curve, chart, figure_of, held_out_figure, runs_of, summary_figure, table, wrapped
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.suites.fetch import read_published
from progrpo.suites.table import SUITES
from progrpo.tracking.records import metric
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.statistics import Interval, interval, mean_of, spearman
from progrpo.training.gpus import GPUS


@dataclass(frozen=True)
class Scale:
    """The settings that the arms share, and the hours, seeds and plans that are run unless others are asked for."""

    name: str
    base: Config
    judges: tuple[str, ...]
    """Held-out rewards, of which those are taken that can be had."""
    hours: float
    seeds: tuple[int, ...]
    plans: Mapping[str, PlanSettings]
    """The plans of the arms, by name; `none` is that of the arms that do not prune."""


def real() -> Scale:
    """Flow-GRPO's settings for this task (arXiv 2505.05470), as in the recipe `sd35m-ocr`."""
    recipe = sd35m_ocr()
    base = replace(
        recipe,
        # the embeddings of its 20,000 prompts would take 34 GB, the text encoders 11
        model=replace(recipe.model, keep_text_encoders=True),
        audit=AuditSettings(every=5),
        eval=replace(recipe.eval, every=10),
    )
    plans = {name: PlanSettings(name) for name in ("none", "standard", "flash", "auto")}
    return Scale("real", base, ("pickscore", "imagereward", "aesthetic", "hpsv2"), 24.0, (0, 1, 2), plans)


def rehearsal(world: str) -> Scale:
    """The same on a built-in model: a prompt an iteration, small groups, a LoRA, and evaluations of a few pictures."""
    prompts, reward, judges = {
        "words": ("words", "ocr_line", ("ocr",)),
        "shapes": ("shapes", "shapes_match", ("shapes_strict", "shapes_taste")),
    }[world]
    base = Config(
        model=ModelSettings(path=f"{world}-flow", lora_rank=8, lora_alpha=16),
        prompts=PromptSettings(source=prompts, per_iteration=1),
        sampling=SamplingSettings(microbatch=12),
        reward=RewardSettings((RewardTerm(reward),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(kl_beta=0.04, kl_form="flow_grpo")),
        # without the average, which hardly moves in a few iterations
        optim=replace(sd35m_ocr().optim, lr=1e-3, microbatch=27, ema_decay=0.0),
        audit=AuditSettings(every=2),
        eval=EvalSettings(prompts=prompts, pictures=12, every=4),
    )
    small = {"none": (6, ()), "standard": (12, ((5, 6), (7, 4))), "flash": (6, ((5, 5), (7, 4)))}
    plans = {name: PlanSettings("custom", group_size=size, prune=prune) for name, (size, prune) in small.items()}
    plans["auto"] = PlanSettings("custom", group_size=6, final_keep=4, adaptive=True)
    return Scale("rehearsal", base, judges, 0.006, (0, 1), plans)


def arms(base: Config, plans: Mapping[str, PlanSettings]) -> dict[str, Config]:
    """The arms by name; `base` is Flow-GRPO's configuration."""
    plain = replace(base, plan=plans["none"])
    unguided = replace(
        plain,
        sampling=replace(plain.sampling, guidance_scale=1.0),
        eval=replace(plain.eval, guidance_scale=1.0),
    )
    fast = replace(
        unguided,
        sampling=replace(
            unguided.sampling, sampler="cps_reduced", sde_window="random", sde_window_size=3, sde_window_end=5
        ),
        objective=ObjectiveSettings(grpo=GRPOSettings()),
    )
    dgpo = replace(
        unguided,
        objective=ObjectiveSettings(name="dgpo"),
        optim=replace(unguided.optim, updates_per_rollout=1),
    )
    configs = {
        "plain GRPO": plain,
        "flow_grpo fast": fast,
        **{f"Pro-GRPO {name}": replace(base, plan=plans[name]) for name in ("standard", "flash", "auto")},
        "DGPO": dgpo,
    }
    return {
        arm: replace(config, recipe=folder_of(arm.replace("_", "-")), iterations=BEGINNING)
        for arm, config in configs.items()
    }


ARMS = ("plain GRPO", "flow_grpo fast", "Pro-GRPO standard", "Pro-GRPO flash", "Pro-GRPO auto", "DGPO")
SHARE = 0.35
"""The share of a GPU's peak that calls are assumed to reach, as in `progrpo plan`."""
WHEN = ("before", "after")


# --- before it runs ---------------------------------------------------------------------------------------------------


def forecast(scale: Scale, args: argparse.Namespace) -> str:
    """The predicted GPU-hours by arm, and of all."""
    rows, whole = [], 0.0
    for arm in args.arms:
        config = arms(scale.base, scale.plans)[arm]
        check(config)
        prediction = predict(config, args.hours, GPUS[args.gpu], SHARE)
        hours = prediction.training_hours + prediction.other_hours
        whole += hours * len(args.seeds)
        cells = (
            f"{prediction.seconds:,.3g}",
            f"{prediction.iterations:,}",
            f"{prediction.training_hours:.3g}",
            f"{hours:.3g}",
        )
        rows.append([arm, *cells])
    head = ["arm", "seconds per iteration", "iterations", "GPU-hours of training", "with evaluations and audits"]
    return (
        f"{table(head, rows)}\n\nPredicted: {whole:,.3g} GPU-hours for {len(args.seeds)} seeds on one {args.gpu} at"
        f" {SHARE:.0%} of its peak. Rewards and the loading of models are not counted, and an"
        " auto plan is taken to stay as it begins."
    )


def with_prompts(scale: Scale, args: argparse.Namespace) -> Scale:
    """The scale with prompt files: those that are named, or Flow-GRPO's, fetched into the folder of the runs."""
    if scale.name != "real":
        return scale
    files = {}
    for split, named in (("train", args.prompts), ("test", args.eval_prompts)):
        files[split] = named or args.runs / f"{split}.txt"
        if not files[split].exists() and named is None:
            suite = SUITES["ocr"]
            assert suite.published is not None
            published = replace(suite.published, files=(f"{split}.txt",))
            texts = [prompt.text for prompt in read_published(replace(suite, published=published))]
            files[split].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[split], "\n".join(texts) + "\n")
    prompts = replace(scale.base.prompts, source=str(files["train"]))
    return replace(
        scale,
        base=replace(scale.base, prompts=prompts, eval=replace(scale.base.eval, prompts=str(files["test"]))),
    )


def with_judges(scale: Scale) -> Scale:
    """The scale with the held-out rewards that can be had here."""
    terms = []
    for name in scale.judges:
        try:
            load_reward(RewardTerm(name)).close()
            terms.append(RewardTerm(name))
        except Refusal as error:
            show(f"{name} is left out: {error}")
    return replace(scale, base=replace(scale.base, eval=replace(scale.base.eval, rewards=tuple(terms))))


# --- what came of it --------------------------------------------------------------------------------------------------


def run_record(arm: str, seed: int, path: Path) -> dict[str, Any]:
    """The page's record of a finished run."""
    folder = RunFolder(path)
    spent, hours = 0.0, []
    for seconds in training_seconds(path):
        spent += seconds * processes() / 3600
        hours.append(spent)
    points = [
        {
            "iterations": i + 1,
            "gpu_hours": round(hours[i], 6),
            "score": metric(line, "eval/graded"),
            "kl": metric(line, "eval/kl"),
            "held_out": {n.partition("@")[2]: v for n, v in line.items() if n.startswith("eval/held_out@")},
        }
        for i, line in enumerate(folder.metrics.read())
        if "eval/graded" in line
    ]
    agreement = [
        [spearman(scores, audit["final"]) for scores in audit["scores"]]
        for audit in folder.read_audits()
        if len({score for score in audit["final"] if score is not None}) > 1
    ]
    own = {**record(arm, seed, path), "curves": {}}
    return {**own, "gpu_hours": round(spent, 6), "points": points, "agreement": agreement}


def results(scale: Scale, args: argparse.Namespace, runs: Mapping[tuple[str, int], Path]) -> dict[str, Any]:
    """All finished runs, ready for JSON."""
    done = {key: path for key, path in runs.items() if finished(path)}
    return {
        "scale": scale.name,
        "model": scale.base.model.path,
        "reward": scale.base.reward.terms[0].name,
        "hours": args.hours,
        "configs": {
            arm: to_dict(config)
            for arm, config in arms(scale.base, scale.plans).items()
            if any(a == arm for a, _ in done)
        },
        "runs": [run_record(arm, seed, path) for (arm, seed), path in done.items()],
    }


def page(data: Mapping[str, Any]) -> str:
    """The page in Markdown, of what was run alone."""
    runs, names = data["runs"], list(dict.fromkeys(run["arm"] for run in data["runs"]))
    rehearsed = data["scale"] == "rehearsal"
    option = f" --rehearse {data['model'].removesuffix('-flow')}" if rehearsed else ""
    figures = f"{data['scale']}_hours.svg", f"{data['scale']}_kl.svg"
    parts = [
        f"# {data['model']} towards `{data['reward']}` at equal GPU-hours",
        "This page is a rehearsal of `benchmarks/real.py` on a built-in model, for minutes. **It shows that the code"
        " runs, and its figures say nothing about real weights.** GPU-hours are hours of a CPU, beside other work."
        if rehearsed
        else "This page compares arms that differ in plan and objective, at the same GPU-hours of training.",
        f"```bash\npython benchmarks/real.py{option}   # the same command continues where it was stopped\n```",
        "## Results",
        _results_table(runs, names),
        _about(data),
        _judges_table(runs, names),
        f"![Score on evaluation prompts over GPU-hours, by arm]({figures[0]})",
        f"![Score on evaluation prompts over the distance to the base, by arm]({figures[1]})",
        "## Agreement of previews",
        "Spearman's correlation of one-step previews with final rewards within audited groups, by the step after which"
        " they are taken: the mean over groups with its 95 % interval (Student).",
        _agreement_table(runs, names),
    ]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def _results_table(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    head = ["arm", "seeds", "iterations", "GPU-hours", "NFE", "score before", "score after", "KL"]
    rows = []
    for arm in names:
        own = runs_of(runs, arm)
        iterations, hours, nfe = (
            mean(value(run) for run in own)
            for value in (lambda r: r["summary"]["iterations"], lambda r: r["gpu_hours"], lambda r: r["summary"]["nfe"])
        )
        row = [arm, str(len(own)), f"{iterations:,.0f}", f"{hours:.3g}", f"{nfe:,.0f}"]
        row += [figure_of(own, summary_figure(f"reward_{when}")) for when in WHEN]
        distances = [run["points"][-1]["kl"] for run in own if run["points"] and run["points"][-1]["kl"] is not None]
        row.append(f"{mean(distances):.2g}" if distances else "")
        rows.append(row)
    return table(head, rows)


def _judges_table(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    judges = dict.fromkeys(name for run in runs for name in run["summary"].get("held_out_after") or {})
    rows = [
        [arm, judge, *(figure_of(runs_of(runs, arm), held_out_figure(judge, when)) for when in WHEN)]
        for arm in names
        for judge in judges
    ]
    return table(["arm", "held-out judge", *WHEN], rows) if judges else "No held-out judge was installed."


def _agreement_table(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    steps = max((len(group) for run in runs for group in run["agreement"]), default=0)
    groups = {arm: [group for run in runs_of(runs, arm) for group in run["agreement"]] for arm in names}
    rows = [["groups", *(str(len(own)) for own in groups.values())]]
    for step in range(steps):
        # a preview that is equal for all members tells nothing
        columns = [[group[step] or 0.0 for group in own if step < len(group)] for own in groups.values()]
        intervals = [interval(mean_of(column)) if column else None for column in columns]
        rows.append([str(step), *(_in_words(i) for i in intervals)])
    return table(["after step", *names], rows)


def _in_words(value: Interval | None) -> str:
    """An interval; of one group, which has none, the value."""
    if value is None:
        return ""
    return f"{value.value:.2f}" if math.isnan(value.half) else f"{value.value:.2f} ± {value.half:.2f}"


def _about(data: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    runs = data["runs"]
    devices = sorted({str(run["summary"].get("device")) for run in runs})
    torch = sorted({run["summary"]["versions"]["torch"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    guidance = {arm: config["eval"]["guidance_scale"] for arm, config in data["configs"].items()}
    without = [arm for arm, scale in guidance.items() if scale == 1] if len(set(guidance.values())) > 1 else []
    alone = (
        f" {' and '.join(without)} are trained and evaluated without guidance, the others with it." if without else ""
    )
    return (
        f"Mean and standard deviation over seeds {', '.join(map(str, seeds))} ({', '.join(devices)}; torch"
        f" {', '.join(torch)}). Each run was given {data['hours']:g} GPU-hours of training, and made {BEGINNING}"
        f" iterations at least. Score is the mean reward, KL the mean square distance of velocities"
        f" to the base at the last evaluation on the way.{alone}"
    )


def pictures(data: Mapping[str, Any]) -> dict[str, str]:
    """Score over GPU-hours and over the distance to the base, by file name: one line a seed."""
    names = list(dict.fromkeys(run["arm"] for run in data["runs"]))
    drawn = {}
    for name, key, label in (("hours", "gpu_hours", "GPU-hours of training"), ("kl", "kl", "distance to the base")):
        curves = {arm: [_points(run, key) for run in runs_of(data["runs"], arm)] for arm in names}
        image = chart(curves, label)
        if image is not None:
            drawn[f"{data['scale']}_{name}.svg"] = image
    return drawn


def _points(run: Mapping[str, Any], key: str) -> Curve:
    known = [p for p in run["points"] if p[key] is not None and p["score"] is not None]
    return [(p[key], p["score"]) for p in known]


def write_page(out: Path, name: str) -> list[Path]:
    """Write page and pictures from the JSON beside them; the files."""
    data = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    files = {f"{name}.md": page(data), **pictures(data)}
    for file, text in files.items():
        write_text(out / file, text)
    return [out / file for file in (f"{name}.json", *files)]


def write_upload(files: Sequence[Path], runs: Mapping[tuple[str, int], Path], repo: str, folder: Path) -> None:
    """Write into a folder what a repository will hold: the page as its card, and a folder for each finished run."""
    for file in files:
        shutil.copyfile(file, folder / ("README.md" if file.suffix == ".md" else file.name))
    for (arm, seed), path in runs.items():
        if finished(path):
            own = folder / "runs" / folder_of(arm) / f"seed{seed}"
            write_repository(path, repo, own)
            shutil.copyfile(path / "metrics.jsonl", own / "metrics.jsonl")


# --- the command ------------------------------------------------------------------------------------------------------


def parsed(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Scale]:
    """The options, with the scale's own for those that were not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", nargs="?", const="words", choices=("words", "shapes"))
    parser.add_argument("--hours", type=float, help="GPU-hours of training for each arm and seed")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="the card of the prediction")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--eval-prompts", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--push-to", metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--dry-run", action="store_true", help="print the predicted GPU-hours, and nothing else")
    parser.add_argument("--page", action="store_true", help="write the page from its JSON, and run nothing")
    args = parser.parse_args(words)
    scale = rehearsal(args.rehearse) if args.rehearse else real()
    args.hours = scale.hours if args.hours is None else args.hours
    args.seeds = list(scale.seeds) if args.seeds is None else args.seeds
    args.runs = args.runs or Path("runs") / scale.name
    return args, scale


def main(words: Sequence[str] | None = None) -> None:
    args, scale = parsed(words)
    if args.page:
        write_page(args.out, scale.name)
        return
    quiet()
    show(forecast(scale, args))
    if args.dry_run:
        return
    scale = with_judges(with_prompts(scale, args))
    runs = {(arm, seed): args.runs / folder_of(arm) / f"seed{seed}" for seed in args.seeds for arm in args.arms}
    for (arm, seed), path in runs.items():
        train_for(replace(arms(scale.base, scale.plans)[arm], seed=seed), path, 3600 * args.hours / processes())
    args.out.mkdir(parents=True, exist_ok=True)
    data = results(scale, args, runs)
    write_text(args.out / f"{scale.name}.json", json.dumps(data, separators=(",", ":")) + "\n")
    files = write_page(args.out, scale.name)
    if args.push_to:
        with tempfile.TemporaryDirectory() as folder:
            write_upload(files, runs, args.push_to, Path(folder))
            show(push(Path(folder), args.push_to, args.private))
    show(str(args.out / f"{scale.name}.md"))


if __name__ == "__main__":
    main()
