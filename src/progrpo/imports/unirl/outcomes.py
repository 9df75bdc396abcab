"""Rules of UniRL's settings: the model, the objective, the LoRA, sampling, rewards and prompts."""

from __future__ import annotations

import os
import re

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.messages import quoted

ALGORITHMS = {"FlowGRPO": "grpo", "DiffusionNFT": "nft"}
"""UniRL's algorithms that have an objective here, by the name of their class."""
_MODELS = (
    *("sd3", "qwen_image", "qwen_image21", "qwen_image_edit_plus", "flux2_klein", "z_image", "wan21", "wan22"),
    *("hunyuan_video", "hunyuan_video10", "hunyuan_video15"),
)
"""The models that have a policy here, by the name of their package."""
_VIDEO = ("wan", "hunyuan_video")
"""Models of videos, by the beginning of their name."""
_OWN_SHIFT = ("qwen_image", "flux2_klein")
"""Models whose shift follows from the size, and for which the setting is not read, by the beginning of their name."""
_KERNELS = {"FlowSDEStrategy": "flow_grpo", "DanceSDEStrategy": "dance", "CPSSDEStrategy": "cps_reduced"}
DTYPES = {
    **{"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"},
    **{"fp32": "float32", "float32": "float32"},
}
_STEPS = "sampling.num_inference_steps"
_EVAL_STEPS, _EVAL_SCALE = (f"eval_sampling.{name}" for name in ("num_inference_steps", "guidance_scale"))


def _class(setting: Setting) -> str:
    """The name of the class that a `_target_` names."""
    return setting.text().rpartition(".")[2]


def _objective(setting: Setting) -> str:
    return ALGORITHMS[str(setting.all["algorithm._target_"]).rpartition(".")[2]]


def _model(setting: Setting) -> str:
    """The name of the model's package, from the class of its bundle."""
    match = re.search(r"\.models\.(\w+)\.", str(setting.all["bundle._target_"]))
    return match.group(1) if match else str(setting.all["bundle._target_"])


def bundle(setting: Setting) -> Outcome:
    if _model(setting) not in _MODELS:
        raise ValueError(
            f"{setting.name} is of {quoted(_model(setting))}, which cannot be trained here; there are"
            f" {', '.join(_MODELS)}"
        )
    return not_needed("read from the model itself")


def path(setting: Setting) -> Outcome:
    if "ti2v" in setting.text().lower():
        raise ValueError(
            f"{setting.name} {quoted(setting.value)} has a timestep for each place, as no policy here does"
        )
    return to_fields({"model.path": os.path.expanduser(setting.text())})


def shift(setting: Setting) -> Outcome:
    if _model(setting).startswith(_OWN_SHIFT):
        return not_needed("the model's own shift follows from the size in both")
    return to_fields({"sampling.shift": setting.value})


def algorithm(setting: Setting) -> Outcome:
    return to_fields({"objective.name": _objective(setting)})


def kernel(setting: Setting) -> Outcome:
    if adds_no_noise(setting):
        return not_needed("no step adds noise")
    if _class(setting) not in _KERNELS:
        raise ValueError(f"{setting.name} {quoted(_class(setting))} has no equal here; there are {', '.join(_KERNELS)}")
    return to_fields({"sampling.sampler": _KERNELS[_class(setting)]})


def adds_no_noise(setting: Setting) -> bool:
    return setting.all.get("sampling.scheduler.num_sde_steps", 1) == 0 or setting.all.get("sampling.eta") == 0


def of(objective: str, field: str) -> Rule:
    """The rule of a setting that is a field of this objective."""
    return lambda s: (
        to_fields({f"objective.{objective}.{field}": s.value}) if _objective(s) == objective else not_needed("not read")
    )


def beta(setting: Setting) -> Outcome:
    if _objective(setting) == "nft":
        return to_fields({"objective.nft.beta": setting.value})
    return to_fields({"objective.grpo.kl_beta": setting.value, "objective.grpo.kl_form": "exact"})


def reference(setting: Setting) -> Outcome:
    if setting.number() == 0:
        return to_fields({"objective.nft.kl_beta": 0.0})
    return no_equal("objective.nft.kl_beta weighs the same distance; it is 1e-4 unless you set it")


def draws(setting: Setting) -> Outcome:
    draws = max(1, int(setting.count(_STEPS) * setting.number()))
    return to_fields({"objective.nft.draws": draws, "objective.nft.time_fraction": setting.value})


# --- LoRA -------------------------------------------------------------------------------------------------------------


def rank(setting: Setting) -> Outcome:
    return to_fields({"model.weights": "lora", "model.lora_rank": setting.value})


def _has_shadow(setting: Setting) -> bool:
    """Whether the LoRA stands in the block that also keeps an old policy."""
    return "backend.ema_lora_cfg.rank" in setting.all


def unless_shadow(rule: Rule) -> Rule:
    return lambda setting: not_needed("ema_lora_cfg is read") if _has_shadow(setting) else rule(setting)


def full(setting: Setting) -> Outcome:
    """The outcome of a file without a LoRA."""
    if _has_shadow(setting):
        return not_needed("ema_lora_cfg is read")
    if _model(setting) == "wan22":
        raise ValueError("it has no backend.lora_cfg, and a Wan 2.2's two networks are trained by a LoRA here")
    return to_fields({"model.weights": "full"}, "no LoRA")


def targets(setting: Setting) -> Outcome:
    if isinstance(setting.value, list):
        return to_fields({"model.lora_targets": setting.value})
    return no_equal("our default is used: attention and feed-forward; model.lora_targets takes a list of layers' names")


# --- sampling ---------------------------------------------------------------------------------------------------------


def height(setting: Setting) -> Outcome:
    other = setting.all.get("sampling.width", setting.value)
    return to_fields({"model.resolution": setting.value if setting.value == other else [setting.value, other]})


def frames(setting: Setting) -> Outcome:
    if setting.count() == 1 and not _model(setting).startswith(_VIDEO):
        return not_needed("a picture")
    return to_fields({"model.frames": setting.value, "reward.frames": setting.value}, "rewards score every frame")


def steps(setting: Setting) -> Outcome:
    fields = {"sampling.num_inference_steps": setting.value}
    if _EVAL_STEPS not in setting.all:
        fields["eval.num_inference_steps"] = setting.value
    return to_fields(fields)


def eval_scale(setting: Setting) -> Outcome:
    return to_fields({"eval.guidance_scale": _scale(setting)})


def _scale(setting: Setting) -> float:
    """A guidance scale as ours, of which 1 is none; Z-Image counts from 0."""
    return max(1.0, setting.number() + (_model(setting) == "z_image"))


def guidance(setting: Setting) -> Outcome:
    scale = _scale(setting)
    fields: dict[str, object] = {"sampling.guidance_scale": scale}
    if _EVAL_SCALE not in setting.all:
        fields["eval.guidance_scale"] = scale
    if _model(setting) in ("hunyuan_video", "hunyuan_video10") and scale > 1:
        fields["sampling.embedded_guidance"] = True
    return to_fields(fields)


def noise(setting: Setting) -> Outcome:
    if adds_no_noise(setting):
        return not_needed("no step adds noise")
    return to_fields({"sampling.noise_level": setting.value})


def _pool(setting: Setting) -> tuple[float, int]:
    """The share of the grid at which the pool of noisy steps begins, and the step before which it ends."""
    share = setting.all.get("sampling.scheduler.timestep_fraction", 1.0)
    given = share if isinstance(share, list) and len(share) == 2 else (0.0, share)
    ends = [end for end in given if isinstance(end, int | float) and 0 <= end <= 1]
    if len(ends) != 2:
        raise ValueError(f"sampling.scheduler.timestep_fraction must lie in 0..1, not {quoted(share)}")
    return ends[0], min(int(setting.count(_STEPS) * ends[1]), setting.count(_STEPS) - 1)


def noisy_steps(setting: Setting) -> Outcome:
    """The outcome of the number of noisy steps, which are drawn from a pool for each rollout; ours lie side by side."""
    if setting.value == 0:
        return to_fields({"sampling.sde_window": "none"})
    _, end = _pool(setting)
    size = end if setting.value is None else min(setting.count(), end)
    if size >= setting.count(_STEPS) - 1:
        return to_fields({"sampling.sde_window": "all"})
    if size == end:
        return to_fields({"sampling.sde_window": "first", "sampling.sde_window_size": size})
    fields = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return to_fields(fields, "side by side here, drawn one by one there")


def fraction(setting: Setting) -> Outcome:
    if "sampling.scheduler.num_sde_steps" not in setting.all or setting.all["sampling.scheduler.num_sde_steps"] == 0:
        return not_needed("there is no pool of steps")
    start, _ = _pool(setting)
    if start > 0:
        return no_equal("windows may begin before its first step here")
    return counted_in("sampling.sde_window_end")


def window(setting: Setting) -> Outcome:
    windows = {"progressive": "sliding", "random": "random", "all": "all"}
    return to_fields({"sampling.sde_window": setting.one_of(windows)})


def _has_window(setting: Setting, *strategies: str) -> bool:
    return str(setting.all.get("sampling.scheduler.config.strategy", "all")) in strategies


def window_size(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive", "random"):
        return not_needed("there is no window")
    return to_fields({"sampling.sde_window_size": setting.value})


def interval(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive"):
        return not_needed("only for a window that slides")
    return to_fields({"sampling.sde_window_interval": setting.value})


def overlap(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive"):
        return not_needed("only for a window that slides")
    one_step = setting.value == setting.count("sampling.scheduler.config.window_size") - 1
    why = "a window moves on by one step"
    return not_needed(why) if one_step else no_equal(why)


# --- data -------------------------------------------------------------------------------------------------------------


def file(field: str) -> Rule:
    """The rule of a prompt file."""

    def rule(setting: Setting) -> Outcome:
        fields = {field: os.path.expanduser(setting.text())}
        path = str(setting.all.get("bundle.config.pretrained_model_ckpt_path")).lower()
        if _model(setting) == "qwen_image_edit_plus" or "i2v" in path:
            return no_equal("a line's picture is under `media` there, and a path in its `image` here", fields)
        if _model(setting) == "flux2_klein" and "edit" in str(
            setting.all.get("reward.backend.config.required_rewards")
        ):
            return no_equal("a line's picture is not used: this model paints from the prompt alone here", fields)
        return to_fields(fields)

    return rule


def save(setting: Setting) -> Outcome:
    if setting.number() <= 0:
        return no_equal("checkpoints cannot be turned off")
    return to_fields({"checkpoint.every": setting.value})
