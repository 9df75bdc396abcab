"""One framework's share of `frameworks.py`: the work of a file, by progrpo or by TRL's DDPOTrainer.

    python benchmarks/frameworks_work.py progrpo work.json result.json
    PEER-PYTHON benchmarks/frameworks_work.py trl work.json result.json

The file imports the framework that it runs and nothing of the other, so that each has a Python of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""The layers that TRL adapts; its rank is 4 and its alpha 4."""
LORA_RANK = 4
LOG_PROB_CLIP, ADVANTAGE_CLIP = 1e-4, 5.0


@dataclass(frozen=True)
class Work:
    """The work of both frameworks: `iterations` of one group for each prompt, with one optimizer step each."""

    model: str
    prompts: tuple[str, ...]
    group_size: int
    steps: int
    guidance: float
    microbatch: int
    lr: float
    iterations: int
    seed: int
    last_step: bool
    """Whether TRL learns from the last step too, as it does. progrpo does not."""

    @property
    def pictures(self) -> int:
        return len(self.prompts) * self.group_size


def redness(picture_HWC: np.ndarray) -> float:
    """The reward: mean red less mean green of a picture in 0 to 255."""
    red, green = picture_HWC[..., 0].mean(), picture_HWC[..., 1].mean()
    return float(red - green)


def by_progrpo(work: Work, scratch: Path) -> list[dict[str, float]]:
    """Seconds by stage and the mean reward of each iteration, from the run's own metrics."""
    from diffusers import DiffusionPipeline

    import progrpo
    from progrpo.config import (
        AuditSettings,
        CheckpointSettings,
        Config,
        EvalSettings,
        GRPOSettings,
        ModelSettings,
        ObjectiveSettings,
        OptimSettings,
        PlanSettings,
        PromptSettings,
        SamplingSettings,
    )

    config = Config(
        iterations=work.iterations,
        seed=work.seed,
        model=ModelSettings(lora_rank=LORA_RANK, lora_alpha=LORA_RANK, lora_targets=LORA_TARGETS),
        prompts=PromptSettings(per_iteration=len(work.prompts)),
        sampling=SamplingSettings(
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            sampler="ddim",
            noise_level=1.0,
            microbatch=work.microbatch,
        ),
        plan=PlanSettings(preset="custom", group_size=work.group_size),
        objective=ObjectiveSettings(
            name="grpo", grpo=GRPOSettings(clip_range=LOG_PROB_CLIP, adv_clip_max=ADVANTAGE_CLIP)
        ),
        optim=OptimSettings(lr=work.lr, microbatch=work.microbatch, noise_scale=False),
        audit=AuditSettings(every=0),
        eval=EvalSettings(pictures=1, num_inference_steps=work.steps, guidance_scale=work.guidance),
        checkpoint=CheckpointSettings(every=work.iterations),
    )

    def reward(images: list[Any]) -> list[float]:
        return [redness(np.asarray(image)) for image in images]

    pipeline = DiffusionPipeline.from_pretrained(work.model)
    run = progrpo.train(pipeline, list(work.prompts), reward, config=config, out=scratch / "run")
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [
        {
            "pictures": row["time/sample"] + row["time/reward"],
            "update": row["time/update"],
            "iteration": row["seconds"],
            "reward": row["reward/mean"],
        }
        for row in rows
    ]


def by_trl(work: Work, scratch: Path) -> list[dict[str, float]]:
    """The same of TRL's DDPOTrainer, timed around its own methods.

    Advantages are over the pictures of a prompt: its tracker of statistics holds exactly one group of each.
    """
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    rows: list[dict[str, float]] = []

    def timed(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            rows[-1][stage] = rows[-1].get(stage, 0.0) + time.perf_counter() - start
            return result

        return call

    class Timed(DDPOTrainer):
        def calculate_loss(self, latents: Any, timesteps: torch.Tensor, *others: Any) -> Any:
            if not work.last_step:
                next_latents, log_probs, advantages, embeds = others
                advantages = advantages * (timesteps != self.sd_pipeline.scheduler.timesteps[-1])
                others = (next_latents, log_probs, advantages, embeds)
            return super().calculate_loss(latents, timesteps, *others)

        def step(self, epoch: int, global_step: int) -> int:
            rows.append({})
            return int(timed("iteration", super().step)(epoch, global_step))

        def _generate_samples(self, *args: Any, **kwargs: Any) -> Any:
            return timed("pictures", super()._generate_samples)(*args, **kwargs)

        def compute_rewards(self, *args: Any, **kwargs: Any) -> Any:
            return timed("pictures", super().compute_rewards)(*args, **kwargs)

        def _train_batched_samples(self, *args: Any, **kwargs: Any) -> Any:
            return timed("update", super()._train_batched_samples)(*args, **kwargs)

    def reward(images: torch.Tensor, _prompts: tuple[str, ...], _metadata: tuple[Any, ...]) -> Any:
        pictures_NHWC = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        values = [redness(picture_HWC) for picture_HWC in pictures_NHWC]
        rows[-1]["reward"] = rows[-1].get("reward", 0.0) + sum(values) / work.pictures
        return torch.tensor(values), {}

    asked: Iterator[str] = cycle(prompt for prompt in work.prompts for _ in range(work.group_size))
    config = DDPOConfig(
        seed=work.seed,
        num_epochs=work.iterations,
        save_freq=work.iterations + 1,
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        project_kwargs={"project_dir": str(scratch)},
        sample_num_steps=work.steps,
        sample_eta=1.0,
        sample_guidance_scale=work.guidance,
        sample_batch_size=work.microbatch,
        sample_num_batches_per_epoch=work.pictures // work.microbatch,
        train_batch_size=work.microbatch,
        train_gradient_accumulation_steps=work.pictures // work.microbatch,
        train_timestep_fraction=(work.steps - work.last_step) / work.steps,
        train_learning_rate=work.lr,
        train_cfg=True,
        train_clip_range=LOG_PROB_CLIP,
        train_adv_clip_max=ADVANTAGE_CLIP,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=work.group_size,
        per_prompt_stat_tracking_min_count=work.group_size,
    )
    PartialState(cpu=True)  # without it TRL's own warning of a missing LoRA file raises
    pipeline = DefaultDDPOStableDiffusionPipeline(work.model, use_lora=True)
    trainer = Timed(config, reward, lambda: (next(asked), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    trainer.train()
    return rows


FRAMEWORKS: dict[str, Callable[[Work, Path], list[dict[str, float]]]] = {"progrpo": by_progrpo, "trl": by_trl}


def main() -> None:
    name, work_file, out = sys.argv[1:]
    # both frameworks time their stages by this clock, and only CPU seconds compare on a machine that others use
    time.perf_counter = time.process_time
    torch.set_num_threads(1)
    given = json.loads(Path(work_file).read_text())
    work = Work(**{**given, "prompts": tuple(given["prompts"])})
    with tempfile.TemporaryDirectory() as scratch:
        rows = FRAMEWORKS[name](work, Path(scratch))
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "iterations": rows,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6),
        "around": time.process_time() - sum(row["iteration"] for row in rows),
        "versions": {package: version(package) for package in (name, "torch", "diffusers", "transformers", "peft")},
    }
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
