"""The import of UniRL's settings: a YAML file of Hydra, whose blocks name the classes that they are for.

A setting that is left out has UniRL's own default, and is listed as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from progrpo.imports.hydra_settings import read_hydra
from progrpo.imports.outcome import Rule
from progrpo.imports.translation import Translation, translate, with_prefixes
from progrpo.imports.unirl.outcomes import ALGORITHMS
from progrpo.imports.unirl.rules import PREFIXES, RULES
from progrpo.messages import named, quoted

_ALGORITHM = "algorithm._target_"

# UniRL's defaults that differ from ours, and what the absence of a block means.
_DEFAULTS: dict[str, object] = {
    **{"adv_use_global_std": False, "stack.num_updates_per_batch": 1},
    **{"num_rollouts": 100, "save_interval": 0, "eval_interval": 0},
}
_OF_FLOW_GRPO: dict[str, object] = {"algorithm.clip_range": 1e-4, "algorithm.beta": 0.0}
_OF_A_POOL: dict[str, object] = {
    "sampling.scheduler.num_sde_steps": None,
    "sampling.scheduler.timestep_fraction": 1.0,
}
_WITHOUT_LORA: dict[str, object] = {"backend.lora_cfg": None}
_BLOCKS = ("bundle.config", "pipeline.strategy")
"""Blocks that may refer to a section elsewhere in the file."""
_NEEDED = ("bundle._target_", _ALGORITHM, "sampling.num_inference_steps")


def import_unirl(path: str) -> Translation:
    """The configuration that a YAML file asks for, and the outcome of each setting.

    ValueError, one sentence, if the file cannot be read or the settings cannot be run.
    """
    file = Path(path)
    reading = read_hydra(file)
    settings = {name: _as_number(value) for name, value in reading.settings.items()}
    for name in _NEEDED:
        if name not in settings:
            raise ValueError(
                f"{named(file)} has no {name}, so it trains no diffusion model by one algorithm; only such files of"
                " UniRL are translated"
            )
    algorithm = str(settings[_ALGORITHM]).rpartition(".")[2]
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{named(file)}: {_ALGORITHM} {quoted(algorithm)} has no equal here; there are {', '.join(ALGORITHMS)}"
        )
    missed = {row.name for row in reading.unread}
    defaults = {
        **_DEFAULTS,
        **(_OF_FLOW_GRPO if algorithm == "FlowGRPO" else {}),
        **({} if any(name.startswith("sampling.scheduler.config.") for name in settings) else _OF_A_POOL),
        **({} if any(re.match(r"backend\.(ema_)?lora_cfg\.", name) for name in settings) else _WITHOUT_LORA),
    }
    left_out = {name: value for name, value in defaults.items() if name not in settings and name not in missed}
    known = {**settings, **left_out}
    return translate(file, known, _rules_for(known), reading.unread, defaults=left_out)


def _rules_for(settings: Mapping[str, object]) -> dict[str, Rule]:
    """The rules of settings, also of those in a section of their own that a block refers to as a whole."""
    rules = with_prefixes(settings, RULES, PREFIXES)
    for block in _BLOCKS:
        reference = re.fullmatch(r"\$\{([A-Za-z][\w.]*)\}", str(settings.get(block)))
        if reference:
            section = f"{reference.group(1)}."
            own = {name: f"{block}.{name.removeprefix(section)}" for name in settings if name.startswith(section)}
            of_block = with_prefixes(own.values(), RULES, PREFIXES)
            rules |= {name: of_block[other] for name, other in own.items() if other in of_block}
    return rules


def _as_number(value: object) -> object:
    """The number that a text such as 3e-4 means, which YAML 1.1 reads as a text; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", value):
        return float(value)
    return value
