"""The pretraining of a built-in model: a stage of training that stops and resumes at any step, and the export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin

from progrpo.durable import whole_folder, write_text
from progrpo.storage import load_state, save_state


@dataclass(frozen=True)
class Pretraining:
    """A run of pretraining: the folder `out` of its stages, their seed and device, and where lines and weights go.

    `device` auto is a GPU where there is one. Without `export` no weights are written beside the stages.
    """

    out: Path
    seed: int = 0
    device: str = "auto"
    export: Path | None = None
    log: Callable[[str], None] = print

    @property
    def torch_device(self) -> torch.device:
        """The device, chosen where it is `auto`."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(automatic if self.device == "auto" else self.device)

    def begin(self) -> None:
        """Make the folder, and seed torch's generator."""
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.seed)

    def export_model(self, model: DiffusionPipeline | ModelMixin, name: str, figures: Mapping[str, object]) -> None:
        """Log a model's figures and write them to `out`. With `export`, write the model's folder `name` and its
        figures there.
        """
        text = json.dumps(figures, indent=1)
        write_text(self.out / "figures.json", text)
        self.log(text)
        if self.export:
            model.save_pretrained(self.export / name)
            write_text(self.export / name / "figures.json", text)


def sample_pictures(pipeline: DiffusionPipeline, texts: Sequence[str], seed: int, **options: Any) -> np.ndarray:
    """Sample a picture of each text, uint8 (N, H, W, 3). `options` are the pipeline call's; the default is 10 steps
    without guidance.
    """
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, **options}
    batches = []
    for start in range(0, len(texts), 64):
        g = torch.Generator().manual_seed(seed + start)
        batches.append(pipeline(texts[start : start + 64], generator=g, output_type="np", **options).images)
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


class Ema:
    """The exponential moving average of parameters. Its decay grows with the updates n: min(`decay`, (1+n)/(10+n))."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[torch.nn.Parameter]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: list[torch.nn.Parameter]) -> None:
        """Exchange averaged and live weights. A second call restores them."""
        for p, s in zip(parameters, self.shadow, strict=True):
            live = p.detach().clone()
            p.copy_(s)
            s.copy_(live)


class _Optimizers:
    """AdamW, and Muon for the parameters named in `matrices`. A convolution's weight is a matrix (out, in x height x
    width).
    """

    def __init__(self, module: torch.nn.Module, matrices: Collection[str], lr: float):
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        hidden = [named[name] for name in matrices]
        # torch's Muon takes matrices only: it is given views that share the parameters' memory
        self.views = [(p, torch.nn.Parameter(p.detach().flatten(1))) for p in hidden]
        others = [p for name, p in named.items() if name not in matrices]
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
        if hidden:
            flat = [view for _, view in self.views]
            self.all.append(torch.optim.Muon(flat, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))

    def step(self, lr: float) -> None:
        """Update the parameters at rate `lr` by their gradients, and drop the gradients."""
        for p, view in self.views:
            view.grad, p.grad = None if p.grad is None else p.grad.flatten(1), None
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class StageSettings:
    """The settings of a stage of training.

    The learning rate warms up to `lr` over 100 steps, stays, and falls linearly to zero over the last `decay_fraction`.
    Muon trains the parameters named in `matrices`, which must be weights of hidden layers, with updates of AdamW's size
    (arXiv 2502.16982). AdamW trains all others.
    """

    steps: int
    lr: float
    decay_fraction: float = 0.25
    matrices: Collection[str] = ()
    ema_decay: float = 0.999
    minutes_between_checkpoints: float = 3.0

    def rate(self, step: int) -> float:
        """The learning rate of a zero-based step."""
        warm = min(1.0, (step + 1) / 100)
        fall = (self.steps - step) / max(1, self.decay_fraction * self.steps)
        return self.lr * min(warm, fall)


def train_stage(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    settings: StageSettings,
    run: Pretraining,
    evaluate: Callable[[], str] | None = None,
) -> None:
    """Train `module`, from the run's folder `name` if that exists, and leave it with averaged weights.

    `loss_of(step)` must be a function of the step number alone, so that a resumed stage sees the same data. More steps
    for a stage whose rate has begun to fall raise the rate again, and the stage then differs from one without a stop.
    """
    folder, steps = run.out / name, settings.steps
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = _Optimizers(module, settings.matrices, settings.lr)
    ema = Ema(parameters, settings.ema_decay)
    step = 0
    if whole_folder(folder).exists():
        saved = load_state(folder)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers.all, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.updates = saved["ema_updates"]
        ema.shadow = [s.to(parameters[0].device) for s in saved["ema"]]
        step = saved["step"]
        run.log(f"{name}: resumed at step {step}")

    def checkpoint() -> None:
        state = {
            "step": step,
            "module": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers.all],
            "ema": ema.shadow,
            "ema_updates": ema.updates,
        }
        save_state(folder, state)

    def report(losses: list[float], rate: float) -> None:
        ema.swap(parameters)
        module.eval()
        with torch.no_grad():
            measured = evaluate() if evaluate else ""
        ema.swap(parameters)
        module.train()
        left = (steps - step) / max(rate, 1e-9) / 60
        mean = sum(losses) / max(len(losses), 1)
        run.log(f"{name}: step {step}/{steps}  loss {mean:.5f}  {rate:.2f} steps/s  {left:.0f} min left  {measured}")

    module.train()
    since, first, losses = time.monotonic(), step, []
    while step < steps:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(settings.rate(step))
        ema.update(parameters)
        step += 1
        losses.append(float(loss.detach()))
        if time.monotonic() - since > 60 * settings.minutes_between_checkpoints or step == steps:
            rate = (step - first) / (time.monotonic() - since)
            checkpoint()
            report(losses, rate)
            since, first, losses = time.monotonic(), step, []
    ema.swap(parameters)
    module.eval()
