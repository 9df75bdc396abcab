"""The export of what a run has trained: a LoRA in a tool's layout, or the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from progrpo.durable import new_folder, write_file
from progrpo.messages import named
from progrpo.policies.export import DENOISERS, denoiser_of, save_merged, saved_lora, saved_magnitudes
from progrpo.policies.load import BUILT_IN
from progrpo.policies.lora_files import LORA_FILE, second_loras
from progrpo.publish.layouts import LAYOUTS, formats_of
from progrpo.publish.lora import laid_out, without_place

if TYPE_CHECKING:
    from progrpo.policies.settings import ModelSettings


def export_lora(trained: Path, model: ModelSettings, form: str, out: Path) -> None:
    """Write a run's LoRA to a file in a format.

    `trained` is the folder of the run's weights. ValueError for a run that trained all weights, a format that the
    model does not have, and a layer that the format's readers do not take.
    """
    if trained.name in DENOISERS:
        raise ValueError(
            f"the run trained all weights of the {trained.name}, and no LoRA; --format merged writes the whole model"
        )
    if others := second_loras(trained):
        raise ValueError(
            f"the run trained two denoisers, each with a LoRA, and one file holds one: take {LORA_FILE} and {others[0]}"
            f" of {named(trained)}, or --format merged"
        )
    lora = saved_lora(trained / LORA_FILE)
    if form == "diffusers":
        with (trained / LORA_FILE).open("rb") as saved:
            write_file(out, lambda file: shutil.copyfileobj(saved, file))
        return
    pipeline, config = denoiser_of(model)
    formats = ("diffusers", "merged") if model.path in BUILT_IN else formats_of(pipeline)
    if form not in formats:
        raise ValueError(f"no tool reads {form} files of {named(model.path)}; its formats are {' and '.join(formats)}")
    if saved_magnitudes(trained / LORA_FILE):
        raise ValueError(
            f"the run trained a DoRA, and not all readers of {form} files scale its rows by the trained lengths; its"
            " formats are diffusers and merged"
        )
    layout = LAYOUTS[form][pipeline]
    if homeless := without_place(lora, layout, config):
        others = [
            name for name in formats if name not in LAYOUTS or not without_place(lora, LAYOUTS[name][pipeline], config)
        ]
        raise ValueError(
            f"{form} files have no place for {len(homeless)} of the {len(lora)} layers that the LoRA adapts, such as"
            f" {named(homeless[0])}; its formats are {', '.join(others)}"
        )
    data = save({name: t.contiguous() for name, t in laid_out(lora, layout, config).items()})
    write_file(out, lambda file: file.write(data))


def export_model(trained: Path, model: ModelSettings, dtype: str, out: Path) -> None:
    """Write a whole model in diffusers' format to a folder, with what a run has trained in its denoiser."""
    with new_folder(out) as folder:
        save_merged(model, trained, folder, getattr(torch, dtype))
