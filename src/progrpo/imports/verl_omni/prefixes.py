"""The rule of each group of settings whose names begin alike."""

from __future__ import annotations

from progrpo.imports.outcome import Outcome, Rule, Setting, no_equal, not_needed
from progrpo.imports.shared_rules import ignored, named_below, only_at
from progrpo.imports.verl_omni import sampling
from progrpo.imports.verl_omni.sections import ACTOR, DIFFUSION_LOSS, MODEL, PIPELINE, ROLLOUT, VALIDATION

_RUN_FOLDER = "progrpo train --out names the run's folder"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_ENGINE = "the training process samples, without another engine"
_SHARDING = "--model.shard and --model.offload say where weights lie"
_PROFILER = "there is no profiler"
_SERVER = "a reward's own settings say where it runs"
_LOADING = ignored("prompts are read at once, and encoded at the start")
_OTHER_LOSS = ignored("a setting of an algorithm that is not translated")


def _correction(setting: Setting) -> Outcome:
    """The outcome of a correction for the difference between the rollout's engine and the trainer."""
    off = setting.value in (None, False) or not setting.name.endswith(("rollout_is", "rollout_rs", "bypass_mode"))
    why = "the training process samples, so there is nothing to correct"
    return not_needed(why) if off else no_equal(why)


PREFIXES: dict[str, Rule] = {
    **named_below(
        "data.",
        "seed val_batch_size dataloader_num_workers max_prompt_length truncation filter_overlong_prompts tokenizer"
        " use_shm reward_fn_key max_response return_ image_patch validation_shuffle video_key trust_remote sampler."
        " datagen. apply_chat tool_config",
        _LOADING,
    ),
    **named_below(MODEL, "pipeline. algo.", sampling.training_copy),
    **named_below(
        MODEL,
        "attn_backend extra_tokenizers fsdp_layer_prefixes model_type mtp tokenizer_path use_shm policy_state_adapters",
        ignored("a matter of how the model is run"),
    ),
    **named_below(ACTOR, "fsdp_config. strategy veomni_config", ignored(_SHARDING)),
    **named_below(ACTOR, "checkpoint. shuffle data_loader_seed use_no_sync", ignored(_LAUNCH)),
    **named_below(
        ROLLOUT,
        "name mode nnodes n_gpus dtype gpu_memory enforce_eager cudagraph free_cache tensor_model data_parallel"
        " expert_parallel pipeline_model max_num max_model enable_ engine_kwargs agent. load_format layered_summon"
        " log_prob_micro prompt_length rollout_attn calculate_log_probs rollout_adapter checkpoint_engine"
        " step_execution max_prompt_embed skip_tokenizer disable_log scheduling_policy logprobs_mode prometheus",
        ignored(_ENGINE),
    ),
    "actor_rollout_ref.ref.": ignored("the reference is the model at its start"),
    "diffusion/": ignored(_SHARDING),
    **dict.fromkeys(
        (f"{PIPELINE}output_type", f"{VALIDATION}pipeline.output_type"),
        only_at("pil", "np", "pt", why="rewards see pictures", otherwise="rewards see decoded pictures"),
    ),
    "reward.reward_functions[].": lambda s: no_equal("a setting of a reward that you write"),
    "actor_rollout_ref.hybrid_engine": ignored(_ENGINE),
    "actor_rollout_ref.nccl_timeout": ignored(_LAUNCH),
    **named_below("reward.", "num_workers reward_model. reward_manager. models. sandbox", ignored(_SERVER)),
    **named_below(
        "trainer.",
        "project_name experiment_name default_ rollout_data validation_data video_fps",
        ignored(_RUN_FOLDER),
    ),
    **named_below("trainer.", "logger log_val", ignored("metrics go to the run folder and its report")),
    **named_below("trainer.", "n_gpus nnodes device use_v1 ray_ esi_ del_local v1.s v1.colocate", ignored(_LAUNCH)),
    **named_below("", "ray_kwargs transfer_queue skip. hydra.", ignored(_LAUNCH)),
    **dict.fromkeys(
        ("global_profiler", f"{ACTOR}profiler", f"{ROLLOUT}profiler", "reward.reward_model.rollout.profiler"),
        ignored(_PROFILER),
    ),
    **dict.fromkeys(("algorithm.rollout_correction.", f"{ACTOR}rollout_correction."), _correction),
    f"{ACTOR}rollout_n": ignored("that of the rollout"),
    f"{ACTOR}distill": ignored("there is no distillation"),
    **named_below(DIFFUSION_LOSS, "kl_mask add_kl mse_ ratio_norm", _OTHER_LOSS),
    f"{VALIDATION}algo.": ignored("evaluations add no noise"),
}
