"""One stage of pretraining: a loss, an optimizer and an average of the weights, stopped and resumed at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from progrpo.storage import load_state, save_state


class Ema:
    """Exponential moving average of parameters, slow from the first step: decay min(`decay`, (1+n)/(10+n))."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[torch.nn.Parameter]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: list[torch.nn.Parameter]) -> None:
        """Exchange averaged and live weights; a second call restores them."""
        for p, s in zip(parameters, self.shadow, strict=True):
            live = p.detach().clone()
            p.copy_(s)
            s.copy_(live)


def _optimizers(module: torch.nn.Module, matrices: Collection[str], lr: float) -> list[torch.optim.Optimizer]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    others = [p for name, p in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    if not matrices:
        return [adamw]
    hidden = [named[name] for name in matrices]
    return [adamw, torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


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
    """Train `module` for `steps` steps, resuming from `out`/`name` if it is there; leave it averaged.

    The parameters named in `matrices` are trained by Muon, which wants the weight matrices of hidden layers, with updates
    of AdamW's size (arXiv 2502.16982); all others by AdamW.

    `loss_of(step)` must be a function of the step number alone, so that a resumed stage sees the same data. The
    learning rate warms up over 100 steps, stays, and falls linearly to zero over the last `decay_fraction`.
    More `steps` for a stage whose rate has begun to fall raise it again, and it differs from a straight one.
    """
    folder = out / name
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = _optimizers(module, matrices, lr)
    ema = Ema(parameters, ema_decay)
    step = 0
    if folder.exists():
        saved = load_state(folder)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.updates, ema.shadow = saved["ema_updates"], [s.to(parameters[0].device) for s in saved["ema"]]
        step = saved["step"]
        log(f"{name}: resumed at step {step}")

    def checkpoint() -> None:
        state = {
            "step": step,
            "module": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
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
        warm, fall = min(1.0, (step + 1) / 100), (steps - step) / max(1, decay_fraction * steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(warm, fall)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
