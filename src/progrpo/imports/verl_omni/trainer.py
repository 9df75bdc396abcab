"""Rules of the trainer: its updates, the length of a run, checkpoints and evaluations."""

from __future__ import annotations

from progrpo.imports.outcome import Outcome, Rule, Setting, no_equal, not_needed, to_fields
from progrpo.imports.verl_omni.sections import ACTOR


def updates(setting: Setting) -> Outcome:
    prompts = setting.count("data.train_batch_size")
    count = max(1, prompts // setting.count())
    return to_fields({"optim.updates_per_rollout": count}, f"{prompts} prompts divided by it")


def warmup(setting: Setting) -> Outcome:
    if setting.value is None or setting.number() <= 0:
        return not_needed("off")
    return no_equal("optim.warmup counts iterations, and optimizer steps are counted there")


def gradient_norm(setting: Setting) -> Outcome:
    if setting.name.endswith("optim.clip_grad") and f"{ACTOR}grad_clip" in setting.all:
        return not_needed("grad_clip sets it")
    return to_fields({"optim.max_grad_norm": setting.value})


def iterations(setting: Setting) -> Outcome:
    if setting.value is None:
        return no_equal("passes over the prompts decide; give --iterations")
    return to_fields({"iterations": setting.value})


def epochs(setting: Setting) -> Outcome:
    if setting.all.get("trainer.total_training_steps") is not None:
        return not_needed("total_training_steps sets it")
    return no_equal("a pass over all prompts there; give --iterations")


def every(field: str, off: Outcome) -> Rule:
    return lambda s: to_fields({field: s.value}) if s.number() > 0 else off


def eval_pictures(setting: Setting) -> Outcome:
    if setting.number() > 0:
        return to_fields({"eval.pictures": setting.value})
    return no_equal("eval.pictures says how many pictures are sampled; 512")


def resume(setting: Setting) -> Outcome:
    if setting.value == "resume_path":
        return no_equal("progrpo train --resume resumes its own runs only")
    return not_needed("progrpo train --resume continues a run")
