"""Rules of sampling: sizes, guidance, batches, and the steps that add noise."""

from __future__ import annotations

from progrpo.imports.flow_factory.model import counts_guidance_from_0, takes_sources
from progrpo.imports.flow_factory.trainer import is_offline, objective_of
from progrpo.imports.outcome import Outcome, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import group_outcome
from progrpo.messages import quoted


def _size(setting: Setting, section: str) -> tuple[object, object]:
    """Height and width under `train` or `eval`.

    A side that is given itself counts before the resolution, of which one number is a square.
    """
    # 1024 if it is left out (which only an evaluation's can be), 512 if it is empty
    resolution = setting.all.get(f"{section}.resolution", 1024) or 512
    sides = resolution if isinstance(resolution, list) else [resolution]
    height = setting.all.get(f"{section}.height")
    width = setting.all.get(f"{section}.width")
    return sides[0] if height is None else height, sides[:2][-1] if width is None else width


def resolution(setting: Setting) -> Outcome:
    height, width = _size(setting, "train")
    return to_fields({"model.resolution": height if height == width else [height, width]})


def side(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("train.resolution sets it")
    return counted_in("model.resolution")


def eval_size(setting: Setting) -> Outcome:
    why = "evaluations have the size of training"
    return not_needed(why) if _size(setting, "eval") == _size(setting, "train") else no_equal(why)


def eval_frames(setting: Setting) -> Outcome:
    why = "evaluations have the length of training"
    return not_needed(why) if setting.value in (None, setting.all.get("train.num_frames")) else no_equal(why)


def _guidance_scale(setting: Setting) -> float:
    return max(1.0, setting.number() + counts_guidance_from_0(setting))


def _guidance_note(setting: Setting) -> str:
    return "it counts from 0 there" if counts_guidance_from_0(setting) else ""


def eval_guidance(setting: Setting) -> Outcome:
    return to_fields({"eval.guidance_scale": _guidance_scale(setting)}, _guidance_note(setting))


def second_guidance(setting: Setting) -> Outcome:
    """The outcome of the guidance scale of a Wan 2.2's second network."""
    why = "both networks have one guidance scale"
    first = setting.all.get(setting.name.removesuffix("_2"))
    return not_needed(why) if setting.value in (None, first) else no_equal(why)


def guidance(setting: Setting) -> Outcome:
    fields = {"sampling.guidance_scale": _guidance_scale(setting)}
    model = str(setting.all.get("model.model_name_or_path")).lower()
    # FLUX.2 klein is guided by a pair of calls
    if "flux" in model and "klein" not in model and setting.number() > 1:
        fields["sampling.embedded_guidance"] = True
    return to_fields(fields, _guidance_note(setting))


def microbatch(setting: Setting) -> Outcome:
    if objective_of(setting) != "dpo":
        return to_fields({"sampling.microbatch": setting.value, "optim.microbatch": setting.value})
    fields = {"sampling.microbatch": setting.value, "optim.microbatch": 2 * setting.count()}
    return to_fields(fields, "pairs in an update there")


def group_size(setting: Setting) -> Outcome:
    if is_offline(setting):
        return not_needed("pairs are recorded")
    pairs = objective_of(setting) == "dpo"
    return group_outcome(setting.count() if pairs else setting.value, pairs)


def prompts_of_iteration(setting: Setting) -> Outcome:
    if is_offline(setting):
        return not_needed("pairs are recorded")
    return to_fields({"prompts.per_iteration": setting.value})


def steps_of_epoch(setting: Setting) -> Outcome:
    if is_offline(setting):
        return not_needed("an iteration is one update")
    if setting.all.get("train.gradient_accumulation_steps") == "auto":
        return to_fields({"optim.updates_per_rollout": setting.value})
    return not_needed("gradient_accumulation_steps sets it instead")


def accumulation(setting: Setting) -> Outcome:
    parallel = setting.count("train.per_device_batch_size") * setting.count("num_processes")
    if is_offline(setting):
        steps = 1 if setting.value == "auto" else setting.count()
        return to_fields({"prompts.per_iteration": steps * parallel}, "the pairs of an update, on all GPUs")
    if setting.value == "auto":
        return not_needed("gradient_step_per_epoch sets it")
    # a pair is trained on as one
    of_group = 1 if objective_of(setting) == "dpo" else setting.count("train.group_size")
    batches = setting.count("train.unique_sample_num_per_epoch") * of_group // parallel
    return to_fields(
        {"optim.updates_per_rollout": max(1, batches // setting.count())},
        f"{batches} batches of an epoch divided by it",
    )


def latent_dtype(setting: Setting) -> Outcome:
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    if setting.value is None:
        return no_equal("latents are kept in float32, or in sampling.latent_dtype")
    return to_fields({"sampling.latent_dtype": setting.one_of(names)})


def _is_ode(setting: Setting) -> bool:
    return setting.all.get("scheduler.dynamics_type") == "ODE"


def dynamics(setting: Setting) -> Outcome:
    if _is_ode(setting):
        return to_fields({"sampling.sde_window": "none"})
    samplers = {"flow-sde": "flow_grpo", "dance-sde": "dance", "cps": "cps_reduced"}
    return to_fields({"sampling.sampler": setting.one_of(samplers)})


def noise_level(setting: Setting) -> Outcome:
    return not_needed("the ODE adds none") if _is_ode(setting) else to_fields({"sampling.noise_level": setting.value})


def noisy_steps(setting: Setting) -> Outcome:
    """The outcome of the number of noisy steps, which are drawn from a list for each epoch; ours lie side by side."""
    if _is_ode(setting):
        return not_needed("the ODE adds no noise")
    last = setting.count("train.num_inference_steps") - 1
    pool = setting.all.get("scheduler.sde_steps") or list(range(last))
    if not isinstance(pool, list) or not all(isinstance(step, int) for step in pool):
        raise ValueError(f"scheduler.sde_steps must be a list of steps, not {quoted(pool)}")
    size = setting.count()
    if size >= last:
        return to_fields({"sampling.sde_window": "all"})
    end = min(max(pool) + 1, last)
    fields = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return to_fields(fields, "side by side here, drawn one by one there")


def pool(setting: Setting) -> Outcome:
    if _is_ode(setting) or setting.value is None:
        return not_needed("all but the last step")
    steps = setting.value if isinstance(setting.value, list) else []
    first = min((step for step in steps if isinstance(step, int)), default=0)
    if first > 0:
        return no_equal(f"it sets sampling.sde_window_end, but windows may begin before step {first} here")
    return counted_in("sampling.sde_window_end")


def source_size(setting: Setting) -> Outcome:
    if "kontext" in str(setting.all.get("model.model_name_or_path")).lower():
        return not_needed("source pictures have the size that the model's pipeline gives them")
    if not takes_sources(setting):
        return no_equal("this model starts from the prompt alone here, without a source picture")
    why = "source pictures are cropped to the sampled size"
    sides = setting.value if isinstance(setting.value, list) and setting.value else [setting.value]
    same = setting.value is False or (sides[0], sides[-1]) == _size(setting, "train")
    return not_needed(why) if same else no_equal(why)


def frames(setting: Setting) -> Outcome:
    frames = setting.value
    fields = {"model.frames": frames}
    if isinstance(frames, int) and 1 <= frames <= 1024:
        fields["reward.frames"] = frames
    return to_fields(fields, "its rewards score every frame of a video")
