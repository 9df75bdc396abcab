"""The time of an iteration per plan, against the bare network on the same inputs in the same process.

    python benchmarks/iteration.py [--models shapes-flow shapes-diffusion]
                                   [--plans none posthoc standard flash window] [--objective grpo] [--iterations 5]
                                   [--prompts 4] [--compile] [--reuse-rollout] [--json [FILE]]
    python benchmarks/iteration.py --random-weights
                                   --models stabilityai/stable-diffusion-3.5-medium black-forest-labs/FLUX.1-dev
                                   [--resolution 512 | H W] [--max-sequence-length 128] [--activation-checkpointing]
                                   [--microbatch 16] [--train-microbatch 4]

`window` is an early window: noise on the first 3 of 10 steps alone, and 24 members, of which 12 go on right after it.
Before and after every iteration the unit costs are measured bare: a call of the network, with and without gradient, a
decoded picture, by the full and by the tiny decoder, and a reward. From these follow:

sampling   rows per second of the sampling stage over those of the bare network in calls of the same sizes
update     the same of trained items, forward and backward, with the further forward passes of the objective
model      seconds of the iteration over the cost of its counts at these units (the cost model)
previews   their seconds over those of sampling: by the full decoder as it ran, by the tiny one and the probe at their
           unit costs

matmul     FLOPs per second of the sampling stage and of the update, as the model's own code counts them
           (progrpo.policies.sizes), over those of one large matrix product in the same process and dtype: MFU against
           the device's reach
MFU        the same over the maker's figure, for a card of progrpo.training.gpus.GPUS

Beside them stand the peak memory of an iteration, on a GPU with the prediction of `progrpo plan`, and in JSON the
deviation of a ratio from 1 before an iteration's first update.

Figures are medians over iterations; a first one is not counted. NFE, decodes and reward calls must be those that the
plan predicts.

With `--random-weights` a model is built by its published architecture and filled with random numbers, where it runs:
without the hub and text encoders (texts are random as well), with a LoRA of rank 32, in bfloat16, and with rewards by
the size of the picture's JPEG.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderTiny

from progrpo.config import (
    Config,
    ModelSettings,
    PlanSettings,
    PreviewSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
    resolve_plan,
)
from progrpo.packing import balanced_size
from progrpo.policies.base import Policy, PolicyContext, torch_dtype
from progrpo.policies.decoding import PictureDecoder, unscale_tiny
from progrpo.policies.load import policy_from_pipeline, quiet
from progrpo.policies.sizes import without_weights
from progrpo.rewards.base import Scorer
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.plan import UnitCosts
from progrpo.rollout.preview import DECODED
from progrpo.rollout.probe import Probe, latent_features, probe_examples, text_features
from progrpo.tracking.records import metric
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.estimate import estimate, flops_by_stage, sizes_for
from progrpo.training.gpus import GPUS
from progrpo.training.measure import with_measured_microbatches
from progrpo.training.trainer import Trainer
from progrpo.types import Cost, Rollout, Trajectories

WINDOW = (
    PlanSettings(preset="custom", group_size=24, prune=((3, 12),)),
    SamplingSettings(sde_window="first", sde_window_size=3),
)
FURTHER_PASSES = {"grpo": 0, "dgpo": 2, "nft": 2, "awm": 2, "elbo": 2}
"""The forward passes of an item without gradient, which an objective compares with.

They are of the reference and an average of the weights.
"""
SIDE = 8192 if torch.cuda.is_available() else 2048
_PRODUCTS = 8 if torch.cuda.is_available() else 1
_REPEATS = 3


def config_for(model: str, plan: str, options: argparse.Namespace) -> Config:
    base = Config(model=ModelSettings(path=model, dtype="auto", compile=options.compile))
    chosen, sampling = WINDOW if plan == "window" else (PlanSettings(preset=plan), base.sampling)
    config = replace(
        base,
        plan=chosen,
        sampling=replace(sampling, microbatch=options.microbatch),
        preview=PreviewSettings(decoder="tiny"),  # so that the policy has it; what runs is set below
        objective=replace(base.objective, name=options.objective),
        optim=replace(base.optim, reuse_rollout=options.reuse_rollout, microbatch=options.train_microbatch),
        prompts=replace(base.prompts, per_iteration=options.prompts),
        audit=replace(base.audit, every=0),
    )
    return of_real_size(config, options) if options.random_weights else config


def of_real_size(config: Config, options: argparse.Namespace) -> Config:
    pixels = options.resolution or []
    model = replace(
        config.model,
        dtype="bfloat16",
        lora_rank=32,
        lora_alpha=64,
        resolution=pixels[0] if len(pixels) == 1 else (pixels[0], pixels[1]) if pixels else None,
        max_sequence_length=options.max_sequence_length,
        activation_checkpointing=options.activation_checkpointing,
    )
    sampling = replace(config.sampling, guidance_scale=options.guidance_scale)
    reward = RewardSettings((RewardTerm("jpeg_compressibility"),))
    return replace(config, model=model, sampling=sampling, reward=reward, preview=PreviewSettings())


def random_policy(settings: ModelSettings, context: PolicyContext) -> Policy:
    """A model by its architecture with random numbers for weights and for every text."""
    on_meta = PolicyContext(torch.device("meta"))
    empty = without_weights(settings.path, torch_dtype(settings))
    shapes = policy_from_pipeline(empty, replace(settings, compile=False), on_meta).family.condition_shapes()
    pipeline = without_weights(settings.path, torch_dtype(settings))
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder"):
            setattr(pipeline, name, torch.nn.Identity())  # nobody asks it for a text, or for its settings
        elif isinstance(part, torch.nn.Module):
            fill(part.to_empty(device=context.device))
    policy: Any = policy_from_pipeline(pipeline, settings, context)
    tiny = random_tiny_decoder(policy)
    policy.previewer = PictureDecoder(tiny, unscale_tiny(tiny), "tiny decoder", "")
    policy.family.condition_shapes = lambda: shapes
    policy.family.encode_text = lambda text: {name: torch.randn(1, *shape) for name, shape in shapes.items()}
    return policy


def random_tiny_decoder(policy: Any) -> AutoencoderTiny:
    """A decoder of TAESD's architecture for the model's latents."""
    tiny = AutoencoderTiny(latent_channels=policy.latent_shape[0]).requires_grad_(False).eval()
    fill(tiny)
    return tiny.to(policy.device, policy.family.dtype, memory_format=torch.channels_last)


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Fill the weights so that signals keep their size from layer to layer, and pictures differ."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.fill_(float(name.endswith("weight")))


class Bare:
    """The parts of an iteration on their own, on inputs of its shapes and on pictures that it made.

    Each has its seconds per row.
    """

    def __init__(self, policy: Policy, reward: Scorer, config: Config, rolled: Rollout) -> None:
        self.policy, self.reward, self.config, self.rolled = policy, reward, config, rolled
        self.prompts = prompts = rolled.prompts
        self.condition = policy.encode(prompts)
        self.timestep = policy.levels(10).timestep[5]
        self.passes = FURTHER_PASSES[config.objective.name]
        plan, most = resolve_plan(config), config.sampling.rows_per_call
        self.rows_T = [len(prompts) * plan.living_at(step) for step in range(config.sampling.num_inference_steps)]
        self.shapes_T = [min(most, self.rows_T[0]) if policy.compiled else balanced_size(r, most) for r in self.rows_T]
        # drawn: a GPU multiplies ones faster, which flip fewer bits
        self.matrix = torch.randn(SIDE, SIDE, device=policy.device, dtype=getattr(torch, config.model.dtype))
        self.guidance, self.pair = config.sampling.guidance_scale, 2 if config.sampling.in_pairs else 1

    def _call(self, size: int) -> torch.Tensor:
        rows = torch.arange(size) % len(self.prompts)
        x = torch.randn(size, *self.policy.latent_shape, generator=torch.Generator().manual_seed(0))
        x = x.to(self.policy.device)
        condition = self.condition.take(rows.to(self.policy.device))
        return self.policy.predict(x, self.timestep.to(x), condition, self.guidance)

    def _train(self, size: int) -> None:
        for _ in range(self.passes):
            self._sample(size)
        self._call(size).square().mean().backward()
        for parameter in self.policy.trainable.values():
            parameter.grad = None

    def _sample(self, size: int) -> None:
        with torch.no_grad():
            self._call(size)

    def measure(self) -> dict[str, float]:
        calls, items = self.config.sampling.rows_per_call, self.config.optim.items_per_pass
        decoded = min(calls, DECODED)
        latents = torch.randn(decoded, *self.policy.latent_shape).to(self.policy.device)
        groups, pictures = self.rolled.group_N[:DECODED], self.rolled.pictures.images_NHWC[:DECODED].numpy()
        asked = [self.prompts[g] for g in groups]
        probe, texts, group = Probe(1), text_features(self.condition), torch.arange(calls) * len(self.prompts) // calls
        seen = latent_features(torch.randn(calls, *self.policy.latent_shape))
        finished = Trajectories(group, group, torch.arange(calls), seen, latent_features=(seen,))
        probe.learn(list(probe_examples(finished, self.condition, torch.randn(calls)).values()))
        works: dict[str, tuple[Callable[[], object], int]] = {
            "train": (lambda: self._train(items), items),
            "decode": (lambda: self.policy.decode(latents), decoded),
            "tiny": (lambda: self.policy.preview(latents), decoded),
            "matmul": (self._matmul, 1),
            "reward": (lambda: self.reward.score(pictures, asked, groups), len(asked)),
            "probe": (lambda: probe.score(0, seen, texts, group), calls),
        }
        units = {name: seconds(work) / rows for name, (work, rows) in works.items()}
        by_shape = {shape: seconds(partial(self._sample, shape)) / shape for shape in set(self.shapes_T)}
        spent = sum(rows * by_shape[shape] for rows, shape in zip(self.rows_T, self.shapes_T, strict=True))
        return {"call": spent / sum(self.rows_T) / self.pair, **units}

    def _matmul(self) -> None:
        """A product of a size that keeps a GPU busy, or a CPU for a tenth of a second."""
        for _ in range(_PRODUCTS):
            self.matrix @ self.matrix


def seconds(work: Callable[[], object]) -> float:
    """The median of some calls, after one."""
    work()
    synchronize()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """The GiB of the GPU's allocator, or those resident in the process, read fifty times per second."""
    done, seen, process = threading.Event(), [0], psutil.Process()

    def look() -> None:
        while not done.wait(0.02):
            seen[0] = max(seen[0], process.memory_info().rss)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 2**30
        return
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: seen[0] / 2**30
    finally:
        done.set()
        thread.join()


def measure(config: Config, iterations: int, random_weights: bool) -> dict[str, Any]:
    ranks = Ranks()
    config = resolve_dtype(config, ranks)
    if random_weights:
        policy = random_policy(config.model, PolicyContext(ranks.device))
    else:
        policy = policy_from(config.model, policy_context(config, ranks))
    order, reward = train_order(config.prompts, config.seed), load_mixture(config.reward.terms, config.reward.frames)
    prompts = order.prompts_for(0, config.prompts.per_iteration)
    config = replace(config, preview=PreviewSettings())
    config = with_measured_microbatches(config, policy, prompts[0], ranks)
    trainer = Trainer(config, policy, reward, order, ranks)
    flops = flops_by_stage(config, trainer.plan, sizes_for(config))
    policy.encode(order.prompts_for(0, config.prompts.per_iteration * (iterations + 1)))
    bare = Bare(policy, reward, config, trainer.step().rollout)
    before, rows, peaks, ratios = bare.measure(), [], [], [0.0]
    for _ in range(iterations):
        with peak_memory() as peak:
            record = trainer.step().record
            peaks.append(peak())
        ratios.append(metric(record, "update/on_policy_deviation") or 0.0)
        after = bare.measure()
        units = {name: (before[name] + after[name]) / 2 for name in after}
        before = after
        rows.append(row(record, units, flops))
    same = ("nfe", "decodes", "reward_calls")
    predicted, counted = trainer.predicted() * (iterations + 1), trainer.totals.counted
    return {
        **{key: statistics.median(r[key] for r in rows) for key in rows[0]},
        "model by iteration": [round(r["model"], 3) for r in rows],
        "peak GiB": max(peaks),
        "predicted GiB": predicted_memory(config),
        "ratio off 1 by": max(ratios),
        "microbatch": [config.sampling.microbatch, config.optim.microbatch],
        "dtype": config.model.dtype,
        "predicted": asdict(predicted),
        "counted": asdict(counted),
        "counts_agree": all(getattr(predicted, n) == getattr(counted, n) for n in same),
    }


def row(record: dict[str, Any], units: dict[str, float], flops: Mapping[str, float]) -> dict[str, float]:
    stages = {name: record[f"time/{name}"] for name in ("sample", "preview", "reward", "update", "other")}
    cost = Cost(**{name: record[f"rollout/{name}"] for name in asdict(Cost())})
    picture = units["decode"] + units["reward"]
    promised = UnitCosts(units["call"], picture, picture, units["train"]).seconds(cost)
    sampled, trained = flops["sampling"] / stages["sample"], flops["update"] / stages["update"]
    matmul = 2 * SIDE**3 * _PRODUCTS / units["matmul"]
    return {
        "seconds": record["seconds"],
        **stages,
        "nfe a second": cost.nfe / stages["sample"],
        "bare nfe a second": 1 / units["call"],
        "sampling": cost.nfe * units["call"] / stages["sample"],
        "update rate": cost.trained_steps * units["train"] / stages["update"],
        "model": record["seconds"] / promised,
        "previews, full": stages["preview"] / stages["sample"],
        "previews, tiny": cost.previews * (units["tiny"] + units["reward"]) / stages["sample"],
        "previews, probe": cost.previews * units["probe"] / stages["sample"],
        "sampling TFLOPS": sampled / 1e12,
        "update TFLOPS": trained / 1e12,
        "sampling, of a matmul": sampled / matmul,
        "update, of a matmul": trained / matmul,
        **{
            f"{name}, MFU": rate / peak
            for peak in stated_peak()
            for name, rate in (("sampling", sampled), ("update", trained))
        },
        **{f"unit {name} ms": 1000 * value for name, value in units.items()},
    }


def predicted_memory(config: Config) -> float | None:
    """The GiB that `progrpo plan` predicts of sampling and the update, on a GPU: a CPU's process holds much else."""
    if not torch.cuda.is_available():
        return None
    peaks = estimate(config, "h200", 1.0, 1)["peak_gb"]  # the same for every card
    return max(peaks["sampling"], peaks["update"]) * 1e9 / 2**30


def stated_peak() -> list[float]:
    """The maker's FLOPs per second of the card, None for a card that is not known."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return [card.peak * 1e12 for short, card in GPUS.items() if short.split("-")[0] in name][:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--plans", nargs="+", default=["none", "posthoc", "standard", "flash", "window"])
    parser.add_argument("--objective", default="grpo")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--resolution", type=int, nargs="+")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--max-sequence-length", type=int, default=16)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--train-microbatch", type=int)
    parser.add_argument("--reuse-rollout", action="store_true")
    parser.add_argument(
        "--json", nargs="?", const="-", help="print JSON, or write it to a file as each plan is measured"
    )
    options = parser.parse_args()
    quiet()
    plans: dict[str, dict[str, Any]] = {}
    for model in options.models:
        for plan in options.plans:
            result = measure(config_for(model, plan, options), options.iterations, options.random_weights)
            plans.setdefault(model, {})[plan] = result
            print(line(model, plan, result), flush=True, file=sys.stderr if options.json else sys.stdout)
            if options.json not in (None, "-"):  # so that what is there stays, if a lent machine goes
                Path(options.json).write_text(as_json(options, plans))
    if options.json == "-":
        print(as_json(options, plans), end="")


def as_json(options: argparse.Namespace, plans: dict[str, dict[str, Any]]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return json.dumps({**vars(options), "torch": torch.__version__, "device": device, "plans": plans}, indent=1) + "\n"


def line(model: str, plan: str, r: dict[str, Any]) -> str:
    stages = "  ".join(f"{name} {r[name]:.2f}" for name in ("sample", "preview", "reward", "update", "other"))
    previews = " ".join(f"{r[f'previews, {kind}']:.1%}" for kind in ("full", "tiny", "probe"))
    counts = "" if r["counts_agree"] else "  COUNTS DIFFER"
    predicted = "" if r["predicted GiB"] is None else f" (predicted {r['predicted GiB']:.1f})"
    return (
        f"{model:17s} {plan:9s} {r['seconds']:.2f} s: {stages};  of the bare network: sampling {r['sampling']:.1%},"
        f" update {r['update rate']:.1%}, of a matmul {r['sampling, of a matmul']:.0%}, {r['update, of a matmul']:.0%};"
        f"  model x {r['model']:.3f};  previews {previews};  {r['peak GiB']:.1f} GiB{predicted}{counts}"
    )


if __name__ == "__main__":
    main()
