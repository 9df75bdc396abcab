"""The import of verl-omni's settings: a script that starts its trainer with overrides, or a YAML file.

A setting that is left out has verl-omni's own default, and is listed as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from progrpo.imports.files import flatten
from progrpo.imports.hydra_settings import HydraReading, override_value, read_hydra, resolve
from progrpo.imports.outcome import Row
from progrpo.imports.shared_rules import ignored
from progrpo.imports.shell_settings import read_script
from progrpo.imports.translation import Translation, translate, with_prefixes
from progrpo.imports.verl_omni.algorithm import ALGORITHM, ALGORITHMS, LOSS
from progrpo.imports.verl_omni.prefixes import PREFIXES
from progrpo.imports.verl_omni.rules import RULES
from progrpo.messages import named, quoted

_ROOT = "actor_rollout_ref"
_DIFFUSION = re.compile(r"(^|[./])main_(diffusion|flowgrpo|dpo)")
_REWARD_FILE = re.compile(r"reward\.(custom_reward_function|reward_functions\.\w+)\.path")
_SIZES = ("height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length")
_PARTS = ("rollout", "rollout.val_kwargs", "model")
_OLDER = {f"{part}.{name}": f"{part}.pipeline.{name}" for part in _PARTS for name in _SIZES}
"""Settings that older files have beside `pipeline`, and their places today."""

# verl-omni's defaults that differ from ours.
_DEFAULTS: dict[str, object] = {
    "data.train_batch_size": 1024,
    f"{_ROOT}.model.path": "~/models/Qwen/Qwen-Image",
    f"{_ROOT}.model.lora_rank": 0,
    f"{_ROOT}.model.lora_alpha": 64,
    f"{_ROOT}.model.target_modules": "all-linear",
    f"{_ROOT}.model.enable_gradient_checkpointing": True,
    f"{_ROOT}.actor.optim.lr": 1e-6,
    f"{_ROOT}.actor.optim.weight_decay": 0.01,
    f"{_ROOT}.actor.ppo_mini_batch_size": 256,
    f"{_ROOT}.actor.fsdp_config.dtype": "bfloat16",
    f"{_ROOT}.actor.diffusion_loss.clip_ratio": 1e-4,
    f"{_ROOT}.actor.diffusion_loss.dpo_beta": 2000.0,
    f"{_ROOT}.actor.diffusion_loss.mix_beta": 0.5,
    f"{_ROOT}.actor.diffusion_loss.ref_kl_coef": 0.0,
    f"{_ROOT}.rollout.n": 1,
    f"{_ROOT}.rollout.pipeline.height": 512,
    f"{_ROOT}.rollout.pipeline.width": 512,
    f"{_ROOT}.rollout.pipeline.num_inference_steps": 10,
    f"{_ROOT}.rollout.pipeline.true_cfg_scale": 1.0,
    f"{_ROOT}.rollout.pipeline.guidance_scale": None,
    f"{_ROOT}.rollout.pipeline.max_sequence_length": 512,
    f"{_ROOT}.rollout.algo.noise_level": 1.0,
    f"{_ROOT}.rollout.algo.sde_type": "sde",
    f"{_ROOT}.rollout.algo.sde_window_size": None,
    f"{_ROOT}.rollout.val_kwargs.pipeline.num_inference_steps": 50,
    "algorithm.global_std": True,
    "algorithm.timestep_fraction": 1.0,
    "algorithm.sample_source": "online",
    "trainer.total_epochs": 30,
    "trainer.total_training_steps": None,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
}


_CLASS = ignored("the class that reads the settings beside it")


def import_verl_omni(path: str) -> Translation:
    """The configuration that a script or a YAML file asks for, and the outcome of each setting.

    ValueError, one sentence, if the file cannot be read or the settings cannot be run.
    """
    file = Path(path)
    reading = read_hydra(file) if file.suffix in (".yaml", ".yml") else _of_script(file)
    settings = {_today(name): _as_number(value) for name, value in reading.settings.items()}
    missed = {_today(row.name) for row in reading.unread}
    algorithm = settings.get(ALGORITHM, "flow_grpo")
    defaults = {ALGORITHM: algorithm, LOSS: algorithm, **_DEFAULTS}
    for name in (ALGORITHM, LOSS):
        value = settings.get(name, defaults[name])
        if name in missed or value not in ALGORITHMS:
            raise ValueError(
                f"{named(file)}: {name} {quoted(value)} has no equal here; there are {', '.join(ALGORITHMS)}"
            )
    left_out = {name: value for name, value in defaults.items() if name not in settings and name not in missed}
    known = {**settings, **left_out}
    rules = with_prefixes(known, RULES, PREFIXES) | {name: _CLASS for name in known if name.endswith("_target_")}
    return translate(file, known, rules, reading.unread, defaults=left_out)


def _of_script(file: Path) -> HydraReading:
    script = read_script(file)
    if not _DIFFUSION.search(script.program):
        raise ValueError(
            f"{named(file)} starts {quoted(script.program)}, and only verl-omni's trainers of diffusion models are"
            " translated, such as verl_omni.trainer.main_diffusion"
        )
    unread = [Row(name, value.text, value.outcome) for name, value in script.unread.items()]
    # the folder of a reward's file says nothing, and its name may be the reward's
    files = {
        row.name: row.value.rpartition("/")[2]
        for row in unread
        if _REWARD_FILE.fullmatch(row.name) and isinstance(row.value, str) and "$" not in row.value.rpartition("/")[2]
    }
    unread = [row for row in unread if row.name not in files]
    values: dict[str, object] = {name: override_value(text) for name, text in (script.settings | files).items()}
    return resolve(_flat(values), file.name, unread)


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    """The settings with each object of an override's value as settings of their own."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{part}": item for part, item in flatten(value).items()} if _is_object(value) else {name: value}
        )
    return flat


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _today(name: str) -> str:
    """The name of a setting today."""
    part = name.removeprefix(f"{_ROOT}.")
    renamed = f"{_ROOT}.{_OLDER[part]}" if part in _OLDER else name
    return re.sub(r"^(reward\.reward_functions)\.([^.]+)\.", r"\1[\2].", renamed)


def _as_number(value: object) -> object:
    """The number that a text such as 3e-4 means, which YAML 1.1 reads as a text; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", value):
        return float(value)
    return value
