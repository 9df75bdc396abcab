"""Rules of sampling: guidance, batches, and the steps that add noise."""

from __future__ import annotations

from progrpo.imports.flow_grpo.scripts import OLDER_WINDOW, is_dpo, is_flux, kind_of, reads_windows
from progrpo.imports.outcome import Outcome, Setting, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import group_outcome

REPEATS = "sample.sample_time_per_prompt"


def guidance(setting: Setting) -> Outcome:
    fields: dict[str, object] = {"sampling.guidance_scale": setting.value}
    if is_flux(setting):
        fields["sampling.embedded_guidance"] = True
    if not _reads_eval_guidance(setting) or "sample.eval_guidance_scale" not in setting.all:
        fields["eval.guidance_scale"] = setting.value
    return to_fields(fields)


def _reads_eval_guidance(setting: Setting) -> bool:
    return setting.all["script"] == "fast" and kind_of(setting) in ("SD3", "FLUX")


def eval_guidance(setting: Setting) -> Outcome:
    if _reads_eval_guidance(setting):
        return to_fields({"eval.guidance_scale": setting.value})
    return not_needed("its script evaluates with sample.guidance_scale")


def cfg(setting: Setting) -> Outcome:
    if is_dpo(setting):
        return not_needed("DPO trains without guidance in both")
    if setting.value is True or setting.number("sample.guidance_scale") <= 1 or is_flux(setting):
        return not_needed("sampling and training have the same guidance here")
    return no_equal("sampling and training have the same guidance here, sampling.guidance_scale")


def _has_window(setting: Setting) -> bool:
    if is_dpo(setting):
        return False
    size = setting.all.get("sample.sde_window_size")
    return reads_windows(setting) and size != 0 and OLDER_WINDOW not in setting.all


def window_size(setting: Setting) -> Outcome:
    if not _has_window(setting):
        return not_needed("the script reads no window, or it is all steps")
    return to_fields(
        {"sampling.sde_window": "random", "sampling.sde_window_size": setting.value},
        "one window for all prompts of an iteration; there one for each batch",
    )


def older_window(setting: Setting) -> Outcome:
    """The size of the window in an older fast script, which began anywhere in the grid's first half."""
    if not reads_windows(setting):
        return not_needed("the script reads no window")
    size, steps = setting.count(), setting.count("sample.num_steps")
    return to_fields(
        {
            "sampling.sde_window": "random",
            "sampling.sde_window_size": size,
            "sampling.sde_window_end": min(steps // 2 + size, steps - 1),
        },
        "pictures of a batch share the steps before the window there; here each has its own",
    )


def window_range(setting: Setting) -> Outcome:
    if not _has_window(setting):
        return not_needed("the script reads no window, or it is all steps")
    if not isinstance(setting.value, tuple | list) or len(setting.value) != 2:
        raise ValueError(f"sample.sde_window_range must be a pair of steps, not {setting.value!r}")
    first, end = setting.value
    last = setting.count("sample.num_steps") - 1
    if not isinstance(end, int) or first != 0:
        return no_equal("windows begin anywhere from the first step on here")
    if end > last:
        return to_fields({"sampling.sde_window_end": last}, "the last step is nearly deterministic and never trained")
    return to_fields({"sampling.sde_window_end": end})


def _count_or_one(setting: Setting, name: str) -> int:
    """The number of a setting that few files have; 1 without it."""
    return setting.count(name) if name in setting.all else 1


def rows_per_batch(setting: Setting) -> int:
    """The pictures of a GPU's network call. An older script sets prompts there, and the pictures of each elsewhere."""
    return setting.count("sample.train_batch_size") * _count_or_one(setting, "sample.mini_num_image_per_prompt")


def batches(setting: Setting) -> Outcome:
    pictures = setting.count("gpu_number") * rows_per_batch(setting) * setting.count()
    prompts, rest = divmod(pictures, setting.count("sample.num_image_per_prompt"))
    repeats = _count_or_one(setting, REPEATS)
    note = f"of {pictures * repeats} pictures" + (", rounded down" if rest else "")
    return to_fields({"prompts.per_iteration": max(1, prompts)}, note)


def batches_trained(setting: Setting) -> int:
    return setting.count("sample.num_batches_per_epoch") * _count_or_one(setting, REPEATS)


def updates(setting: Setting) -> int:
    return max(1, batches_trained(setting) // setting.count("train.gradient_accumulation_steps"))


def group_size(setting: Setting) -> Outcome:
    size = setting.count() * _count_or_one(setting, REPEATS)
    return group_outcome(size, is_dpo(setting), "plain GRPO; --plan.preset late prunes")


def accumulation(setting: Setting) -> Outcome:
    return to_fields({"optim.updates_per_rollout": updates(setting)}, "batches of an epoch divided by it")
