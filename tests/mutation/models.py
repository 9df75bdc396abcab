"""Damaged folders of the built-in models, and trained weights of another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.mutation.cases import Case


def model_cases(work: Path) -> Iterator[Case]:
    """Damaged folders of the built-in models, and trained weights of another."""
    from progrpo.policies.load import load_policy, quiet
    from progrpo.policies.settings import ModelSettings
    from progrpo.zoo import WEIGHTS

    quiet()
    weights, index = "transformer/diffusion_pytorch_model.safetensors", "model_index.json"
    settings = (ModelSettings(lora_rank=2), ModelSettings(weights="full"))
    for name in ("shapes-flow", "shapes-diffusion"):
        for kind in settings:
            load_policy(replace(kind, path=name)).save(work / "trained" / f"{name}-{kind.weights}")

    def case(
        tried: str, damage: Callable[[Path], object], trained: Path | None = None, base: str = "shapes-flow"
    ) -> Case:
        folder = work / "model"

        def load() -> None:
            shutil.copytree(WEIGHTS / base, folder)
            try:
                damage(folder)
                load_policy(replace(settings[0], path=str(folder)), trained=trained)
            finally:
                shutil.rmtree(folder)

        return Case("model", tried, load, (str(folder), str(work), "model.path: "))

    def edited(name: str, **changes: Any) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            data = json.loads((folder / name).read_text()) | changes
            (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

        return edit

    def cut(name: str, size: int) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    def write(name: str, text: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_text(text)

    def remove(name: str) -> Callable[[Path], object]:
        return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    def without(name: str, tensor: str) -> Callable[[Path], object]:
        from safetensors.torch import load_file, save_file

        def drop(folder: Path) -> None:
            kept = {key: value for key, value in load_file(folder / name).items() if tensor not in key}
            save_file(kept, folder / name, metadata={"format": "pt"})

        return drop

    for size in (0, 7, 100, 5000, -1):
        for name in (weights, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            yield case(f"{name} cut at {size}", cut(name, size))
    for name in (
        index,
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ):
        yield case(f"{name} cut", cut(name, 30))
        yield case(f"{name} absent", remove(name))
        yield case(f"{name} a list", write(name, "[]"))
    for part in ("transformer", "vae", "tokenizer", "text_encoder_3"):
        yield case(f"no {part}", remove(part))
        yield case(f"{part} not in the index", edited(index, **{part: ...}))
        for junk in (3, ["os", "system"], ["no_such_library", "X"], ["diffusers", "NoSuch"], [None, None]):
            yield case(f"{part} is {junk}", edited(index, **{part: junk}))
    for pipeline in (None, 3, ["a"], "KolorsPipeline", "StableDiffusionPipeline", "os.system", "x" * 10_000, "a\nb"):
        yield case(f"pipeline {pipeline!r:.50}", edited(index, _class_name=pipeline))
    yield case(
        "another family's pipeline", edited(index, _class_name="StableDiffusion3Pipeline"), base="shapes-diffusion"
    )
    for changes in (
        {"num_layers": "x"},
        {"num_layers": 9},
        {"num_attention_heads": 0},
        {"in_channels": -1},
        {"sample_size": None},
    ):
        yield case(f"transformer {changes}", edited("transformer/config.json", **changes))
    for name, tensor in (
        (weights, "proj_out.weight"),
        ("text_encoder/model.safetensors", "final_layer_norm.bias"),
        (weights, ""),
    ):
        yield case(f"{name} without {tensor!r}", without(name, tensor))
    yield case("a pickle", lambda folder: (folder / weights).rename(folder / weights.replace(".safetensors", ".bin")))
    for name in ("shapes-flow", "shapes-diffusion"):
        for kind in settings:
            own = work / "trained" / f"{name}-{kind.weights}"
            other = {"shapes-flow": "shapes-diffusion", "shapes-diffusion": "shapes-flow"}[name]
            yield case(f"{own.name} on {other}", lambda folder: None, own, other)
            yield case(f"{own.name} on its own", lambda folder: None, own, name)
            bad, file = work / "trained" / f"{own.name}-cut", next(own.glob("*.safetensors")).name
            shutil.copytree(own, bad)
            cut(file, -99)(bad)
            yield case(f"{own.name}, cut", lambda folder: None, bad, name)
    yield case("no trained weights", lambda folder: None, work)
