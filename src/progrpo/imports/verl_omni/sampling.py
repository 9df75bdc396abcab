"""Rules of the model and of sampling: sizes, guidance, groups, and the steps that add noise."""

from __future__ import annotations

import os
import re

from progrpo.imports.outcome import Outcome, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import group_outcome
from progrpo.imports.verl_omni.algorithm import is_offline, objective_of
from progrpo.messages import quoted

_MODEL = "actor_rollout_ref.model"
_ROLLOUT = "actor_rollout_ref.rollout"
_STEPS = f"{_ROLLOUT}.pipeline.num_inference_steps"
_LONGEST_TEXT = 512
_NO_POLICY = {
    "bagel": "it is no pipeline of diffusers",
    "boogu": "it is no pipeline of diffusers",
    "lingbot": "it is no pipeline of diffusers",
    "ltx-2": "it makes sound with the video, of which the policies know nothing",
    "minimax": "it makes sound with the video, of which the policies know nothing",
    "ti2v": "it has a timestep for each place, which no policy here can train",
    "omni[^/]*$": "it is no diffusion model",
}
"""Why a model has no policy here, by a pattern of its name and of the folder above it."""


def _name(setting: Setting) -> str:
    """The last part of the model's path or hub id, in small letters."""
    return str(setting.all.get(f"{_MODEL}.path")).lower().rstrip("/").rpartition("/")[2]


def path(setting: Setting) -> Outcome:
    last_two = "/".join(setting.text().lower().rstrip("/").split("/")[-2:])
    for pattern, why in _NO_POLICY.items():
        if re.search(pattern, last_two):
            raise ValueError(f"{setting.name} {quoted(setting.value)} cannot be trained here: {why}")
    return to_fields({"model.path": os.path.expanduser(setting.text())})


def _has_lora(setting: Setting) -> bool:
    return setting.number(f"{_MODEL}.lora_rank") > 0


def lora_rank(setting: Setting) -> Outcome:
    if not _has_lora(setting):
        return to_fields({"model.weights": "full"}, "no LoRA")
    return to_fields({"model.weights": "lora", "model.lora_rank": setting.value})


def lora_alpha(setting: Setting) -> Outcome:
    return to_fields({"model.lora_alpha": setting.value}) if _has_lora(setting) else not_needed("there is no LoRA")


def lora_targets(setting: Setting) -> Outcome:
    if not _has_lora(setting):
        return not_needed("there is no LoRA")
    if isinstance(setting.value, list):
        return to_fields({"model.lora_targets": setting.value})
    return no_equal("our default is used: attention and feed-forward; model.lora_targets takes a list of layers' names")


def height(setting: Setting) -> Outcome:
    other = setting.all.get(f"{_ROLLOUT}.pipeline.width")
    return to_fields({"model.resolution": setting.value if setting.value == other else [setting.value, other]})


def eval_size(setting: Setting) -> Outcome:
    name = f"{_ROLLOUT}.pipeline.{setting.name.rpartition('.')[2]}"
    why = "evaluations have the size of training"
    return not_needed(why) if setting.value in (None, setting.all.get(name)) else no_equal(why)


def text_length(setting: Setting) -> Outcome:
    if setting.count() > _LONGEST_TEXT:
        return no_equal(f"at most {_LONGEST_TEXT} tokens of text here, without those of pictures; the model's own are")
    return to_fields({"model.max_sequence_length": setting.value})


def frames(setting: Setting) -> Outcome:
    if setting.count() == 1:
        return not_needed("a picture")
    return to_fields({"model.frames": setting.value, "reward.frames": setting.value}, "rewards score every frame")


def _reads_true_cfg(setting: Setting) -> bool:
    """Whether the model's guidance is `true_cfg_scale`: Qwen-Image's is, and any without a `guidance_scale`."""
    return "qwen" in _name(setting) or setting.all.get(f"{_ROLLOUT}.pipeline.guidance_scale") is None


def _scale(setting: Setting, name: str) -> float:
    """A guidance scale as ours, of which 1 is none; Z-Image counts from 0."""
    return max(1.0, setting.number(name) + bool(re.search(r"z-?image", _name(setting))))


def guidance(setting: Setting) -> Outcome:
    is_true_cfg = setting.name.endswith("true_cfg_scale")
    if is_true_cfg is not _reads_true_cfg(setting):
        return not_needed("this model reads the other guidance scale")
    scale = _scale(setting, setting.name)
    fields: dict[str, object] = {"sampling.guidance_scale": scale}
    if not is_true_cfg and "flux" in _name(setting) and "klein" not in _name(setting) and scale > 1:
        fields["sampling.embedded_guidance"] = True
    own = setting.name.replace(".pipeline.", ".val_kwargs.pipeline.")
    if setting.all.get(own) is None:
        fields["eval.guidance_scale"] = scale
    if f"{_MODEL}.path" not in setting.all:
        return no_equal("the model could not be read; for FLUX give --sampling.embedded-guidance too", fields)
    return to_fields(fields, "it counts from 0 there" if scale != setting.number() and setting.number() > 1 else "")


def eval_guidance(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("that of training")
    if setting.name.endswith("true_cfg_scale") is not _reads_true_cfg(setting):
        return not_needed("this model reads the other guidance scale")
    return to_fields({"eval.guidance_scale": _scale(setting, setting.name)})


def training_copy(setting: Setting) -> Outcome:
    """The outcome of a setting of the model's own pipeline or steps, which the trainer reads beside the rollout's."""
    name = setting.name.replace(f"{_MODEL}.", f"{_ROLLOUT}.")
    why = "training takes what sampling has"
    return not_needed(why) if setting.value in (None, setting.all.get(name)) else no_equal(why)


def group_size(setting: Setting) -> Outcome:
    if is_offline(setting):
        return not_needed("pairs are recorded")
    pairs = objective_of(setting) == "dpo"
    return group_outcome(setting.count() if pairs else setting.value, pairs)


def _samples_with_noise(setting: Setting) -> bool:
    return setting.all.get(f"{_ROLLOUT}.algo.noise_level") != 0 and objective_of(setting) == "grpo"


def noise_level(setting: Setting) -> Outcome:
    if not _samples_with_noise(setting):
        return to_fields({"sampling.sde_window": "none"}, "the ODE")
    return to_fields({"sampling.noise_level": setting.value})


def sampler(setting: Setting) -> Outcome:
    if not _samples_with_noise(setting):
        return not_needed("the ODE adds no noise")
    samplers = {"sde": "flow_grpo", "dance_sde": "dance", "cps": "cps_reduced"}
    return to_fields({"sampling.sampler": setting.one_of(samplers)})


def window_size(setting: Setting) -> Outcome:
    if not _samples_with_noise(setting):
        return not_needed("the ODE adds no noise")
    if setting.value is None:
        return to_fields({"sampling.sde_window": "all"})
    strategy = "sliding" if setting.all.get(f"{_ROLLOUT}.algo.sample_strategy") == "progressive" else "random"
    return to_fields({"sampling.sde_window": strategy, "sampling.sde_window_size": setting.value})


def window_range(setting: Setting) -> Outcome:
    if not _samples_with_noise(setting) or setting.all.get(f"{_ROLLOUT}.algo.sde_window_size") is None:
        return not_needed("there is no window")
    ends = setting.value
    if ends is None:
        return not_needed("all steps that can be trained")
    if not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int) for end in ends)):
        raise ValueError(f"{setting.name} must be a pair of steps, not {quoted(ends)}")
    if ends[0] != 0:
        return no_equal("windows begin anywhere from the first step on here")
    return to_fields({"sampling.sde_window_end": min(ends[1], setting.count(_STEPS) - 1)})


def strategy(setting: Setting) -> Outcome:
    if setting.one_of({"random": True, "progressive": False}):
        return not_needed("the window is drawn for each iteration")
    return no_equal("a sliding window moves on by one step here, and by its size there")


def window_interval(setting: Setting) -> Outcome:
    if setting.all.get(f"{_ROLLOUT}.algo.sample_strategy") != "progressive":
        return not_needed("only for a window that slides")
    return to_fields({"sampling.sde_window_interval": setting.value})


def width(setting: Setting) -> Outcome:
    return counted_in("model.resolution")
