"""The pretraining of a built-in model: a stage of training that stops and resumes at any step, and the export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin

from progrpo.durable import whole_folder, write_text
from progrpo.storage import load_state, save_state


def begin(out: Path, seed: int, device: str) -> torch.device:
    """Make the folder, seed torch's generator and return the device; `auto` is a GPU where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def export_model(
    model: DiffusionPipeline | ModelMixin,
    name: str,
    figures: Mapping[str, object],
    out: Path,
    export: Path | None,
    log: Callable[[str], None],
) -> None:
    """Log a model's figures and write them to `out`. With `export`, write the model's folder `name` and its figures
    there.
    """
    text = json.dumps(figures, indent=1)
    write_text(out / "figures.json", text)
    log(text)
    if export:
        model.save_pretrained(export / name)
        write_text(export / name / "figures.json", text)


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


def train_stage(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    out: Path,
    matrices: Collection[str] = (),
    decay_fraction: float = 0.25,
    ema_decay: float = 0.999,
    evaluate: Callable[[], str] | None = None,
    minutes_between_checkpoints: float = 3.0,
    log: Callable[[str], None] = print,
) -> None:
    """Train `module` for `steps` steps, from `out`/`name` if that exists, and leave it with averaged weights.

    Muon trains the parameters named in `matrices`, which must be weights of hidden layers, with updates of AdamW's size
    (arXiv 2502.16982). AdamW trains all others.

    `loss_of(step)` must be a function of the step number alone, so that a resumed stage sees the same data. The
    learning rate warms up over 100 steps, stays, and falls linearly to zero over the last `decay_fraction`. More
    `steps` for a stage whose rate has begun to fall raise the rate again, and the stage then differs from one without a
    stop.
    """
    folder = out / name
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = _Optimizers(module, matrices, lr)
    ema = Ema(parameters, ema_decay)
    step = 0
    if whole_folder(folder).exists():
        saved = load_state(folder)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers.all, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.updates = saved["ema_updates"]
        ema.shadow = [s.to(parameters[0].device) for s in saved["ema"]]
        step = saved["step"]
        log(f"{name}: resumed at step {step}")

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
        log(f"{name}: step {step}/{steps}  loss {mean:.5f}  {rate:.2f} steps/s  {left:.0f} min left  {measured}")

    module.train()
    since, first, losses = time.monotonic(), step, []
    while step < steps:
        warm = min(1.0, (step + 1) / 100)
        fall = (steps - step) / max(1, decay_fraction * steps)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(lr * min(warm, fall))
        ema.update(parameters)
        step += 1
        losses.append(float(loss.detach()))
        if time.monotonic() - since > 60 * minutes_between_checkpoints or step == steps:
            rate = (step - first) / (time.monotonic() - since)
            checkpoint()
            report(losses, rate)
            since, first, losses = time.monotonic(), step, []
    ema.swap(parameters)
    module.eval()
