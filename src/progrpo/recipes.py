"""Recipes: vetted configurations, as functions. `progrpo recipes` shows the first line of each docstring."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from progrpo.config import (
    AuditSettings,
    AWMSettings,
    CheckpointSettings,
    Config,
    DGPOSettings,
    EvalSettings,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
    config_from_json,
)
from progrpo.messages import named, nearest


def quickstart() -> Config:
    """Teach the built-in model in minutes on two CPU cores, by small groups and many updates.

    Groups are not pruned, which teaches most where sampling is cheap. `--plan.group-size 24 --plan.prune 2 12` expands
    and prunes.
    """
    return Config(
        recipe="quickstart",
        iterations=150,
        model=ModelSettings(weights="full", dtype="auto"),
        prompts=PromptSettings(per_iteration=6),
        # given rather than measured, so that equal seeds give equal runs; these microbatches fill up with whole groups
        sampling=SamplingSettings(num_inference_steps=6, microbatch=72),
        plan=PlanSettings(preset="custom", group_size=12),
        reward=RewardSettings((RewardTerm("shapes_mixed"),)),
        # without the distance to the base two of four runs fell back, at half the rate
        objective=ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=2, kl_beta=0.01)),
        optim=OptimSettings(lr=2e-4, decay=1.0, max_grad_norm=0.1, microbatch=72, ema_decay=0.9),
        audit=AuditSettings(every=25),
        eval=EvalSettings(every=50, keep_best=True),
        checkpoint=CheckpointSettings(every=25),
    )


def shapes_diffusion() -> Config:
    """Expand, prune and learn on the built-in diffusion model: a U-Net that predicts noise, with DDIM."""
    base = quickstart()
    return replace(
        base,
        recipe="shapes-diffusion",
        iterations=50,  # with 80 the learning rate stays high for longer, and a third of the gain is lost again
        model=replace(base.model, path="shapes-diffusion"),
        prompts=PromptSettings(per_iteration=12),
        sampling=replace(base.sampling, num_inference_steps=8),
        plan=PlanSettings(preset="custom", group_size=24, prune=((4, 12),)),
        objective=ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=2, kl_beta=0.0)),
        optim=replace(base.optim, lr=1e-4),
        audit=AuditSettings(every=10),
        eval=replace(base.eval, every=10),
        checkpoint=CheckpointSettings(every=10),
    )


def words_flow() -> Config:
    """Teach the built-in model of words to spell by a text recogniser, in 20 minutes on a CPU.

    The recogniser is PP-OCRv6 in rapidocr's package (`pip install 'progrpo[ocr]'`). It reads the inked part of a
    picture as one line. `ocr`, which searches the picture for lines first, judges from outside.
    """
    base = quickstart()
    return replace(
        base,
        recipe="words-flow",
        model=replace(base.model, path="words-flow"),
        prompts=replace(base.prompts, source="words"),
        reward=RewardSettings((RewardTerm("ocr_line"),)),
        eval=replace(base.eval, prompts="words", pictures=384, rewards=(RewardTerm("ocr"),)),
    )


def preferences() -> Config:
    """Align the built-in model with a reward model of your own pairs, in minutes; train that first.

    The reward model is the folder `reward-model` (docs/preferences.md). The hidden taste of the example
    (examples/preferences.py) and the strict verdict judge from outside. One prompt an iteration is enough where a taste
    asks the same of every prompt: more prompts would teach the same (arXiv 1812.06162).
    """
    base = quickstart()
    return replace(
        base,
        recipe="preferences",
        iterations=60,
        model=replace(base.model, dtype="float32"),
        prompts=PromptSettings(per_iteration=1),
        sampling=replace(base.sampling, microbatch=24),
        reward=RewardSettings((RewardTerm("reward_model", model="reward-model"),)),
        optim=replace(base.optim, microbatch=24),
        audit=AuditSettings(every=0),
        eval=replace(
            base.eval,
            every=20,
            keep_best=False,
            pictures=256,
            rewards=(RewardTerm("shapes_taste"), RewardTerm("shapes_strict")),
        ),
    )


def sd14_hpsv2() -> Config:
    """The paper's run on SD 1.4 towards HPSv2.1, 48 -> 32 -> 8; bring prompts.txt and eval.txt.

    The settings are DanceGRPO's (arXiv 2505.07818), whose baseline is `--plan.preset custom --plan.group-size 16`. The
    plan is Pro-GRPO's (arXiv 2512.15347), whose learning settings are not public.
    """
    return Config(
        recipe="sd14-hpsv2",
        iterations=300,
        model=ModelSettings(path="CompVis/stable-diffusion-v1-4", weights="full", dtype="bfloat16"),
        prompts=PromptSettings(source="prompts.txt", per_iteration=32),
        sampling=SamplingSettings(num_inference_steps=50, guidance_scale=5.0, same_latent=True, microbatch=16),
        plan=PlanSettings(preset="sd14"),
        reward=RewardSettings((RewardTerm("hpsv2"),)),
        optim=OptimSettings(lr=1e-5, updates_per_rollout=2, microbatch=8),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=50, guidance_scale=5.0),
    )


# The layers that flow_grpo's training scripts adapt: the attention projections of both streams.
_ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
# flow_grpo's average keeps 0.9 of itself at every eighth update; ours is taken once per iteration of two updates.
_EMA_OF_TWO_UPDATES = 0.974


def _sd35m(task: str, kl_beta: float, prompts: str = "txt", reward: str = "") -> Config:
    """Flow-GRPO's settings on SD 3.5 Medium (arXiv 2505.05470), with Pro-GRPO's plan.

    Tasks differ in reward, prompts and KL. Pro-GRPO's own learning settings are not public. The std of advantages is
    that of the survivors, as in its paper; flow_grpo takes that of the whole batch: `--objective.advantage batch`.
    """
    return Config(
        recipe=f"sd35m-{task}",
        iterations=1000,
        model=ModelSettings(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            lora_targets=_ATTENTION,
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
        ),
        prompts=PromptSettings(source=f"prompts.{prompts}", per_iteration=48),
        sampling=SamplingSettings(guidance_scale=4.5, microbatch=8),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm(reward or task),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(kl_beta=kl_beta, kl_form="flow_grpo")),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=8, ema_decay=_EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts=f"eval.{prompts}", pictures=200, num_inference_steps=40, guidance_scale=4.5),
    )


def sd35m_pickscore() -> Config:
    """The paper's run on SD 3.5 Medium towards PickScore; bring prompts.txt and eval.txt.

    The plan is `standard`, or `--plan.preset flash` (Pro-GRPO, arXiv 2512.15347, whose learning settings are not
    public). The rest is Flow-GRPO's (arXiv 2505.05470), whose baseline is `--plan.preset none`, a group of 24.
    """
    return _sd35m("pickscore", kl_beta=0.01)


def sd35m_hpsv2() -> Config:
    """The paper's other reward on SD 3.5 Medium, HPSv2.1; bring prompts.txt and eval.txt.

    Pro-GRPO (arXiv 2512.15347) names such a run without its settings, and Flow-GRPO (arXiv 2505.05470) has none. These
    are Flow-GRPO's settings for PickScore, the other reward of human preferences.
    """
    return _sd35m("hpsv2", kl_beta=0.01)


def sd35m_geneval() -> Config:
    """SD 3.5 Medium towards GenEval's checks; bring prompts.jsonl and eval.jsonl, GenEval's metadata.

    The settings and the reward's value are Flow-GRPO's (arXiv 2505.05470). The plan is Pro-GRPO's (arXiv 2512.15347),
    which was not published with this reward. The value of `--reward.terms geneval` stays in 0..1.
    """
    return _sd35m("geneval", kl_beta=0.04, prompts="jsonl", reward="geneval_flow_grpo")


def sd35m_ocr() -> Config:
    """SD 3.5 Medium towards text that can be read; bring prompts.txt and eval.txt, with texts in quotes.

    The settings are Flow-GRPO's for this task (arXiv 2505.05470). The plan is Pro-GRPO's (arXiv 2512.15347), which was
    not published with this reward.
    """
    return _sd35m("ocr", kl_beta=0.04)


def sd35m_awm() -> Config:
    """SD 3.5 Medium towards PickScore by AWM, with its authors' settings; bring prompts.txt and eval.txt.

    The settings come from their public configuration for one node of eight GPUs (arXiv 2509.25050), whose baseline is
    `--plan.preset none`, a group of 24. Their solver is SA-Solver, ours the ODE's Euler steps. The plan is Pro-GRPO's
    (arXiv 2512.15347), which was not published with this objective. Flow-Factory's settings are the objective's
    defaults, with `weighting ghuber`.
    """
    base = _sd35m("awm", kl_beta=0.0, reward="pickscore")
    return replace(
        base,
        prompts=replace(base.prompts, per_iteration=24),
        sampling=replace(base.sampling, num_inference_steps=14, guidance_scale=1.0),
        objective=ObjectiveSettings(
            name="awm",
            advantage="batch",
            awm=AWMSettings(weighting="ghuber", adv_clip_max=5.0, adv_scale=0.2, average_ramp=1e-3),
        ),
        optim=replace(base.optim, updates_per_rollout=1, ema_decay=0.99),
        eval=replace(base.eval, guidance_scale=1.0),
    )


def flux_pickscore() -> Config:
    """FLUX.1-dev towards PickScore at 512 pixels, in six steps; bring prompts.txt and eval.txt.

    The settings are Flow-GRPO's for this model (arXiv 2505.05470), with embedded guidance and the model's own shift.
    Its baseline is `--plan.preset none`, a group of 24. The plan is Pro-GRPO's (arXiv 2512.15347), which was not
    published on FLUX.
    """
    feed_forward = "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
    return Config(
        recipe="flux-pickscore",
        iterations=1000,
        model=ModelSettings(
            path="black-forest-labs/FLUX.1-dev",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(*_ATTENTION, *feed_forward),
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=48),
        sampling=SamplingSettings(
            num_inference_steps=6, guidance_scale=3.5, embedded_guidance=True, noise_level=0.9, microbatch=8
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=4, ema_decay=_EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=28, guidance_scale=3.5),
    )


def kontext_vlm() -> Config:
    """FLUX.1 Kontext, which edits, towards the marks of a vision model; bring edits.jsonl and eval.jsonl.

    A line of those is {"prompt": ..., "image": a path, "question": the question to the judge}. The judge does not see
    the source, so the question must say what is to stay as it is. A reward of your own that takes `image` may compare.
    The network's settings are those of `flux-pickscore`, Flow-GRPO's on FLUX.1-dev (arXiv 2505.05470), and the
    guidance is Kontext's own (arXiv 2506.15742). These settings and the reward are our choice for editing: nobody has
    published such a run with this plan.
    """
    base = flux_pickscore()
    return replace(
        base,
        recipe="kontext-vlm",
        model=replace(base.model, path="black-forest-labs/FLUX.1-Kontext-dev"),
        prompts=replace(base.prompts, source="edits.jsonl"),
        sampling=replace(base.sampling, guidance_scale=2.5),
        reward=RewardSettings((RewardTerm("vlm"),)),
        eval=replace(base.eval, prompts="eval.jsonl", guidance_scale=2.5),
    )


_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
"""The default negative prompt of Wan's own code."""


def wan_pickscore() -> Config:
    """Videos by Wan 2.1 (1.3B) towards PickScore of their frames; bring prompts.txt and eval.txt.

    The step's noise and the clip range of 1e-4 are DanceGRPO's (arXiv 2505.07818): the default range follows the
    latent's size and would be 7.3e-6 here. Guidance, negative prompt, shift and size are Wan's own (arXiv 2503.20314).
    The rest is our choice, and we have not run it: a LoRA, 33 frames, 20 steps, and a plan that halves groups after
    twelve of them.
    """
    return Config(
        recipe="wan-pickscore",
        iterations=300,
        model=ModelSettings(
            path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            lora_rank=32,
            lora_alpha=64,
            frames=33,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=8),
        sampling=SamplingSettings(
            num_inference_steps=20, guidance_scale=5.0, negative_prompt=_WAN_NEGATIVE, sampler="dance", microbatch=1
        ),
        plan=PlanSettings(preset="custom", group_size=16, prune=((11, 8),)),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=1e-4, microbatch=1),
        eval=EvalSettings(prompts="eval.txt", pictures=32, num_inference_steps=50, guidance_scale=5.0),
    )


def lean(config: Config, gb: int, sampled: int, trained: int, checkpointing: bool = True) -> Config:
    """A recipe for one GPU of `gb` GB: smaller microbatches, latents in bfloat16, and fewer prompts per iteration.

    `sampled` and `trained` are the rows of a network call, without and with a backward pass. Eight prompts per
    iteration is Flow-GRPO's own setting for one GPU (arXiv 2505.05470). Text encoders leave memory once the prompts
    are encoded (`model.keep_text_encoders`). The fit is calculated, not measured: if it fails, a run halves its
    microbatches and continues.
    """
    return replace(
        config,
        recipe=f"{config.recipe}-{gb}gb",
        model=replace(config.model, activation_checkpointing=checkpointing),
        prompts=replace(config.prompts, per_iteration=8),
        sampling=replace(config.sampling, latent_dtype="bfloat16", microbatch=sampled),
        optim=replace(config.optim, microbatch=trained),
    )


def sd35m_pickscore_24gb() -> Config:
    """`sd35m-pickscore` on one GPU of 24 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 24, sampled=4, trained=4)


def sd35m_pickscore_48gb() -> Config:
    """`sd35m-pickscore` on one GPU of 48 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 48, sampled=16, trained=8)


def sd35m_pickscore_80gb() -> Config:
    """`sd35m-pickscore` on one GPU of 80 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 80, sampled=32, trained=8, checkpointing=False)


def flux_pickscore_24gb() -> Config:
    """`flux-pickscore` on one GPU of 24 GB, its frozen weights in 8 bits; bring prompts.txt and eval.txt."""
    config = lean(flux_pickscore(), 24, sampled=4, trained=2)
    return replace(config, model=replace(config.model, quantize="int8", offload=True, decoding="sliced"))


def flux_pickscore_48gb() -> Config:
    """`flux-pickscore` on one GPU of 48 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(flux_pickscore(), 48, sampled=4, trained=4)


def flux_pickscore_80gb() -> Config:
    """`flux-pickscore` on one GPU of 80 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(flux_pickscore(), 80, sampled=16, trained=8)


def sd3() -> Config:
    """Pro-GRPO with the paper's plan on Stable Diffusion 3.5: a start for a task of your own."""
    return Config(
        recipe="sd3",
        iterations=300,
        model=ModelSettings(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
        ),
        sampling=SamplingSettings(guidance_scale=4.5, microbatch=8),
        plan=PlanSettings(preset="standard"),
        optim=OptimSettings(lr=3e-4, microbatch=8, ema_decay=0.9),
        eval=EvalSettings(guidance_scale=4.5),
    )


def smoke() -> Config:
    """Two tiny iterations of everything, in seconds: for tests; it learns nothing."""
    return Config(
        recipe="smoke",
        iterations=2,
        prompts=PromptSettings(per_iteration=2),
        sampling=SamplingSettings(num_inference_steps=6, microbatch=12),
        plan=PlanSettings(preset="custom", group_size=6, prune=((3, 4),)),
        optim=OptimSettings(microbatch=40),
        audit=AuditSettings(every=2),
        eval=EvalSettings(pictures=12, num_inference_steps=6),
        checkpoint=CheckpointSettings(every=1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "shapes-diffusion": shapes_diffusion,
    "words-flow": words_flow,
    "preferences": preferences,
    "sd14-hpsv2": sd14_hpsv2,
    "sd35m-pickscore": sd35m_pickscore,
    "sd35m-pickscore-24gb": sd35m_pickscore_24gb,
    "sd35m-pickscore-48gb": sd35m_pickscore_48gb,
    "sd35m-pickscore-80gb": sd35m_pickscore_80gb,
    "sd35m-hpsv2": sd35m_hpsv2,
    "sd35m-geneval": sd35m_geneval,
    "sd35m-ocr": sd35m_ocr,
    "sd35m-awm": sd35m_awm,
    "flux-pickscore": flux_pickscore,
    "flux-pickscore-24gb": flux_pickscore_24gb,
    "flux-pickscore-48gb": flux_pickscore_48gb,
    "flux-pickscore-80gb": flux_pickscore_80gb,
    "kontext-vlm": kontext_vlm,
    "wan-pickscore": wan_pickscore,
    "sd3": sd3,
    "smoke": smoke,
}


_MOST_BYTES = 1_000_000  # a configuration takes about 3,000


def describe(name: str) -> str:
    """One line about a shipped recipe."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]


def load_recipe(name: str) -> Config:
    """The configuration of a shipped recipe, of a JSON file, or of a run folder (its config.json)."""
    if name in RECIPES:
        return RECIPES[name]()
    # unlike Path's methods, those of os.path do not raise for a name that is too long or holds a NUL
    of_run = os.path.isdir(name)
    path = Path(name, "config.json") if of_run else Path(name)
    if not os.path.isfile(path):
        raise ValueError(
            f"{named(name)} is no recipe ({', '.join(RECIPES)}), config file or run folder{nearest(name, RECIPES)}"
        )
    try:
        return config_from_json(_read_text(path), of_run)
    except OSError as error:
        raise ValueError(f"{named(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{named(path)}: not UTF-8 text; save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from None


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"over {_MOST_BYTES // 10**6} MB, so no configuration; give a recipe's JSON or a run folder")
    return content.decode("utf-8-sig")
