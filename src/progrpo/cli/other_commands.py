"""Other commands: import settings of another framework, serve a reward."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.checks import check
from progrpo.cli.command import Command, check_device, check_range
from progrpo.config import config_to_json
from progrpo.durable import write_text
from progrpo.imports.flow_grpo.scripts import Script
from progrpo.messages import named
from progrpo.rewards.settings import RewardDtype, RewardTerm


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Translate the settings of another framework into a configuration, and report on each setting."""

    framework: Positional[
        Literal["flow_grpo", "flow-grpo", "flow-factory", "flow_factory", "verl-omni", "verl_omni", "unirl"]
    ]
    """The framework that the settings are for."""
    settings: Annotated[Positional[str], arg(metavar="FILE")]
    """flow_grpo's config/grpo.py:FUNCTION, a YAML of Flow-Factory or UniRL, or a YAML or a script of verl-omni.
    It is read, and nothing in it is run."""
    out: Path | None = None
    """The configuration's file, for `progrpo train`.
    Without it: FUNCTION.json or the file's name with .json, in the current folder."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace a file that is already there."""
    gpus: int | None = None
    """flow_grpo: the number of GPUs that it runs on, if the file does not say it."""
    script: Script = "auto"
    """flow_grpo: the training script that reads the settings.
    `plain` trains all steps, `fast` a window, `guard` with GRPO-Guard's ratio.
    `auto` finds out from the names and from whether a window is set."""

    def run(self) -> None:
        framework = self.framework.replace("-", "_")
        if framework != "flow_grpo" and (self.gpus is not None or self.script != "auto"):
            raise ValueError(f"--gpus and --script are options of flow_grpo, not of {self.framework}")
        check_range(1, 100_000, gpus=self.gpus)
        from progrpo.imports.flow_factory.read import import_flow_factory
        from progrpo.imports.flow_grpo.read import import_flow_grpo
        from progrpo.imports.translation import as_tables
        from progrpo.imports.unirl.read import import_unirl
        from progrpo.imports.verl_omni.read import import_verl_omni

        if framework == "flow_grpo":
            translation = import_flow_grpo(self.settings, self.gpus, self.script)
        else:
            importers = {
                "flow_factory": import_flow_factory,
                "verl_omni": import_verl_omni,
                "unirl": import_unirl,
            }
            translation = importers[framework](self.settings)
        out = self.out or Path(re.split(r"[:/\\]", self.settings)[-1]).with_suffix(".json")
        if os.path.exists(out) and not self.overwrite:
            raise ValueError(f"{named(out)} is already there; give another --out, or --overwrite")
        recipe = re.sub(r"[^\w.-]", "-", out.stem)[:100] or "imported"
        config = replace(translation.config, recipe=recipe)
        check(config)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, config_to_json(config))
        except OSError as error:
            raise ValueError(f"{named(out)} cannot be written: {error.strerror}") from None
        print(f"{as_tables(translation)}\n\n{named(out)} is written: progrpo train {named(out)}")


@dataclass(frozen=True, kw_only=True)
class ServeReward(Command):
    """Serve a reward to other machines over HTTP, for `url` of their recipes."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A built-in reward's name, or `module:function`."""
    host: str = "127.0.0.1"
    """The address to listen at. An address that other machines reach needs a token in PROGRPO_REWARD_TOKEN."""
    port: int = 8000
    """The port; 0 is any free one."""
    device: str = "auto"
    """The device. `auto` is the GPU where there is one, else the CPU."""
    dtype: RewardDtype = "auto"
    """The dtype of the reward's network. `auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int = 16
    """The number of pictures in one call, from any requests."""
    model: str = ""
    """Another model than the reward's own: a hub id, a folder, or a file of weights."""
    sha256: str = ""
    """The SHA-256 of that file, for a reward whose weights you bring as a pickle."""
    max_pictures: int = 64
    """The most pictures of a request."""
    max_megabytes: int = 64
    """The most megabytes of a request."""

    def run(self) -> None:
        check_range(0, 65_535, port=self.port)
        check_range(1, 100_000, batch_size=self.batch_size, max_pictures=self.max_pictures)
        check_range(1, 100_000, max_megabytes=self.max_megabytes)
        check_device(self.device)
        lacking = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
        if lacking:
            raise ValueError(f"serve-reward needs {lacking[0]}, which is not installed: pip install 'progrpo[server]'")
        from progrpo.rewards.server import Limits, serve

        term = RewardTerm(
            self.name,
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            sha256=self.sha256,
        )
        serve(term, self.host, self.port, Limits(self.max_pictures, self.max_megabytes))
