"""Every public configuration of flow_grpo and Flow-Factory as what it means here, from tables of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo.config import Config, RewardTerm
from progrpo.imports.flow_factory.read import import_flow_factory
from progrpo.imports.flow_grpo.read import import_flow_grpo

SD35, FLUX, KONTEXT = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "FLUX.1-Kontext-dev"


def values(config: Config, paths: dict[str, Any]) -> dict[str, Any]:
    """The configuration's values at these paths, each written as `part.field`."""
    by_path: dict[str, Any] = {}
    for path in paths:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        by_path[path] = value
    return by_path


# --- flow_grpo --------------------------------------------------------------------------------------------------------

ATTENTION = {f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")}
ATTENTION |= {"attn.to_add_out"}
FF = {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
MLP = {f"{stream}_mlp.{n}" for stream in ("img", "txt") for n in ("net.0.proj", "net.2")}

BASE: dict[str, Any] = {
    **{"run_name": "", "debug": True, "num_epochs": 100000, "resume_from": None, "seed": 42, "logdir": "logs"},
    **{"save_freq": 20, "eval_freq": 20, "num_checkpoint_limit": 5, "mixed_precision": "fp16", "allow_tf32": True},
    **{"use_lora": True, "dataset": "", "resolution": 768, "activation_checkpointing": False},
    **{"fsdp_optimizer_offload": False, "prompt_fn": "imagenet_animals", "prompt_fn_kwargs": {}, "save_dir": ""},
    **{"per_prompt_stat_tracking": True, "pretrained.model": "runwayml/stable-diffusion-v1-5"},
    **{"pretrained.revision": "main", "sample.num_steps": 40, "sample.eval_num_steps": 40},
    **{"sample.guidance_scale": 4.5, "sample.eval_guidance_scale": 4.5, "sample.train_batch_size": 1},
    **{"sample.num_image_per_prompt": 1, "sample.test_batch_size": 1, "sample.num_batches_per_epoch": 2},
    **{"sample.global_std": True, "sample.noise_level": 0.7, "sample.same_latent": False},
    **{"sample.sde_window_size": 2, "sample.sde_window_range": (0, 10), "train.batch_size": 1},
    **{"train.use_8bit_adam": False, "train.learning_rate": 3e-4, "train.adam_beta1": 0.9, "train.adam_beta2": 0.999},
    **{"train.adam_weight_decay": 1e-4, "train.adam_epsilon": 1e-8, "train.gradient_accumulation_steps": 1},
    **{"train.max_grad_norm": 1.0, "train.num_inner_epochs": 1, "train.cfg": True, "train.adv_clip_max": 5},
    **{"train.clip_range": 1e-4, "train.clip_range_lt": 1e-4, "train.clip_range_gt": 1e-4, "train.timestep_shift": 3.0},
    **{"train.timestep_fraction": 1.0, "train.beta": 0.0, "train.lora_path": None, "train.ema": False},
    **{"reward_fn": {"jpeg_compressibility": 1}},
}


def batches(gpus: int, batch: int, group: int, prompts: int, **more: Any) -> dict[str, Any]:
    """The settings that its functions compute: batches of an epoch, of which half make an update."""
    count = int(prompts / (gpus * batch / group))
    return {
        "gpus": gpus,
        "sample.train_batch_size": batch,
        "sample.num_image_per_prompt": group,
        "sample.num_batches_per_epoch": count,
        "train.batch_size": batch,
        "train.gradient_accumulation_steps": count // 2,
        **more,
    }


def sd3(kind: str, reward: dict[str, float], **more: Any) -> dict[str, Any]:
    columns = "geneval" if kind == "geneval" else "general_ocr"
    fixed = {"pretrained.model": SD35, "sample.num_steps": 10, "sample.eval_num_steps": 40, "resolution": 512}
    fixed |= {"train.timestep_fraction": 0.99, "train.ema": True, "save_freq": 60, "eval_freq": 60}
    return {**fixed, "dataset": f"dataset/{kind}", "prompt_fn": columns, "reward_fn": reward, **more}


def flux(kind: str, reward: dict[str, float], **more: Any) -> dict[str, Any]:
    own = {"pretrained.model": FLUX, "sample.num_steps": 6, "sample.eval_num_steps": 28, "sample.guidance_scale": 3.5}
    own |= {"sample.noise_level": 0.9, "mixed_precision": "bf16", "save_freq": 30, "eval_freq": 30}
    return {**sd3(kind, reward), **own, **more}


def fast(last: int, **more: Any) -> dict[str, Any]:
    window = {"sample.sde_window_size": 3, "sample.sde_window_range": (0, last), "sample.sde_type": "cps"}
    return {**window, "sample.noise_level": 0.8, "train.clip_range": 1e-5, "train.timestep_fraction": 1.0, **more}


def qwen(gpus: int, model: str = "Qwen/Qwen-Image", **more: Any) -> dict[str, Any]:
    own = {"pretrained.model": model, "sample.eval_num_steps": 50, "sample.guidance_scale": 4, "train.ema": False}
    own |= {"sample.noise_level": 1.2, "sample.sde_window_size": 2, "sample.sde_window_range": (0, 5)}
    own |= {"mixed_precision": "bf16", "activation_checkpointing": True, "fsdp_optimizer_offload": True}
    own |= {"train.timestep_fraction": 1.0, "save_freq": 30, "eval_freq": 30}
    return {**sd3("pickscore", {"pickscore": 1.0}), **batches(gpus, 4, 16, 32), **own, **more}


def guard(kind: str, reward: dict[str, float], clip: float) -> dict[str, Any]:
    own = {"run_name": "X", "run_project": "X", "save_freq": 30, "eval_freq": 30, "rationorm": True}
    own |= {"train.clip_range": clip, "train.highclip_range": clip, "train.learning_rate": 1e-4}
    return {**sd3(kind, reward), **batches(16, 9, 24, 48), "sample.global_std": False, **own}


WAN = {
    **{"pretrained.model": "hf_cache/Wan2.1-T2V-1.3B-Diffusers", "sample.num_steps": 20, "sample.eval_num_steps": 50},
    **{"height": 240, "width": 416, "frames": 33, "sample.train_batch_size": 8, "sample.num_image_per_prompt": 4},
    **{"sample.num_batches_per_epoch": 2, "sample.sample_time_per_prompt": 1, "train.batch_size": 8},
    **{"train.timestep_fraction": 0.99, "train.beta": 0.004, "train.learning_rate": 1e-4, "train.clip_range": 1e-3},
    **{"sample.kl_reward": 0, "train.sft": 0.0, "train.sft_batch_size": 3, "sample.global_std": False},
    **{"train.ema": True, "mixed_precision": "bf16", "diffusion_loss": True, "save_freq": 60, "eval_freq": 30},
    **{"dataset": "dataset/ocr", "prompt_fn": "general_ocr", "reward_fn": {"video_ocr": 1.0}},
}

ONE, NONE = {"pickscore": 1.0}, {"sampling.sde_window": "auto", "sampling.sampler": "auto"}
_SD3 = {
    **{"model.path": SD35, "model.lora_rank": 32, "model.lora_alpha": 64, "model.max_sequence_length": 128},
    **{"model.resolution": 512, "model.dtype": "float16", "sampling.num_inference_steps": 10},
    **{"sampling.guidance_scale": 4.5, "sampling.embedded_guidance": False, "sampling.noise_level": 0.7},
    **{"sampling.same_latent": False, "eval.num_inference_steps": 40, "eval.guidance_scale": 4.5, "eval.every": 60},
    **{"plan.preset": "custom", "plan.group_size": 24, "plan.prune": (), "prompts.per_iteration": 48},
    **{"objective.name": "grpo", "objective.advantage": "batch", "objective.adv_eps": 1e-4},
    **{"objective.grpo.clip_range": 1e-4, "objective.grpo.adv_clip_max": 5.0, "objective.grpo.ratio": "plain"},
    **{"optim.lr": 3e-4, "optim.updates_per_rollout": 2, "optim.microbatch": 9, "sampling.microbatch": 9, **NONE},
    "optim.ema_decay": pytest.approx(0.9 ** (4 / 8), abs=1e-4),
}
_OF_4_GPUS = {
    **{"plan.group_size": 16, "prompts.per_iteration": 16, "sampling.microbatch": 8, "optim.microbatch": 8},
    "optim.ema_decay": pytest.approx(0.9, abs=1e-4),
}
_FAST = {
    **{"sampling.sde_window": "random", "sampling.sde_window_size": 3, "sampling.sde_window_end": 5},
    **{"sampling.sampler": "cps_reduced", "sampling.noise_level": 0.8, "objective.grpo.clip_range": 1e-5},
}
_NO_CFG = {**_FAST, "sampling.guidance_scale": 1.0, "eval.guidance_scale": 1.0}
_FLUX = {
    **_SD3,
    **{"model.path": FLUX, "model.lora_rank": 64, "model.lora_alpha": 128, "model.dtype": "bfloat16"},
    **{"sampling.num_inference_steps": 6, "sampling.guidance_scale": 3.5, "sampling.embedded_guidance": True},
    **{"sampling.noise_level": 0.9, "eval.num_inference_steps": 28, "eval.guidance_scale": 3.5, "eval.every": 30},
    **{"sampling.microbatch": 3, "optim.microbatch": 3, "objective.grpo.kl_beta": 0.0},
    "optim.ema_decay": pytest.approx(0.9 ** (12 / 8), abs=1e-4),
}
_QWEN = {
    **_SD3,
    **{"model.path": "Qwen/Qwen-Image", "model.lora_rank": 64, "model.lora_alpha": 128, "model.dtype": "bfloat16"},
    **{"model.max_sequence_length": 512, "model.activation_checkpointing": True, "sampling.guidance_scale": 4.0},
    **{"sampling.noise_level": 1.2, "sampling.sde_window": "random", "sampling.sde_window_size": 2},
    **{"sampling.sde_window_end": 5, "eval.num_inference_steps": 50, "eval.guidance_scale": 4.0, "eval.every": 30},
    **{"plan.group_size": 16, "prompts.per_iteration": 32, "sampling.microbatch": 4, "optim.microbatch": 4},
    "optim.ema_decay": 0.0,
}
_GUARD = {
    **_SD3,
    **{"objective.grpo.ratio": "guard", "objective.grpo.step_weights": "inverse_h", "objective.advantage": "group"},
    **{"objective.grpo.clip_range": 2e-6, "objective.grpo.kl_beta": 0.0, "optim.lr": 1e-4, "eval.every": 30},
    "optim.ema_decay": pytest.approx(0.9, abs=1e-4),
}
_WAN = {
    **{"model.path": "hf_cache/Wan2.1-T2V-1.3B-Diffusers", "model.resolution": (240, 416), "model.frames": 33},
    **{"model.lora_rank": 32, "model.lora_alpha": 64, "model.max_sequence_length": 512, "model.dtype": "bfloat16"},
    **{"model.activation_checkpointing": True, "sampling.sampler": "flow_grpo_wan", "sampling.noise_level": None},
    **{"sampling.num_inference_steps": 20, "sampling.guidance_scale": 4.5, "eval.guidance_scale": 4.5},
    **{"eval.num_inference_steps": 50, "eval.every": 30, "plan.group_size": 4, "prompts.per_iteration": 32},
    **{"objective.grpo.kl_beta": 0.004, "objective.grpo.kl_form": "exact", "objective.grpo.clip_range": 1e-3},
    **{"objective.advantage": "group", "optim.lr": 1e-4, "sampling.sde_window": "auto"},
}


def kl(beta: float, form: str = "flow_grpo") -> dict[str, Any]:
    return {"objective.grpo.kl_beta": beta, **({"objective.grpo.kl_form": form} if beta else {})}


OCR, GENEVAL, PICKSCORE = (RewardTerm("ocr"),), (RewardTerm("geneval_flow_grpo"),), (RewardTerm("pickscore"),)
CLIP = RewardTerm("clipscore", round(100 / 30 / 2.5, 9))
EDITED = {"image_similarity": 0.2, "geneval": 0.8}

# function -> its settings, layers of the LoRA, rewards, and what else it means
GRPO: dict[str, tuple[dict[str, Any], set[str], tuple[RewardTerm, ...], dict[str, Any]]] = {
    "general_ocr_wan2_1": (
        {**WAN, "gpus": 8},
        {"to_q", "to_k", "to_v", "to_out.0"},
        (RewardTerm("my_rewards:video_ocr"),),
        {**_WAN, "prompts.per_iteration": 32},
    ),
    "general_ocr_sd3": (
        sd3("ocr", {"ocr": 1.0}, **batches(32, 9, 24, 48), **{"train.beta": 0.04}),
        ATTENTION,
        OCR,
        {**_SD3, **kl(0.04), "prompts.source": "dataset/ocr/train.txt"},
    ),
    "geneval_sd3": (
        sd3("geneval", {"geneval": 1.0}, **batches(32, 9, 24, 48), **{"train.beta": 0.04}),
        ATTENTION,
        GENEVAL,
        {**_SD3, **kl(0.04), "prompts.source": "dataset/geneval/train_metadata.jsonl"},
    ),
    "geneval_sd3_fast_nocfg": (
        sd3(
            "geneval",
            {"geneval": 1.0},
            **batches(32, 9, 24, 48),
            **fast(5, **{"sample.guidance_scale": 1, "sample.eval_guidance_scale": 1, "train.cfg": False}),
        ),
        ATTENTION,
        GENEVAL,
        {**_SD3, **_NO_CFG, **kl(0.0)},
    ),
    "pickscore_sd3": (
        sd3("pickscore", ONE, **batches(32, 9, 24, 48), **{"train.beta": 0.01}),
        ATTENTION,
        PICKSCORE,
        {**_SD3, **kl(0.01)},
    ),
    "clipscore_sd3": (
        sd3(
            "pickscore",
            {"clipscore": 1.0},
            **batches(32, 9, 24, 48),
            **{"train.beta": 0.02, "sample.same_latent": True},
        ),
        ATTENTION,
        (CLIP,),
        {**_SD3, **kl(0.02), "sampling.same_latent": True},
    ),
    "pickscore_sd3_fast": (
        sd3(
            "pickscore",
            ONE,
            **batches(32, 9, 24, 48),
            **{"sample.train_num_steps": 2, "sample.noise_level": 0.8, "train.clip_range": 1e-5},
        )
        | {"sample.train_batch_size": 1, "sample.mini_num_image_per_prompt": 9},
        ATTENTION,
        PICKSCORE,
        {
            **_SD3,
            **{"sampling.sde_window": "random", "sampling.sde_window_size": 2, "sampling.noise_level": 0.8},
            **{"objective.grpo.clip_range": 1e-5, "sampling.sde_window_end": 7},
        },
    ),
    "pickscore_sd3_fast_nocfg": (
        sd3(
            "pickscore",
            ONE,
            **batches(32, 9, 18, 64),
            **fast(5, **{"sample.guidance_scale": 1, "sample.eval_guidance_scale": 1, "train.cfg": False}),
        ),
        ATTENTION,
        PICKSCORE,
        {**_SD3, **_NO_CFG, "plan.group_size": 18, "prompts.per_iteration": 64},
    ),
    "general_ocr_sd3_4gpu": (
        sd3("ocr", {"ocr": 1.0}, **batches(4, 8, 16, 16), **{"train.beta": 0.04}),
        ATTENTION,
        OCR,
        {**_SD3, **_OF_4_GPUS, **kl(0.04)},
    ),
    "pickscore_sd3_4gpu": (
        sd3("pickscore", ONE, **batches(4, 8, 16, 16), **{"train.beta": 0.01}),
        ATTENTION,
        PICKSCORE,
        {**_SD3, **_OF_4_GPUS, **kl(0.01)},
    ),
    "general_ocr_sd3_1gpu": (
        sd3("ocr", {"ocr": 1.0}, **batches(1, 8, 8, 8), **{"train.beta": 0.04}),
        ATTENTION,
        OCR,
        {**_SD3, **_OF_4_GPUS, **kl(0.04), "plan.group_size": 8, "prompts.per_iteration": 8},
    ),
    "pickscore_flux": (flux("pickscore", ONE, **batches(32, 3, 24, 48)), ATTENTION | FF, PICKSCORE, _FLUX),
    "pickscore_flux_8gpu": (
        flux("pickscore", ONE, **batches(8, 3, 24, 48)),
        ATTENTION | FF,
        PICKSCORE,
        {**_FLUX, "optim.ema_decay": pytest.approx(0.9**6, abs=1e-4)},
    ),
    "geneval_flux_fast": (
        flux("geneval", {"geneval": 1.0}, **batches(32, 3, 24, 48), **fast(3, **{"sample.eval_guidance_scale": 3.5})),
        ATTENTION | FF,
        GENEVAL,
        {**_FLUX, **_FAST, "sampling.sde_window_end": 3},
    ),
    "pickscore_flux_fast": (
        flux(
            "pickscore",
            ONE,
            **batches(32, 3, 24, 48),
            **fast(3, **{"sample.eval_guidance_scale": 3.5, "sample.global_std": False}),
        ),
        ATTENTION | FF,
        PICKSCORE,
        {**_FLUX, **_FAST, "sampling.sde_window_end": 3, "objective.advantage": "group"},
    ),
    "counting_flux_kontext": (
        flux("counting_edit", {"image_similarity": 0.5, "geneval": 0.5}, **batches(28, 3, 21, 48))
        | {"pretrained.model": f"black-forest-labs/{KONTEXT}", "sample.guidance_scale": 2.5},
        ATTENTION | FF | {"proj_mlp"},
        (RewardTerm("clip_similarity", 0.5), RewardTerm("geneval_flow_grpo", 0.5)),
        {
            **_FLUX,
            **{"model.path": f"black-forest-labs/{KONTEXT}", "sampling.guidance_scale": 2.5},
            **{"eval.guidance_scale": 2.5, "plan.group_size": 21},
            "prompts.source": "dataset/counting_edit/train_metadata.jsonl",
        },
    ),
    "pickscore_qwenimage": (qwen(32), ATTENTION | MLP, PICKSCORE, _QWEN),
    "pickscore_qwenimage_8gpu": (qwen(8), ATTENTION | MLP, PICKSCORE, _QWEN),
    "general_ocr_sd3_rationorm": (
        guard("ocr", {"ocr": 1.0, "pickscore": 0.0}, 2e-6),
        ATTENTION,
        (RewardTerm("ocr"), RewardTerm("pickscore", 0.0)),
        _GUARD,
    ),
    "pickscore_hps_sd3_ratio_norm": (
        guard("pickscore", ONE, 4e-6),
        ATTENTION,
        PICKSCORE,
        {**_GUARD, "objective.grpo.clip_range": 4e-6},
    ),
    "geneval_sd3_rationorm": (
        guard("geneval", {"geneval": 1.0, "pickscore": 0.0}, 2e-6) | {"train_attribute": None},
        ATTENTION,
        (RewardTerm("geneval_flow_grpo"), RewardTerm("pickscore", 0.0)),
        _GUARD,
    ),
}

_DPO = {"sample.num_steps": 40, "train.beta": 100, "train.ref_update_step": 10000000, **batches(1, 24, 24, 1)}
_DPO |= {"train.gradient_accumulation_steps": 1, "train.algorithm": "dpo"}
_PAIRS = {
    **_SD3,
    **{"sampling.num_inference_steps": 40, "sampling.sde_window": "all", "plan.final_keep": 2},
    **{"prompts.per_iteration": 1, "sampling.microbatch": 24, "optim.microbatch": 24, "objective.name": "dpo"},
    **{"objective.advantage": "group", "objective.dpo.beta": 50.0, "objective.dpo.draws": 39},
    **{"optim.updates_per_rollout": 1, "optim.ema_decay": pytest.approx(0.9 ** (1 / 8), abs=1e-4)},
}
for _name in ("objective.grpo.clip_range", "objective.grpo.adv_clip_max", "objective.grpo.ratio"):
    del _PAIRS[_name]
_EDIT = {**_QWEN, "prompts.source": "dataset/counting_edit/train_metadata.jsonl"}
_SIMILAR = (RewardTerm("clip_similarity", 0.2), RewardTerm("geneval_flow_grpo", 0.8))


def edit(gpus: int, model: str = "Qwen/Qwen-Image-Edit") -> dict[str, Any]:
    return qwen(gpus, model, reward_fn=EDITED, dataset="dataset/counting_edit")


GRPO |= {
    "geneval_sd3_dpo": (
        sd3("geneval", {"geneval": 1.0}, **_DPO),
        ATTENTION,
        GENEVAL,
        {**_PAIRS, "prompts.source": "dataset/geneval/train_metadata.jsonl"},
    ),
    "pickscore_sd3_dpo": (sd3("pickscore", ONE, **_DPO), ATTENTION, PICKSCORE, _PAIRS),
    "counting_qwenimage_edit": (edit(32), ATTENTION | MLP, _SIMILAR, {**_EDIT, "model.path": "Qwen/Qwen-Image-Edit"}),
    "counting_qwenimage_edit_fast": (
        edit(32),
        ATTENTION | MLP,
        _SIMILAR,
        {**_EDIT, "model.path": "Qwen/Qwen-Image-Edit"},
    ),
    "counting_qwenimage_edit_8gpu": (
        edit(8),
        ATTENTION | MLP,
        _SIMILAR,
        {**_EDIT, "model.path": "Qwen/Qwen-Image-Edit"},
    ),
    "repairany_qwenimage_edit_plus_fast": (
        edit(2, "Qwen/Qwen-Image-Edit-2509"),
        ATTENTION | MLP,
        _SIMILAR,
        {**_EDIT, "model.path": "Qwen/Qwen-Image-Edit-2509"},
    ),
}
_BAGEL = sd3("pickscore", ONE, **batches(32, 6, 16, 48), **{"pretrained.model": "ByteDance-Seed/BAGEL-7B-MoT"})
_NOT_GRPO = "has no equal here: only GRPO and DPO are translated from flow_grpo"
REFUSED = {
    "compressibility": ({"pretrained.model": SD35, "gpus": 1}, "plan.group_size must be between 2"),
    "pickscore_bagel": (_BAGEL, "is a BAGEL, which cannot be trained here"),
    "pickscore_bagel_lora": (_BAGEL, "is a BAGEL, which cannot be trained here"),
    **{
        f"{task}_sd3_sft": (
            sd3(task, {task: 1.0}, **{**_DPO, "train.algorithm": "sft"}),
            f"train.algorithm 'sft' {_NOT_GRPO}",
        )
        for task in ("geneval", "pickscore")
    },
    **{
        f"gardo_{i}": (
            sd3("ocr", reward, **batches(8, 9, 24, 48), **{"train.algorithm": "gardo", "reset_freq": 15}),
            f"train.algorithm 'gardo' {_NOT_GRPO}",
        )
        for i, reward in enumerate(({"ocr": 0.8}, {"geneval": 0.8}, {"hpsv2_score": 0.8}))
    },
}


def imported(folder: Path, function: str, settings: dict[str, Any], **options: Any):
    """A base and a function in the syntax of flow_grpo's files."""

    def lines(data: dict[str, Any], made: set[str]) -> list[str]:
        out = []
        for name, value in data.items():
            head = name.rpartition(".")[0]
            if head and head not in made:
                out.append(f"config.{head} = ml_collections.ConfigDict()")
                made.add(head)
            out.append(f"config.{name} = {value!r}")
        return out

    def written(name: str, body: list[str], top: str) -> str:
        return "\n    ".join([f"{top}\ndef {name}():", *body, "return config"]) + "\n"

    config = folder / "config"
    config.mkdir()
    made: set[str] = set()
    base = ["config = ml_collections.ConfigDict()", *lines(BASE, made)]
    (config / "base.py").write_text(written("get_config", base, "import ml_collections\n"))
    gpus = settings.get("gpus")
    own = {name: value for name, value in settings.items() if name != "gpus"}
    count = [f"gpu_number = {gpus}"] if gpus else []
    top = 'import imp, os\nbase = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))\n'
    body = [*count, "config = base.get_config()", *lines(own, made)]
    (config / "grpo.py").write_text(written(function, body, top))
    return import_flow_grpo(f"{config / 'grpo.py'}:{function}", **options)


@pytest.mark.parametrize("function", GRPO)
def test_flow_grpos_function(tmp_path, function):
    settings, layers, rewards, expected = GRPO[function]
    translation = imported(tmp_path, function, settings)
    assert values(translation.config, expected) == expected
    assert set(translation.config.model.lora_targets) == layers
    assert translation.config.reward.terms == rewards
    assert not [row for row in translation.rows if row.outcome.note == "not a setting that this import knows"]


@pytest.mark.parametrize("function", REFUSED)
def test_flow_grpos_function_that_cannot_be_run(tmp_path, function):
    settings, sentence = REFUSED[function]
    with pytest.raises(ValueError) as refused:
        imported(tmp_path, function, settings)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_an_algorithm_that_cannot_be_read_is_refused(tmp_path):
    settings = sd3("ocr", {"ocr": 1.0}, **batches(1, 8, 8, 8), **{"train.algorithm": "grpo"})
    assert imported(tmp_path, "same", settings).config.objective.name == "grpo"
    file = tmp_path / "config" / "grpo.py"
    file.write_text(file.read_text().replace("config.train.algorithm = 'grpo'", "config.train.algorithm = chosen()"))
    with pytest.raises(ValueError, match=r"train.algorithm could not be read \(line \d+\); only GRPO and DPO are"):
        import_flow_grpo(f"{file}:same")


def test_what_differs_in_flow_grpos_dpo_is_listed(tmp_path):
    settings = sd3("pickscore", ONE, **{**_DPO, "train.ref_update_step": 40})
    rows = {row.name: row.outcome.status for row in imported(tmp_path, "pairs", settings).rows}
    differs = ("script.sampling_policy", "script.noise_levels", "train.ref_update_step")
    assert {rows[name] for name in differs} == {"no equal here"}
    unread = ("train.clip_range", "train.adv_clip_max", "sample.global_std", "train.cfg", "sample.sde_window_size")
    assert {rows[name] for name in unread} == {"not needed here"}


@pytest.mark.parametrize(
    ("theirs", "ours", "factor", "fate"),
    [
        ("pickscore", "pickscore", 1.0, "translated"),
        ("imagereward", "imagereward", 1.0, "translated"),
        ("aesthetic", "aesthetic", 1.0, "translated"),
        ("hpsv2_score", "hpsv2", 1.0, "translated"),
        ("ocr", "ocr", 1.0, "translated"),
        ("geneval", "geneval_flow_grpo", 1.0, "translated"),
        ("jpeg_compressibility", "jpeg_compressibility", 1 / 500, "translated"),
        ("clipscore", "clipscore", 4 / 3, "no equal here"),
        ("video_ocr", "my_rewards:video_ocr", 1.0, "no equal here"),
        ("deqa", "deqa", 1 / 5, "no equal here"),
        ("qwenvl", "my_rewards:qwenvl", 1.0, "no equal here"),
        ("unifiedreward", "unifiedreward", 1.0, "no equal here"),
        ("image_similarity", "clip_similarity", 1.0, "no equal here"),
    ],
)
def test_flow_grpos_rewards_keep_their_share_of_the_sum(tmp_path, theirs, ours, factor, fate):
    translation = imported(tmp_path, "task", sd3("ocr", {theirs: 3.0}, **batches(1, 8, 8, 8)))
    (term,) = translation.config.reward.terms
    assert (term.name, term.weight) == (ours, pytest.approx(3 * factor, rel=1e-6))
    assert {row.outcome.status for row in translation.rows if row.name.startswith("reward_fn")} == {fate}


@pytest.mark.parametrize(("use_lora", "expected"), [(True, "runs/lora"), (False, "")])
def test_a_lora_of_flow_grpo_is_trained_further(tmp_path, use_lora, expected):
    more = {"train.lora_path": "runs/lora", "use_lora": use_lora}
    translation = imported(tmp_path, "task", sd3("ocr", {"ocr": 1.0}, **batches(1, 8, 8, 8), **more))
    assert translation.config.model.lora == expected


# --- Flow-Factory -----------------------------------------------------------------------------------------------------


def term(model: str, weight: float | None = None, **more: Any) -> dict[str, Any]:
    weighed = {} if weight is None else {"weight": weight}
    return (
        {"name": model, "reward_model": model, "batch_size": 16, "device": "cuda", "dtype": "bfloat16"} | weighed | more
    )


def ours(name: str, weight: float = 1.0) -> RewardTerm:
    """Their PickScore reads no dtype."""
    return RewardTerm(
        name, weight, batch_size=16, device="cuda", dtype="float32" if name == "pickscore" else "bfloat16"
    )


def of(model: str, kind: str, rank: int | None, train: dict, noise: dict, rewards: Any, lr: float = 3e-4, **more: Any):
    """A file: `rank` of a LoRA, or None for all weights."""
    lora = {"finetune_type": "full"} if rank is None else {"finetune_type": "lora", "lora_rank": rank}
    fixed: dict[str, Any] = {
        "per_device_batch_size": 1,
        "group_size": 16,
        "global_std": False,
        "unique_sample_num_per_epoch": 48,
    }
    fixed |= {"gradient_step_per_epoch": 2, "gradient_accumulation_steps": "auto", "clip_range": 1e-4, "seed": 42}
    fixed |= {"adv_clip_range": 5.0, "kl_type": "v-based", "kl_beta": 0, "ema_decay": 0.9, "ema_update_interval": 4}
    evaluation = {"resolution": train["resolution"], "num_inference_steps": 28, "eval_freq": 20, "seed": 42}
    return {
        **{"num_processes": 8, "mixed_precision": "bf16", "data": {"datasets": [{"name": "default"}]}},
        "model": {"model_name_or_path": model, "model_type": kind, "target_modules": "default", **lora},
        "train": {**fixed, "advantage_aggregation": "gdpo", "trainer_type": "grpo", **train},
        "scheduler": noise,
        "eval": {**evaluation, "guidance_scale": train["guidance_scale"], **more.pop("eval", {})},
        "rewards": rewards,
        "optimizers": [{"name": "default", "learning_rate": lr, "betas": [0.9, 0.999], "eps": 1e-8}],
        **more,
    }


def sde(noise: float, steps: list[int], size: int = 1, kind: str = "Flow-SDE", **more: Any) -> dict[str, Any]:
    return {"dynamics_type": kind, "noise_level": noise, "num_sde_steps": size, "sde_steps": steps, "seed": 42, **more}


ODE = {"dynamics_type": "ODE"}
BOTH = [term("CLIP", 1.0), term("PickScore", 0.5)]
OLD = {"off_policy": True, "ema_decay_schedule": "piecewise_linear", "flat_steps": 0, "ramp_rate": 0.001}
OLD |= {"ema_decay": 0.5, "ema_update_interval": 1}


def size(resolution: Any, steps: int, guidance: float, **more: Any) -> dict[str, Any]:
    return {"resolution": resolution, "num_inference_steps": steps, "guidance_scale": guidance, **more}


def nft(beta: float, draws: int | None, share: float, **more: Any) -> dict[str, Any]:
    own = {"trainer_type": "nft", "nft_beta": beta, "num_train_timesteps": draws, "timestep_range": share}
    return {**own, **OLD, "time_sampling_strategy": "discrete", "gradient_step_per_epoch": 1, **more}


def awm(draws: int, share: float, ema_kl: float, **more: Any) -> dict[str, Any]:
    own = {"trainer_type": "awm", "awm_weighting": "ghuber", "ghuber_power": 0.25, "num_train_timesteps": draws}
    own |= {"timestep_range": share, "clip_range": 1, "adv_clip_range": 1.0, "kl_weight": "Uniform"}
    own |= {"ema_kl_beta": ema_kl, "advantage_aggregation": "sum", "off_policy": False}
    return {**own, **more}


SUM: dict[str, Any] = {
    "advantage_aggregation": "sum",
    "global_std": True,
    "ema_decay": 0.99,
    "per_device_batch_size": 8,
}
DGPO: dict[str, Any] = {
    **{"trainer_type": "dgpo", "advantage_aggregation": "sum", "dpo_beta": 10, "use_shared_noise": True},
    **{"clip_dsm": True, "clip_kl": False, "switch_ema_ref": 200, "kl_cfg": 1.0, "use_ema_ref": False},
    **{"off_policy": False, "ema_decay_schedule": "constant", "ema_update_interval": 8, "ema_ref_max_decay": 0.3},
    **{"ema_ref_ramp_rate": 0.001, "num_train_timesteps": 4, "timestep_range": 0.6, "kl_beta": 0.001},
    **{"clip_range": 5e-2, "per_device_batch_size": 12, "group_size": 24, "global_std": True},
    **{"unique_sample_num_per_epoch": 24, "gradient_step_per_epoch": 1},
}


def klein(which: str) -> str:
    return f"black-forest-labs/FLUX.2-klein-{which}"


def window(noise: float, end: int, size: int = 1, sampler: str = "flow_grpo") -> dict[str, Any]:
    settings = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return {**settings, "sampling.noise_level": noise, "sampling.sampler": sampler}


def learns(name: str, **fields: Any) -> dict[str, Any]:
    own = {f"objective.{name}.{field}": value for field, value in fields.items()}
    return {"objective.name": name, **own, **({} if name == "grpo" else {"sampling.sde_window": "none"})}


CLIP_GDPO = (ours("clipscore"), ours("pickscore", 0.5))  # under gdpo a reward's scale is divided out
PICK = (ours("pickscore"),)
RANK = RewardTerm("my_rewards:PickScore_Rank", batch_size=16, device="cuda", dtype="bfloat16")
JUDGE = [term("rational_rewards_t2i", batch_size=8, api_base_url="http://127.0.0.1:8000/v1")]
JUDGED = RewardTerm("rationalrewards", url="http://127.0.0.1:8000/v1", batch_size=8, device="cuda", dtype="bfloat16")
WAN21 = "Wan-AI/Wan2.1-T2V-14B-Diffusers"

LAYERS = {
    "sd3-5": ATTENTION,
    "flux1": ATTENTION | FF,
    "flux1-kontext": ATTENTION | FF,
    "flux2-klein": ATTENTION
    | {f"{stream}.{n}" for stream in ("ff", "ff_context") for n in ("linear_in", "linear_out")}
    | {"attn.to_qkv_mlp_proj"},
    "qwen-image": ATTENTION | {"img_mlp.net.0.proj", "txt_mlp.net.0.proj"},
    "flux2": ATTENTION
    | {f"{stream}.{n}" for stream in ("ff", "ff_context") for n in ("linear_in", "linear_out")}
    | {"attn.to_qkv_mlp_proj"},
    "qwen-image-2.1": {f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    | {f"img_mlp.{n}" for n in ("proj", "gate_layer", "out")},
    "qwen-image-edit-plus": {n.removeprefix("attn.") for n in ATTENTION} | {"net.0.proj", "net.2"},
    "z-image": {f"attention.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    | {f"feed_forward.w{i}" for i in (1, 2, 3)},
    "wan2_i2v": {f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")}
    | {"ffn.net.0.proj", "ffn.net.2"},
    "wan2_t2v": {f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")}
    | {"ffn.net.0.proj", "ffn.net.2"},
}

# file -> its settings, the rewards, and what else it means
FACTORY: dict[str, tuple[dict[str, Any], tuple[RewardTerm, ...], dict[str, Any]]] = {
    "grpo/lora/sd3_5/default": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 10, 4.5, **SUM, group_size=24),
            sde(0.8, [1, 2, 3, 4, 5], 2),
            [term("PickScore")],
        ),
        PICK,
        {
            **{"model.path": SD35, "model.lora_rank": 32, "model.lora_alpha": 64, "plan.group_size": 24},
            **{"objective.advantage": "batch", "objective.adv_eps": 1e-6, "optim.lr": 3e-4, **window(0.8, 6, 2)},
            **learns("grpo", clip_range=1e-4, kl_beta=0.0, kl_form="velocity", ratio="plain"),
            "optim.ema_decay": pytest.approx(0.99**0.25, abs=1e-6),
        },
    ),
    "grpo/lora/sd3_5/nocfg": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 10, 1.0, **SUM, group_size=18, unique_sample_num_per_epoch=64),
            sde(0.8, [0, 1, 2, 3, 4], 3, "CPS"),
            [term("PickScore")],
        ),
        PICK,
        {**window(0.8, 5, 3, "cps_reduced"), "prompts.per_iteration": 64, "sampling.guidance_scale": 1.0},
    ),
    "grpo/lora/sd3_5/geneval": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 10, 1.0, **SUM, group_size=18, unique_sample_num_per_epoch=64),
            sde(0.8, [0, 1, 2, 3, 4], 3, "CPS"),
            [term("geneval")],
        ),
        (ours("geneval"),),
        {**window(0.8, 5, 3, "cps_reduced"), "plan.group_size": 18},
    ),
    "grpo/lora/sd3_5/multi_source": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 10, 1.0, **SUM, unique_sample_num_per_epoch=144),
            sde(0.8, [0, 1, 2, 3, 4], 3, "CPS"),
            [
                term("GenEval", 1, applicable_datasets=["geneval"]),
                term("OCR", 1, applicable_datasets=["ocr"]),
                term("PickScore") | {"weight": {"geneval": 0.2, "ocr": 0.2, "pickscore": 1.0}},
            ],
            data={"datasets": [{"name": n, "dataset_dir": f"dataset/{n}"} for n in ("geneval", "ocr", "pickscore")]},
        ),
        (ours("geneval"), ours("pickscore", 0.2)),
        {"prompts.source": "dataset/geneval/train.jsonl", "prompts.per_iteration": 144},
    ),
    "template/sd3_5/async_reward": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 10, 1.0, **SUM, group_size=24, unique_sample_num_per_epoch=64),
            sde(0.8, [0, 1, 2, 3, 4], 3, "CPS"),
            [
                term("PickScore", async_reward=False),
                {
                    **{"name": "judge", "reward_model": "vllm_evaluate", "batch_size": 16, "api_key": "EMPTY"},
                    **{"api_base_url": "http://localhost:8000/v1", "vlm_model": "Qwen3-VL", "timeout": 60},
                    **{"max_retries": 10, "max_concurrent": 100, "top_logprobs": 20, "async_reward": True},
                },
            ],
        ),
        (
            ours("pickscore"),
            RewardTerm(
                "vlm", model="Qwen3-VL", url="http://localhost:8000/v1", batch_size=16, retries=10, timeout=60.0
            ),
        ),
        {"plan.group_size": 24},
    ),
    "grpo/full/sd3_5/default": (
        of(SD35, "sd3-5", None, size(512, 10, 4.5), sde(0.7, [1, 2, 3]), BOTH, 1e-5),
        CLIP_GDPO,
        {"model.weights": "full", "objective.advantage": "gdpo", "optim.lr": 1e-5, **window(0.7, 4)},
    ),
    "grpo/lora/flux1/default": (
        of(
            FLUX,
            "flux1",
            64,
            size(512, 10, 3.5, per_device_batch_size=2),
            sde(0.7, [1, 2, 3]),
            [term("PickScore_Rank", 1.0)],
            eval_rewards=term("PickScore"),
        ),
        (RANK,),
        {"sampling.embedded_guidance": True, "model.lora_alpha": 128, "eval.rewards": PICK, **window(0.7, 4)},
    ),
    "grpo/full/flux1/default": (
        of(FLUX, "flux1", None, size(384, 10, 3.5), sde(0.7, [1, 2, 3]), BOTH, 1e-5),
        CLIP_GDPO,
        {"model.weights": "full", "model.resolution": 384, "sampling.embedded_guidance": True},
    ),
    **{
        f"grpo/{weights}/flux1_kontext/default": (
            of(
                f"black-forest-labs/{KONTEXT}",
                "flux1-kontext",
                rank,
                size(384, 10, 2.5, condition_image_size=384),
                sde(0.9, [1, 2, 3]),
                term("PickScore"),
                lr,
            ),
            PICK,
            {"model.weights": weights, "sampling.guidance_scale": 2.5, "sampling.embedded_guidance": True},
        )
        for weights, rank, lr in (("lora", 64, 3e-4), ("full", None, 1e-5))
    },
    "grpo/lora/flux2_klein/default": (
        of(klein("9B"), "flux2-klein", 64, size(384, 4, 1.0), sde(0.5, [1, 2]), [term("PickScore", 1)]),
        PICK,
        {"sampling.num_inference_steps": 4, "sampling.embedded_guidance": False, **window(0.5, 3)},
    ),
    "grpo/full/flux2_klein/default": (
        of(klein("4B"), "flux2-klein", None, size(384, 4, 1.0), sde(0.5, [1, 2]), [term("PickScore_Rank", 1)], 1e-5),
        (RANK,),
        {"model.weights": "full", **window(0.5, 3)},
    ),
    "grpo/lora/flux2_klein_base/default": (
        of(klein("base-9B"), "flux2-klein", 64, size(384, 8, 4.0), sde(0.7, [1, 2, 3]), [term("PickScore", 1)]),
        PICK,
        {"sampling.guidance_scale": 4.0, "sampling.embedded_guidance": False, **window(0.7, 4)},
    ),
    "grpo/full/flux2_klein_base/default": (
        of(klein("base-4B"), "flux2-klein", None, size(384, 8, 4.0), sde(0.7, [1, 2, 3]), [term("PickScore", 1)], 1e-5),
        PICK,
        {"model.weights": "full", "sampling.embedded_guidance": False},
    ),
    "grpo/lora/qwen_image/default": (
        of(
            "Qwen/Qwen-Image-2512",
            "qwen-image",
            64,
            size(512, 10, 4, enable_gradient_checkpointing=True),
            sde(1.0, [1, 2, 3]),
            BOTH,
        ),
        CLIP_GDPO,
        {"model.lora_alpha": 128, "model.activation_checkpointing": True, **window(1.0, 4)},
    ),
    "grpo/full/qwen_image/default": (
        of("Qwen/Qwen-Image", "qwen-image", None, size(384, 10, 4), sde(1.0, [1, 2, 3]), BOTH, 1e-5),
        CLIP_GDPO,
        {"model.weights": "full", "sampling.guidance_scale": 4.0},
    ),
    **{
        f"grpo/{weights}/wan21/t2v": (
            of(
                WAN21,
                "wan2_t2v",
                rank,
                size(256, 10, 5.0, num_frames=5),
                sde(0.9, [1, 2, 3], flow_shift=3.0),
                BOTH,
                1e-4,
            ),
            CLIP_GDPO,
            {"model.frames": 5, "reward.frames": 5, "sampling.shift": 3.0, "model.weights": weights, **window(0.9, 4)},
        )
        for weights, rank in (("lora", 64), ("full", None))
    },
    "nft/lora/sd3_5/default": (
        of(
            SD35,
            "sd3-5",
            32,
            size(512, 14, 1.0, **nft(1.0, 4, 0.5), advantage_aggregation="sum", per_device_batch_size=8),
            ODE,
            [term("PickScore", 1)],
            1e-4,
        ),
        PICK,
        {
            **learns("nft", beta=1.0, draws=4, time_fraction=0.5, kl_beta=0.0, adv_clip_max=5.0),
            **{"objective.advantage": "group", "optim.updates_per_rollout": 1, "optim.ema_decay": 0.0},
        },
    ),
    "nft/lora/flux1/default": (
        of(
            FLUX,
            "flux1",
            64,
            size(384, 8, 1.0, **nft(1, 2, 0.7), advantage_aggregation="sum"),
            ODE,
            [term("PickScore")],
        ),
        PICK,
        learns("nft", beta=1.0, draws=2, time_fraction=0.7),
    ),
    "nft/full/flux1/default": (
        of(
            FLUX,
            "flux1",
            None,
            size(384, 8, 1.0, **nft(1, 2, 0.7), advantage_aggregation="sum"),
            ODE,
            [term("CLIP"), term("PickScore")],
            1e-5,
        ),
        (ours("clipscore", 0.4), ours("pickscore")),
        {**learns("nft", draws=2), "objective.advantage": "group"},
    ),
    "nft/lora/flux1/rational_rewards_t2i": (
        of(FLUX, "flux1", 64, size(512, 20, 1.0, **nft(1.0, 5, 0.8), kl_beta=2e-3), ODE, JUDGE, 2e-4),
        (JUDGED,),
        learns("nft", draws=5, time_fraction=0.8, kl_beta=2e-3),
    ),
    "nft/lora/flux1_kontext/rational_rewards_edit": (
        of(
            f"black-forest-labs/{KONTEXT}",
            "flux1-kontext",
            64,
            size(512, 20, 1.0, **nft(1.0, None, 0.9), kl_beta=1e-3, auto_resize=True, condition_image_size=[512, 512]),
            ODE,
            [term("rational_rewards_edit")],
            2e-4,
        ),
        (RewardTerm("rationalrewards_edit", batch_size=16, device="cuda", dtype="bfloat16"),),
        learns("nft", draws=18, time_fraction=0.9, kl_beta=1e-3),
    ),
    **{
        f"nft/{weights}/flux2_klein_base/default": (
            of(
                klein("base-4B"),
                "flux2-klein",
                rank,
                size(384, 8, 1.0, **nft(0.1, 2, 0.5)),
                ODE,
                [term("PickScore", 1)],
                lr,
            ),
            PICK,
            {**learns("nft", beta=0.1, draws=2, time_fraction=0.5), "model.weights": weights},
        )
        for weights, rank, lr in (("lora", 64, 1e-4), ("full", None, 1e-5))
    },
    "nft/lora/qwen_image/rational_rewards_t2i": (
        of(
            "Qwen/Qwen-Image-2512",
            "qwen-image",
            64,
            size(512, 30, 1.0, **nft(1.0, 10, 0.5), unique_sample_num_per_epoch=32),
            ODE,
            JUDGE,
            2e-4,
        ),
        (JUDGED,),
        {**learns("nft", draws=10, time_fraction=0.5), "prompts.per_iteration": 32},
    ),
    "nft/lora/wan21/t2v": (
        of(
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "wan2_t2v",
            128,
            size([480, 832], 12, 1.0, **nft(0.1, 4, 0.9), num_frames=1),
            ODE,
            [term("PickScore")],
            1e-4,
        )
        | {
            "model": {
                **{"model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "model_type": "wan2_t2v"},
                **{"finetune_type": "lora", "lora_rank": 128, "lora_alpha": 128},
            }
        },
        PICK,
        {
            **learns("nft", beta=0.1, draws=4),
            **{"model.frames": 1, "model.resolution": (480, 832), "model.lora_rank": 128, "model.lora_alpha": 128},
        },
    ),
    "awm/lora/sd3_5/default": (
        of(
            SD35,
            "sd3-5",
            32,
            size(
                512,
                14,
                1.0,
                **awm(6, 0.9, 1, kl_beta=0.0001, ema_decay_schedule="linear", ema_decay=0.3, warmup_steps=1000),
                **{"ema_update_interval": 1, "time_sampling_strategy": "discrete_wo_init", "global_std": True},
                gradient_step_per_epoch=1,
            ),
            ODE,
            [term("PickScore")],
        ),
        PICK,
        {
            **learns("awm", draws=6, weighting="ghuber", huber_power=0.25, clip_range=1.0, adv_clip_max=1.0),
            **learns("awm", kl_beta=1e-4, average_beta=1.0, average_limit=0.3, average_ramp=3e-4, adv_scale=1.0),
            "objective.advantage": "batch",
        },
    ),
    "awm/lora/flux1/default": (
        of(
            FLUX,
            "flux1",
            64,
            size(
                512,
                10,
                3.5,
                **awm(4, 0.7, 0.1, ema_decay_schedule="linear", ema_decay=0.3, warmup_steps=300),
                **{"ema_update_interval": 1, "global_std": True, "per_device_batch_size": 2},
            ),
            ODE,
            [term("PickScore")],
        ),
        PICK,
        learns("awm", draws=4, time_fraction=0.7, average_beta=0.1, average_limit=0.3, average_ramp=1e-3),
    ),
    "awm/lora/flux2_klein_base/default": (
        of(
            klein("base-4B"),
            "flux2-klein",
            64,
            size(384, 8, 4.0, **awm(4, 0.7, 0.1, ema_decay_schedule="power", ema_decay=0.9, ema_update_interval=1)),
            ODE,
            [term("PickScore")],
        ),
        PICK,
        {**learns("awm", draws=4, weighting="ghuber", average_beta=0.1), "objective.advantage": "group"},
    ),
    **{
        f"dgpo/lora/sd3_5/{name}": (
            of(SD35, "sd3-5", 64, size(512, 10, guidance, **DGPO), ODE, [term("PickScore", 1.0)], num_processes=4),
            PICK,
            {
                **learns("dgpo", dpo_beta=10.0, draws=4, time_fraction=0.6, clip_range=0.05, kl_beta=1e-3),
                **{"sampling.guidance_scale": guidance, "plan.group_size": 24, "prompts.per_iteration": 24},
                "optim.ema_decay": pytest.approx(0.9 ** (1 / 8), abs=1e-6),
            },
        )
        for name, guidance in (("default", 4.5), ("nocfg", 1.0))
    },
}

EDITS: dict[str, Any] = {"data": {"datasets": [{"name": "default", "dataset_dir": "edits"}]}}
QWEN_EDIT, WAN22 = "Qwen/Qwen-Image-Edit-2509", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
FLUX2, Z_IMAGE = "black-forest-labs/FLUX.2-dev", "Tongyi-MAI/Z-Image"
RATIONAL_EDIT = term("rational_rewards_edit", batch_size=8, temperature=0.1, max_tokens=2048, aspects=["a", "b"])
_EMBEDDED = {"sampling.embedded_guidance": True, "sampling.guidance_scale": 4.0, **window(1.0, 4)}
_I2V = {"model.frames": 5, "sampling.guidance_scale": 5.0, "prompts.source": "edits/train.jsonl", **window(0.9, 4)}
_PAIR = {"plan.preset": "custom", "plan.group_size": 4, "plan.final_keep": 2, "objective.advantage": "group"}
_OFFLINE = {"prompts.pairs": "pairs/pairs.jsonl", "prompts.per_iteration": 1, "optim.microbatch": 2}


def weights(rank: int) -> dict[str | None, tuple[int | None, float]]:
    return {"lora": (rank, 3e-4), "full": (None, 1e-5)}


FACTORY |= {
    "dpo/lora/sd3_5/default": (
        of(
            SD35,
            "sd3-5",
            32,
            size(
                512,
                40,
                1.0,
                **{"trainer_type": "dpo", "beta": 100.0, "weighting_scheme": "logit_normal", "logit_mean": 0.0},
                **{"logit_std": 1.0, "num_train_timesteps": 1, "timestep_range": 0.99, "group_size": 4},
                **{"per_device_batch_size": 24, "gradient_accumulation_steps": 1},
            ),
            ODE,
            [term("PickScore")],
            1e-5,
        ),
        PICK,
        {
            **{**_PAIR, "prompts.per_iteration": 48, "sampling.microbatch": 24, "optim.microbatch": 48},
            **{**learns("dpo", beta=50.0, draws=1, time_fraction=0.99), "optim.updates_per_rollout": 1},
        },
    ),
    "offline_dpo/lora/sd3_5/default": (
        of(
            SD35,
            "sd3-5",
            16,
            size(512, 10, 1.0, trainer_type="offline-dpo", beta=2000.0, gradient_accumulation_steps=1, ema_decay=0),
            ODE,
            [],
            1e-5,
            num_processes=1,
            data={"datasets": [{"name": "default", "dataset_dir": "pairs"}]},
        ),
        (RewardTerm("shapes"),),
        {**_OFFLINE, **learns("dpo", beta=1000.0, draws=1, time_fraction=0.99), "optim.updates_per_rollout": 1},
    ),
    **{
        f"grpo/{kind}/flux2/t2i": (
            of(FLUX2, "flux2", rank, size(512, 8, 4), sde(1.0, [1, 2, 3]), BOTH, lr),
            CLIP_GDPO,
            {**_EMBEDDED, "model.weights": kind},
        )
        for kind, (rank, lr) in weights(64).items()
    },
    **{
        f"grpo/{kind}/flux2/i2i": (
            of(
                FLUX2,
                "flux2",
                rank,
                size(384, 10, 4, condition_image_size=[384, 384]),
                sde(1.0, [1, 2, 3]),
                term("PickScore"),
                lr,
            ),
            PICK,
            _EMBEDDED,
        )
        for kind, (rank, lr) in weights(64).items()
    },
    "grpo/lora/qwen_image_2_1/default": (
        of(
            "Qwen/Qwen-Image-2.1",
            "qwen-image-2.1",
            64,
            size(384, 10, 1.0, condition_image_size=[384, 384]),
            sde(1.0, [1, 2, 3]),
            term("PickScore"),
        ),
        PICK,
        {"sampling.guidance_scale": 1.0, **window(1.0, 4)},
    ),
    **{
        f"grpo/{kind}/qwen_image_edit_plus/default": (
            of(
                QWEN_EDIT,
                "qwen-image-edit-plus",
                rank,
                size(384, 10, 4, condition_image_size=[384, 384], auto_resize=True),
                sde(1.0, [1, 2, 3]),
                term("PickScore"),
                lr,
                **EDITS,
            ),
            PICK,
            {"model.path": QWEN_EDIT, "prompts.source": "edits/train.jsonl", "sampling.embedded_guidance": False},
        )
        for kind, (rank, lr) in weights(64).items()
    },
    **{
        f"grpo/{kind}/z_image/default": (
            of(Z_IMAGE, "z-image", rank, size(512, 10, 4.0), sde(0.7, [1, 2, 3]), [term("PickScore")], lr),
            PICK,
            {"sampling.guidance_scale": 5.0, "eval.guidance_scale": 5.0, "model.weights": kind},
        )
        for kind, (rank, lr) in weights(64).items()
    },
    **{
        f"grpo/{kind}/z_image_turbo/default": (
            of(f"{Z_IMAGE}-Turbo", "z-image", rank, size(512, 6, 0), sde(0.7, [1, 2, 3]), [term("PickScore")], lr),
            PICK,
            {"sampling.guidance_scale": 1.0, "eval.guidance_scale": 1.0},
        )
        for kind, (rank, lr) in weights(64).items()
    },
    **{
        f"grpo/{kind}/wan21/i2v": (
            of(
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
                "wan2_i2v",
                rank,
                size(240, 10, 5.0, num_frames=5),
                sde(0.9, [1, 2, 3]),
                term("PickScore"),
                1e-4,
                **EDITS,
            ),
            PICK,
            _I2V,
        )
        for kind, (rank, _) in weights(64).items()
    },
    "grpo/lora/wan22/t2v": (
        of(
            WAN22,
            "wan2_t2v",
            64,
            size(480, 10, 4.0, num_frames=5, guidance_scale_2=3.0),
            sde(0.9, [1, 2, 3]),
            term("PickScore"),
        ),
        PICK,
        {"model.path": WAN22, "sampling.guidance_scale": 4.0},
    ),
    "grpo/lora/wan22/i2v": (
        of(
            WAN22.replace("T2V", "I2V"),
            "wan2_i2v",
            64,
            size(480, 8, 3.5, num_frames=5),
            sde(0.9, [1]),
            term("PickScore"),
            **EDITS,
        ),
        PICK,
        {"sampling.guidance_scale": 3.5, **window(0.9, 2)},
    ),
    "nft/lora/wan22/t2v": (
        of(
            WAN22,
            "wan2_t2v",
            128,
            size([384, 720], 12, 1.0, **nft(0.1, 2, 0.3), num_frames=1, guidance_scale_2=1.0),
            ODE,
            [term("PickScore")],
            1e-4,
        ),
        PICK,
        {**learns("nft", beta=0.1, draws=2, time_fraction=0.3), "model.resolution": (384, 720)},
    ),
    "nft/lora/wan21/i2v": (
        of(
            "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            "wan2_i2v",
            128,
            size([512, 512], 10, 1.0, **nft(0.1, 4, 0.7), num_frames=1, condition_image_size=[512, 512]),
            ODE,
            [term("PickScore")],
            1e-4,
            **EDITS,
        ),
        PICK,
        learns("nft", beta=0.1, draws=4, time_fraction=0.7),
    ),
    "nft/lora/qwen_image_edit_plus/rational_rewards_edit": (
        of(
            QWEN_EDIT,
            "qwen-image-edit-plus",
            64,
            size(512, 30, 1.0, **nft(1.0, 5, 0.7), kl_beta=2e-4, auto_resize=True, condition_image_size=[512, 512]),
            ODE,
            [RATIONAL_EDIT],
            2e-4,
            **EDITS,
        ),
        (RewardTerm("rationalrewards_edit", batch_size=8, device="cuda", dtype="bfloat16"),),
        learns("nft", draws=5, time_fraction=0.7, kl_beta=2e-4),
    ),
    **{
        f"nft/{kind}/z_image/default": (
            of(Z_IMAGE, "z-image", rank, size(512, 10, 0.0, **nft(0.1, 2, 0.5)), ODE, [term("PickScore")], lr),
            PICK,
            {**learns("nft", beta=0.1, draws=2, time_fraction=0.5), "sampling.guidance_scale": 1.0},
        )
        for kind, (rank, lr) in weights(64).items()
    },
    "nft/full/z_image_turbo/default": (
        of(f"{Z_IMAGE}-Turbo", "z-image", None, size(512, 6, 0.0, **nft(0.1, 3, 0.99)), ODE, [term("PickScore")], 1e-5),
        PICK,
        {**learns("nft", beta=0.1, draws=3, time_fraction=0.99), "model.weights": "full"},
    ),
}

_CANNOT = "is a type of model that cannot be trained here"
_OTHER_MODELS = ("bagel", "sensenova", "wan2_v2v", "ltx2_t2av", "ltx2_i2av", "minimax-h3-t2va")
_OTHER_TRAINERS = ("dppo", "crd", "dmd2", "dmdr", "opd", "tdm", "tdm_r1", "sft")


def as_file(folder: Path, settings: dict[str, Any]):
    file = folder / "default.yaml"
    file.write_text(yaml.safe_dump(settings))
    return import_flow_factory(str(file))


@pytest.mark.parametrize("name", FACTORY)
def test_flow_factorys_file(tmp_path, name):
    settings, rewards, expected = FACTORY[name]
    translation = as_file(tmp_path, settings)
    assert values(translation.config, expected) == expected
    assert translation.config.reward.terms == rewards
    model = translation.config.model
    by_default = "target_modules" in settings["model"] and model.weights == "lora"
    assert set(model.lora_targets) == (LAYERS[settings["model"]["model_type"]] if by_default else set())


def test_what_nft_draws_from_is_the_old_policy_in_both(tmp_path):
    rows = {row.name: row.outcome for row in as_file(tmp_path, FACTORY["nft/lora/sd3_5/default"][0]).rows}
    same = ("off_policy", "ema_decay", "ema_decay_schedule", "flat_steps", "ramp_rate", "ema_update_interval")
    assert {rows[f"train.{name}"].note for name in same} == {"the same here"}
    settings, *_ = FACTORY["nft/lora/flux1/default"]
    other = {**settings, "train": {**settings["train"], "off_policy": False, "ramp_rate": 0.01}}
    rows = {row.name: row.outcome for row in as_file(tmp_path, other).rows}
    assert rows["train.off_policy"].status == rows["train.ramp_rate"].status == "no equal here"
    silent = {name: value for name, value in settings["train"].items() if name not in OLD}
    rows = {row.name: row.outcome for row in as_file(tmp_path, {**settings, "train": silent}).rows}
    for name in ("off_policy", "ema_decay", "ema_decay_schedule", "ema_update_interval"):
        assert rows[f"train.{name} (its default)"].status == "no equal here"


@pytest.mark.parametrize("kind", _OTHER_MODELS)
def test_a_model_without_a_policy_is_refused(tmp_path, kind):
    settings = of("some/model", kind, 8, size(512, 10, 1.0), sde(0.7, [1, 2, 3]), [term("PickScore")])
    with pytest.raises(ValueError) as refused:
        as_file(tmp_path, settings)
    assert f"model.model_type '{kind}' {_CANNOT}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "rank", "sentence"),
    [
        (WAN22, None, "has two networks, which are trained by a LoRA here and not in full"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 8, "has a timestep for each place, which no policy here can train"),
    ],
)
def test_a_wan_of_two_networks_has_a_lora(tmp_path, model, rank, sentence):
    settings = of(model, "wan2_t2v", rank, size(256, 10, 5.0), sde(0.9, [1, 2, 3]), [term("PickScore")])
    with pytest.raises(ValueError, match=sentence):
        as_file(tmp_path, settings)


@pytest.mark.parametrize(
    ("own", "fates"),
    [
        ({"target_components": ["transformer", "transformer_2"]}, {"not needed here"}),
        ({"target_components": "transformer", "target_modules": "transformer.default"}, {"no equal here"}),
    ],
)
def test_both_networks_of_a_wan_are_trained(tmp_path, own, fates):
    settings = of(WAN22, "wan2_t2v", 8, size(256, 10, 5.0, guidance_scale_2=3.0), sde(0.9, [1]), [term("PickScore")])
    settings["model"] |= own
    translation = as_file(tmp_path, settings)
    status = {row.name: row.outcome.status for row in translation.rows}
    assert {status[f"model.{name}"] for name in own} == fates
    assert status["train.guidance_scale_2"] == "no equal here"
    assert set(translation.config.model.lora_targets) == LAYERS["wan2_t2v"]


@pytest.mark.parametrize(("value", "same"), [(384, True), ([384, 384], True), ([384, 512], False), (True, False)])
@pytest.mark.parametrize(("model", "kind"), [(QWEN_EDIT, "qwen-image-edit-plus"), (FLUX2, "flux2")])
def test_a_source_picture_has_the_sampled_size(tmp_path, model, kind, value, same):
    train = size(384, 10, 4, condition_image_size=value)
    settings = of(model, kind, 8, train, sde(1.0, [1]), term("PickScore"))
    rows = {row.name: row.outcome for row in as_file(tmp_path, settings).rows}
    takes = kind != "flux2"
    assert rows["train.condition_image_size"].status == ("not needed here" if takes and same else "no equal here")
    assert ("without a source picture" in rows["train.condition_image_size"].note) is not takes


@pytest.mark.parametrize(("rewards", "fate"), [(1, "translated"), (2, "no equal here")])
def test_pairs_are_chosen_by_the_weighted_sum(tmp_path, rewards, fate):
    train = size(512, 10, 1.0, trainer_type="dpo", group_size=2)
    translation = as_file(tmp_path, of(SD35, "sd3-5", 8, train, ODE, [term("PickScore"), term("OCR")][:rewards]))
    rows = {row.name: row.outcome.status for row in translation.rows}
    assert rows["train.advantage_aggregation"] == fate and translation.config.plan.final_keep is None
    assert rows["train.beta (its default)"] == "translated" and translation.config.objective.dpo.beta == 1000.0
    assert rows["train.weighting_scheme (its default)"] == "no equal here"
    assert rows["train.clip_range"] == rows["train.kl_beta"] == "not needed here"


@pytest.mark.parametrize("trainer", _OTHER_TRAINERS)
def test_another_algorithm_is_refused(tmp_path, trainer):
    settings = of(SD35, "sd3-5", 8, size(512, 10, 1.0, trainer_type=trainer), ODE, [term("PickScore")])
    with pytest.raises(ValueError, match=f"train.trainer_type '{trainer}' has no equal here"):
        as_file(tmp_path, settings)


def test_a_trainers_name_is_read_in_any_case(tmp_path):
    settings = of(SD35, "sd3-5", 8, size(512, 10, 1.0, trainer_type="GRPO-Guard"), sde(0.7, [1]), [term("PickScore")])
    assert as_file(tmp_path, settings).config.objective.grpo.ratio == "guard"


@pytest.mark.parametrize(
    ("theirs", "name", "factor", "fate"),
    [
        ("PickScore", "pickscore", 1.0, "translated"),
        ("CLIP", "clipscore", 0.4, "no equal here"),
        ("OCR", "ocr", 1.0, "no equal here"),
        ("geneval", "geneval", 1.0, "no equal here"),
        ("vllm_evaluate", "vlm", 1.0, "no equal here"),
        ("PickScore_Rank", "my_rewards:PickScore_Rank", 1.0, "no equal here"),
        ("rational_rewards_t2i", "rationalrewards", 1.0, "no equal here"),
    ],
)
@pytest.mark.parametrize("aggregation", ["sum", "gdpo"])
def test_flow_factorys_rewards_keep_their_share(tmp_path, theirs, name, factor, fate, aggregation):
    train = size(512, 10, 1.0, advantage_aggregation=aggregation)
    translation = as_file(tmp_path, of(SD35, "sd3-5", 8, train, sde(0.7, [1, 2]), [term(theirs, 3.0)]))
    (reward_term,) = translation.config.reward.terms
    weight = 3.0 if aggregation == "gdpo" else 3.0 * factor
    assert (reward_term.name, reward_term.weight) == (name, pytest.approx(weight, rel=1e-6))
    assert {row.outcome.status for row in translation.rows if row.name == "rewards[0].reward_model"} == {fate}


@pytest.mark.parametrize(
    ("finetune_type", "resume_type", "expected"),
    [("lora", None, "owner/mine"), ("lora", "lora", "owner/mine"), ("lora", "state", ""), ("full", None, "")],
)
def test_a_lora_of_flow_factory_is_trained_further(tmp_path, finetune_type, resume_type, expected):
    settings = of(SD35, "sd3-5", 8, size(512, 10, 1.0), sde(0.7, [1, 2]), [term("PickScore")])
    settings["model"] |= {"finetune_type": finetune_type, "resume_path": "owner/mine", "resume_type": resume_type}
    translation = as_file(tmp_path, settings)
    assert translation.config.model.lora == expected
    fates = {row.outcome.status for row in translation.rows if row.name.startswith("model.resume")}
    assert fates == {"translated" if expected else "no equal here"}
