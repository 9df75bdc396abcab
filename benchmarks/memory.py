"""Memory predicted by `progrpo plan --gpu` against memory allocated: `python benchmarks/memory.py [--json]`.

A network call, a forward and backward pass and a decoding of each model run on the CPU in float32, under torch's
profiler, which notes every allocation. The prediction runs the same code on tensors without content. The models are the
built-in ones, and a transformer of SD 3.5's kind with random weights, as a LoRA, with and without activation
checkpointing. Then follow whole iterations of the built-in flow model: the most that lives beyond what was there
before, while sampling and in the update, of everything that torch's operations return. The goal is within 15 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from progrpo.config import (
    AuditSettings,
    Config,
    DGPOSettings,
    ModelSettings,
    NFTSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    SamplingSettings,
    resolve_plan,
)
from progrpo.policies.load import load_policy, policy_from_pipeline, quiet
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.sizes import Watch, sizes
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.sampling import Sampling
from progrpo.training.build import policy_context, policy_from, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.estimate import estimate
from progrpo.training.trainer import Trainer
from progrpo.training.update import Updated
from progrpo.types import Condition, Rollout

CALLED, TRAINED, DECODED = 8, 4, 4
TOKENS = 32


def random_sd3() -> StableDiffusion3Pipeline:
    """Six layers of width 512, for pictures of 256 pixels and text from CLIP alone."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        num_layers=6,
        num_attention_heads=8,
        attention_head_dim=64,
        joint_attention_dim=1024,
        caption_projection_dim=512,
        pooled_projection_dim=512,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1, 2),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        shift_factor=0.06,
    )
    text = CLIPTextConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    text.projection_dim = 256
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that live at once during `work`, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def compared(name: str, settings: ModelSettings, policy: PipelinePolicy | None = None) -> dict[str, object]:
    policy = policy or load_policy(settings)
    tensors = {n: torch.randn(1, *shape) for n, shape in policy.family.condition_shapes().items()}

    def call(rows: int) -> torch.Tensor:
        condition = Condition({n: t.expand(rows, *t.shape[1:]) for n, t in tensors.items()})
        return policy.predict(torch.randn(rows, *policy.latent_shape), torch.tensor(500.0), condition)

    def sample() -> None:
        with torch.no_grad():
            call(CALLED)

    def train() -> None:
        call(TRAINED).square().mean().backward()

    for work in (sample, train):  # gradients are there from then on, and are counted with the weights
        work()
    measured = {
        "network call": allocated(sample),
        "forward and backward pass": allocated(train),
        "decoding": allocated(lambda: policy.decode(torch.randn(DECODED, *policy.latent_shape))),
    }
    estimated = sizes(settings, CALLED, TRAINED, DECODED)
    predicted = dict(zip(measured, (estimated.call_bytes, estimated.train_bytes, estimated.decode_bytes), strict=True))
    return {
        "model": name,
        **{
            n: {"predicted_MB": predicted[n] / 1e6, "measured_MB": b / 1e6, "ratio": predicted[n] / b}
            for n, b in measured.items()
        },
    }


def watched_step(trainer: Trainer) -> dict[str, int]:
    """The most bytes that live at once while sampling, and in the update, of a trainer's next iteration."""
    gc.collect()
    watch = Watch([tensor for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)])
    most: dict[str, int] = {}
    learn = trainer.learner.learn

    def watched(rolled: Rollout, sampling: Sampling, key: NoiseKey, iteration: int) -> Updated:
        most["sampling"] = watch.most
        watch.most = 0  # what lives on is counted again with the next thing that is allocated
        updated = learn(rolled, sampling, key, iteration)
        most["update"] = watch.most
        return updated

    trainer.learner.learn = watched  # type: ignore[method-assign]
    with watch:
        trainer.step()
    return most


def iteration(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """The predicted and measured bytes of a second iteration, which has Adam's moments, beyond what is always there.

    Pictures are kept on the CPU, which here is the same memory and on a GPU is not, and are added.
    """
    ranks = Ranks()
    policy, order = policy_from(config.model, policy_context(config, ranks)), train_order(config.prompts, 0)
    trainer = Trainer(config, policy, load_mixture(config.reward.terms, config.reward.frames), order, ranks)
    trainer.step()
    measured = watched_step(trainer)
    estimated = estimate(config, "h100", 0.35, 1)
    always = "frozen weights", "decoder", "trained weights, optimizer", "copies of trained weights", "rewards"
    resident = sum(estimated["memory_gb"][part] for part in always) * 1e9
    side = 4 * policy.latent_shape[-1]
    pictures = config.prompts.per_iteration * resolve_plan(config).finalists * side**2 * 3
    return {name: estimated["peak_gb"][name] * 1e9 - resident + pictures for name in measured}, {**measured}


def iterations() -> dict[str, Config]:
    base = Config(
        prompts=PromptSettings(per_iteration=4),
        sampling=SamplingSettings(num_inference_steps=6, microbatch=4),
        plan=PlanSettings("none"),
        optim=OptimSettings(microbatch=2),
        audit=AuditSettings(every=0),
    )
    pruned = replace(
        base, prompts=PromptSettings(per_iteration=12), plan=PlanSettings("custom", group_size=24, prune=((3, 4),))
    )
    low = replace(base.sampling, latent_dtype="bfloat16")
    dgpo, nft = (
        ObjectiveSettings("dgpo", dgpo=DGPOSettings(draws=1)),
        ObjectiveSettings("nft", nft=NFTSettings(draws=1)),
    )
    return {
        "GRPO, 24": base,
        "GRPO, 24, latents in bfloat16": replace(base, sampling=low),
        "GRPO, 24 -> 4": pruned,
        "GRPO, 24 -> 4, latents in bfloat16": replace(pruned, sampling=low),
        "GRPO, 24, two updates": replace(base, optim=OptimSettings(microbatch=2, updates_per_rollout=2)),
        "NFT, 24": replace(base, objective=nft),
        "DGPO, 24, all weights": replace(base, objective=dgpo, model=ModelSettings(weights="full")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args()
    quiet()
    lora = ModelSettings(lora_rank=32, max_sequence_length=TOKENS)
    leaner = replace(lora, activation_checkpointing=True)
    results = [
        compared("shapes-flow, all weights", ModelSettings(weights="full")),
        compared("shapes-flow, LoRA", ModelSettings()),
        compared("shapes-diffusion, all weights", ModelSettings(path="shapes-diffusion", weights="full")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        random_sd3().save_pretrained(folder)
        for name, settings in (("random SD3, LoRA", lora), ("random SD3, LoRA, checkpointing", leaner)):
            results.append(compared(name, replace(settings, path=folder), policy_from_pipeline(random_sd3(), settings)))
    for name, config in iterations().items():
        predicted, measured = iteration(config)
        figures = {
            n: {"predicted_MB": predicted[n] / 1e6, "measured_MB": b / 1e6, "ratio": predicted[n] / b}
            for n, b in measured.items()
        }
        results.append({"model": f"an iteration: {name}", **figures})
    if options.json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["model"])
        for part, value in result.items():
            if isinstance(value, dict):
                print(f"  {part:28s}" + "   ".join(f"{name} {number:9.2f}" for name, number in value.items()))


if __name__ == "__main__":
    main()
