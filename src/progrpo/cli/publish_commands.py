"""Commands that carry a run's result away: export and push."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.cli.command import Command, first_free, require_run
from progrpo.config import ModelSettings
from progrpo.messages import named
from progrpo.publish.layouts import Format
from progrpo.recipes import load_recipe
from progrpo.types import FROM_PYTHON


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a run's LoRA for other tools, or the whole model with what was trained."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    format: Format
    """The reader. `diffusers`: the LoRA as the run saved it, for load_lora_weights.
    `kohya`: A1111, Forge, sd-scripts, musubi-tuner. `comfyui`: ComfyUI.
    `merged`: a folder with the whole model, for DiffusionPipeline.from_pretrained."""
    out: Path | None = None
    """The file (.safetensors), or the folder of a merged model.
    Without it: a new one that is named by run and format, in exports."""
    model: str = ""
    """The model that was trained, where the name in the run's config.json no longer loads it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of a merged model's denoiser. In one of 16 bits small changes are rounded away."""

    def run(self) -> None:
        require_run(self.folder)
        from progrpo.policies.load import quiet
        from progrpo.publish.export import export_lora, export_model
        from progrpo.training.build import saved_weights

        quiet()
        trained, model, out = saved_weights(self.folder), self._model(), self._out()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if self.format == "merged":
                export_model(trained, model, self.dtype, out)
            else:
                export_lora(trained, model, self.format, out)
        except OSError as error:
            raise ValueError(f"--out: {named(out)} cannot be written: {error.strerror}") from error
        print(out)

    def _model(self) -> ModelSettings:
        model = load_recipe(str(self.folder)).model
        if self.model:
            return replace(model, path=self.model, single_file="", revision="", variant="")
        if model.path.endswith(FROM_PYTHON) and self.format != "diffusers":
            raise ValueError(
                f"{named(self.folder)} trained {model.path}, which no name loads; name the model it was: --model MODEL"
            )
        return model

    def _out(self) -> Path:
        is_file = self.format != "merged"
        if is_file and self.dtype != "float32":
            raise ValueError("--dtype is an option of --format merged; a LoRA is written in float32")
        if self.out is None:
            name = f"{self.folder.resolve().name}-{self.format}"
            return first_free(Path("exports", name), ".safetensors" if is_file else "")
        if is_file and self.out.suffix != ".safetensors":
            raise ValueError(f"--out: {named(self.out)} must end in .safetensors, by which tools know a LoRA's file")
        if os.path.lexists(self.out):
            raise ValueError(f"--out: {named(self.out)} is already there; give another name")
        return self.out


@dataclass(frozen=True, kw_only=True)
class Push(Command):
    """Send a run's weights to the Hugging Face hub, with a model card; --dry-run writes the folder alone."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """The repository, as OWNER/NAME. It is created if it is not there."""
    dry_run: Path | None = None
    """Write what would be sent into this folder, and send nothing."""
    private: FlagCreatePairsOff[bool] = False
    """Create the repository as a private one."""
    base_model: str | None = None
    """The hub's id of the model that was trained, where the run knows a folder alone."""
    license: str | None = None
    """The licence, by the hub's name. Without it: that of the base model's card."""

    def run(self) -> None:
        require_run(self.folder)
        from progrpo.publish.push import push_run, write_repository

        if self.dry_run is None:
            print(push_run(self.folder, self.repo, self.private, self.base_model, self.license))
        else:
            write_repository(self.folder, self.repo, self.dry_run, self.base_model, self.license)
            print(self.dry_run)
