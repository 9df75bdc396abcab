"""Shared parts of the recipes of published models: layers, an average, and the settings for one small GPU."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import Config

# The layers that flow_grpo's training scripts adapt: the attention projections of both streams.
ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
# The average of flow_grpo keeps 0.9 of itself at every eighth update, that of Flow-Factory in every fourth iteration;
# ours is taken once per iteration of two updates.
EMA_OF_TWO_UPDATES = 0.974


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
